"""No step of a fit on an accelerator makes the host wait, counted on a pretended accelerator.

The same fits run on a GPU, where there is one, in `test_cuda.py`.
"""

import copy

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
            path = sd.SDEPath(
                lambda t, z: rate * (level - z), lambda t, z: self.sigma + 0 * z, start, grid.ts
            )
            z = pyro.sample("z", path)
            batch.observe("y", dist.Normal(grid.observed(z), 0.3 * self.one))


def levels(**options):
    model = Levels()
    encoder = sd.GRUEncoder(2, 4)
    return model, sd.AmortizedGuide(model, encoder, hidden=4, **options)


def latent_sde(**options):
    model = sd.LatentSDE(2, 2, hidden=4, substeps=1, noise=0.5, **options)
    return model, model.guide


def without_encoder(**options):
    """Posteriors in tables."""
    model = latent_sde()[0]
    return model, sd.AmortizedGuide(model, **options)


class Correlated(nn.Module):
    """Noise with a constant matrix as its factor."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([[0.5, 0.0], [0.2, 0.4]]))

    def forward(self, t, z):
        return self.factor.expand(*z.shape[:-1], 2, 2)


def matrix_noise():
    return latent_sde(process=sd.NeuralSDE(2, 4, diffusion=sd.MatrixDiffusion(Correlated())))


def latent_ode(**options):
    model = sd.LatentODE(2, 2, hidden=4, noise=0.5, solver=sd.RungeKutta4(1), **options)
    return model, model.guide


def second_order():
    return latent_sde(process=sd.NeuralSDE(2, 4, drift=sd.HamiltonianField(2, hidden=(4,))))


def counts():
    return latent_sde(decoder=sd.PoissonDecoder(nn.Linear(2, 2)))


def observation_jumps(**options):
    model = sd.ObservationJumpODE(2, 4, **options)
    return model, model.guide


GROUPS = {"site": [0, 0, 1, 1]}
CASES = {
    "latent SDE, messages": (latent_sde, waves, {}),
    "latent SDE, filter": (lambda: latent_sde(paths=sd.FilterMessage(refine=1)), waves, {}),
    "latent SDE, posterior drift": (lambda: latent_sde(paths=sd.PosteriorDrift(hidden=(4,))), waves, {}),
    "latent SDE, simulation-free": (
        lambda: latent_sde(paths=sd.Marginals()), waves, {"objective": sd.PathELBO()},
    ),
    "observation jumps": (lambda: observation_jumps(dt=0.2), waves, {}),
    "observation jumps, own times, batches": (lambda: observation_jumps(anchored=True), ragged, {"batch_size": 2}),
    "observation jumps, covariates": (
        lambda: observation_jumps(covariates=1, dt=None), lambda: waves(covariates=torch.linspace(0, 1, 16).reshape(4, 4, 1)),
        {},
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
    "particles": (latent_sde, waves, {"objective": sd.ELBO(particles=2)}),
    "tables, filter, batches": (without_encoder, waves, {"batch_size": 2}),
    "tables, free": (lambda: without_encoder(paths=sd.FreeMessage()), waves, {}),
    "tables, simulation-free": (
        lambda: without_encoder(paths=sd.Marginals()), waves, {"objective": sd.PathELBO()},
    ),
    "matrix noise": (matrix_noise, waves, {}),
    "checkpointed": (lambda: latent_ode(gradient=sd.Checkpointed(2)), waves, {}),
    "flow": (lambda: levels(latents=sd.Flow(transforms=1, hidden=(4,))), lambda: waves(groups=GROUPS), {}),
}  # fmt: skip
QUICK = {
    "latent SDE, messages", "latent SDE, filter", "latent SDE, posterior drift", "latent SDE, simulation-free",
    "latent ODE", "own times, batches", "hierarchy, amortised", "observation jumps",
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


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_a_step_does_not_wait(name, waits):
    """And finds what a fit on the CPU finds, which looks at every number: the draws are the same."""
    make, data, options = CASES[name]
    torch.manual_seed(0)
    model, guide = make()
    there = copy.deepcopy((model, guide))
    assert there[1].model is there[0]
    first = 3 if "batch_size" in options else LOOKED
    fit, found = waits(*there, data(), steps=first + 2, **options)
    assert fit.skipped == 0
    assert len(fit.losses) == fit.step == len(found) == first + 2
    assert all(found[:LOOKED])  # the count sees what is there before
    assert found[first:] == [[], []]
    torch.manual_seed(0)
    here = sd.fit(model, guide, data(), steps=first + 2, progress=False, **options)
    torch.testing.assert_close(fit.losses, here.losses, rtol=1e-4, atol=0)


class Normal(nn.Module):
    """A mean to be learned; `trouble(call)` is multiplied on the log density."""

    def __init__(self, trouble=lambda call, y: 1.0):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("calls", torch.zeros(()))
        self.trouble, self.call = trouble, 0

    def forward(self, y):
        self.call += 1
        self.calls += 1
        with pyro.poutine.scale(scale=self.trouble(self.call - 1, y)):
            pyro.sample(
                "y", dist.Normal(self.loc, torch.ones_like(self.loc)).expand(y.shape).to_event(1), obs=y
            )


Y = torch.tensor([1.0, 2.0, 3.0])


def no_guide(y):
    pass


@pytest.mark.parametrize(
    "look",
    [
        lambda y: y.sum().item(),
        lambda y: float(y.sum()),
        lambda y: len(y.nonzero()),
        lambda y: 1.0 if y.sum() > 0 else 0.0,
        lambda y: y.tolist()[0],
        lambda y: y.cpu().sum().numpy().item(),
        lambda y: len(y[y > 0]),
        lambda y: torch.tensor(1.0, device=y.device),
        lambda y: torch.ones(3).to(y.device).sum(),
        lambda y: y[torch.tensor([0])].sum(),
        lambda y: torch.linalg.cholesky(y.diag()).sum(),
        lambda y: len(y.unique()),
        lambda y: y.repeat_interleave(torch.ones_like(y).long()).sum(),
        lambda y: float(torch.allclose(y, y)),
    ],
)
def test_a_model_that_looks_at_numbers_is_counted(look, waits):
    """The control: each of these waits on a GPU."""
    _, found = waits(Normal(lambda call, y: look(y)), no_guide, Y)
    assert all(found[LOOKED:])


def test_what_only_works_on_one_device_is_refused():
    with pretended():
        y = Y.to(FAR)
        with pytest.raises(RuntimeError, match="two devices"):
            y + Y
        with pytest.raises(RuntimeError, match="generator is on the host"):
            torch.randn(3, device=FAR, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="a list as an index"):
            y[[0, 2]]
        assert (y + torch.tensor(1.0)).sum().item() == 9  # a single number goes along with the kernel


def nan_at(*calls):
    return lambda call, y: torch.full_like(y[0], float("nan") if call in calls else 1.0)


def test_a_step_that_is_not_finite_changes_nothing(waits):
    """Parameters, buffers and Adam's state are those of a fit that never met it."""
    model, other = Normal(nan_at(4, 5)), Normal()
    fit, found = waits(model, no_guide, Y, steps=8, lr=sd.Constant(0.1))
    clean, _ = waits(other, no_guide, Y, steps=6, lr=sd.Constant(0.1))
    assert (fit.step, fit.skipped, len(fit.losses)) == (8, 2, 6)
    assert found[3:8] == [[]] * 5
    torch.testing.assert_close(fit.losses, clean.losses, rtol=1e-6, atol=0)
    assert model.loc.near.item() == pytest.approx(other.loc.near.item(), rel=1e-6)
    assert model.calls.near.item() == other.calls.near.item() == 6


def test_ten_in_a_row_are_named_by_their_step_a_block_later(waits, monkeypatch):
    monkeypatch.setattr(loop, "BLOCK", 7)
    model = Normal(nan_at(*range(4, 100)))
    with pytest.raises(sd.FitError, match="step 13: 10 steps in a row were not finite") as caught:
        waits(model, no_guide, Y, steps=40)
    fit = caught.value.fit
    # Two steps were looked at, then blocks of seven.
    assert (fit.step, fit.skipped, len(fit.losses)) == (16, 10, 4)
    assert torch.isfinite(model.loc.near)


def test_losses_are_read_in_blocks(waits, monkeypatch):
    monkeypatch.setattr(loop, "BLOCK", 4)
    fit, found = waits(Normal(), no_guide, Y, steps=13)
    reads = [k for k, waited in enumerate(found) if waited and k >= LOOKED]
    assert reads == [5, 9]  # every fourth step, and once more at the end
    assert [len(found[k]) for k in reads] == [1, 1]
    assert len(fit.losses) == 13


def test_clipping_is_that_of_a_cpu(waits):
    def jumps(call, y):
        return torch.full_like(y[0], 100.0 if call == 3 else 1.0)

    fit, _ = waits(Normal(jumps), no_guide, Y, steps=8, lr=0.1, clip_norm=2.0)
    here = sd.fit(Normal(jumps), no_guide, Y, steps=8, lr=0.1, clip_norm=2.0, progress=False)
    torch.testing.assert_close(fit.losses, here.losses, rtol=1e-5, atol=0)


def test_watching_may_wait_and_changes_nothing(waits):
    fit, _ = waits(Normal(), no_guide, Y, steps=21, validate=Y)
    assert len(fit.validation) == 21
    assert all(torch.isfinite(torch.tensor([elbo for _, elbo in fit.validation])))
    plain, _ = waits(Normal(), no_guide, Y, steps=21)
    assert fit.losses == plain.losses
