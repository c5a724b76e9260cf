"""The iterated smoother, on models whose likelihood or dynamics is not linear."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from stochdyn.errors import GuideError
from stochdyn.guides.smoother import without_particles
from tests.programs import F64, elbos, mean_and_error, normal, ou_path


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


COUNTS = sd.Series(
    torch.linspace(0, 3, 7),
    torch.tensor([[2, 5, 9, 14, 6, 3, 1], [0, 1, 0, 2, 1, 4, 3]], dtype=F64)[..., None],
)


def counts(batch):
    """Poisson counts whose log rate is an Ornstein-Uhlenbeck process."""
    grid = sd.TimeGrid(batch.times, substeps=3)
    with batch.plate("series"):
        z = pyro.sample("z", ou_path(grid.ts, 1.0, 1.0, 1.0))
        seen = dist.Poisson(grid.observed(z).exp()).mask(batch.mask).to_event(2)
        pyro.sample("y", seen, obs=batch.values)


def predators(batch):
    """A stochastic Lotka-Volterra model in logarithms, with a rate to learn."""
    rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.0, dtype=F64), 0.3))
    grid = sd.TimeGrid(batch.times, substeps=4)

    def drift(t, z):
        return torch.stack(torch.broadcast_tensors(rate - z[..., 1].exp(), z[..., 0].exp() - 1.0), -1)

    with batch.plate("series"):
        start = dist.Normal(torch.zeros(2, dtype=F64), 0.5).to_event(1)
        path = sd.SDEPath(
            drift, torch.full((2,), 0.2, dtype=F64), start, grid.ts, solver=sd.GaussianStep(mean=sd.Heun())
        )
        z = pyro.sample("z", path)
        seen = dist.Normal(grid.observed(z), 0.2).mask(batch.mask).to_event(2)
        pyro.sample("y", seen, obs=batch.values)


PREY = sd.Series(
    torch.linspace(0, 4, 9),
    torch.stack([torch.linspace(0, 4, 9).cos(), torch.linspace(0, 4, 9).sin()], -1)[None].double(),
)


def with_bound(log_w):
    """The ELBO, its standard error, and the importance-weighted bound from the same draws."""
    assert torch.isfinite(log_w).all()
    return *mean_and_error(log_w), log_w.logsumexp(0).item() - math.log(len(log_w))


@pytest.mark.parametrize(
    ("model", "data"),
    [
        pytest.param(counts, COUNTS, id="counts"),
        pytest.param(predators, PREY, id="predators", marks=pytest.mark.slow),
    ],
)
def test_the_bound_is_tight_before_and_tighter_after_training(model, data):
    guide = sd.AmortizedGuide(model)
    mean, error, bound = with_bound(elbos(model, guide, data, draws=1500))
    assert mean + 4 * error < bound < mean + 6
    sd.fit(model, guide, data, steps=60, lr=0.03, progress=False)
    after, other, bound = with_bound(elbos(model, guide, data, draws=1500))
    assert after > mean + 4 * math.hypot(error, other)
    assert after + 4 * other < bound < after + 2
    blind = sd.AmortizedGuide(model, paths=sd.FreeMessage())
    assert elbos(model, blind, data, draws=1000).mean() < mean - 1


def test_relinearising_helps():
    means = []
    for refine in (0, 5):
        guide = sd.AmortizedGuide(counts, paths=sd.FilterMessage(refine=refine))
        means.append(mean_and_error(elbos(counts, guide, COUNTS, draws=1000)))
    (a, s), (b, t) = means
    assert b - a > 4 * math.hypot(s, t)


def test_for_a_linear_model_the_estimate_is_the_smoothed_mean():
    def model(batch):
        grid = sd.TimeGrid(batch.times, substeps=2)
        with batch.plate("series"):
            z = pyro.sample("z", ou_path(grid.ts, 1.0, 0.0, 1.0))
            pyro.sample("y", dist.Normal(grid.observed(z), 0.1).to_event(2), obs=batch.values)

    batch = sd.Series(torch.linspace(0, 1, 4), torch.randn(2, 4, 1, dtype=F64))
    guide = sd.AmortizedGuide(model, paths=sd.FilterMessage(refine=1, follow=0.0))
    guide(batch)
    with torch.no_grad(), pyro.plate("particles", 400, dim=-2):
        draws = guide(batch)["z"]
    error = draws.std(0) / 20
    assert ((draws.mean(0) - guide.paths["z"].around).abs() < 5 * error).all()
    assert (guide.paths["z"].around.abs() > 5 * error).any()


def test_a_masked_observed_site_says_nothing():
    def model(batch):
        grid = sd.TimeGrid(batch.times, substeps=2)
        with batch.plate("series"):
            z = pyro.sample("z", ou_path(grid.ts, 1.0, 0.0, 1.0))
            with poutine.mask(mask=torch.tensor([True, False])):
                pyro.sample("y", dist.Normal(grid.observed(z), 0.1).to_event(2), obs=batch.values)

    batch = sd.Series(torch.linspace(0, 1, 4), torch.full((2, 4, 1), 2.0, dtype=F64))
    guide = sd.AmortizedGuide(model)
    assert elbos(model, guide, batch, draws=10).var() < 1e-10
    q = poutine.trace(guide).get_trace(batch).nodes["z"]["fn"]
    assert q.message.precision[0].max() > 10
    assert not q.message.precision[1].any()


def test_the_filter_sees_latents_sampled_before_and_medians_of_those_after():
    def model(batch):
        mu = pyro.sample("mu", normal(0.0, 1.0))
        grid = sd.TimeGrid(batch.times, substeps=2)
        with batch.plate("series"):
            z = pyro.sample("z", ou_path(grid.ts, 1.0, mu, 1.0))
            noise = pyro.sample("noise", dist.LogNormal(torch.tensor(-1.0, dtype=F64), 0.1))
            seen = dist.Normal(grid.observed(z), noise[..., None, None]).to_event(2)
            pyro.sample("y", seen, obs=batch.values)

    batch = sd.Series(torch.linspace(0, 1, 4), torch.full((2, 4, 1), 2.0, dtype=F64))
    guide = sd.AmortizedGuide(model)
    guide(batch)
    with torch.no_grad():
        guide.locals["noise"].loc.fill_(math.log(0.1))
    last = poutine.trace(guide).get_trace(batch).nodes["z"]["fn"].message
    torch.testing.assert_close(last.precision[:, -1, 0, 0], torch.full((2,), 100.0, dtype=F64))
    replayed = [
        poutine.trace(poutine.condition(guide, {"mu": torch.tensor(m, dtype=F64)})).get_trace(batch)
        for m in (0.0, 1.0)
    ]
    a, b = (trace.nodes["z"]["fn"].message.information for trace in replayed)
    assert (a - b)[:, :-1].abs().max() > 1e-3


def test_a_part_of_other_data_is_fine():
    """Observations in a mini-batch that do not read the path do not make it a partial reader."""

    def model(batch, shared):
        grid = sd.TimeGrid(shared.times, substeps=2)
        z = pyro.sample("z", ou_path(grid.ts, 1.0, 0.0, 1.0))
        pyro.sample("x", dist.Normal(grid.observed(z), 0.1).to_event(2), obs=shared.values[0])
        with batch.plate("series"):
            level = z[..., -1, :] if batch.obs_dim == 2 else torch.zeros(1, dtype=F64)
            seen = dist.Normal(level[..., None, :].expand(*level.shape[:-1], 4, batch.obs_dim), 1.0).to_event(
                2
            )
            pyro.sample("y", seen, obs=batch.values)

    shared = sd.Series(torch.linspace(0, 1, 4), torch.randn(1, 4, 1, dtype=F64))
    apart, reading = (sd.Series(torch.linspace(0, 1, 4), torch.randn(5, 4, c, dtype=F64)) for c in (1, 2))
    sd.AmortizedGuide(model)(apart[:2], shared)
    sd.AmortizedGuide(model)(reading, shared)
    with pytest.raises(GuideError, match="2 of 5"):
        sd.AmortizedGuide(model)(reading[:2], shared)


def test_particles_are_averaged_out():
    path = torch.randn(6, 1, 4, 5, 2)
    torch.testing.assert_close(without_particles(path, 1), path.mean((0, 1)))
    assert without_particles(path[0, 0], 1).equal(path[0, 0])
    assert without_particles(path, 0).shape == (5, 2)
