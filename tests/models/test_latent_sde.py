"""The latent SDE: it trains under every family of paths, predicts, copies and loads."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import stochdyn as sd
from tests.waves import loss_of, waves

FAMILIES = {
    "diagonal": sd.FreeMessage(rank=0),
    "full": sd.FreeMessage(),
    "filter": sd.FilterMessage(refine=1),
    "drift": sd.PosteriorDrift(hidden=(8,)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    assert not list(pyro.get_param_store().keys())


def small(family="full", **options):
    torch.manual_seed(1)
    return sd.LatentSDE(obs_dim=2, state_dim=2, hidden=8, noise=0.5, paths=FAMILIES[family], **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_trains(family):
    model, batch = small(family), waves()
    model.guide(batch)
    before, lost = copy.deepcopy(model), loss_of(model, batch)
    fit = sd.fit(model, model.guide, batch, steps=60 if family != "filter" else 25, lr=0.02, progress=False)
    assert loss_of(model, batch) < lost - 5
    for module in ("process", "decoder", "guide"):
        old, new = (dict(getattr(m, module).named_parameters()) for m in (before, model))
        still = {name for name in new if torch.equal(old[name], new[name])}
        assert still == set(), f"{module}: {still}"
    assert fit.model is model


def test_trains_under_pyros_svi():
    model, batch = small(), waves()
    model.guide(batch)
    before, lost = copy.deepcopy(model), loss_of(model, batch)
    svi = SVI(model, model.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(60):
        svi.step(batch)
    assert loss_of(model, batch) < lost - 5
    for module in ("process", "decoder", "guide"):
        old, new = (dict(getattr(m, module).named_parameters()) for m in (before, model))
        assert not any(torch.equal(old[name], new[name]) for name in new)
    pyro.clear_param_store()


def test_is_the_program_it_says():
    """Against the same model written out: the joint density of one draw."""
    model, batch = small(), waves()
    trace = poutine.trace(model).get_trace(batch)
    trace.compute_log_prob()
    grid, z = sd.TimeGrid(batch.times, substeps=2), trace.nodes["z"]["value"]
    prior = sd.SDEPath(model.process.drift, model.process.diffusion, model.process.initial(), grid.ts)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], prior.log_prob(z))
    at_times = z[:, ::2]
    seen = dist.Normal(at_times @ model.decoder.net.weight.mT + model.decoder.net.bias, 0.5)
    expected = torch.where(batch.mask, seen.log_prob(batch.values), torch.zeros(())).sum((-1, -2))
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], expected, rtol=1e-5, atol=1e-4)
    assert trace.nodes["y"]["cond_indep_stack"][0].name == "series"


def test_the_guide_is_not_the_models():
    model, batch = small(), waves()
    model.guide(batch)
    assert not any("guide" in name or "encoder" in name for name in model.state_dict())
    assert {name.split(".")[0] for name in model.state_dict()} == {"process", "decoder"}
    assert {name.split(".")[0] for name in model.guide.state_dict()} == {"encoder", "paths"}
    owned = {id(p) for p in model.parameters()}
    assert not owned & {id(p) for p in model.guide.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_a_model_with_its_guide(family):
    model, batch = small(family), waves()
    model.guide(batch)
    twin = copy.deepcopy(model)
    assert twin.guide is not model.guide
    assert twin.guide.model is twin
    both = {id(p) for m in (model, model.guide) for p in m.parameters()}
    assert not both & {id(p) for m in (twin, twin.guide) for p in m.parameters()}
    assert loss_of(twin, batch, 2) == loss_of(model, batch, 2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    sd.fit(twin, twin.guide, batch, steps=3, progress=False)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert loss_of(twin, batch, 2) != loss_of(model, batch, 2)


@pytest.mark.parametrize("family", ["full", "drift"])
def test_save_and_load(family, tmp_path):
    model, batch = small(family), waves()
    sd.fit(model, model.guide, batch, steps=5, lr=0.02, progress=False)
    for name, part in (("model", model), ("guide", model.guide)):
        torch.save(part.state_dict(), tmp_path / f"{name}.pt")
    fresh = sd.LatentSDE(obs_dim=2, state_dim=2, hidden=8, paths=FAMILIES[family])
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    fresh.guide.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    for m in (model, fresh):
        m.eval(), m.guide.eval()
    assert loss_of(fresh, batch, 2) == loss_of(model, batch, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_predicts(family):
    model, batch = small(family), waves()
    fit = sd.fit(model, model.guide, batch, steps=3, progress=False)
    found = sd.predict(fit, batch, ts=[2.5, 3.0], draws=7)
    assert found.observations.shape == (7, 8, 9, 2)
    assert found.states.shape == (7, 8, 9, 2)
    assert torch.isfinite(found.observations).all()
    new = waves(series=3, points=5, seed=1)
    assert sd.predict(fit, new, draws=7).observations.shape == (7, 3, 5, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forecast_runs_on_by_the_prior(family):
    """After the last observation guide and prior have one density, whatever they learned before."""
    model, batch = small(family), waves()
    sd.fit(model, model.guide, batch, steps=20, lr=0.02, progress=False)
    times = torch.cat([batch.times, torch.tensor([2.5, 3.0], dtype=batch.times.dtype)])
    pad = torch.zeros(8, 2, 2)
    longer = sd.Series(times, torch.cat([batch.values, pad], 1), mask=torch.cat([batch.mask, pad.bool()], 1))
    model.eval(), model.guide.eval()
    with torch.no_grad():
        q = poutine.trace(model.guide).get_trace(longer).nodes["z"]
        p = poutine.trace(poutine.replay(model, trace=poutine.Trace())).get_trace(longer).nodes["z"]
        z, last = q["value"], 2 * (len(batch.times) - 1)
        moved = z.clone()
        moved[:, last + 1 :] += 0.5 * torch.randn_like(moved[:, last + 1 :])
        gaps = [site["fn"].log_prob(moved) - site["fn"].log_prob(z) for site in (q, p)]
        torch.testing.assert_close(*gaps, rtol=1e-4, atol=1e-3)
        assert gaps[0].abs().min() > 0.01
        before = z.clone()
        before[:, 1:last] += 0.5 * torch.randn_like(before[:, 1:last])
        gaps = [site["fn"].log_prob(before) - site["fn"].log_prob(z) for site in (q, p)]
        assert (gaps[0] - gaps[1]).abs().max() > 0.02


def test_parts_can_be_replaced():
    class Spring(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(2.0))

        def forward(self, t, z):
            return self.rate * torch.stack([z[..., 1], -z[..., 0]], -1)

    process = sd.NeuralSDE(2, drift=Spring(), diffusion=nn.Parameter(torch.full((2,), 0.3)))
    decoder = sd.NormalDecoder(nn.Identity(), 2, scale=0.1, learned=False)
    encoder = sd.ConvEncoder(2, 8)
    model = sd.LatentSDE(
        2, 2, hidden=8, process=process, decoder=decoder, encoder=encoder, paths=FAMILIES["filter"]
    )
    batch = waves()
    sd.fit(model, model.guide, batch, steps=100, lr=0.02, progress=False)
    assert model.guide.encoder is encoder
    assert 2.1 < model.process.drift.rate.item() < 3.3  # on its way from 2 to 3
    assert set(dict(model.named_parameters())) == {
        "process.diffusion", "process.drift.rate", "process.start_loc", "process.start_log_scale",
    }  # fmt: skip


def test_double_precision_takes_both():
    model = sd.LatentSDE(2, 2, hidden=8).double()
    model.guide.double()
    batch = waves()
    batch = sd.Series(batch.times, batch.values.double(), mask=batch.mask)
    fit = sd.fit(model, model.guide, batch, steps=2, progress=False)
    assert sd.predict(fit, batch, draws=3).states.dtype == torch.float64


def driven(covariates=None, series=8):
    """A relaxation towards an input that jumps, at times of its own."""
    torch.manual_seed(0)
    times = torch.linspace(0, 4, 9)
    height = torch.randn(series, 1)
    seen = torch.where(times > 2, height * (1 - torch.exp(2 - times)), torch.zeros(()))[..., None]
    data = sd.Series(times, seen + 0.02 * torch.randn_like(seen))
    return data.with_covariates(sd.Series([0.0, 2.1], torch.stack([0 * height, height], 1)))


@pytest.mark.parametrize("family", [*FAMILIES, "marginals"])
def test_covariates_in_every_family(family):
    torch.manual_seed(1)
    paths, batch = FAMILIES.get(family, sd.Marginals()), driven()
    model = sd.LatentSDE(1, 1, hidden=8, noise=0.5, covariates=1, paths=paths)
    model.guide(batch)
    objective = sd.PathELBO() if family == "marginals" else sd.ELBO()
    fit = sd.fit(model, model.guide, batch, steps=25, lr=0.02, objective=objective, progress=False)
    assert sum(fit.losses[-5:]) < sum(fit.losses[:5]) - 10
    found = sd.predict(fit, batch, ts=[5.0], draws=5)
    assert found.states.shape == (5, 8, 11, 1)
    assert torch.isfinite(found.observations).all()


def test_covariates_enter_the_drift_at_their_times():
    """Against the same density written out, with the rows of the context by hand."""
    torch.manual_seed(1)
    model, batch = sd.LatentSDE(1, 1, hidden=8, covariates=1), driven()
    site = poutine.trace(model).get_trace(batch).nodes["z"]
    grid = sd.TimeGrid(batch.times, substeps=2)
    acting = (grid.ts >= 2.1)[:, None] * batch.covariates[:, -1:]
    prior = model.process(grid.ts, acting.reshape(8, -1, 1))
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), prior.log_prob(site["value"]))
    early = model.process(grid.ts, torch.cat([acting[:, 1:], acting[:, -1:]], 1).reshape(8, -1, 1))
    assert not torch.allclose(early.log_prob(site["value"]), prior.log_prob(site["value"]), rtol=1e-3)


def test_a_known_future_of_the_covariates():
    """Carried on without one; with one the forecast is another, and the past is the same."""
    torch.manual_seed(1)
    model, batch = sd.LatentSDE(1, 1, hidden=8, noise=0.1, covariates=1), driven()
    fit = sd.fit(model, model.guide, batch, steps=60, lr=0.02, progress=False)
    inputs = batch.covariates[:, [0, -1]]
    plain = sd.predict(fit, batch, ts=[5.0, 6.0], draws=50)

    def future(height):
        rows = torch.cat([inputs, torch.full((8, 1, 1), height)], 1)
        series = batch.with_covariates(sd.Series([0.0, 2.1, 5.0], rows))
        return sd.predict(fit, series, ts=[6.0], draws=50)

    kept, other = future(0.0), future(50.0)
    assert torch.equal(kept.times, plain.times)
    assert torch.equal(kept.states[:, :, :-1], other.states[:, :, :-1])  # up to time 5 and at it
    assert (kept.states[:, :, -1] - other.states[:, :, -1]).abs().mean() > 0.5
    same = sd.predict(fit, batch.with_covariates(sd.Series([0.0, 2.1], inputs)), ts=[5.0, 6.0], draws=50)
    assert torch.equal(same.states, plain.states)


def test_another_number_of_covariates_is_refused():
    model = sd.LatentSDE(1, 1, hidden=8, covariates=2)
    with pytest.raises(sd.FieldError, match="context of size 2, got 1"):
        model(driven())
    with pytest.raises(sd.DataError, match="no covariates"):
        model(sd.Series([0.0, 1.0], torch.zeros(2, 2, 1)))
