"""The same model and guide under Pyro's own engines: ELBOs, particles, SVI, Predictive, condition, NUTS."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from torch import nn

import stochdyn as sd
from tests.problems import OU
from tests.programs import (
    F64,
    elbos,
    local_theta,
    mean_and_error,
    normal,
    observe,
    ou,
    ou_evidence,
    ou_path,
    ou_series,
    own_times,
)

BATCH = ou_series(3, own_times(3, 5), hold=[(1, 2)])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    assert not list(pyro.get_param_store().keys())


def estimates(elbo, model, guide, batch, times):
    with torch.no_grad():
        return mean_and_error(torch.tensor([-elbo.loss(model, guide, batch) for _ in range(times)]))


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(alpha=0.0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
def test_every_elbo_gives_the_evidence(elbo):
    guide = sd.AmortizedGuide(ou)
    exact = ou_evidence(BATCH).sum().item()
    value = -elbo.loss(ou, guide, BATCH)
    if isinstance(elbo, TraceMeanField_ELBO):  # its KL is estimated step by step: right on average only
        mean, error = estimates(elbo, ou, guide, BATCH, 60)
        assert abs(mean - exact) < 4 * error
        assert error < 0.5
    else:
        assert value == pytest.approx(exact, abs=1e-8)
    elbo.loss_and_grads(ou, guide, BATCH)
    assert guide.paths["z"].numbers.grad is not None
    assert abs(exact + elbo.loss(ou, sd.AmortizedGuide(ou, paths=sd.FreeMessage()), BATCH)) > 0.1


@pytest.mark.parametrize(
    "elbo", [TraceMeanField_ELBO(), TraceGraph_ELBO()], ids=lambda elbo: type(elbo).__name__
)
def test_elbos_agree_with_local_latents(elbo):
    guide = sd.AmortizedGuide(local_theta)
    reference, error = mean_and_error(elbos(local_theta, guide, BATCH, draws=2000))
    mean, other = estimates(elbo, local_theta, guide, BATCH, 40)
    assert abs(mean - reference) < 4 * math.hypot(error, other)


def test_renyi_bounds_are_in_order():
    guide = sd.AmortizedGuide(local_theta)
    elbo, error = mean_and_error(elbos(local_theta, guide, BATCH, draws=1000))
    renyi = RenyiELBO(alpha=0.0, num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    bound, other = estimates(renyi, local_theta, guide, BATCH, 10)
    assert bound - elbo > 4 * math.hypot(error, other)


SHARE = 0.2


def outliers(batch, enumerate_="parallel"):
    """Every series is, with probability .2, seen with five times the noise."""
    grid = sd.TimeGrid(batch.times, substeps=3)
    with batch.plate("series"):
        wild = pyro.sample(
            "wild", dist.Bernoulli(torch.tensor(SHARE, dtype=F64)), infer={"enumerate": enumerate_}
        )
        z = pyro.sample("z", ou_path(grid.ts, OU["theta"], OU["mu"], OU["sigma"]))
        noise = OU["noise"] * (1 + 4 * wild)[..., None, None]
        observe(grid, z, batch, noise)


def test_a_discrete_latent_beside_the_path_is_summed_out():
    calm = ou_evidence(BATCH, substeps=3)
    wild = ou_evidence(BATCH, noise=5 * OU["noise"], substeps=3)
    exact = torch.logaddexp(calm + math.log(1 - SHARE), wild + math.log(SHARE)).sum().item()
    guide = sd.AmortizedGuide(outliers)
    mean, error = estimates(TraceEnum_ELBO(max_plate_nesting=1), outliers, guide, BATCH, 60)
    assert mean < exact + 4 * error
    assert mean > exact - 1.0
    with torch.no_grad(), pyro.plate("particles", 2000, dim=-2):
        q = poutine.trace(guide).get_trace(BATCH)
        q.compute_log_prob()
        parts = []
        for k, share in ((0.0, 1 - SHARE), (1.0, SHARE)):
            values = {"z": q.nodes["z"]["value"], "wild": torch.full((2000, 3), k, dtype=F64)}
            p = poutine.trace(poutine.condition(outliers, values)).get_trace(BATCH)
            p.compute_log_prob()
            parts.append(p.nodes["z"]["log_prob"] + p.nodes["y"]["log_prob"] + math.log(share))
    by_hand, other = mean_and_error((torch.logaddexp(*parts) - q.nodes["z"]["log_prob"]).sum(-1))
    assert abs(mean - by_hand) < 4 * math.hypot(error, other)
    assert by_hand > calm.sum().item() + 3 * math.log(1 - SHARE) + 4 * other  # what one mode alone would give


def test_predictive_draws_the_posterior():
    guide = sd.AmortizedGuide(ou)
    draws = Predictive(ou, guide=guide, num_samples=400, parallel=True, return_sites=["z", "y"])(BATCH)
    assert draws["z"].shape == (400, 3, 21, 1)
    shape = draws["y"].shape
    assert shape[-3:] == (3, 5, 1)
    one = Predictive(ou, guide=guide, num_samples=3, return_sites=["z"])(BATCH)
    assert one["z"].shape == (3, 3, 21, 1)
    # Where the data are precise the posterior mean follows them, unlike the prior's.
    grid = sd.TimeGrid(BATCH.times)
    error = (grid.observed(draws["z"]).mean(0) - BATCH.values)[BATCH.mask].square().mean().sqrt()
    prior = (OU["mu"] - BATCH.values)[BATCH.mask].square().mean().sqrt()
    assert error < 0.2 < prior


def test_a_path_may_be_conditioned_on():
    grid = sd.TimeGrid(BATCH.times, substeps=3)
    path = ou_path(grid.ts, OU["theta"], OU["mu"], OU["sigma"]).expand((3,)).sample()
    held = poutine.condition(local_theta, {"z": path})
    guide = sd.AmortizedGuide(held)
    values = elbos(held, guide, BATCH, draws=10)
    assert torch.isfinite(values).all()
    assert sorted(guide(BATCH)) == ["level", "theta"]
    assert not guide.paths


def test_another_guide_for_the_latents_that_are_no_paths():
    def model(batch):
        ou(batch, mu=pyro.sample("mu", normal(0.0, 1.0)))

    auto = AutoNormal(poutine.block(model, expose=["mu"]), init_scale=0.3)
    given = {}
    path = sd.AmortizedGuide(lambda batch: poutine.condition(model, dict(given))(batch))

    def guide(batch):
        given.update(auto(batch))
        path(batch)

    guide(BATCH)
    mean, error = mean_and_error(elbos(model, guide, BATCH, draws=500))
    whole = sd.AmortizedGuide(model)
    whole(BATCH)
    with torch.no_grad():
        whole.joint.loc.copy_(auto.locs.mu), whole.joint.log_scale.fill_(math.log(0.3))
    reference, other = mean_and_error(elbos(model, whole, BATCH, draws=500))
    assert abs(mean - reference) < 4 * math.hypot(error, other)
    Trace_ELBO().differentiable_loss(model, guide, BATCH).backward()
    pyro.clear_param_store()  # AutoNormal keeps its parameters there


def test_nuts_over_parameters_and_path():
    batch = ou_series(1, torch.linspace(0, 2, 5))

    def model(batch):
        mu = pyro.sample("mu", normal(0.0, 1.0))
        grid = sd.TimeGrid(batch.times, substeps=1)
        with batch.plate("series"):
            z = pyro.sample("z", ou_path(grid.ts, OU["theta"], mu, OU["sigma"]))
            observe(grid, z, batch, OU["noise"])

    guide = sd.AmortizedGuide(model)
    mcmc = MCMC(NUTS(model, max_tree_depth=5), num_samples=150, warmup_steps=80, disable_progbar=True)
    mcmc.run(batch)
    draws = mcmc.get_samples()
    assert draws["z"].shape == (150, 1, 5, 1)
    with torch.no_grad():
        grid = torch.linspace(-3, 3, 61, dtype=F64)
        log_p = torch.stack([ou_evidence(batch, mu=float(m), substeps=1).sum() for m in grid])
    w = torch.softmax(log_p + normal(0.0, 1.0).log_prob(grid), 0)
    mean = (w * grid).sum()
    spread = (w * (grid - mean).square()).sum().sqrt()
    assert abs(draws["mu"].mean() - mean) < 4 * spread / math.sqrt(40)  # some forty independent draws
    assert guide(batch)["z"].shape == (1, 5, 1)


# Training by Pyro's own means.


class Learned(nn.Module):
    """Plain torch parameters, that Pyro does not know."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(-1.0, dtype=F64))
        self.level = nn.Parameter(torch.tensor(-1.0, dtype=F64))

    def forward(self, batch):
        ou(batch, theta=self.rate.exp(), mu=self.level, substeps=2)


def moved(module, before):
    return [not torch.equal(p, before[name]) for name, p in module.named_parameters()]


def copies(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("message", [sd.FilterMessage(), sd.FreeMessage()], ids=["filter", "free"])
def test_pyros_svi_trains_model_and_guide(message):
    model = Learned()
    guide = sd.AmortizedGuide(model, paths=message)
    guide(BATCH)
    before = copies(model), copies(guide)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    losses = [svi.step(BATCH) for _ in range(15)]
    assert all(moved(model, before[0]))
    assert any(moved(guide, before[1]))
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    if isinstance(message, sd.FilterMessage):
        assert (model.level.item(), model.rate.item()) > (-1.0, -1.0)


def test_a_torch_optimiser_trains_model_and_guide():
    model = Learned()
    guide = sd.AmortizedGuide(model, paths=sd.FreeMessage())
    guide(BATCH)
    before = copies(model), copies(guide)
    loss = Trace_ELBO()(model, guide)
    adam = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.1)
    losses = []
    for _ in range(15):
        adam.zero_grad()
        value = loss(BATCH)
        value.backward()
        adam.step()
        losses.append(value.item())
    assert all(moved(model, before[0]))
    assert all(moved(guide, before[1]))
    assert sum(losses[-5:]) < sum(losses[:5]) - 1


def test_a_pyro_module_is_trained_once_per_step():
    class Module(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.tensor(-1.0, dtype=F64))

        def forward(self, batch):
            ou(batch, mu=self.level, substeps=2)

    model = Module()
    svi = SVI(model, sd.AmortizedGuide(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(BATCH)
    assert model.level.item() == pytest.approx(-0.9, abs=1e-6)  # the first step of Adam is lr long
    pyro.clear_param_store()
