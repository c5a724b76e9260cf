"""Encoders whose memory neither fades nor explodes."""

import pytest
import torch

import stochdyn as sd
from stochdyn.testing import check_encoder

F64 = torch.float64
KINDS = (sd.AntisymmetricEncoder, sd.OrthogonalEncoder)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("covariates", [0, 2])
def test_the_contract(kind, covariates):
    net = kind(2, 8, covariates=covariates)
    if kind is sd.AntisymmetricEncoder:
        torch.nn.init.normal_(net.field.bias)
    check_encoder(net, covariates=covariates)


def test_a_row_is_an_euler_step_of_its_gap():
    times = torch.tensor([0.0, 0.3, 1.0, 1.2, 2.0], dtype=F64)
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1], [0, 0]]).bool()
    values = torch.randn(5, 2, dtype=F64)
    net = sd.AntisymmetricEncoder(2, 5, step=0.15, damping=0.2, time_unit=2.0).double()
    got = net(sd.Series(times, values[None], mask=mask[None]))[0]
    A = net.field.weight - net.field.weight.mT - 0.2 * torch.eye(5, dtype=F64)
    h = torch.zeros(5, dtype=F64)
    for k, gap in ((3, 0.0), (2, 0.1), (0, 0.5)):
        x = torch.cat([values[k] * mask[k], mask[k].double(), torch.tensor([gap], dtype=F64)])
        slope = torch.tanh(A @ h + net.field.given_weight @ x + net.field.bias)
        h = h + 0.15 * (1 + gap) * slope
        torch.testing.assert_close(got[k], h)
    assert torch.equal(got[1], got[2])
    assert not got[4].any()


def memory(net, length):
    """Of the encoding at the first time: its derivative by the values read first, relative to those read last."""
    batch = sd.Series(torch.arange(float(length)), torch.randn(1, length, 2, dtype=F64))
    values = batch.values.clone().requires_grad_()
    out = net(sd.Series(batch.times, values))[0, 0]
    rows = [torch.autograd.grad(out[i], values, retain_graph=True)[0][0, [-1, 0]] for i in range(len(out))]
    last, first = torch.stack(rows, 1)  # (hidden, channel) each, of what was read first and last
    return (torch.linalg.norm(last) / torch.linalg.norm(first)).item()


def test_an_orthogonal_memory_does_not_fade():
    """The derivative by the input read first has the very norm of the one read last, however long the series."""
    net = sd.OrthogonalEncoder(2, 16).double()
    for length in (5, 200):
        assert memory(net, length) == pytest.approx(1.0, abs=1e-4)  # U was made in float32
    gru = sd.GRUEncoder(2, 16).double()
    assert memory(gru, 200) < 1e-6  # the control forgets


def test_an_antisymmetric_memory_does_not_explode_or_vanish():
    net = sd.AntisymmetricEncoder(2, 16, step=0.05, damping=0.0).double()
    assert 0.05 < memory(net, 200) < 20
    free = sd.AntisymmetricEncoder(2, 16, step=0.05, damping=0.0).double()
    free.field.damping = (
        40.0  # the control: a step of 0.1 and a rate of 40 is unstable in the middle, and forgets
    )
    assert not 0.05 < memory(free, 200) < 20


def test_refused():
    with pytest.raises(sd.FieldError, match="`step` must be positive, got 0"):
        sd.AntisymmetricEncoder(2, step=0)
    with pytest.raises(sd.FieldError, match="`damping` must be at least 0"):
        sd.AntisymmetricEncoder(2, damping=-1)
