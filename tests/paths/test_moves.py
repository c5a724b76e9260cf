"""Particle filters of jump diffusions: unbiased against quadrature, and better with messages than without."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.paths.moves import GaussianMoves, JumpMoves, PriorMoves, moves_of
from tests.problems import within

F64 = torch.float64
TIMES, VALUES, NOISE = (0.0, 1.0, 2.0, 3.0), (0.3, 0.1, 3.2, 2.9), 0.3
NORMAL = sd.NormalJump(torch.tensor([0.5], dtype=F64), torch.tensor([2.0], dtype=F64))
KOU = sd.DoubleExponentialJump(*torch.tensor([0.4, 0.5, 1.0], dtype=F64))


def rising(t, z):
    """An intensity that depends on the state."""
    return 0.2 + 0.3 * z.sigmoid()


def setting(size=NORMAL, intensity=0.3, substeps=2):
    grid = sd.TimeGrid(torch.tensor(TIMES, dtype=F64), substeps=substeps)
    start = dist.Normal(torch.zeros(1, dtype=F64), 0.5).to_event(1)
    jumps, spread = sd.CompoundPoisson(intensity, size), torch.tensor([0.6], dtype=F64)
    path = sd.JumpDiffusionPath(lambda t, z: -0.3 * z, spread, jumps, start, grid.ts)
    seen = torch.ones(len(TIMES), 1, dtype=torch.bool)
    potential = sd.Message.observed(grid, torch.tensor(VALUES, dtype=F64)[:, None], seen, NOISE)
    at = dict(zip(grid.index.tolist(), VALUES, strict=True))

    def likelihood(z, k):
        return dist.Normal(z[..., 0], NOISE).log_prob(torch.tensor(at[k])) if k in at else None

    return path, potential, likelihood


def by_quadrature(path, likelihood, nodes=350, width=14.0):
    """The evidence by a forward pass over a fixed set of states."""
    x = torch.linspace(-width, width, nodes, dtype=F64)
    spacing = math.log(x[1] - x[0])
    alpha = dist.Normal(0.0, 0.5).log_prob(x) + likelihood(x[:, None], 0)
    pairs = torch.stack([x[:, None].expand(nodes, nodes), x.expand(nodes, nodes)], -1)[..., None]
    for k in range(path.chain.steps):
        step = sd.JumpDiffusionPath(
            path.chain.drift, torch.tensor([0.6], dtype=F64), path.jumps, torch.zeros(1, dtype=F64),
            path.ts[k : k + 2], validate_args=False,
        )  # fmt: skip
        # The density of the step alone: a start that is known has none.
        steps = step.expand([nodes, nodes]).steps(pairs)
        alpha = torch.logsumexp(alpha[:, None] + torch.logsumexp(steps.log_terms(), 0)[0], 0) + spacing
        seen = likelihood(x[:, None], k + 1)
        alpha = alpha if seen is None else alpha + seen
    return (torch.logsumexp(alpha, 0) + spacing).item()


def ratios(path, likelihood, exact, particles=30, runs=400):
    return (sd.particle_evidence(path.expand([runs]), likelihood, particles=particles) - exact).exp()


@pytest.mark.parametrize("intensity", [0.3, rising], ids=["constant", "by_state"])
@pytest.mark.parametrize("size", [NORMAL, KOU], ids=["normal", "double_exponential"])
def test_guided_and_bootstrap_are_unbiased_and_messages_help(size, intensity):
    torch.manual_seed(0)
    path, potential, likelihood = setting(size, intensity)
    exact = by_quadrature(path, likelihood)
    guided = path.guided(path.filtered(potential))
    ours = ratios(guided, likelihood, exact)
    plain = ratios(path, likelihood, exact, particles=300)
    assert within(ours, 1.0) and within(plain, 1.0)
    assert not within(ours, 1.1)
    assert 3 * ours.std() < plain.std()


def test_the_normals_that_stand_for_exponential_jumps_are_corrected_for():
    torch.manual_seed(1)
    path, potential, likelihood = setting(KOU)
    exact = by_quadrature(path, likelihood)
    guided = path.guided(path.filtered(potential))
    with torch.no_grad():
        z = guided.rsample((4000,))
        seen = [likelihood(z[..., k, :], k) for k in range(path.chain.steps + 1)]
        w = path.log_prob(z) + sum(x for x in seen if x is not None) - guided.log_prob(z)
    assert within((w - exact).exp(), 1.0) and 0 < exact - w.mean() < 0.06
    uncorrected = guided.mismatch(path.ts[:1], path.ts[1:2] - path.ts[:1], z[:, 0], z[:, 1], None)
    assert uncorrected.abs().max() > 0.05


@pytest.mark.parametrize("intensity", [1.0, lambda t, z: 1.0 + 0 * z], ids=["constant", "by_state"])
def test_a_jump_that_only_many_jumps_explain_is_weighed_by_what_drew_it(intensity):
    torch.manual_seed(0)
    size = sd.DoubleExponentialJump(*torch.tensor([0.5, 1.0, 1.0], dtype=F64))
    path = sd.JumpDiffusionPath(
        lambda t, z: 0 * z, torch.tensor([0.1], dtype=F64), sd.CompoundPoisson(intensity, size),
        torch.zeros(1, dtype=F64), torch.tensor([0.0, 0.05], dtype=F64),
    )  # fmt: skip
    precision = torch.tensor([[0.0], [4.0]], dtype=F64)
    seen = dist.Normal(torch.tensor(30.0, dtype=F64), 0.5)
    guided = path.guided(path.filtered(sd.Message(30.0 * precision, precision)))
    x = torch.linspace(20, 40, 8001, dtype=F64)
    steps = path.expand([len(x)]).steps(torch.stack([torch.zeros_like(x), x], -1)[..., None])
    density = torch.logsumexp(steps.log_terms(), 0)[0] + seen.log_prob(x)
    exact = torch.logsumexp(density, 0) + (x[1] - x[0]).log()
    found = ratios(
        guided, lambda z, k: seen.log_prob(z[..., 0]) if k else None, exact, particles=500, runs=100
    )
    assert within(found, 1.0) and not within(found, 1.2)


def test_steps_of_zero_length_change_nothing():
    torch.manual_seed(0)
    path, potential, likelihood = setting()
    last = path.ts[-1:]
    longer = sd.JumpDiffusionPath(
        path.chain.drift,
        torch.tensor([0.6], dtype=F64),
        path.jumps,
        path._initial,
        torch.cat([path.ts, last]),
    )
    padded = sd.Message(
        *(torch.cat([x, 0 * x[-1:]]) for x in (potential.information, potential.full()[..., 0]))
    )
    found = ratios(longer.guided(longer.filtered(padded)), likelihood, by_quadrature(path, likelihood))
    assert within(found, 1.0)


def test_the_evidence_of_a_fit_tells_a_path_that_jumps_from_one_that_does_not():
    pyro.set_rng_seed(0)
    exact = by_quadrature(*setting()[::2])
    batch = sd.Series(torch.tensor(TIMES, dtype=F64), torch.tensor(VALUES, dtype=F64)[None, :, None])

    def model(batch, jumps=True):
        grid = sd.TimeGrid(batch.times, substeps=2)
        start, spread = (
            dist.Normal(torch.zeros(1, dtype=F64), 0.5).to_event(1),
            torch.tensor([0.6], dtype=F64),
        )

        def drift(t, z):
            return -0.3 * z

        with batch.plate("series"):
            plain = sd.SDEPath(drift, spread, start, grid.ts)
            jumping = sd.JumpDiffusionPath(drift, spread, sd.CompoundPoisson(0.3, NORMAL), start, grid.ts)
            z = pyro.sample("z", jumping if jumps else plain)
            batch.observe("y", dist.Normal(grid.observed(z), NOISE))

    found = {}
    for jumps in (True, False):

        def own(batch, jumps=jumps):
            model(batch, jumps)

        guide = sd.AmortizedGuide(own, paths=sd.FilterMessage(learned=False))
        found[jumps] = sd.evidence((own, guide), batch, draws=4, particles=1000)
    assert abs(found[True].total.item() - exact) < 0.05
    assert found[True].per_series.shape == (1,)
    assert found[True].total - found[False].total > 2


def test_each_path_has_its_moves():
    path, potential, _ = setting()
    made = (path, path.guided(path.filtered(potential)), path.matched, path.matched.guided())
    kinds = (PriorMoves, JumpMoves, GaussianMoves, GaussianMoves)
    assert all(type(moves_of(p)) is kind for p, kind in zip(made, kinds, strict=True))
    with pytest.raises(
        sd.FieldError, match="move along an SDEPath, a JumpDiffusionPath, or a guided one, got Normal"
    ):
        sd.particle_evidence(dist.Normal(0.0, 1.0), lambda z, k: None)
