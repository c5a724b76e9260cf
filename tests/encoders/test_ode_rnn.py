import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import stochdyn as sd
from stochdyn.errors import TimeError

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sharpened(**options):
    """A field that bends: three times the weights of a fresh one."""
    torch.manual_seed(1)
    net = sd.ODERNNEncoder(2, 5, **options).double()
    with torch.no_grad():
        for p in net.field.parameters():
            p.mul_(3)
    return net


def exact(net, h, gap):
    def slope(t, z):
        return net.field(torch.from_numpy(z)).detach().numpy()

    return torch.from_numpy(solve_ivp(slope, (0, gap), h.numpy(), rtol=1e-11, atol=1e-12).y[:, -1])


def test_the_flow_solves_the_field():
    h, gaps = torch.randn(3, 5, dtype=F64), (0.4, 1.3, 2.0)
    net = sharpened(substeps=40)
    got = net.flow(h, torch.tensor(gaps, dtype=F64)[:, None]).detach()
    for row, before, gap in zip(got, h, gaps, strict=True):
        torch.testing.assert_close(row, exact(net, before, gap), rtol=0, atol=1e-6)
    assert (got - h).abs().min() > 1e-3


@pytest.mark.parametrize(("solver", "order"), [(sd.Heun(), 2), (sd.RungeKutta4(), 4)], ids=repr)
def test_more_substeps_converge_at_the_solver_s_order(solver, order):
    h, gap = torch.randn(1, 5, dtype=F64), torch.ones(1, 1, dtype=F64)
    truth = exact(sharpened(), h[0], 1.0)
    error = [
        (sharpened(substeps=n, solver=solver).flow(h, gap)[0] - truth).norm().item() for n in (8, 16, 32)
    ]
    slopes = -np.diff(np.log(error)) / math.log(2)
    assert abs(slopes[-1] - order) < 0.3


def test_it_flows_and_jumps_backwards_and_a_missing_time_is_no_jump():
    times = torch.tensor([0.0, 0.3, 1.0, 1.2, 2.0], dtype=F64)
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1], [0, 0]]).bool()
    values = torch.randn(5, 2, dtype=F64)
    net = sharpened(substeps=3)
    got = net(sd.Series(times, values[None], mask=mask[None]))[0]
    h = torch.zeros(1, 5, dtype=F64)
    for k, gap in ((3, None), (2, 0.2), (0, 1.0)):
        before = h if gap is None else net.flow(h, torch.tensor([[gap]], dtype=F64))
        h = net.cell(torch.cat([values[k] * mask[k], mask[k].double()])[None], before)
        torch.testing.assert_close(got[k], h[0], rtol=0, atol=1e-12)
    assert torch.equal(got[1], got[2])
    assert not got[4].any()


def test_a_long_gap_does_not_explode():
    net = sharpened(substeps=2)
    out = net(sd.Series(torch.tensor([0.0, 1.0, 1e4]), torch.randn(1, 3, 2, dtype=F64)))
    assert torch.isfinite(out).all()
    assert out.abs().max() <= 1e4 + 1


def test_no_substeps_are_refused():
    with pytest.raises(TimeError, match="`substeps` must be at least 1, got 0"):
        sd.ODERNNEncoder(1, substeps=0)
