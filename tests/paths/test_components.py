"""Mixtures of normals of several states: exact in a gap, their draws and gradients, and what merging keeps."""

import math

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.paths.components import Products, before, merged, settled
from stochdyn.paths.mixture_message import MixtureMessage
from tests.problems import within

F64 = torch.float64
RATE, NOISE = 0.6, 0.1
LOC, SCALE = torch.tensor([0.5, -1.0], dtype=F64), torch.tensor([3.0, 1.0], dtype=F64)
SIGMA, ACROSS = torch.tensor([0.5, 0.8], dtype=F64), torch.tensor([1.0, -0.7], dtype=F64)


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def gap(y, substeps=4):
    """Two states that jump together, of which one number is seen, so that half of what could be known is not."""
    grid = sd.TimeGrid(tensor(0.0, 1.0), substeps=substeps)
    jumps = sd.CompoundPoisson(RATE, sd.NormalJump(LOC, SCALE))
    path = sd.JumpDiffusionPath(lambda t, z: 0 * z, SIGMA, jumps, torch.zeros(2, dtype=F64), grid.ts)
    h, J = torch.zeros(substeps + 1, 2, dtype=F64), torch.zeros(substeps + 1, 2, 2, dtype=F64)
    h[-1], J[-1] = ACROSS * y / NOISE**2, torch.outer(ACROSS, ACROSS) / NOISE**2
    return path, sd.Message(h, J)


def exact(y):
    """log p(y), a Poisson mixture of normals, and P(no jump | y)."""
    terms = []
    for n in range(40):
        weight = -RATE + n * math.log(RATE) - math.lgamma(n + 1)
        variance = NOISE**2 + (ACROSS.square() * (SIGMA.square() + n * SCALE.square())).sum()
        seen = torch.distributions.Normal(n * (ACROSS * LOC).sum(), variance.sqrt()).log_prob(tensor(y)[0])
        terms.append(weight + seen)
    total = torch.logsumexp(torch.stack(terms), 0)
    return total.item(), (terms[0] - total).exp().item()


def weights(path, guided, y, draws=3000):
    with torch.no_grad():
        z = guided.rsample((draws,))
        seen = torch.distributions.Normal(tensor(y), NOISE).log_prob(z[..., -1, :] @ ACROSS)
        return z, path.log_prob(z) + seen - guided.log_prob(z)


@pytest.mark.parametrize("y", [0.1, 1.5, 2.5])
def test_one_gap_of_two_states_is_exact_and_one_gaussian_message_is_not(y):
    torch.manual_seed(0)
    path, potential = gap(y)
    message = path.filtered(potential, components=6)
    z, w = weights(path, path.guided(message), y)
    evidence, no_jump = exact(y)
    assert abs(w.mean().item() - evidence) < 1e-3 and w.std() < 0.02
    log_none, size = path.steps(z).posterior()
    assert within(log_none.sum(0).exp(), no_jump) and not within(log_none.sum(0).exp(), no_jump + 0.1)
    assert size.shape == (4, 3000, 2)
    single = MixtureMessage(*(x.unsqueeze(-1 - k) for k, x in enumerate(merged(*message.parts))))
    assert evidence - weights(path, path.guided(single), y)[1].mean() > 0.3


def test_draws_follow_their_density():
    torch.manual_seed(1)
    path, potential = gap(1.5, substeps=2)
    q, other = (path.guided(path.filtered(potential, components=c)) for c in (3, 2))
    with torch.no_grad():
        z = q.rsample((20000,))
        ratio = (other.log_prob(z) - q.log_prob(z)).exp()
    assert within(ratio, 1.0) and not within(1.02 * ratio, 1.0)


def mixture(h):
    """A correlated factor on two components, by its information."""
    J = torch.tensor([[[2.0, 1.2], [1.2, 1.5]], [[0.3, -0.2], [-0.2, 0.6]]], dtype=F64)
    message = MixtureMessage(tensor(0.0, 0.4), h, J)
    means, spreads = torch.stack([tensor(0.0, 0.3), tensor(1.0, -2.0)]), torch.stack([SIGMA, SCALE])
    return Products.of(tensor(-0.3, -1.2), means, spreads, message)


def moments(parts):
    """Mean and second moment of a mixture, in closed form."""
    share = torch.softmax(parts.log_weight, -1)
    factor = torch.linalg.solve_triangular(
        parts.root.mT, torch.diag_embed(torch.ones_like(parts.mean)), upper=True
    )
    factor = parts.spread[..., None] * factor
    second = factor @ factor.mT + parts.mean[..., None] * parts.mean[..., None, :]
    return (share[:, None] * parts.mean).sum(0), (share[:, None, None] * second).sum(0)


def test_gradients_of_expectations_are_those_of_the_closed_form():
    """E z and E z_1 z_2, by a parameter that moves weights, means and correlations."""
    torch.manual_seed(2)
    h = torch.tensor([[1.0, -0.5], [0.2, 0.4]], dtype=F64, requires_grad=True)
    first, second = moments(mixture(h))
    wanted = [torch.autograd.grad(x, h, retain_graph=True)[0] for x in (*first, second[0, 1])]
    blocks: list[list[torch.Tensor]] = [[], [], []]
    for _ in range(60):
        z = mixture(h).expanded(torch.Size((1000,))).draw()
        values = z[:, 0].mean(), z[:, 1].mean(), (z[:, 0] * z[:, 1]).mean()
        for block, value in zip(blocks, values, strict=True):
            block.append(torch.autograd.grad(value, h, retain_graph=True)[0])
    for block, expected in zip(blocks, wanted, strict=True):
        for i in range(2):
            for j in range(2):
                found = torch.stack([x[i, j] for x in block])
                assert within(found, expected[i, j].item())
    assert not within(torch.stack([x[0, 0] for x in blocks[0]]), wanted[0][0, 0].item() + 0.1)


def test_density_is_normalised_and_has_the_moments_of_the_draws():
    parts = mixture(torch.tensor([[1.0, -0.5], [0.2, 0.4]], dtype=F64))
    x = torch.linspace(-14, 14, 701, dtype=F64)
    z = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1)
    p = parts.log_density(z).exp() * (x[1] - x[0]) ** 2
    first, second = moments(parts)
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert (p[..., None] * z).sum((0, 1)) == pytest.approx(first, abs=1e-5)
    assert (p * z[..., 0] * z[..., 1]).sum().item() == pytest.approx(second[0, 1].item(), abs=1e-4)
    torch.manual_seed(3)
    drawn = parts.expanded(torch.Size((20000,))).draw()
    assert within(drawn[:, 0] * drawn[:, 1], second[0, 1].item())
    assert not within(drawn[:, 0] * drawn[:, 1], second[0, 1].item() + 0.2)


def test_a_step_before_is_the_integral_over_the_step():
    F = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=F64)
    after = MixtureMessage(
        tensor(0.3), tensor(0.5, -0.2)[None], torch.tensor([[[1.0, 0.4], [0.4, 0.7]]], dtype=F64)
    )
    m, d, log_prior = tensor(0.2, -0.4)[None], SIGMA[None], tensor(-0.7)
    w, h, J = (x[0, 0] for x in before(F, m, d, log_prior, after))
    for z in (tensor(0.0, 0.0), tensor(1.3, -0.8)):
        product = Products.of(log_prior, (F @ z + m[0])[None], d, after)
        ours = w + h @ z - 0.5 * z @ J @ z
        assert ours.item() == pytest.approx(product.log_integral().item(), abs=1e-12)


def test_merging_keeps_mass_mean_and_covariance_and_what_nothing_is_known_of():
    J = torch.tensor([[[2.0, 0.5], [0.5, 1.0]], [[0.4, 0.0], [0.0, 3.0]]], dtype=F64)
    h, w = torch.tensor([[1.0, 0.0], [-0.5, 2.0]], dtype=F64), tensor(0.2, -0.3)
    mean, cov = torch.linalg.solve(J, h), torch.linalg.inv(J)
    mass = (w + 0.5 * (h * mean).sum(-1) - 0.5 * torch.logdet(J)).exp()
    one_w, one_h, one_J = merged(w, h, J)
    share = mass / mass.sum()
    centre = share @ mean
    apart = mean - centre
    covariance = (share[:, None, None] * (cov + apart[..., None] * apart[:, None])).sum(0)
    assert torch.allclose(torch.linalg.inv(one_J), covariance, rtol=1e-5)
    assert torch.allclose(torch.linalg.solve(one_J, one_h), centre, rtol=1e-5)
    total = one_w + 0.5 * one_h @ centre - 0.5 * torch.logdet(one_J)
    assert total.item() == pytest.approx(mass.sum().log().item(), abs=1e-5)
    silent = merged(w, 0 * h, 0 * J)
    assert silent[0].item() == pytest.approx(w.exp().sum().log().item(), abs=1e-12)
    assert (silent[1] == 0).all() and (silent[2] == 0).all()
    half = merged(
        w, h * tensor(1.0, 0.0), torch.diag_embed(torch.stack([tensor(2.0, 0.0), tensor(0.4, 0.0)]))
    )
    assert half[2][1].abs().max() < 1e-12 and half[2][0, 0] > 0.3


def test_a_factor_is_settled_where_it_says_something_and_stays_where_not():
    J, around = torch.outer(ACROSS, ACROSS), tensor(4.0, 5.0)
    moved = settled(3.0 * ACROSS, J, around)
    assert (ACROSS @ moved).item() == pytest.approx(3.0, abs=1e-4)
    assert torch.allclose(settled((ACROSS @ around) * ACROSS, J, around), around)
    assert torch.allclose(settled(0 * ACROSS, 0 * J, around), around)


def test_the_evidence_of_coupled_states_against_a_long_bootstrap():
    """A jump of the second state is seen only through the first, which it drags along."""
    torch.manual_seed(4)
    grid = sd.TimeGrid(torch.arange(5.0, dtype=F64), substeps=3)
    start = dist.MultivariateNormal(
        torch.zeros(2, dtype=F64), torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=F64)
    )
    jumps = sd.CompoundPoisson(0.2, sd.NormalJump(0.0, tensor(0.0, 3.0)))
    path = sd.JumpDiffusionPath(
        lambda t, z: torch.stack([z[..., 1] - z[..., 0], -0.3 * z[..., 1]], -1), SIGMA, jumps, start, grid.ts
    )
    y = tensor(0.1, 0.3, 0.2, 1.9, 2.6)
    seen = torch.ones(5, 1, dtype=torch.bool)
    first = sd.Message.observed(grid, y[:, None], seen, 0.4)
    h = torch.cat([first.information, torch.zeros_like(first.information)], -1)
    J = torch.diag_embed(torch.cat([first.full()[..., 0], torch.zeros_like(h[..., :1])], -1))
    at = dict(zip(grid.index.tolist(), y, strict=True))

    def likelihood(z, k):
        return torch.distributions.Normal(z[..., 0], 0.4).log_prob(at[k]) if k in at else None

    guided = path.guided(path.filtered(sd.Message(h, J)))
    ours = sd.particle_evidence(guided.expand([300]), likelihood, particles=50)
    plain = sd.particle_evidence(path.expand([300]), likelihood, particles=1000)
    reference = torch.logsumexp(plain, 0) - math.log(300)
    # Two independent means of one number.
    assert within((ours - reference).exp() - (plain - reference).exp(), 0.0)
    assert not within(1.2 * (ours - reference).exp() - (plain - reference).exp(), 0.0)
    assert ours.std() < plain.std()  # with a twentieth of the particles
