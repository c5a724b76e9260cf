"""Sizes of jumps: densities of their sums against numerical convolution, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

import stochdyn as sd
from stochdyn.paths.jump_sizes import log_normal_integrals, log_poisson
from tests.problems import within

F64 = torch.float64


def number(value):
    return torch.tensor(value, dtype=F64)


SIZES = {
    "normal": sd.NormalJump(number(-0.3), number(0.7)),
    "double exponential": sd.DoubleExponentialJump(number(0.35), number(2.0), number(1.2)),
}


@pytest.mark.parametrize("order", [0, 1, 5, 12])
@pytest.mark.parametrize("x", [-8.0, -0.5, 0.5, 0.999, 1.001, 1.5, 4.0, 30.0])
def test_repeated_integrals_of_the_normal_tail(order, x):
    def integrand(u):
        return u**order * math.exp(-0.5 * u * u - x * u)

    exact = integrate.quad(integrand, 0, 60, epsabs=0, epsrel=1e-13, limit=500)[0] / math.factorial(order)
    ours = log_normal_integrals(order, number([x]))[0, -1].item() + 0.5 * x * x
    assert abs(ours - math.log(exact)) < 1e-11 * (1 + abs(math.log(exact)))


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_density_of_a_sum_integrates_to_one_and_has_its_moments(name, count):
    size, scale = SIZES[name], number(0.4)
    x = torch.linspace(-40, 40, 160001, dtype=F64)
    p = size.log_density(count, x[:, None], scale)[:, 0].exp()
    mean = torch.trapezoid(x * p, x)
    assert abs(torch.trapezoid(p, x) - 1) < 1e-9
    assert abs(mean - count * size.mean) < 1e-8
    assert abs(torch.trapezoid((x - mean).square() * p, x) - (0.16 + count * size.variance)) < 1e-7


@pytest.mark.parametrize("name", list(SIZES))
def test_density_of_two_is_the_convolution_of_one_with_one(name):
    """With the noise shared out between them; the control is the wrong number of jumps."""
    size, half = SIZES[name], number(0.4 / math.sqrt(2))
    y = torch.linspace(-30, 30, 60001, dtype=F64)
    first = size.log_density(1, y[:, None], half)[:, 0].exp()
    for x in (-2.0, 0.1, 1.7):
        second = size.log_density(1, (x - y)[:, None], half)[:, 0].exp()
        both = torch.trapezoid(first * second, y)
        at = number([x])
        assert abs(size.log_density(2, at, number(0.4)).exp() - both) < 1e-9
        assert abs(size.log_density(3, at, number(0.4)).exp() - both) > 1e-4


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("count", [1, 3])
def test_expected_size_given_the_sum_with_noise(name, count):
    size, scale, x = SIZES[name], number(0.5), number([0.8])
    s = torch.linspace(-30, 30, 600001, dtype=F64)
    sizes = size.log_density(count, s[:, None], number(1e-2))[:, 0]
    joint = (sizes - 0.5 * ((x - s) / scale).square()).exp()
    exact = torch.trapezoid(s * joint, s) / torch.trapezoid(joint, s)
    assert abs(size.expected(count, x, scale)[0] - exact) < 2e-3


@pytest.mark.parametrize("name", list(SIZES))
def test_samples_have_the_moments_of_their_counts(name):
    torch.manual_seed(0)
    size, counts = SIZES[name], torch.tensor([0.0, 1.0, 4.0], dtype=F64).repeat(20000, 1)[..., None]
    drawn = size.sample(counts, torch.zeros(counts.shape, dtype=F64))
    assert (drawn[:, 0] == 0).all()
    for column, n in ((1, 1), (2, 4)):
        assert within(drawn[:, column, 0], (n * size.mean).item())
        centred = (drawn[:, column, 0] - n * size.mean).square()
        assert within(centred, (n * size.variance).item())
        assert not within(centred, ((n + 1) * size.variance).item())


def test_gradients_of_the_double_exponential_density():
    def density(up, a, b, scale):
        return sd.DoubleExponentialJump(up, a, b).log_density(3, number([[-2.0], [0.3], [4.0]]), scale)

    inputs = [number(v).requires_grad_() for v in (0.4, 1.5, 0.8, 0.3)]
    assert torch.autograd.gradcheck(density, inputs)


def test_poisson_weights_also_of_no_rate():
    rates = number([0.0, 0.3, 5.0])
    weights = torch.stack([log_poisson(n, rates).exp() for n in range(60)])
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-12)
    assert weights[:, 0].tolist() == [1.0] + [0.0] * 59


def test_refused():
    with pytest.raises(sd.FieldError, match="`scale` must not be negative"):
        sd.NormalJump(0.0, -1.0)
    with pytest.raises(sd.FieldError, match=r"`loc` is not finite, got nan"):
        sd.NormalJump(math.nan, 1.0)
    with pytest.raises(sd.FieldError, match="`up` is a probability"):
        sd.DoubleExponentialJump(1.2, 1.0, 1.0)
    with pytest.raises(sd.FieldError, match="rates must be positive"):
        sd.DoubleExponentialJump(0.5, 0.0, 1.0)
    with pytest.raises(sd.FieldError, match="`intensity` must not be negative"):
        sd.CompoundPoisson(-0.1, sd.NormalJump(0.0, 1.0))
    with pytest.raises(sd.FieldError, match="`size` must be NormalJump or DoubleExponentialJump"):
        sd.CompoundPoisson(0.1, 2.0)  # type: ignore


@pytest.mark.parametrize("up", [0.0, 1.0])
def test_jumps_to_one_side_have_a_finite_gradient(up):
    share = number(up).requires_grad_()
    size = sd.DoubleExponentialJump(share, number(2.0), number(1.0))
    (slope,) = torch.autograd.grad(size.log_density(2, number([0.5]), number(0.3)).sum(), share)
    assert torch.isfinite(slope)


def test_single_precision_and_many_jumps():
    """All finite, values and gradients, far from the middle too; near double precision."""
    x = torch.linspace(-2, 2, 81)[:, None].requires_grad_()
    size = sd.DoubleExponentialJump(0.4, 10.0, 5.0)
    for count in (1, 12, 20):
        value = size.log_density(count, x, torch.tensor(0.01))
        (slope,) = torch.autograd.grad(value.sum(), x)
        exact = size.log_density(count, x.detach().double(), number(0.01))
        assert torch.isfinite(value).all() and torch.isfinite(slope).all()
        assert ((value - exact).abs() / (1 + exact.abs())).max() < 1e-3


def test_normals_that_stand_for_double_exponential_sizes():
    """Mean and variance of sums, and the divergence from one jump with a little noise."""
    size = sd.DoubleExponentialJump(*(torch.tensor([v], dtype=torch.float64) for v in (0.4, 0.5, 2.0)))
    for count in (0, 1, 2, 5):
        log_weight, mean, variance = (x.double() for x in size.normals(count))
        weight = log_weight.exp()[..., None]
        first = (weight * mean).sum(-2)
        second = (weight * (variance + mean.square())).sum(-2) - first.square()
        assert weight.sum().item() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(first, count * size.mean, rtol=0.01)
        assert torch.allclose(second, count * size.variance, rtol=0.02)
    x, scale = (
        torch.linspace(-12, 40, 60001, dtype=torch.float64)[:, None],
        torch.full((1,), 0.1, dtype=torch.float64),
    )
    exact = size.log_density(1, x, scale).sum(-1)
    log_weight, mean, variance = size.normals(1)
    parts = torch.distributions.Normal(mean[..., 0], (variance[..., 0] + 0.01).sqrt()).log_prob(x)
    found = torch.logsumexp(log_weight + parts, -1)
    divergence = torch.trapezoid(exact.exp() * (exact - found), x[:, 0])
    one = torch.distributions.Normal(size.mean, (size.variance + 0.01).sqrt()).log_prob(x)[:, 0]
    assert 0 < divergence < 0.05 < 0.2 < torch.trapezoid(exact.exp() * (exact - one), x[:, 0])


@pytest.mark.parametrize("up", [0, 1])
def test_normals_of_whole_numbers_are_those_of_the_same_fractions(up):
    for given, expected in zip(
        sd.DoubleExponentialJump(up, 10, 5).normals(1),
        sd.DoubleExponentialJump(float(up), 10.0, 5.0).normals(1),
        strict=True,
    ):
        torch.testing.assert_close(given, expected)
