"""The censored distribution: densities, tails and intervals side by side, and finite gradients everywhere."""

import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as ss
import torch

import stochdyn as sd

F64 = torch.float64
INF = float("inf")
LOW = torch.tensor([-INF, -INF, 2.0, 0.5], dtype=F64)
HIGH = torch.tensor([INF, 0.1, INF, 1.5], dtype=F64)
Y = torch.tensor([0.7, 0.1, 2.0, 1.0], dtype=F64)


def censored(loc=0.3, scale=0.8):
    loc = torch.as_tensor(loc, dtype=F64)
    return sd.Censored(dist.Normal(loc, scale), LOW, HIGH)


def test_each_kind():
    n = ss.norm(0.3, 0.8)
    expected = [
        n.logpdf(0.7),
        n.logcdf(0.1),
        n.logsf(2.0),
        torch.tensor(n.cdf(1.5) - n.cdf(0.5)).log().item(),
    ]
    got = censored().log_prob(Y)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=F64), rtol=1e-10, atol=0)
    # The control: as exact values all but the first differ.
    assert ((got - dist.Normal(torch.tensor(0.3, dtype=F64), 0.8).log_prob(Y)).abs() > 0.01).tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_the_value_of_a_censored_entry_is_ignored():
    other = torch.where(censored().censored, Y + 100, Y)
    assert torch.equal(censored().log_prob(other), censored().log_prob(Y))


def test_it_is_a_likelihood():
    """The probabilities of all that may be recorded under a lower and an upper limit add up to 1."""
    inside = torch.linspace(0.1, 2.0, 20001, dtype=F64)
    base = dist.Normal(torch.tensor(0.3, dtype=F64), 0.8)
    one = torch.ones(1, dtype=F64)
    left = sd.Censored(base, -INF * one, 0.1 * one).log_prob(one).exp()
    right = sd.Censored(base, 2.0 * one, INF * one).log_prob(one).exp()
    total = left + right + torch.trapezoid(base.log_prob(inside).exp(), inside)
    torch.testing.assert_close(total, one, rtol=1e-8, atol=0)


def test_batches_and_expansion():
    fn = censored(torch.zeros(5, 1))
    assert fn.batch_shape == (5, 4) and fn.event_shape == ()
    assert fn.log_prob(Y).shape == (5, 4)
    more = fn.expand((3, 5, 4))
    torch.testing.assert_close(more.log_prob(Y), fn.log_prob(Y).expand(3, 5, 4))
    masked = fn.mask(torch.tensor([True, False, True, True])).to_event(1)
    torch.testing.assert_close(masked.log_prob(Y), fn.log_prob(Y)[:, [0, 2, 3]].sum(-1))


def test_draws_are_of_the_truth():
    torch.manual_seed(0)
    draws = censored().sample((20000,))
    assert (draws < -1.0).any() and (draws > 2.5).any()
    assert ((draws.mean(0) - 0.3).abs() < 4 * 0.8 / 20000**0.5).all()
    loc = torch.zeros(4, dtype=F64, requires_grad=True)
    assert censored(loc).has_rsample and censored(loc).rsample().requires_grad
    assert not sd.Censored(dist.Poisson(torch.ones(1)), torch.zeros(1), torch.ones(1)).has_rsample
    assert torch.equal(censored().mean, torch.full((4,), 0.3, dtype=F64))


BASES = {
    "normal": lambda x: dist.Normal(x, 0.01),
    "lognormal": lambda x: dist.LogNormal(x, 0.01),
    "student": lambda x: dist.StudentT(3.0 + 0 * x.detach(), x, 0.01),
    "poisson": lambda x: dist.Poisson(x.exp()),
    "negative binomial": lambda x: dist.NegativeBinomial(3.0 + 0 * x.detach(), logits=x),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gradients_and_curvatures_are_finite_far_away(name, dtype):
    """Locations up to 400 scales from every limit, exact and masked entries among them."""
    low = torch.tensor([-INF, -INF, 3.0, 1.0], dtype=dtype)
    high = torch.tensor([INF, 1.0, INF, 2.0], dtype=dtype)
    y, mask = torch.tensor([2.0, 1.0, 3.0, 1.5], dtype=dtype), torch.tensor([True, True, True, True])
    y = y if name in ("normal", "lognormal", "student") else y.floor()
    x = torch.linspace(-4, 4, 33, dtype=dtype)[:, None].expand(33, 4).clone().requires_grad_()
    for seen in (mask, ~mask):
        out = sd.Censored(BASES[name](x), low, high).mask(seen).log_prob(y)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        curvature = torch.autograd.grad(slope.sum(), x)[0] if slope.requires_grad else torch.zeros_like(x)
        assert all(torch.isfinite(v).all() for v in (out, slope, curvature))
        assert seen.any() or not (slope.any() or curvature.any())


def test_a_censored_normal_is_log_concave():
    x = torch.linspace(-30, 30, 121, dtype=F64)[:, None].expand(121, 4).clone().requires_grad_()
    out = sd.Censored(dist.Normal(x, 0.8), LOW, HIGH).log_prob(Y)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert (curvature <= 1e-9).all()
    assert (curvature[60] < -0.1).all()


def test_as_a_site():
    with pyro.plate("series", 1):
        fn = censored(torch.zeros(1, 4)).to_event(1)
        trace = pyro.poutine.trace(lambda: pyro.sample("y", fn, obs=Y[None])).get_trace()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], censored(torch.zeros(4)).log_prob(Y).sum()[None])


def test_refused():
    with pytest.raises(sd.ShapeError, match="over scalars, got event_shape"):
        sd.Censored(dist.Normal(torch.zeros(4), 1.0).to_event(1), LOW, HIGH)
    low, high = torch.tensor([-INF, -INF]), torch.tensor([INF, 1.0])
    with pytest.raises(sd.SupportError, match=r"Censored\(Poisson\): the exact value 0.5 at \(0,\)"):
        sd.Censored(dist.Poisson(torch.ones(2)), low, high).log_prob(torch.tensor([0.5, 0.5]))
    assert torch.isfinite(
        sd.Censored(dist.Poisson(torch.ones(2)), low, high).log_prob(torch.tensor([1.0, 0.5]))
    ).all()
    with pytest.raises(sd.SupportError, match="Bernoulli has no distribution function"):
        sd.Censored(dist.Bernoulli(torch.ones(2) / 2), low, high).log_prob(torch.ones(2))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.5), (-1.0, 0.5), (-torch.inf, 0.0), (-torch.inf, 0.5), (0.0, torch.inf)]
)
def test_limits_at_the_edge_of_a_support(low, high):
    loc, scale = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.8))
    base = dist.LogNormal(loc, scale)
    entry = sd.Censored(base, torch.tensor(low).double(), torch.tensor(high).double())
    got = entry.log_prob(torch.tensor(0.2).double())
    exact = ss.lognorm(0.8, scale=math.exp(0.3))
    mass = exact.cdf(high) - exact.cdf(low)
    assert (got.exp() - mass).abs() < 1e-12
    if mass > 0:
        assert all(g.isfinite() for g in torch.autograd.grad(got, (loc, scale)))
