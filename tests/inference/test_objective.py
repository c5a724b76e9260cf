"""The ELBO against Pyro's own and against hand calculations; the KL weight in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.utils._python_dispatch import TorchDispatchMode

from stochdyn.errors import FitError
from stochdyn.inference.objective import ELBO, AbstractObjective, weighted

Y = torch.tensor([0.3, 1.1, 2.0], dtype=torch.float64)
LOC = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
SCALE = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
ZERO = torch.zeros((), dtype=torch.float64)


def model(y):
    z = pyro.sample("z", dist.Normal(ZERO, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def guide(y):
    pyro.sample("z", dist.Normal(LOC, SCALE))


def discrete_model(y):
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(k, 0.5), obs=y)


def discrete_guide(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("k", dist.Bernoulli(torch.sigmoid(LOC)))


def value_and_gradient(loss):
    LOC.grad = SCALE.grad = None
    loss.backward()
    return loss.item(), LOC.grad, SCALE.grad


@pytest.mark.parametrize("pair", [(model, guide), (discrete_model, discrete_guide)])
@pytest.mark.parametrize("options", [{}, {"particles": 3}, {"particles": 3, "vectorized": False}])
def test_value_and_gradient_are_those_of_pyro(pair, options):
    pyro.set_rng_seed(1)
    ours = value_and_gradient(ELBO(**options).loss(*pair, Y))
    pyro.set_rng_seed(1)
    particles = options.get("particles", 1)
    vectorized = options.get("vectorized", True) and particles > 1
    stock = Trace_ELBO(num_particles=particles, vectorize_particles=vectorized)
    theirs = value_and_gradient(stock.differentiable_loss(*pair, Y))
    for mine, reference in zip(ours, theirs, strict=True):
        if reference is not None:
            torch.testing.assert_close(
                torch.as_tensor(mine), torch.as_tensor(reference), rtol=1e-12, atol=1e-12
            )


def test_sites_that_are_not_reparametrised_get_a_gradient():
    # The negative control of the test above: without the score function it would be zero.
    assert value_and_gradient(ELBO().loss(discrete_model, discrete_guide, Y))[1].abs() > 0


def test_the_exact_guide_gives_the_evidence_whatever_is_drawn():
    precision = 1 + len(Y) / 0.25

    def exact(y):
        pyro.sample("z", dist.Normal(y.sum() / 0.25 / precision, precision**-0.5))

    covariance = torch.eye(3, dtype=torch.float64) * 0.25 + 1.0
    evidence = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(Y)
    for _ in range(3):
        torch.testing.assert_close(-ELBO(particles=2).loss(model, exact, Y), evidence, rtol=1e-10, atol=0)


def test_no_transfer_per_site():
    class CountTransfers(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with pyro.validation_enabled(False):
        with CountTransfers() as ours:
            ELBO(particles=2, vectorized=False).loss(model, guide, Y)
        with CountTransfers() as stock:
            Trace_ELBO(num_particles=2).differentiable_loss(model, guide, Y)
    assert ours.count == 0
    assert stock.count > 0  # negative control


def test_plate_nesting_is_found_once():
    runs = []

    def counted(y):
        runs.append(1)
        model(y)

    objective = ELBO(particles=5).prepared(counted, guide, Y)
    assert objective == ELBO(particles=5, max_plate_nesting=1)
    runs.clear()
    objective.loss(counted, guide, Y)
    assert len(runs) == 1
    assert ELBO().prepared(counted, guide, Y) == ELBO()


def test_particles_average():
    pyro.set_rng_seed(0)
    draws = torch.stack([ELBO(particles=10).loss(model, guide, Y).detach() for _ in range(200)])
    # E_q of the negative log joint and of log q, by hand.
    loglik = (
        -0.5 * (((Y - LOC) ** 2 + SCALE**2) / 0.25).sum() - 3 * math.log(0.5) - 1.5 * math.log(2 * math.pi)
    )
    kl = torch.distributions.kl_divergence(dist.Normal(LOC, SCALE), dist.Normal(ZERO, 1.0))
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - (kl - loglik)).abs() < 4 * error
    assert (draws.mean() - (kl - loglik) - 10 * error).abs() > 4 * error  # negative control


def test_no_particles_are_refused():
    with pytest.raises(FitError, match=r"particles must be at least 1, got 0"):
        ELBO(particles=0)


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        AbstractObjective()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
def test_kl_weight_in_closed_form(weight):
    pyro.set_rng_seed(3)
    loss = ELBO().loss(weighted(model, weight), weighted(guide, weight, guide=True), Y)
    pyro.set_rng_seed(3)
    z = poutine.trace(guide).get_trace(Y).nodes["z"]["value"]
    half_log = 0.5 * math.log(2 * math.pi)
    loglik = (-0.5 * ((Y - z) / 0.5) ** 2 - math.log(0.5) - half_log).sum()
    log_p = -0.5 * z**2 - half_log
    log_q = -0.5 * ((z - LOC) / SCALE) ** 2 - SCALE.log() - half_log
    torch.testing.assert_close(loss, -(loglik - weight * (log_q - log_p)), rtol=1e-12, atol=1e-12)


def test_kl_weight_scales_the_gradient_too():
    def gradient(weight):
        pyro.set_rng_seed(3)
        return value_and_gradient(
            ELBO().loss(weighted(model, weight), weighted(guide, weight, guide=True), Y)
        )[1]

    likelihood, full, double = gradient(0.0), gradient(1.0), gradient(2.0)
    torch.testing.assert_close(double - likelihood, 2 * (full - likelihood), rtol=1e-12, atol=1e-12)
    assert (full - likelihood).abs() > 1e-3


def test_kl_weight_one_changes_nothing():
    assert weighted(model, 1.0) is model


def test_kl_weight_leaves_subsampling_and_the_scale_of_mini_batches():
    def subsampled(y):
        with pyro.plate("rows", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y.repeat(2)[index])

    trace = poutine.trace(weighted(subsampled, 0.5)).get_trace(Y)
    scales = {name: float(site["scale"]) for name, site in trace.nodes.items() if site["type"] == "sample"}
    assert scales == {"rows": 1.0, "z": 1.5, "twice": 3.0, "y": 3.0}


def test_kl_weight_sees_conditioned_sites_as_observed():
    conditioned = poutine.condition(model, {"z": torch.tensor(1.0, dtype=torch.float64)})
    trace = poutine.trace(weighted(conditioned, 0.5)).get_trace(Y)
    assert float(trace.nodes["z"]["scale"]) == 1.0


def test_a_factor_belongs_to_the_likelihood_or_to_q():
    def with_factor():
        pyro.factor("f", torch.tensor(1.0), has_rsample=True)

    scale_of = lambda program: float(poutine.trace(program).get_trace().nodes["f"]["scale"])  # noqa: E731
    assert scale_of(weighted(with_factor, 0.5)) == 1.0
    assert scale_of(weighted(with_factor, 0.5, guide=True)) == 0.5
