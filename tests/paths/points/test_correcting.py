import math

import pytest
import torch
from scipy import integrate

import stochdyn as sd
from tests.jumps import END, SELF_CORRECTING_LOG_PROB, TIMES, mean_count, value


def test_log_prob_in_closed_form():
    process = sd.SelfCorrecting(1.0, 0.4, 0.0, END)
    assert float(process.log_prob(value())) == pytest.approx(SELF_CORRECTING_LOG_PROB, abs=1e-10)
    later = sd.SelfCorrecting(1.0, 0.4, 2.0, END + 2)
    moved = torch.tensor([t + 2 for t in TIMES], dtype=torch.float64)[:, None]
    assert float(later.log_prob(moved)) == pytest.approx(SELF_CORRECTING_LOG_PROB, abs=1e-5)


def test_compensator_against_quadrature():
    process = sd.SelfCorrecting(1.0, 0.4, 0.0, END)
    edges = [0.0, *TIMES, END]
    parts = [
        integrate.quad(lambda t, k=k: math.exp(t - 0.4 * k), a, b, epsabs=1e-13)[0]
        for k, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))
    ]
    found = process.compensator(edges[1:], value())
    assert torch.allclose(found, torch.tensor(parts, dtype=torch.float64).cumsum(0), atol=1e-10)


def test_the_general_process_agrees():
    mu = torch.tensor([0.5, 1.0], dtype=torch.float64)
    general = sd.PointProcess(lambda t, h: torch.exp(mu * t - 0.4 * h.count), 0.0, END)
    assert torch.allclose(
        general.log_prob(value()), sd.SelfCorrecting(mu, 0.4, 0.0, END).log_prob(value()), atol=1e-9
    )


@pytest.mark.parametrize("sampler", [sd.Thinning(), pytest.param(sd.Inversion(), marks=pytest.mark.slow)])
def test_draws_pass_time_rescaling_and_are_regular(sampler):
    torch.manual_seed(1)
    process = sd.SelfCorrecting(0.5, 0.2, 0.0, 50.0, sampler=sampler)
    drawn = process.sample((16,))
    assert not sd.time_rescaling(process, drawn).rejects()
    assert sd.time_rescaling(sd.SelfCorrecting(0.5, 0.3, 0.0, 50.0), drawn).rejects()
    counts = mean_count(drawn)
    assert float(counts.var()) < 0.2 * float(counts.mean())


def test_single_precision_where_the_intensity_underflows():
    mu, alpha = 0.1, 5.0
    own = torch.tensor(alpha, requires_grad=True)
    process = sd.SelfCorrecting(torch.tensor(mu), own, 0.0, 100.0)
    times = torch.arange(1.0, 60.0)[:, None]
    exact = sd.SelfCorrecting(mu, torch.tensor(alpha).double().requires_grad_(), 0.0, 100.0)
    found, expected = process.log_prob(times), exact.log_prob(times.double())
    assert float(found.detach()) == pytest.approx(mu * 1770 - alpha * 1711 - 1.0596, rel=1e-5)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (grad,) = torch.autograd.grad(found, own)
    assert float(grad) == pytest.approx(float(torch.autograd.grad(expected, exact.alpha)[0]), rel=1e-5)


def test_parameters_are_checked():
    with pytest.raises(sd.FieldError, match="SelfCorrecting: `mu` must be positive, got -1"):
        sd.SelfCorrecting(-1.0, 0.4, 0.0, 1.0)
    with pytest.raises(sd.FieldError, match="batch member 1: `alpha` must be not negative"):
        sd.SelfCorrecting(1.0, torch.tensor([0.4, -0.4]), 0.0, 1.0)
