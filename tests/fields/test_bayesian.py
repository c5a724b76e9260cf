"""Random weights: drawn once per path, one net for all series, scaled by the width, and their exact posterior."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample

import stochdyn as sd
from stochdyn.fields import has_drawn_weights
from stochdyn.guides.sites import lower_factor
from tests.problems import within

F64 = torch.float64
TS = torch.linspace(0, 1, 6, dtype=F64)
START = torch.tensor([0.3, -0.2], dtype=F64)
NOISE = torch.tensor([0.5, 0.7], dtype=F64)


@pytest.fixture(autouse=True)
def _seed():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def random_drift(hidden=(4,), name="drift", **options):
    return sd.bayesian(sd.NeuralField(2, hidden=hidden, **options), name).double()


def path_of(drift, ts=TS, start=START):
    return sd.SDEPath(drift, NOISE, start, ts)


def test_weights_are_drawn_once_per_path_and_anew_for_the_next():
    drift, z = random_drift(), torch.randn(6, 2, dtype=F64).index_fill(0, torch.tensor([0]), 0) + 0.0
    z[0] = START
    path = path_of(drift)
    assert torch.equal(path.log_prob(z), path.log_prob(z))
    assert not torch.equal(path.log_prob(z), path_of(drift).log_prob(z))
    value = path.rsample()
    assert torch.equal(path.guided().log_prob(value), path.log_prob(value))
    hidden_from_us = path_of(lambda t, x: drift(t, x))  # the control: a closure cannot be looked into
    assert not torch.equal(hidden_from_us.log_prob(z), hidden_from_us.log_prob(z))
    drawn = sd.draw_weights(drift)
    closed = path_of(lambda t, x: drawn(t, x))
    assert torch.equal(closed.log_prob(z), closed.log_prob(z))


def test_the_score_is_that_of_the_traced_weights():
    drift = random_drift()
    trace = poutine.trace(lambda: pyro.sample("z", path_of(drift))).get_trace()
    trace.compute_log_prob()
    layers = [
        (trace.nodes[f"drift.net.layers.{k}.weight"], trace.nodes[f"drift.net.layers.{k}.bias"])
        for k in (0, 1)
    ]
    (W, b), (V, c) = [(w["value"], u["value"]) for w, u in layers]
    known = path_of(lambda t, z: torch.nn.functional.softplus(z @ W.mT + b) @ V.mT + c)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], known.log_prob(trace.nodes["z"]["value"]))


def test_both_fields_and_a_matrix_of_noise():
    class Column(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = sd.MLP(2, 2, (3,))

        def forward(self, t, z):
            return self.net(z)[..., None] * torch.eye(2, dtype=z.dtype) + torch.eye(2, dtype=z.dtype)

    noise = sd.MatrixDiffusion(sd.bayesian(Column(), "noise").double())
    diagonal = sd.bayesian(sd.ElementwiseField(2, 3), "spread").double()
    for diffusion, sites in ((noise, 4), (diagonal, 4)):
        path = sd.SDEPath(random_drift(), diffusion, START, TS)
        value = path.rsample()
        assert torch.equal(path.log_prob(value), path.log_prob(value))
        trace = poutine.trace(lambda d=diffusion: sd.SDEPath(random_drift(), d, START, TS)).get_trace()
        assert len(trace.stochastic_nodes) == 4 + sites


def test_a_module_without_random_weights_is_itself():
    net = sd.NeuralField(2)
    assert sd.draw_weights(net) is net
    assert path_of(net.double()).chain.drift is net
    assert not has_drawn_weights(net)
    assert has_drawn_weights(sd.draw_weights(random_drift()))

    def function(t, z):
        return z

    assert sd.draw_weights(function) is function


def test_a_module_of_ones_own():
    class Drift(PyroModule):
        def __init__(self):
            super().__init__()
            self.rate = PyroSample(dist.LogNormal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            self.level = PyroParam(torch.ones(2, dtype=F64), dist.constraints.positive)
            self.slope = torch.nn.Parameter(torch.ones(2, dtype=F64))

        @PyroSample
        def shift(self):
            return dist.Normal(self.rate, 1.0).to_event(1)

        def forward(self, t, z):
            return self.rate * (self.level - self.slope * z) + self.shift

    drift = Drift()
    trace = poutine.trace(lambda: pyro.sample("z", path_of(drift))).get_trace()
    assert {"rate", "shift", "level"} <= set(trace.nodes)
    path, value = trace.nodes["z"]["fn"], trace.nodes["z"]["value"]
    assert torch.equal(path.log_prob(value), path.log_prob(value))
    path.log_prob(value).backward()
    assert drift.slope.grad.abs().min() > 0
    assert drift.level_unconstrained.grad.abs().min() > 0


def test_one_net_for_all_series_unless_asked():
    drift = random_drift()

    def model(plates=()):
        with pyro.plate("series", 3):
            pyro.sample("z", path_of(sd.draw_weights(drift, plates=plates)))

    def weight(*args):
        trace = poutine.trace(model).get_trace(*args)
        trace.compute_log_prob()
        assert trace.nodes["z"]["log_prob"].shape == (3,)
        return trace.nodes["drift.net.layers.0.weight"]

    assert weight()["value"].shape == (4, 2)
    assert weight()["cond_indep_stack"] == ()
    assert weight(("series",))["value"].shape == (3, 4, 2)
    assert weight(("group",))["value"].shape == (4, 2)


def particles_by_hand(model, count):
    with pyro.plate("mine", count, dim=-2):
        return poutine.trace(model).get_trace()


def particles_by_elbo(model, count):
    with pyro.plate("num_particles_vectorized", count, dim=-2):
        trace = poutine.trace(model)
        return trace.get_trace()


@pytest.mark.parametrize("run", [particles_by_hand, particles_by_elbo])
def test_particles_have_weights_of_their_own(run):
    drift = random_drift(context_dim=1)
    context = torch.tensor([[0.1], [0.5], [-1.0], [0.2]], dtype=F64)

    def model():
        with pyro.plate("series", 4):
            pyro.sample("z", sd.SDEPath(drift, NOISE, START, TS, context=context))

    trace = run(model, 3)
    trace.compute_log_prob()
    assert trace.nodes["drift.net.layers.0.weight"]["value"].shape == (3, 1, 4, 3)
    assert trace.nodes["z"]["log_prob"].shape == (3, 4)
    names = [name for name in trace.stochastic_nodes if name.startswith("drift")]
    for k in range(3):
        given = {name: trace.nodes[name]["value"][k, 0] for name in names} | {
            "z": trace.nodes["z"]["value"][k]
        }
        single = poutine.trace(poutine.condition(model, given)).get_trace()
        single.compute_log_prob()
        torch.testing.assert_close(single.nodes["z"]["log_prob"], trace.nodes["z"]["log_prob"][k])


def latent(batch, drift):
    grid = sd.TimeGrid(batch.times, substeps=2)
    with batch.plate("series"):
        z = pyro.sample("z", path_of(drift, grid.ts, dist.Normal(START, 1.0).to_event(1)))
        pyro.sample("y", dist.Normal(grid.observed(z), 0.3).mask(batch.mask).to_event(2), obs=batch.values)


def data(series=5):
    times = torch.linspace(0, 2, 5, dtype=F64)
    grid = sd.TimeGrid(times, substeps=4)
    z = path_of(lambda t, z: -z, grid.ts, dist.Normal(START, 1.0).to_event(1)).sample((series,))
    return sd.Series(times, grid.observed(z) + 0.3 * torch.randn(series, 5, 2, dtype=F64))


def test_the_amortised_guide_and_vectorised_particles():
    drift, batch = random_drift(), data()

    def model(b):
        latent(b, drift)

    guide = sd.AmortizedGuide(
        model, sd.GRUEncoder(2, 8).double(), latents=sd.MeanField(), paths=sd.FreeMessage(rank=0)
    )
    fit = sd.fit(model, guide, batch, steps=60, lr=0.02, progress=False)
    assert sum(fit.losses[-15:]) < 0.7 * sum(fit.losses[:15])
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True).differentiable_loss(model, guide, batch)
    assert torch.isfinite(loss)
    prediction = sd.predict(fit, batch, ts=[2.5], draws=7)
    assert prediction.observations.shape == (7, 5, 6, 2)
    assert prediction.latents["drift.net.layers.0.weight"].shape == (7, 4, 2)


def test_pyro_s_own_guide_and_svi_and_predictive():
    drift = random_drift()

    def model(values):
        with pyro.plate("series", 5):
            z = pyro.sample("z", path_of(drift, start=dist.Normal(START, 1.0).to_event(1)))
            pyro.sample("y", dist.Normal(z, 0.3).to_event(2), obs=values)

    values = torch.randn(5, 6, 2, dtype=F64)
    guide = AutoNormal(model)
    svi = SVI(
        model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=3, vectorize_particles=True)
    )
    losses = [svi.step(values) for _ in range(60)]
    assert sum(losses[-15:]) < sum(losses[:15])
    drawn = Predictive(model, guide=guide, num_samples=7, parallel=True)(None)
    assert drawn["y"].shape == (7, 5, 6, 2)
    assert drawn["drift.net.layers.0.weight"].shape == (7, 1, 4, 2)


def prior_outputs(width, prior, draws=20_000):
    net = sd.bayesian(sd.MLP(2, 1, (width,), activation=torch.relu), prior=prior).double()
    with pyro.plate("_draws", draws):
        return sd.draw_weights(net)(torch.tensor([0.5, -1.0], dtype=F64))[:, 0].detach()


def test_the_prior_of_the_output_does_not_grow_with_the_width():
    def unscaled(like, fan_in):
        return dist.Normal(torch.zeros((), dtype=like.dtype), 1.0)

    # E relu(a)^2 is half the variance of a: (0.25 + 1) / 2 + 0.4^2 into the hidden layer.
    exact = 1.5**2 * (1.5**2 * 1.25 / 2 + 0.4**2) / 2 + 0.4**2
    for width in (2, 64):
        out = prior_outputs(width, sd.WidthScaled(weight=1.5, bias=0.4))
        assert within(out, 0.0)
        assert within(out.square(), exact)
        wrong = prior_outputs(width, unscaled).square()
        assert not within(wrong, exact)
    assert prior_outputs(64, unscaled).var() > 20 * prior_outputs(2, unscaled).var()


def test_fan_in_of_an_elementwise_field():
    field = sd.bayesian(sd.ElementwiseField(3, 16), "spread")
    scales = {
        k: field._pyro_samples[k](field).base_dist.scale.flatten()[0].item() for k in field._pyro_samples
    }
    assert scales == pytest.approx({"weight": 1, "bias": 1, "out_weight": 0.25, "out_bias": 1})


def regression(z, dt, prior_precision):
    """The exact posterior of an affine drift's rows (W, b) from an Euler path: a linear regression."""
    x = torch.cat([z[:-1], torch.ones(len(z) - 1, 1, dtype=F64)], -1)
    rate, means, covariances = z.diff(dim=0) / dt, [], []
    for d in range(2):
        weight = dt / NOISE[d] ** 2
        S = torch.linalg.inv(torch.diag(prior_precision) + weight * x.mT @ x)
        means.append(S @ (weight * x.mT @ rate[:, d]))
        covariances.append(S)
    return torch.stack(means), torch.stack(covariances)


def test_the_posterior_of_a_linear_drift_is_the_exact_regression():
    dt, A = 0.1, torch.tensor([[-1.0, 2.0], [-1.5, -0.5]], dtype=F64)
    ts = dt * torch.arange(101, dtype=F64)
    z = path_of(lambda t, x: x @ A.mT + 0.5, ts).sample()
    drift = random_drift(hidden=())

    def model(z):
        pyro.sample("z", path_of(drift, ts), obs=z)

    guide = sd.AmortizedGuide(model)
    fit = sd.fit(model, guide, z, steps=500, lr=0.05, progress=False)
    mean, covariance = regression(z, dt, torch.tensor([2.0, 2.0, 1.0], dtype=F64))
    L = lower_factor(guide.joint.log_scale.exp(), guide.joint.lower)
    order = torch.tensor([0, 1, 4, 2, 3, 5])  # the weight row by row, then the bias
    loc = guide.joint.loc.detach()[order].reshape(2, 3)
    S = (L @ L.mT).detach()[order][:, order]
    sds = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((loc - mean) / sds).abs().max() < 0.05
    torch.testing.assert_close(S[:3, :3], covariance[0], rtol=0.05, atol=0.05 * sds[0].min().item() ** 2)
    torch.testing.assert_close(S[3:, 3:], covariance[1], rtol=0.05, atol=0.05 * sds[1].min().item() ** 2)
    assert fit.elbo == pytest.approx(log_evidence(z, dt, mean, covariance), abs=0.01)


def log_evidence(z, dt, mean, covariance):
    """log p(z | W, b) + log p(W, b) - log p(W, b | z) at the posterior mean."""
    x = torch.cat([z[:-1], torch.ones(len(z) - 1, 1, dtype=F64)], -1)
    likelihood = dist.Normal(z[:-1] + dt * x @ mean.mT, NOISE * math.sqrt(dt)).log_prob(z[1:]).sum()
    prior = dist.Normal(0.0, torch.tensor([0.5, 0.5, 1.0], dtype=F64).sqrt()).log_prob(mean).sum()
    posterior = dist.MultivariateNormal(mean, covariance).log_prob(mean).sum()
    return (likelihood + prior - posterior).item()


def test_a_ready_model_whose_process_is_random():
    model = sd.LatentSDE(obs_dim=2, state_dim=2, hidden=8).double()
    sd.bayesian(model.process.drift, "drift")
    model.guide.double()
    fit = sd.fit(model, model.guide, data(), steps=10, lr=0.01, progress=False)
    assert torch.isfinite(torch.as_tensor(fit.losses)).all()
    assert "drift.net.layers.0.weight" in model.guide.joint.slices
    assert fit.guide is model.guide


def test_copies_and_moves():
    drift = random_drift()
    other = copy.deepcopy(drift)
    assert list(drift.state_dict()) == list(other.state_dict()) == []
    out = {
        d.dtype
        for d in (
            sd.draw_weights(m)(TS[:1].to(t), START.to(t))
            for m, t in ((drift, F64), (other.float(), torch.float32))
        )
    }
    assert out == {F64, torch.float32}


def test_parameters_that_are_no_weights_stay():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    sd.bayesian(net, "net")
    assert [name for name, _ in net.named_parameters()] == ["1.weight"]


def test_refused():
    with pytest.raises(sd.FieldError, match="scales must be positive, got 1.0 and 0"):
        sd.WidthScaled(bias=0)
    with pytest.raises(sd.FieldError, match="bayesian: Tanh has no weights"):
        sd.bayesian(torch.nn.Tanh())
    with pytest.raises(sd.FieldError, match="computes weights from others"):
        sd.bayesian(torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(2, 2)))


def test_a_module_in_two_places_is_drawn_once():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = sd.MLP(1, 1, hidden=(4,))

        def forward(self, t, z):
            return self.a(z) - self.b(z)

    drawn = sd.draw_weights(sd.bayesian(Shared(), "f"))
    assert drawn.a is drawn.b
    assert drawn(torch.zeros(1), torch.ones(3, 1)).abs().max() == 0
    net = sd.bayesian(sd.NeuralField(1, hidden=(4,)), "net")

    def model():
        return pyro.sample(
            "z", sd.SDEPath(net, lambda t, z: 0.1 + 0 * z, torch.zeros(1), torch.linspace(0, 1, 4))
        )

    assert pyro.poutine.trace(model).get_trace().nodes["z"]["value"].shape == (4, 1)
