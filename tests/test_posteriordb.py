"""Published posteriors: Lotka-Volterra on the Hudson Bay pelts, by variational inference and by NUTS."""

import os
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from torch.distributions import constraints

import stochdyn as sd

F64 = torch.float64
FOLDER = os.environ.get("STOCHDYN_DATA")
DRAWS = Path(FOLDER or ".") / "lotka_volterra_reference_draws.npz"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not DRAWS.exists(), reason="set STOCHDYN_DATA to the folder with lotka_volterra_reference_draws.npz"
    ),
]
MODE = {"theta": [0.54, 0.027, 0.8, 0.024], "z_init": [33.9, 5.9], "sigma": [0.25, 0.25]}
NAMES = [*(f"theta[{k}]" for k in (1, 2, 3, 4)), "z_init[1]", "z_init[2]", "sigma[1]", "sigma[2]"]


class PositiveNormal(dist.Normal):
    """A normal, truncated to the positive numbers; its density up to a constant."""

    support = constraints.positive

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        shape = self._extended_shape(sample_shape)
        below = torch.special.ndtr(-self.loc / self.scale)
        share = below + (1 - below) * torch.rand(shape, dtype=self.loc.dtype).clamp(1e-6, 1 - 1e-6)
        return self.loc + self.scale * torch.special.ndtri(share)

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)


def parameters():
    """Of the Stan case study: rates, starts, relative errors."""
    loc, scale = (
        torch.tensor([1.0, 0.05, 1.0, 0.05], dtype=F64),
        torch.tensor([0.5, 0.05, 0.5, 0.05], dtype=F64),
    )
    theta = pyro.sample("theta", PositiveNormal(loc, scale).to_event(1))
    z_init = pyro.sample("z_init", dist.LogNormal(torch.full((2,), 10.0, dtype=F64).log(), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.full((2,), -1.0, dtype=F64), 1.0).to_event(1))
    return theta, z_init, sigma


def rates(theta):
    a, b, c, d = theta[..., None, :].unbind(-1)

    def field(t, z):
        x, y = z[..., :1], z[..., 1:]
        return torch.cat([(a - b * y) * x, (d * x - c) * y], -1)

    return field


def pelts():
    data = sd.datasets.lynx_hare()
    return sd.Series(data.times, data.values.double(), channels=data.channels)


def ode(batch, solver=sd.RungeKutta4(3)):  # noqa: B008
    theta, z_init, sigma = parameters()
    z = sd.odeint(rates(theta), z_init, batch.times, solver=solver)
    seen = dist.LogNormal(z.clamp(min=1e-8).log(), sigma[..., None, :])
    with batch.plate("series"):
        pyro.sample("y", seen.to_event(2), obs=batch.values)


def sde(mean):
    """The log populations as a path of tiny noise, so that any bias is that of the mean."""

    def model(batch):
        theta, z_init, sigma = parameters()
        a, b, c, d = theta[..., None, :].unbind(-1)

        def drift(t, z):
            x, y = z[..., :1].exp(), z[..., 1:].exp()
            return torch.cat([a - b * y, d * x - c], -1)

        grid = sd.TimeGrid(batch.times, substeps=5)
        with batch.plate("series"):
            path = sd.SDEPath(drift, torch.full((2,), 1e-3, dtype=F64), z_init.log(), grid.ts, solver=mean)
            z = pyro.sample("z", path)
            seen = dist.LogNormal(grid.observed(z), sigma[..., None, :])
            pyro.sample("y", seen.to_event(2), obs=batch.values)

    return model


def reference():
    drawn = np.load(DRAWS)
    return {name: drawn[name].reshape(-1) for name in NAMES}


def distances(draws):
    """Of means in reference sd, and of sds as a ratio."""
    flat = {}
    for site in ("theta", "z_init", "sigma"):
        for k, column in enumerate(draws[site].reshape(-1, draws[site].shape[-1]).T, 1):
            flat[f"{site}[{k}]"] = column.detach().numpy()
    wanted = reference()
    shift = np.array([(flat[n].mean() - wanted[n].mean()) / wanted[n].std() for n in NAMES])
    ratio = np.array([flat[n].std() / wanted[n].std() for n in NAMES])
    return shift, ratio


SEARCH = sd.Multistart(draws=200, finalists=8, steps=50)


def fitted(guide, steps, particles, lr=0.02, search=None):
    pyro.set_rng_seed(0)
    objective = sd.ELBO(particles=particles)
    options = {"steps": steps, "lr": lr, "objective": objective, "multistart": search, "progress": False}
    return sd.fit(guide.model, guide, pelts(), **options)


def flow_guide():
    """A flow for the ODE that begins where a cheaper guide, of many starts, ended."""
    first = sd.AmortizedGuide(ode)
    fitted(first, 300, 16, lr=0.05, search=SEARCH)
    guide = sd.AmortizedGuide(ode, latents=sd.Flow())
    guide(pelts())
    guide.joint.move_to(first.joint.at())
    return fitted(guide, 400, 64)


def means_of_sde(mean, ode_flow):
    """Shifts of the posterior of the SDE, its guide trained from the posterior of the ODE."""
    guide = sd.AmortizedGuide(sde(mean), latents=sd.Flow())
    guide(pelts())
    guide.joint.load_state_dict(ode_flow.joint.state_dict())
    return distances(sd.predict(fitted(guide, 200, 16), pelts(), draws=1000).latents)[0]


def test_ode_by_a_flow_guide_and_the_mode_that_one_start_ends_in():
    shift, ratio = distances(sd.predict(flow_guide(), pelts(), draws=4000).latents)
    assert np.abs(shift).max() < 0.1
    assert np.abs(ratio - 1).max() < 0.1
    alone = fitted(sd.AmortizedGuide(ode), 300, 16, lr=0.05)
    lost = distances(sd.predict(alone, pelts(), draws=1000).latents)[0]
    assert np.abs(lost).max() > 3


def test_ode_by_nuts():
    """From the modes that a guide finds: other starts may end in another."""
    pyro.set_rng_seed(0)
    start = {name: torch.tensor(v, dtype=F64) for name, v in MODE.items()}
    kernel = NUTS(ode, init_strategy=init_to_value(values=start), full_mass=True, max_tree_depth=7)
    mcmc = MCMC(kernel, num_samples=2500, warmup_steps=300, disable_progbar=True)
    mcmc.run(pelts())
    shift, ratio = distances(mcmc.get_samples())
    assert np.abs(shift).max() < 0.1
    assert np.abs(ratio - 1).max() < 0.1


def test_sde_of_tiny_noise_with_a_heun_mean_and_the_bias_of_euler():
    """Both start at the posterior of the ODE, and as many steps move the one away from it."""
    start = flow_guide().guide
    heun = means_of_sde(sd.GaussianStep(mean=sd.Heun()), start)
    assert np.abs(heun).max() < 0.2
    euler = means_of_sde(sd.EulerMaruyama(), start)
    assert np.abs(euler).max() > 1
