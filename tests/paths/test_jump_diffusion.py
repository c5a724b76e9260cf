"""Jump diffusions as distributions: Merton's and Kou's closed forms, simulation, shapes and faults."""

import math
from itertools import pairwise

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from tests.problems import within

F64 = torch.float64
ZERO = torch.zeros(1, dtype=F64)


def number(*values):
    return torch.tensor(values, dtype=F64)


def merton(ts, lam=1.0, m=-0.1, d=0.15, v=0.2, r=0.05):
    """The log price of Merton's model, under the pricing measure."""
    kappa = math.exp(m + d * d / 2) - 1
    jumps = sd.CompoundPoisson(lam, sd.NormalJump(number(m), number(d)))
    return sd.JumpDiffusionPath(
        lambda t, z: (r - v * v / 2 - lam * kappa) + 0 * z, number(v), jumps, ZERO, ts
    )


def kou(ts):
    lam, p, up, down, v, r = 1.0, 0.4, 10.0, 5.0, 0.16, 0.05
    zeta = p * up / (up - 1) + (1 - p) * down / (down + 1) - 1
    sizes = sd.DoubleExponentialJump(number(p)[0], number(up)[0], number(down)[0])
    jumps = sd.CompoundPoisson(lam, sizes)
    return sd.JumpDiffusionPath(lambda t, z: (r - v * v / 2 - lam * zeta) + 0 * z, number(v), jumps, ZERO, ts)


def at(path, x):
    """The density of a single step from 0 to x."""
    return path.log_prob(torch.stack([torch.zeros_like(x), x], -1)[..., None]).exp()


def call(path, spot, strike, rate, maturity):
    """By Gauss-Legendre quadrature of the density, in pieces from the strike on."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(200))
    edges, total = math.log(strike / spot) + number(0, 0.3, 0.8, 2, 5, 9), 0.0
    for low, high in pairwise(edges):
        x = low + (high - low) * (nodes + 1) / 2
        total += ((high - low) / 2 * weights * (spot * x.exp() - strike) * at(path, x)).sum().item()
    return math.exp(-rate * maturity) * total


MERTON, KOU = 12.761288593628754, 9.147317303819221


def test_merton_and_kou_in_closed_form():
    assert at(merton(number(0.0, 1.0)), number(0.0)).item() == pytest.approx(1.5275739724713515, abs=1e-12)
    assert call(merton(number(0.0, 1.0)), 100, 100, 0.05, 1) == pytest.approx(MERTON, abs=1e-9)
    assert call(kou(number(0.0, 0.5)), 100, 98, 0.05, 0.5) == pytest.approx(KOU, abs=1e-9)
    assert abs(call(merton(number(0.0, 1.0), lam=1.1), 100, 100, 0.05, 1) - MERTON) > 0.1


def test_merton_price_is_the_series_of_normal_prices():
    """The mixture's own weights, means and deviations, in Black and Scholes's formula."""
    path, normal = merton(number(0.0, 1.0)), torch.distributions.Normal(0.0, 1.0)
    steps = path.steps(torch.zeros(2, 1, dtype=F64))
    count = path.counts(steps.rate)
    total = torch.tensor(0.0, dtype=F64)
    for n in range(count + 1):
        loc, var = (
            steps.a[0, 0] + n * path.jumps.size.mean,
            steps.scale[0, 0] ** 2 + n * path.jumps.size.variance,
        )
        sd_, weight = var.sqrt(), math.exp(-1.0) / math.factorial(n)
        d = loc / sd_
        total = (
            total + weight * (100 * (loc + var / 2).exp() * normal.cdf(d + sd_) - 100 * normal.cdf(d)).sum()
        )
    assert (math.exp(-0.05) * total).item() == pytest.approx(MERTON, abs=1e-10)


@pytest.mark.parametrize(
    ("make", "maturity", "strike", "price"),
    [(merton, 1.0, 100, MERTON), (kou, 0.5, 98, KOU)],
    ids=["merton", "kou"],
)
def test_simulated_prices(make, maturity, strike, price):
    torch.manual_seed(1)
    path = make(torch.linspace(0, maturity, 5, dtype=F64))
    paid = math.exp(-0.05 * maturity) * (100 * path.sample((40000,))[:, -1, 0].exp() - strike).clamp(min=0)
    assert within(paid, price)
    assert not within(paid, price + 1)


def test_moments_of_merton_s_return():
    torch.manual_seed(2)
    x = merton(torch.linspace(0, 1, 3, dtype=F64)).sample((40000,))[:, -1, 0]
    assert within(x, 0.0149256864)
    assert within((x - 0.0149256864).square(), 0.0725)


def test_compound_poisson_with_exponential_jumps():
    sizes = sd.DoubleExponentialJump(number(1.0)[0], number(3.0)[0], number(3.0)[0])
    path = sd.JumpDiffusionPath(
        lambda t, z: 0 * z, number(1e-3), sd.CompoundPoisson(2.0, sizes), ZERO, number(0, 1.5)
    )
    assert at(path, number(1.0)).item() == pytest.approx(0.4561543779, abs=1e-6)


def test_a_coarse_grid_and_a_fine_one_have_the_same_law():
    """Jumps are summed out exactly: one step's density is that of many, integrated over the states between."""
    coarse, fine = merton(number(0.0, 1.0)), merton(number(0.0, 0.4, 1.0))
    between = torch.linspace(-3, 3, 6001, dtype=F64)
    paths = torch.stack([torch.zeros_like(between), between, torch.full_like(between, 0.2)], -1)[..., None]
    integral = torch.trapezoid(fine.log_prob(paths).exp(), between)
    assert abs(integral - at(coarse, number(0.2))).item() < 1e-8


def test_without_jumps_it_is_the_diffusion():
    ts = number(0.0, 0.3, 0.3, 1.0)
    jumps = sd.CompoundPoisson(0.0, sd.NormalJump(0.0, 1.0))
    start = dist.Normal(ZERO, 1.0).to_event(1)
    path = sd.JumpDiffusionPath(lambda t, z: -z, number(0.5), jumps, start, ts)
    plain = sd.SDEPath(lambda t, z: -z, number(0.5), start, ts)
    z = plain.sample((5,))
    assert (path.log_prob(z) - plain.log_prob(z)).abs().max() < 1e-12
    x = path.sample((5,))
    assert torch.equal(x[:, 1], x[:, 2])


def test_several_states_jump_together():
    """Against the mixture written out; the control jumps apart."""
    jumps = sd.CompoundPoisson(0.7, sd.NormalJump(number(0.5, -1.0), number(0.2, 0.3)))
    path = sd.JumpDiffusionPath(
        lambda t, z: 0 * z, number(0.4, 0.5), jumps, torch.zeros(2, dtype=F64), number(0, 1)
    )
    x = number(0.6, -0.8)
    together, apart = 0.0, [0.0, 0.0]
    for n in range(40):
        weight = math.exp(-0.7) * 0.7**n / math.factorial(n)
        loc, var = n * number(0.5, -1.0), number(0.4, 0.5).square() + n * number(0.2, 0.3).square()
        p = torch.distributions.Normal(loc, var.sqrt()).log_prob(x).exp()
        together = together + weight * p.prod()
        apart = [a + weight * q for a, q in zip(apart, p, strict=True)]
    found = path.log_prob(torch.stack([torch.zeros(2, dtype=F64), x])).exp()
    assert abs(found - together) < 1e-12
    assert abs(found - apart[0] * apart[1]) > 1e-2


def test_intensity_of_state_and_batch_shapes():
    rates = number(0.5, 1.0, 2.0)
    jumps = sd.CompoundPoisson(lambda t, z: rates[..., None] * z.square(), sd.NormalJump(0.0, 1.0))
    path = sd.JumpDiffusionPath(lambda t, z: -z, number(0.5), jumps, number(1.0), torch.linspace(0, 1, 6))
    assert path.batch_shape == (3,) and path.event_shape == (6, 1)
    z = path.sample((4,))
    whole = path.log_prob(z)
    assert whole.shape == (4, 3)
    for k in range(3):
        own = sd.CompoundPoisson(lambda t, z, k=k: rates[k] * z.square(), sd.NormalJump(0.0, 1.0))
        alone = sd.JumpDiffusionPath(lambda t, z: -z, number(0.5), own, number(1.0), torch.linspace(0, 1, 6))
        assert (alone.log_prob(z[:, k]) - whole[:, k]).abs().max() < 1e-12
    assert path.expand((2, 3)).log_prob(z[:2]).shape == (2, 3)
    varied = sd.CompoundPoisson(rates, sd.NormalJump(rates[:, None], 1.0))
    assert sd.JumpDiffusionPath(
        lambda t, z: -z, number(0.5), varied, number(1.0), number(0, 1)
    ).batch_shape == (3,)


def test_a_matched_diffusion_has_the_same_moments():
    torch.manual_seed(3)
    path = merton(torch.linspace(0, 1, 5, dtype=F64))
    x = path.matched.rsample((40000,))[:, -1, 0].detach()
    assert within(x, 0.0149256864) and within((x - 0.0149256864).square(), 0.0725)
    assert not within((x - 0.0149256864).square(), 0.04)


def test_gradients_by_every_parameter():
    def log_prob(lam, loc, scale, sigma):
        jumps = sd.CompoundPoisson(lam, sd.NormalJump(loc, scale))
        path = sd.JumpDiffusionPath(lambda t, z: -z, sigma, jumps, ZERO, number(0, 0.5, 1.2))
        return path.log_prob(number(0.0, 1.1, 0.9)[:, None])

    inputs = [number(v).squeeze().requires_grad_() for v in (0.8, 0.1, 0.7)] + [number(0.4).requires_grad_()]
    assert torch.autograd.gradcheck(log_prob, inputs)


def test_faults_are_named():
    jumps, ts = sd.CompoundPoisson(1.0, sd.NormalJump(0.0, 1.0)), number(0, 1)

    def path(jumps=jumps, sigma=number(0.5), z0=ZERO, ts=ts, **options):  # noqa: B008
        return sd.JumpDiffusionPath(lambda t, z: -z, sigma, jumps, z0, ts, **options)

    with pytest.raises(sd.DtypeError, match=r"jumps' sizes are torch.float32, the path torch.float64"):
        path(sd.CompoundPoisson(1.0, sd.NormalJump(torch.zeros(3, 1), 1.0)))
    with pytest.raises(sd.FieldError, match="must be a CompoundPoisson"):
        path(1.0)
    with pytest.raises(sd.DiffusionError, match="for diagonal noise"):
        path(sigma=sd.MatrixDiffusion(torch.eye(1, dtype=F64)))
    with pytest.raises(sd.ShapeError, match="DoubleExponentialJump: for paths of one state, this one has 2"):
        path(sd.CompoundPoisson(1.0, sd.DoubleExponentialJump(0.5, 1.0, 1.0)), z0=torch.zeros(2, dtype=F64))
    with pytest.raises(sd.ShapeError, match="sizes have 3 states, the path 2"):
        path(sd.CompoundPoisson(1.0, sd.NormalJump(number(0, 0, 0), 1.0)), z0=torch.zeros(2, dtype=F64))
    with pytest.raises(sd.FieldError, match=r"intensity returned shape .*expected \(..., 1\)"):
        path(sd.CompoundPoisson(lambda t, z: z, sd.NormalJump(0.0, 1.0)), z0=torch.zeros(2, dtype=F64))
    with pytest.raises(sd.FieldError, match="The intensity is -1 near time 0"):
        path(sd.CompoundPoisson(lambda t, z: z - 1, sd.NormalJump(0.0, 1.0))).sample()
    with pytest.raises(sd.DivergedError, match="jumps are expected in one step"):
        path(sd.CompoundPoisson(1e4, sd.NormalJump(0.0, 1.0))).log_prob(torch.zeros(2, 1, dtype=F64))
    with pytest.raises(sd.SupportError, match="starts up to 1 away"):
        path().log_prob(torch.ones(2, 1, dtype=F64))
    with pytest.raises(NotImplementedError, match="have no gradient"):
        path().rsample()
    with pytest.raises(sd.FieldError, match="`max_jumps` must not be negative"):
        path(max_jumps=-1)
