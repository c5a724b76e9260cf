import copy
import math

import pyro.distributions as dist
import pytest
import torch
from scipy import integrate

import stochdyn as sd
from stochdyn.paths.points.poisson import growth
from tests.jumps import (
    END,
    GAMMA_POISSON_LOG_EVIDENCE,
    LOG_LINEAR_LOG_PROB,
    TIMES,
    mean_count,
    value,
)
from tests.problems import within


def test_constant_and_log_linear_in_closed_form():
    constant = sd.PoissonProcess(1.5, 0.0, END).log_prob(value())
    assert float(constant) == pytest.approx(8 * math.log(1.5) - 6.0, abs=1e-12)
    linear = sd.PoissonProcess(math.exp(-0.3), 0.0, END, slope=0.4)
    assert float(linear.log_prob(value())) == pytest.approx(LOG_LINEAR_LOG_PROB, abs=1e-10)
    flat = sd.PoissonProcess(1.5, 0.0, END, slope=0.0)
    assert float(flat.log_prob(value())) == pytest.approx(float(constant), abs=1e-12)


def test_any_intensity_by_quadrature():
    process = sd.PoissonProcess(lambda t: torch.exp(-0.3 + 0.4 * t), 0.0, END)
    assert float(process.log_prob(value())) == pytest.approx(LOG_LINEAR_LOG_PROB, abs=1e-10)
    wiggly = sd.PoissonProcess(lambda t: 1 + torch.sin(9 * t) ** 2, 0.0, END)
    expected = sum(math.log(1 + math.sin(9 * t) ** 2) for t in TIMES)
    expected -= integrate.quad(lambda t: 1 + math.sin(9 * t) ** 2, 0, END, epsabs=1e-12, limit=200)[0]
    assert float(wiggly.log_prob(value())) == pytest.approx(expected, abs=1e-9)


def test_no_jump_is_data_too():
    assert float(sd.PoissonProcess(1.5, 0.0, END).log_prob(value([]))) == -6.0
    assert float(sd.PoissonProcess(1.5, 0.0, END).log_prob(torch.zeros(0, 1))) == -6.0


def test_gamma_poisson_evidence():
    rate = torch.linspace(1e-6, 40, 100001).double()
    joint = sd.PoissonProcess(rate, 0.0, END).log_prob(value()) + dist.Gamma(2.0, 1.5).log_prob(rate)
    evidence = torch.trapezoid(joint.exp(), rate).log()
    assert float(evidence) == pytest.approx(GAMMA_POISSON_LOG_EVIDENCE, abs=1e-7)


def test_parameters_of_any_batch_shape():
    theta = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    process = sd.PoissonProcess(lambda t: torch.exp(theta * t), 0.0, torch.full((2, 1), END))
    assert process.batch_shape == (2, 3)
    expected = torch.stack([sd.PoissonProcess(1.0, 0.0, END, slope=s).log_prob(value()) for s in theta])
    assert torch.allclose(process.log_prob(value()), expected.expand(2, 3), atol=1e-9)
    context = torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)
    given = sd.PoissonProcess(lambda t, c: torch.exp(c[..., 0] * t), 0.0, END, context=context)
    assert torch.allclose(given.log_prob(value()), expected, atol=1e-9)


def test_counts_are_poisson():
    torch.manual_seed(0)
    for process in (
        sd.PoissonProcess(1.5, 0.0, END),
        sd.PoissonProcess(1.5, 0.0, END, sampler=sd.Inversion()),
        sd.PoissonProcess(6 * 0.8 / (math.exp(3.2) - 1), 0.0, END, slope=0.8),
        sd.PoissonProcess(lambda t: 1.5 + torch.sin(2 * math.pi * t), 0.0, END),
        sd.PoissonProcess(lambda t: 1.5 + torch.sin(2 * math.pi * t), 0.0, END, bound=2.5),
    ):
        counts = mean_count(process.sample((2000,)))
        assert within(counts, 6.0)
        assert within((counts - 6.0) ** 2, 6.0)
        assert not within(counts, 6.5)


def test_marks():
    marked = torch.cat([value(), torch.linspace(0.5, 2.0, 10)[:, None]], 1)
    law = dist.LogNormal(0.0, 1.0)
    found = sd.PoissonProcess(1.5, 0.0, END, marks=law).log_prob(marked)
    expected = 8 * math.log(1.5) - 6.0 + float(law.log_prob(marked[:8, 1]).sum())
    assert float(found) == pytest.approx(expected, abs=1e-6)
    torch.manual_seed(0)
    drawn = sd.PoissonProcess(torch.ones(3), 0.0, 9.0, marks=law, max_jumps=30).sample((2,))
    assert drawn.shape == (2, 3, 30, 2)
    assert bool((drawn[..., 1] > 0).eq(torch.isfinite(drawn[..., 0])).all())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sd.PoissonProcess(-1.0, 0.0, 1.0), sd.FieldError, "`intensity` must be positive, got -1"),
        (lambda: sd.PoissonProcess(torch.tensor([1.0, 0.0]), 0.0, 1.0), sd.FieldError, "batch member 1"),
        (lambda: sd.PoissonProcess("a", 0.0, 1.0), sd.FieldError, "must be a number or a tensor, got 'a'"),
        (
            lambda: sd.PoissonProcess(1.0, 0.0, 1.0).log_prob([0.2, 0.3]),
            sd.ShapeError,
            "a tensor .* got list",
        ),
        (lambda: sd.PoissonProcess(lambda t, z: t, 0.0, 1.0), sd.FieldError, "The intensity failed on t"),
        (lambda: sd.PoissonProcess(lambda t: 1.0, 0.0, 1.0), sd.FieldError, "must return a tensor"),
        (lambda: sd.PoissonProcess(lambda t: t, 0.0, 1.0, slope=1.0), sd.FieldError, "`slope` goes with"),
        (lambda: sd.PoissonProcess(1.0, 1.0, 1.0), sd.TimeError, "The window"),
        (lambda: sd.PoissonProcess(torch.ones(2), torch.zeros(3), 1.0), sd.ShapeError, "do not broadcast"),
        (
            lambda: sd.PoissonProcess(lambda t: 0 * t - 1, 0.0, 1.0).log_prob(torch.tensor([[0.5]])),
            sd.FieldError,
            "the intensity is -1",
        ),
    ],
)
def test_faults(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("given", [None, torch.float32])
def test_networks_in_single_precision(given):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1), torch.nn.Softplus()
    )
    twin = copy.deepcopy(net).double()
    context = None if given is None else torch.zeros(3, 1, dtype=given)
    process = sd.PoissonProcess(lambda t, *c: net(t[..., None])[..., 0], 0.0, END, context=context)
    expected = sd.PoissonProcess(lambda t: twin(t[..., None])[..., 0], 0.0, END).log_prob(value())
    found = process.log_prob(value())
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected.expand(found.shape), atol=1e-4)
    assert process.sample((2,)).dtype == torch.float64


@pytest.mark.parametrize("slope", [-2.0, 2.0])
def test_single_precision_far_from_where_the_rate_is_one(slope):
    rate = torch.tensor(1.0 if slope < 0 else 1e-37, requires_grad=True)
    far = 100.0 if slope < 0 else 42.0
    jumps = torch.tensor([[1.0], [far - 1]])
    found = sd.PoissonProcess(rate, 0.0, far, slope=torch.tensor(slope)).log_prob(jumps)
    base = float(rate.detach())
    expected = 2 * math.log(base) + slope * far - base * math.expm1(slope * far) / slope
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    (grad,) = torch.autograd.grad(found, rate)
    assert float(grad) == pytest.approx(2 / base - math.expm1(slope * far) / slope, rel=1e-4)


def test_growth_near_zero():
    rate = torch.tensor([-1e-3, -1e-9, 0.0, 1e-9, 1e-3, 2.0], dtype=torch.float64).requires_grad_()
    length, zero = torch.tensor(3.0, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    assert torch.allclose(
        growth(zero, rate, length)[[0, 4, 5]], ((3 * rate).expm1() / rate)[[0, 4, 5]], atol=1e-12
    )
    (grad,) = torch.autograd.grad(growth(zero, rate, length).sum(), rate)
    assert torch.allclose(grad[1:4], torch.full((3,), 4.5).double(), atol=1e-6)
