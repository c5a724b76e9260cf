"""The latent ODE: exact posteriors of its starts; it trains, predicts, copies and loads."""

import pyro
import pytest
import torch
from torch import nn

import stochdyn as sd
from tests.waves import loss_of, waves


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    assert not list(pyro.get_param_store().keys())


def exact_starts(batch, model):
    """Posterior mean and sd of the start of a linear latent ODE with fixed noise, by least squares."""
    field, net, noise = model.field, model.decoder.net, model.decoder.log_scale.exp()
    zero, eye = torch.zeros(model.state_dim), torch.eye(model.state_dim)
    means, sds = [], []
    for i in range(len(batch)):
        ts = batch.times.expand(len(batch), -1)[i]
        states = sd.odeint(field, torch.cat([zero[None], eye]), ts, solver=model.solver)
        shown = net(states)
        base, columns = shown[0], (shown[1:] - shown[0]).movedim(0, -1)
        seen = batch.mask[i]
        A = (columns / noise[:, None])[seen]
        r = ((batch.values[i] - base) / noise)[seen]
        covariance = torch.linalg.inv(A.T @ A + eye)
        means.append(covariance @ A.T @ r)
        sds.append(covariance.diagonal().sqrt())
    return torch.stack(means).detach(), torch.stack(sds).detach()


class Spiral(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.1, -3.0], [3.0, -0.1]]))

    def forward(self, t, z):
        return z @ self.matrix.T


def test_a_linear_latent_ode_reaches_the_exact_posterior_of_every_start():
    """With the fields held fixed only the guide learns; the control is the guide before it has."""
    torch.manual_seed(1)
    batch = waves(series=32)
    decoder = sd.NormalDecoder(nn.Identity(), 2, scale=0.3, learned=False)
    model = sd.LatentODE(
        obs_dim=2,
        state_dim=2,
        hidden=32,
        field=Spiral(),
        decoder=decoder,
        encoder=sd.GRUEncoder(2, 32),
        solver=sd.RungeKutta4(),
    )
    model.field.requires_grad_(False)
    mean, sd_exact = exact_starts(batch, model)

    def distance(fit):
        found = sd.predict(fit, batch, draws=400).latents["z0"]
        return (
            ((found.mean(0) - mean) / sd_exact).square().mean().sqrt(),
            (found.std(0) / sd_exact).log().abs().mean(),
        )

    model.guide(batch)
    untrained = distance((model, model.guide))
    fit = sd.fit(model, model.guide, batch, steps=300, lr=2e-2, progress=False)
    shift, ratio = distance(fit)
    assert shift < 0.15
    assert ratio < 0.1
    assert untrained[0] > 1


def test_a_latent_ode_learns_predicts_and_copies():
    batch = waves(series=16)
    torch.manual_seed(1)
    model = sd.LatentODE(obs_dim=2, state_dim=3, hidden=8, noise=0.5, gradient=sd.Checkpointed(2))
    model.guide(batch)
    before = loss_of(model, batch)
    fit = sd.fit(model, model.guide, batch, steps=80, lr=0.02, progress=False)
    assert loss_of(model, batch) < before - 20
    prediction = sd.predict(fit, batch, ts=[2.5], draws=5)
    assert prediction.states.shape == (5, 16, 8, 3)
    assert prediction.observations.shape == (5, 16, 8, 2)
    fresh = sd.LatentODE(obs_dim=2, state_dim=3, hidden=8, noise=0.5)
    fresh.guide(batch)
    fresh.load_state_dict(model.state_dict())
    fresh.guide.load_state_dict(model.guide.state_dict())
    assert loss_of(fresh, batch) == loss_of(model, batch)


def test_a_latent_ode_takes_ragged_series_and_covariates():
    rows = [([0.0, 0.5, 1.2], torch.randn(3, 2)), ([0.3, 0.4], torch.randn(2, 2))]
    batch = sd.Series.from_list(rows, covariates=torch.tensor([[1.0], [-1.0]]))
    model = sd.LatentODE(obs_dim=2, state_dim=2, hidden=8, covariates=1)
    fit = sd.fit(model, model.guide, batch, steps=3, progress=False)
    states = sd.predict(fit, batch, draws=3).states
    assert states.shape == (3, 2, 3, 2)
    assert torch.equal(states[:, 1, 1], states[:, 1, 2])
