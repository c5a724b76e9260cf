"""Guided jump diffusions: exact in a gap, their gradients, and what one Gaussian message would lose."""

import math

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.paths.components import Products, implicit, merged
from stochdyn.paths.mixture_message import MixtureMessage
from tests.paths.test_mixture_message import F64, NOISE, RATE, likelihood, number, problem
from tests.problems import within


def gap(guided, path, grid, y, draws=2000):
    """log p(y) less the mean and less the log mean of the weights."""
    with torch.no_grad():
        z = guided.rsample((draws,))
        seen = (
            torch.distributions.Normal(grid.observed(z)[..., 1:, 0], NOISE).log_prob(number(*y[1:])).sum(-1)
        )
        w = path.log_prob(z) + seen - guided.log_prob(z)
    return w, torch.logsumexp(w, 0) - math.log(draws)


@pytest.mark.parametrize("y", [0.1, 1.5, 5.0])
def test_one_gap_is_exact_and_one_gaussian_message_is_not(y):
    torch.manual_seed(0)
    grid, path, potential = problem(y=(0.0, y))
    exact = likelihood(number(0.0), y, 1.0)[0]
    message = path.filtered(potential)
    w, evidence = gap(path.guided(message), path, grid, (0.0, y))
    assert abs(exact - w.mean()) < 1e-3 and abs(exact - evidence) < 1e-3
    w, h, J = (x.unsqueeze(-1 - k) for k, x in enumerate(merged(*message.parts)))
    lost = exact - gap(path.guided(MixtureMessage(w, h, J)), path, grid, (0.0, y))[0].mean()
    assert lost > 0.7


def test_probability_of_a_jump_is_exact():
    """P(no jump | y) by enumeration, and by the steps of draws of the guide."""
    torch.manual_seed(1)
    for y in (0.8, 1.5, 2.5):
        _, path, potential = problem(y=(0.0, y))
        none = (
            -RATE
            + torch.distributions.Normal(0.0, math.sqrt(0.25 + NOISE**2)).log_prob(torch.tensor(y)).double()
        )
        exact = 1 - (none - likelihood(number(0.0), y, 1.0)[0]).exp()
        with torch.no_grad():
            log_none, size = path.steps(path.guided(path.filtered(potential)).rsample((4000,))).posterior()
        assert within(1 - log_none.sum(0).exp(), exact.item())
        assert not within(1 - log_none.sum(0).exp(), exact.item() + 0.1)
        assert size.shape == (6, 4000, 1)


def test_several_gaps_and_a_random_start():
    """Against a bootstrap of many draws, as the future is merged at every observation."""
    torch.manual_seed(2)
    times, y = (0.0, 1.0, 2.0, 3.0), (0.0, 0.4, 5.0, 5.3)
    grid = sd.TimeGrid(number(*times), substeps=3)
    jumps = sd.CompoundPoisson(0.3, sd.NormalJump(number(0.0), number(3.0)))
    start = dist.Normal(torch.zeros(1, dtype=F64), 0.5).to_event(1)
    path = sd.JumpDiffusionPath(lambda t, z: -0.2 * z, number(0.5), jumps, start, grid.ts)
    seen = torch.tensor([[False], [True], [True], [True]])
    message = path.filtered(sd.Message.observed(grid, number(*y)[:, None], seen, NOISE))
    w, evidence = gap(path.guided(message), path, grid, y, 4000)
    assert evidence - w.mean() < 0.05
    far, total = 200000, []
    with torch.no_grad():
        for _ in range(3):
            z = path.sample((far,))
            seen = (
                torch.distributions.Normal(grid.observed(z)[..., 1:, 0], 0.5).log_prob(number(*y[1:])).sum(-1)
            )
            total.append(torch.logsumexp(seen, 0) - math.log(far))
        wide = path.filtered(
            sd.Message.observed(
                grid, number(*y)[:, None], torch.tensor([[False], [True], [True], [True]]), 0.5
            )
        )
        q = path.guided(wide)
        z = q.rsample((4000,))
        like = torch.distributions.Normal(grid.observed(z)[..., 1:, 0], 0.5).log_prob(number(*y[1:])).sum(-1)
        ours = torch.logsumexp(path.log_prob(z) + like - q.log_prob(z), 0) - math.log(4000)
    spread = torch.stack(total).std().item()
    assert abs(ours - torch.stack(total).mean()) < 4 * spread + 0.05


def test_draws_follow_their_density():
    torch.manual_seed(3)
    _, path, potential = problem(substeps=2)
    q = path.guided(path.filtered(potential))
    with torch.no_grad():
        z = q.rsample((20000,))
        # E_q p / q is one for any density that q covers; of another message's density too.
        other = path.guided(path.filtered(potential, components=2))
        ratio = (other.log_prob(z) - q.log_prob(z)).exp()
    assert within(ratio, 1.0)
    assert not within(1.02 * ratio, 1.0)


def test_gradients_of_draws_are_those_of_the_distribution_function():
    """Against the quantile function, by finite differences, at the same level."""
    w, m, s = number(0.4, -0.3, 0.1), number(-2.0, 0.5, 3.0), number(0.5, 1.0, 0.3)

    def level(z, m):
        return (torch.softmax(w, -1) * torch.special.ndtr((z[..., None] - m) / s)).sum(-1)

    torch.manual_seed(4)
    moving = m.clone().requires_grad_()
    drawn = implicit(w.expand(50, 3), moving.expand(50, 3), s.expand(50, 3))[:, 0]
    for k in range(3):
        step = torch.zeros(3, dtype=F64)
        step[k] = 1e-5
        slope = []
        for i in range(50):
            (grad,) = torch.autograd.grad(drawn[i], moving, retain_graph=True)
            slope.append(grad[k])
        z, u = drawn.detach(), level(drawn.detach(), m)
        found = []
        for shifted in (m + step, m - step):
            low, high = z - 1, z + 1
            for _ in range(60):
                middle = (low + high) / 2
                below = level(middle, shifted) < u
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            found.append(low)
        expected = (found[0] - found[1]) / 2e-5
        assert (torch.stack(slope) - expected).abs().max() < 1e-5


def test_the_gradient_of_an_expectation():
    """d/d loc E z at the end, of a guided path: against finite differences of the same expectation by quadrature."""

    def mean(loc):
        grid = sd.TimeGrid(number(0, 1), substeps=1)
        jumps = sd.CompoundPoisson(0.5, sd.NormalJump(loc, number(2.0)))
        path = sd.JumpDiffusionPath(
            lambda t, z: 0 * z, number(0.5), jumps, torch.zeros(1, dtype=F64), grid.ts
        )
        seen = torch.tensor([[False], [True]])
        return path, path.guided(
            path.filtered(sd.Message.observed(grid, number(0.0, 2.0)[:, None], seen, 0.8))
        )

    def exact(loc):
        q = mean(loc)[1]
        z = torch.linspace(-20, 20, 20001, dtype=F64)
        p = q.log_prob(torch.stack([torch.zeros_like(z), z], -1)[..., None]).exp()
        return torch.trapezoid(z * p, z)

    torch.manual_seed(5)
    loc = number(0.3).requires_grad_()
    with torch.no_grad():
        slope = (exact(loc + 1e-4) - exact(loc - 1e-4)) / 2e-4
    z = mean(loc)[1].rsample((10000,))[:, -1, 0]
    # One number per draw: the implicit derivative of each.
    blocks = torch.stack([torch.autograd.grad(b.mean(), loc, retain_graph=True)[0][0] for b in z.chunk(50)])
    assert within(blocks, slope.item())
    assert not within(blocks, slope.item() + 0.05)


def test_shapes_sticking_the_landing_and_faults():
    _, path, potential = problem()
    message = path.filtered(potential)
    q = path.guided(message)
    assert q.expand((3,)).rsample((2,)).shape == (2, 3, 7, 1) and q.has_rsample
    h, sigma = message.information.clone().requires_grad_(), number(0.5).requires_grad_()
    own = sd.JumpDiffusionPath(lambda t, z: 0 * z, sigma, path.jumps, torch.zeros(1, dtype=F64), path.ts)
    own = own.guided(MixtureMessage(message.log_weight, h, message.precision))
    z = own.rsample().detach()
    entropy = own.score_parts(z)[2]
    assert torch.autograd.grad(entropy, [h, sigma], allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(entropy, sigma)[0].abs() > 1e-6
    assert torch.autograd.grad(own.log_prob(z), h)[0].abs().max() > 1e-6
    short = MixtureMessage(torch.zeros(3, 2), torch.zeros(3, 2, 1), torch.ones(3, 2, 1, 1))
    with pytest.raises(sd.GuideError, match="The message has 3 times, the path 7"):
        path.guided(short)


def test_density_of_a_mixture_is_normalised_whatever_its_weights():
    z = torch.linspace(-30, 30, 30001, dtype=F64)[:, None]
    one = torch.ones(2, 1, 1, dtype=F64)
    mixture = Products(number(3.0, -8.0), number(-1.0, 2.0)[:, None], number(0.5, 2.0)[:, None], one)
    p = mixture.log_density(z).exp()
    assert torch.trapezoid(p, z[:, 0]).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("kind", ["time", "state"])
def test_draws_under_an_intensity_that_changes_follow_the_prior_where_there_is_no_message(kind):
    torch.manual_seed(6)
    intensity = (lambda t, z: 4 * t + 0 * z) if kind == "time" else (lambda t, z: 2 * z.abs())
    jumps, ts = sd.CompoundPoisson(intensity, sd.NormalJump(0.0, 1.0)), torch.linspace(0, 2, 9, dtype=F64)
    path = sd.JumpDiffusionPath(lambda t, z: 0 * z, number(0.3), jumps, number(0.5), ts)
    flat = sd.Message(torch.zeros(9, 1, dtype=F64), torch.zeros(9, 1, dtype=F64))
    with torch.no_grad():
        ours = path.guided(path.filtered(flat)).rsample((20000,))[:, -1, 0]
    theirs = path.sample((20000,))[:, -1, 0]
    difference = (ours - 0.5).square() - (theirs - 0.5).square()
    assert within(difference, 0.0)
    assert not within(0.8 * (ours - 0.5).square() - (theirs - 0.5).square(), 0.0)


def test_a_random_start_is_drawn_for_every_draw():
    torch.manual_seed(7)
    start = dist.Normal(torch.zeros(1, dtype=F64), 0.5).to_event(1)
    jumps, ts = sd.CompoundPoisson(0.3, sd.NormalJump(0.0, 3.0)), number(0, 1)
    path = sd.JumpDiffusionPath(lambda t, z: 0 * z, number(0.5), jumps, start, ts)
    flat = sd.Message(torch.zeros(2, 1, dtype=F64), torch.zeros(2, 1, dtype=F64))
    first = path.guided(path.filtered(flat)).rsample((5000,))[:, 0, 0].detach()
    assert within(first.square(), 0.25)


@pytest.mark.parametrize("states", [1, 2])
def test_nothing_is_lost_far_from_zero(states):
    """Log weights are values at zero, where those of factors far out are so large that their differences lose digits."""
    found = {}
    for level, dtype in ((0.0, torch.float64), (1000.0, torch.float32), (1e5, torch.float64)):
        torch.manual_seed(0)
        one = torch.ones(states, dtype=dtype)
        jumps = sd.CompoundPoisson(0.5, sd.NormalJump(0 * one, 2 * one))
        start = dist.Normal(level * one, 0.1).to_event(1)
        path = sd.JumpDiffusionPath(
            lambda t, z: 0 * z, 0.2 * one, jumps, start, torch.linspace(0, 2, 9).double()
        )
        y, precision = torch.zeros(9, states, dtype=dtype), torch.zeros(9, states, dtype=dtype)
        y[4, 0], y[8, 0], precision[[4, 8], 0] = level + 0.125, level + 2.5, 100.0
        guided = path.guided(path.filtered(sd.Message(precision * y, precision)))
        with torch.no_grad():
            z = guided.rsample((300,))
            w = path.log_prob(z) - guided.log_prob(z) - 50 * (z - y)[:, [4, 8], 0].square().sum(-1)
        assert z.dtype == w.dtype == dtype and w.std() < 0.01
        found[level] = w.mean().item()
        seen = lambda z, k: -50 * (z - y[k])[..., 0].square() if k in (4, 8) else None  # noqa: E731, B023
        evidence = sd.particle_evidence(guided, seen, particles=100)
        assert evidence.dtype == dtype and evidence.item() == pytest.approx(found[level], abs=0.01)
    assert max(abs(found[level] - found[0.0]) for level in (1000.0, 1e5)) < 5e-3
