import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import stochdyn as sd
from stochdyn.errors import TimeError
from stochdyn.testing import check_encoder

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sharpened(**options):
    """A field that bends: three times the weights of a fresh one."""
    torch.manual_seed(1)
    net = sd.ODERNNEncoder(2, 5, **options).double()
    with torch.no_grad():
        for p in net.flow.parameters():
            p.mul_(3)
    return net


def exact(net, h, gap):
    def slope(t, z):
        return net.flow(None, torch.from_numpy(z)).detach().numpy()

    return torch.from_numpy(solve_ivp(slope, (0, gap), h.numpy(), rtol=1e-11, atol=1e-12).y[:, -1])


def test_the_flow_solves_the_field():
    h, gaps = torch.randn(3, 5, dtype=F64), (0.4, 1.3, 2.0)
    net = sharpened(substeps=40)
    got = net.flowed(h, torch.tensor(gaps, dtype=F64)[:, None]).detach()
    for row, before, gap in zip(got, h, gaps, strict=True):
        torch.testing.assert_close(row, exact(net, before, gap), rtol=0, atol=1e-6)
    assert (got - h).abs().min() > 1e-3


@pytest.mark.parametrize(("solver", "order"), [(sd.Heun(), 2), (sd.RungeKutta4(), 4)], ids=repr)
def test_more_substeps_converge_at_the_solver_s_order(solver, order):
    h, gap = torch.randn(1, 5, dtype=F64), torch.ones(1, 1, dtype=F64)
    truth = exact(sharpened(), h[0], 1.0)
    error = [
        (sharpened(substeps=n, solver=solver).flowed(h, gap)[0] - truth).norm().item() for n in (8, 16, 32)
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
        before = h if gap is None else net.flowed(h, torch.tensor([[gap]], dtype=F64))
        h = net.jump.cell(torch.cat([values[k] * mask[k], mask[k].double()])[None], before)
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


def test_other_flows_and_jumps_and_the_loop_of_the_model():
    """The encoding of a series is the state of an `ObservationJumpODE` that runs through it backwards."""
    torch.manual_seed(1)
    parts = {"flow": sd.MemoryFlow(5, 2, (8,)), "jump": sd.ResetJump(2, 5, (8,))}
    net = sd.ODERNNEncoder(2, 5, substeps=3, **parts).double()
    check_encoder(sd.ODERNNEncoder(2, 5, substeps=3, flow=sd.GRUFlow(5)).double())
    times = torch.tensor([0.0, 0.3, 1.0, 1.2, 2.0], dtype=F64)
    values, mask = torch.randn(1, 5, 2, dtype=F64), torch.rand(1, 5, 2) < 0.6
    mask[:, -1] = True
    model = sd.ObservationJumpODE(2, 5, solver=sd.RungeKutta4(3), **parts).double()
    model.jump.forward = lambda t, h, y, mask, seen: sd.ResetJump.forward(parts["jump"], t, h, y, mask, None)
    backwards = sd.Series(2.0 - times.flip(0), values.flip(1), mask.flip(1))
    expected, _ = model._past(backwards).until(backwards.times[None])
    model.jump.__dict__.pop("forward")
    seen = mask.any(-1)
    torch.testing.assert_close(
        net(sd.Series(times, values, mask))[seen], expected.flip(1)[seen], rtol=0, atol=1e-12
    )


def test_a_jump_that_reads_a_prediction_is_named():
    net = sd.ODERNNEncoder(2, 5, jump=sd.GRUJump(2, 5))
    with pytest.raises(sd.FieldError, match="reads a prediction.*prediction=False"):
        net(sd.Series([0.0, 1.0], torch.zeros(1, 2, 2)))


def test_covariates_are_read_by_flow_and_jump():
    check_encoder(sd.ODERNNEncoder(2, 5, covariates=3).double(), covariates=3)
