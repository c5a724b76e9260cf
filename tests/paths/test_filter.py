"""The evidence estimate is unbiased, and exact where the messages are."""

import math

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from tests import problems
from tests.problems import within

F64 = torch.float64
THETA, MU, SIGMA, NOISE = (problems.OU[k] for k in ("theta", "mu", "sigma", "noise"))


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def setting(substeps=2, diffusion=None):
    grid = sd.TimeGrid(problems.OU_TIMES, substeps=substeps)
    start = dist.Normal(tensor(MU), SIGMA / math.sqrt(2 * THETA)).to_event(1)
    noise = tensor(SIGMA) if diffusion is None else diffusion
    path = sd.SDEPath(lambda t, z: THETA * (MU - z), noise, start, grid.ts)
    seen = torch.ones_like(problems.OU_VALUES, dtype=torch.bool)
    potential = sd.Message.observed(grid, problems.OU_VALUES, seen, NOISE)
    model = problems.ou_discretised(grid.ts.diff(), **problems.OU)
    at = dict(zip(grid.index.tolist(), problems.OU_VALUES, strict=True))
    return grid, path, potential, problems.kalman_log_evidence(model, at)


def likelihood(grid, values=problems.OU_VALUES):
    at = {k: i for i, k in enumerate(grid.index.tolist())}

    def log_likelihood(z, k):
        return dist.Normal(z[..., 0], NOISE).log_prob(values[at[k], ..., 0]) if k in at else None

    return log_likelihood


def ratios(path, log_likelihood, answer, runs=400, particles=20):
    """exp(estimate - exact) of independent runs, as a batch."""
    return (sd.particle_evidence(path.expand([runs]), log_likelihood, particles=particles) - answer).exp()


def control(t, z):
    return 0.5 * torch.cos(3 * z)


@pytest.mark.parametrize("resample_below", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["bootstrap", "message", "control", "both"])
def test_unbiased(kind, resample_below):
    grid, path, potential, answer = setting()
    exact = sd.information_filter(path, potential)
    wrong = sd.Message(0.7 * exact.information + 0.2, 0.7 * exact.precision)
    guided = {
        "bootstrap": path,
        "message": path.guided(wrong),
        "control": path.guided(control=control),
        "both": path.guided(wrong, control),
    }[kind]
    torch.manual_seed(0)
    log_likelihood = likelihood(grid)
    estimate = sd.particle_evidence(
        guided.expand([400]), log_likelihood, particles=40, resample_below=resample_below
    )
    w = (estimate - answer).exp()
    assert within(w, 1.0)
    if resample_below != 0.5:
        return
    # An evidence that is too high by a nat in all must be seen.
    tilted = dict.fromkeys(grid.index.tolist(), 0.12)
    biased = sd.particle_evidence(
        guided.expand([400]),
        lambda z, k: None if k not in tilted else log_likelihood(z, k) + tilted[k],
        particles=200,
    )
    assert not within((biased - answer).exp(), 1.0)


def test_dropping_the_look_ahead_is_seen():
    """Weighing by the density ratio alone, without undoing the look-ahead at the end of a step, is biased."""
    grid, path, potential, answer = setting()
    wrong = path.guided(sd.Message(0.7 * potential.information + 0.2, 0.7 * potential.precision))
    torch.manual_seed(0)
    z = wrong.rsample((4000,))
    log_w = path.log_prob(z) - wrong.log_prob(z)
    log_w = log_w + dist.Normal(grid.observed(z), NOISE).log_prob(problems.OU_VALUES).sum((-2, -1))
    assert within((log_w - answer).exp(), 1.0)
    ahead = wrong.message.log_value(z).sum(-1)
    assert not within((log_w - answer + ahead).exp(), 1.0)


@pytest.mark.parametrize("particles", [1, 7])
def test_exact_messages_give_the_exact_answer(particles):
    grid, path, potential, answer = setting(substeps=5)
    guided = path.guided(sd.information_filter(path, potential)).expand([50])
    estimate = sd.particle_evidence(guided, likelihood(grid), particles=particles)
    assert (estimate - answer).abs().max() < 1e-10
    other = path.guided(potential).expand([50])
    assert (sd.particle_evidence(other, likelihood(grid), particles=particles) - answer).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["diagonal", "matrix", "wide"])
def test_state_dependent_noise_with_resampling(kind):
    """Bootstrap and twisted filters with different weights agree on a model without closed form."""
    grid = sd.TimeGrid(problems.OU_TIMES[:4], substeps=2)

    def g(t, z):
        return 0.5 + 0.4 * z.sin()

    row = tensor(0.6, -0.8)
    noise = {
        "diagonal": g,
        "matrix": sd.MatrixDiffusion(lambda t, z: g(t, z)[..., None]),
        "wide": sd.MatrixDiffusion(lambda t, z: g(t, z)[..., None] * row),
    }[kind]
    start = dist.Normal(tensor(MU), 0.5).to_event(1)
    path = sd.SDEPath(lambda t, z: -z.sin(), noise, start, grid.ts)
    seen = torch.ones(4, 1, dtype=torch.bool)
    message = sd.information_filter(path, sd.Message.observed(grid, problems.OU_VALUES[:4], seen, NOISE))
    log_likelihood = likelihood(grid, problems.OU_VALUES[:4])
    torch.manual_seed(0)
    plain = sd.particle_evidence(path.expand([300]), log_likelihood, particles=200).exp()
    for guided in (path.guided(message), path.guided(message, control)):
        twisted = sd.particle_evidence(
            guided.expand([300]), log_likelihood, particles=60, resample_below=1.0
        ).exp()
        assert within(plain - twisted, 0.0)
        assert not within(plain - 1.1 * twisted, 0.0)


@pytest.mark.parametrize("start", ["lognormal", "gamma", "known"])
def test_other_starts(start):
    """The evidence of one observation of the start is a one-dimensional integral."""
    initial = {
        "lognormal": dist.LogNormal(tensor(0.1), 0.5).to_event(1),
        "gamma": dist.Gamma(tensor(3.0), tensor(2.5)).to_event(1),
        "known": tensor(1.1),
    }[start]
    path = sd.SDEPath(lambda t, z: -z, tensor(0.3), initial, tensor(0.0, 0.2))

    def log_likelihood(z, k):
        return dist.Normal(z[..., 0], 0.3).log_prob(tensor(0.9)) if k == 0 else None

    if start == "known":
        answer = dist.Normal(tensor(1.1), 0.3).log_prob(tensor(0.9)).squeeze()
        assert (sd.particle_evidence(path, log_likelihood, particles=3) - answer).abs() < 1e-12
        assert (
            sd.particle_evidence(path.expand([2]), log_likelihood, particles=3) - answer
        ).abs().max() < 1e-12
        return
    else:
        x = torch.linspace(1e-6, 20, 400001, dtype=F64)
        density = (initial.log_prob(x[:, None]) + dist.Normal(x, 0.3).log_prob(tensor(0.9))).exp()
        answer = torch.trapezoid(density, x).log()
    torch.manual_seed(0)
    message = sd.Message(tensor(-1.0, 0.0)[:, None], tensor(2.0, 0.0)[:, None])
    for guided in (path, path.guided(message)):
        assert within(ratios(guided, log_likelihood, answer, particles=100), 1.0)


def test_batches_of_own_grids():
    times = torch.tensor([[0.1, 0.3, 1.0], [0.0, 0.7, 0.7]], dtype=F64)
    grid = sd.TimeGrid(times, substeps=2)
    start = dist.Normal(tensor(MU), 0.5).to_event(1)
    y = tensor(0.3, 0.6, 0.1)[:, None].expand(2, 3, 1)
    mask = torch.tensor([[True, True, True], [True, True, False]])[..., None]

    def build(ts):
        return sd.SDEPath(lambda t, z: THETA * (MU - z), tensor(SIGMA), start, ts)

    def log_likelihood(z, k):
        if k % 2:
            return None
        i = k // 2
        return torch.where(mask[:, i, 0], dist.Normal(z[..., 0], NOISE).log_prob(y[:, i, 0]), 0.0)

    path = build(grid.ts)
    guided = path.guided(sd.information_filter(path, sd.Message.observed(grid, y, mask, NOISE)))
    both = sd.particle_evidence(guided, log_likelihood, particles=3)
    assert both.shape == (2,)
    for i, n in enumerate((3, 2)):
        own = sd.TimeGrid(times[i, :n], substeps=2)
        model = problems.ou_discretised(own.ts.diff(), **problems.OU)
        model.P = 0.25 * torch.ones(1, 1, dtype=F64)
        answer = problems.kalman_log_evidence(model, {2 * k: y[i, k] for k in range(n)})
        assert abs(both[i] - answer) < 1e-10


def test_particles_that_explode_are_lost_not_fatal():
    path = sd.SDEPath(lambda t, z: z**9, tensor(3.0), tensor(0.0), torch.linspace(0, 1, 30).double())
    torch.manual_seed(0)
    estimate = sd.particle_evidence(
        path,
        lambda z, k: dist.Normal(z[..., 0], 1.0).log_prob(tensor(0.0)) if k == 29 else None,
        particles=50,
    )
    assert estimate == -math.inf or torch.isfinite(estimate)


def test_refusals():
    grid, path, _, _ = setting()
    with pytest.raises(
        sd.FieldError, match=r"returned shape \(5, 1\), expected \(particles, \*batch\) = \(5,\)"
    ):
        sd.particle_evidence(path, lambda z, k: z, particles=5)
    with pytest.raises(sd.FieldError, match=r"at least 1, got 0"):
        sd.particle_evidence(path, likelihood(grid), particles=0)
