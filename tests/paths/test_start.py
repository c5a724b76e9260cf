"""Initial states: their draws, their densities and their twists."""

import math

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.paths.start import KnownStart, RandomStart, as_start
from tests.problems import within

F64 = torch.float64


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def path_from(initial):
    return sd.SDEPath(lambda t, z: -z, tensor(0.5), initial, tensor(0.0, 0.5))


def test_log_normal_start_is_twisted_exactly_in_its_base():
    """Message on the logarithm: q(z0) is the log-normal with the conjugate normal's moments."""
    loc, scale, h, J = 0.3, 0.5, 1.7, 2.0
    path = path_from(dist.LogNormal(tensor(loc), scale).to_event(1))
    guided = path.guided(sd.Message(tensor(h, 0.0)[:, None], tensor(J, 0.0)[:, None]))
    variance = 1 / (1 / scale**2 + J)
    mean = variance * (loc / scale**2 + h)
    torch.manual_seed(0)
    z = guided.rsample((20000,))
    x = z[:, 0, 0].log()
    assert within(x, mean)
    assert within((x - mean).square(), variance)
    assert not within(x, loc)
    q = dist.LogNormal(tensor(mean), math.sqrt(variance)).to_event(1).log_prob(z[:, 0])
    step = path.log_prob(z) - path.chain.start.log_prob(z[:, 0])
    assert (guided.log_prob(z) - q - step).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["normal", "mvn", "lognormal", "affine"])
def test_gaussian_bases(kind):
    prior = {
        "normal": dist.Normal(tensor(0.1, 0.2), tensor(0.5, 1.0)).to_event(1),
        "mvn": dist.MultivariateNormal(tensor(0.1, 0.2), torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64)),
        "lognormal": dist.LogNormal(tensor(0.1, 0.2), 0.5).to_event(1),
        "affine": dist.TransformedDistribution(
            dist.Normal(tensor(0.1, 0.2), 1.0).to_event(1),
            [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.ExpTransform()],
        ),
    }[kind]
    start = as_start(prior)
    assert start.gaussian
    z0 = prior.sample((5,))
    e, ladj = start.to_base(z0)
    assert (start.from_base(e) - z0).abs().max() < 1e-12
    w = start.noise.solve(e - start.loc)
    base = dist.Normal(0.0, 1.0).log_prob(w).sum(-1) - start.noise.logdet()
    assert (base - ladj - prior.log_prob(z0)).abs().max() < 1e-10
    wide = start.expand(torch.Size([3]))
    assert wide.batch_shape == (3,)
    assert wide.centre().shape == (3, 2)


def test_gamma_start_keeps_its_own_law_without_a_message():
    path = path_from(dist.Gamma(tensor(3.0), tensor(2.0)).to_event(1))
    torch.manual_seed(0)
    z0 = path.rsample((20000,))[:, 0, 0]
    assert within(z0, 1.5)
    assert within((z0 - 1.5).square(), 0.75)
    assert not within(z0, math.exp(0.5))  # a draw from the reference
    n = path.guided(control=lambda t, z: 0 * z).rsample((20000,))[:, 0, 0]
    assert within(n, 1.5)


def test_gamma_start_gives_gradients():
    rate = tensor(2.0).requires_grad_()
    path_from(dist.Gamma(tensor(3.0), rate).to_event(1)).rsample().sum().backward()
    assert rate.grad.abs() > 0


def test_building_a_path_draws_no_random_numbers():
    state = torch.get_rng_state()
    path_from(dist.Gamma(tensor(3.0), tensor(2.0)).to_event(1)).expand([3])
    assert torch.equal(state, torch.get_rng_state())


def test_a_start_without_reparametrised_draws():
    mixture = dist.MixtureSameFamily(
        torch.distributions.Categorical(tensor(0.3, 0.7)),
        torch.distributions.Independent(torch.distributions.Normal(tensor(-2.0, 2.0)[:, None], 0.1), 1),
    )
    path = path_from(mixture)
    assert not path.has_rsample
    torch.manual_seed(0)
    z = path.sample((20000,))
    assert within((z[:, 0, 0] > 0).double(), 0.7)
    assert path_from(tensor(0.0)).has_rsample


def test_a_delta_is_a_known_start():
    for delta in (dist.Delta(tensor(1.5, 2.0)).to_event(1), dist.Delta(tensor(1.5, 2.0), event_dim=1)):
        start = as_start(delta)
        assert isinstance(start, KnownStart)
        assert start.value.tolist() == [1.5, 2.0]
    assert isinstance(as_start(dist.Normal(tensor(0.0), 1.0).to_event(1)), RandomStart)


@pytest.mark.parametrize(
    ("initial", "error", "message"),
    [
        (torch.tensor([1, 2]), sd.FieldError, "must be floating point, got torch.int64"),
        (0.0, sd.FieldError, "must be a distribution or a tensor, got float"),
        (torch.tensor(0.0), sd.ShapeError, r"got a number. Write torch.tensor\(\[x0\]\)"),
        (dist.Normal(tensor(0.0, 0.0), 1.0), sd.ShapeError, r"event_shape \(state,\).*Add .to_event\(1\)"),
        (dist.Poisson(tensor(2.0)).to_event(1), sd.FieldError, "one free real number per state"),
        (dist.Dirichlet(tensor(1.0, 2.0)), sd.FieldError, "one free real number per state"),
    ],
)
def test_refusals(initial, error, message):
    with pytest.raises(error, match=message):
        path_from(initial)


def test_a_start_that_is_not_finite():
    with pytest.raises(sd.DivergedError, match=r"`initial` is not finite"):
        path_from(tensor(math.nan))
