"""No step of a fit on an accelerator makes the host wait, counted on a pretended accelerator.

The same fits run on a GPU, where there is one, in `test_cuda.py`.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import stochdyn as sd
from stochdyn.inference import loop
from tests.synchronisation import FAR, pretended

LOOKED, STEPS = 2, 5


def waves(series=4, points=4, **options):
    generator = torch.Generator().manual_seed(0)
    times = torch.linspace(0, 2, points)
    phase = 6 * torch.rand(series, 1, generator=generator)
    values = torch.stack([torch.sin(3 * times + phase), torch.cos(3 * times + phase)], -1)
    mask = torch.rand(values.shape, generator=generator) > 0.2
    mask[:, -1] = True
    return sd.Series(times, values, mask=mask, **options)


def ragged():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(n, generator=generator).cumsum(0) for n in (4, 2, 3, 4, 1)]
    return sd.Series.from_list([(t, torch.stack([t.sin(), t.cos()], -1)) for t in rows])


class Levels(nn.Module):
    """A rate for all, a level for every group, one for every series, and a path about it."""

    def __init__(self):
        super().__init__()
        self.sigma = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("one", torch.ones(1))

    def forward(self, batch):
        rate = pyro.sample("rate", dist.LogNormal(0 * self.one, 0.3 * self.one).to_event(1))
        with batch.group_plate("site"):
            site = pyro.sample("site_level", dist.Normal(0 * self.one, self.one).to_event(1))
        grid = sd.TimeGrid(batch.times, substeps=1)
        with batch.plate("series"):
            level = pyro.sample("level", dist.Normal(site[batch.groups["site"]], self.one).to_event(1))
            start = dist.Normal(level, self.one).to_event(1)
            path = sd.SDEPath(lambda t, z: rate * (level - z), lambda t, z: self.sigma + 0 * z, start, grid.ts)
            z = pyro.sample("z", path)
            batch.observe("y", dist.Normal(grid.observed(z), 0.3 * self.one))


def levels(**options):
    model = Levels()
    encoder = sd.GRUEncoder(2, 4)
    return model, sd.AmortizedGuide(model, encoder, hidden=4, **options)


def latent_sde(**options):
    model = sd.LatentSDE(2, 2, hidden=4, substeps=1, noise=0.5, **options)
    return model, model.guide


def latent_ode(**options):
    model = sd.LatentODE(2, 2, hidden=4, noise=0.5, solver=sd.RungeKutta4(1), **options)
    return model, model.guide


def second_order():
    return latent_sde(process=sd.NeuralSDE(2, 4, drift=sd.HamiltonianField(2, hidden=(4,))))


def counts():
    return latent_sde(decoder=sd.PoissonDecoder(nn.Linear(2, 2)))


GROUPS = {"site": [0, 0, 1, 1]}
CASES = {
    "latent SDE, messages": (latent_sde, waves, {}),
    "latent SDE, filter": (lambda: latent_sde(paths=sd.FilterMessage(refine=1)), waves, {}),
    "latent SDE, posterior drift": (lambda: latent_sde(paths=sd.PosteriorDrift(hidden=(4,))), waves, {}),
    "latent SDE, simulation-free": (
        lambda: latent_sde(paths=sd.Marginals()), waves, {"objective": sd.PathELBO()},
    ),
    "latent SDE, second order": (second_order, waves, {}),
    "latent ODE": (latent_ode, waves, {}),
    "own times, batches": (latent_sde, ragged, {"batch_size": 2}),
    "own times, batches, filter": (lambda: latent_sde(paths=sd.FilterMessage(refine=1)), ragged, {"batch_size": 2}),
    "censored": (latent_sde, lambda: waves(lower=-0.5), {}),
    "covariates": (
        lambda: latent_sde(covariates=1), lambda: waves(covariates=torch.linspace(0, 1, 16).reshape(4, 4, 1)), {},
    ),
    "hierarchy, amortised": (
        lambda: levels(amortize={"level": "series", "site_level": "site"}), lambda: waves(groups=GROUPS), {},
    ),
    "hierarchy, a posterior for every member": (levels, lambda: waves(groups=GROUPS), {"batch_size": 2}),
    "analytic KL, weighted": (
        latent_sde, waves,
        {"objective": sd.ELBO(estimator=sd.AnalyticKL()), "kl_weight": sd.Linear(0.0, 1.0, 4)},
    ),
    "importance weighted": (latent_sde, waves, {"objective": sd.IWAE(2)}),
}  # fmt: skip


@pytest.fixture
def waits(monkeypatch):
    """What every step of a fit on the pretended device waited for, the taking of its batch included."""
    monkeypatch.setattr(loop, "VALIDATED_STEPS", LOOKED)
    take, found = loop.Trainer.take, []

    def fitted(model, guide, data, steps=STEPS, **options):
        torch.manual_seed(0)
        with pretended() as log:

            def counted(trainer, *args, **kwargs):
                done = take(trainer, *args, **kwargs)
                found.append(log[:])
                log.clear()
                return done

            monkeypatch.setattr(loop.Trainer, "take", counted)
            fit = sd.fit(model, guide, data, steps=steps, device=FAR, progress=False, **options)
        return fit, found

    return fitted


@pytest.mark.parametrize("name", CASES)
def test_a_step_does_not_wait(name, waits):
    make, data, options = CASES[name]
    torch.manual_seed(0)
    first = 3 if "batch_size" in options else LOOKED
    fit, found = waits(*make(), data(), steps=first + 3, **options)
    assert fit.skipped == 0
    assert len(fit.losses) == fit.step == len(found) == first + 3
    assert all(found[:LOOKED])  # the count sees what is there before
    assert found[first:] == [[], [], []]
