"""Three estimators of one ELBO: the same expectation, their noise, and what each evaluates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

import stochdyn as sd
from stochdyn.errors import FitError
from stochdyn.inference import ELBO, AnalyticKL, LogRatio, StickingTheLanding
from stochdyn.paths import GuidedPath
from tests.programs import F64, local_theta, normal, ou, ou_evidence, ou_series, own_times

ESTIMATORS = [StickingTheLanding(), AnalyticKL(), LogRatio()]
COPIES = 400
ONE = ou_series(1, torch.linspace(0, 2.1, 8))
MANY = sd.Series(ONE.times, ONE.values.expand(COPIES, -1, -1))


@pytest.fixture(autouse=True)
def _seed():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def on_the_way(share, batch=MANY):
    """A guide between the prior (0) and the exact posterior (1): the messages' scale grows in proportion."""
    guide = sd.AmortizedGuide(ou, paths=sd.FilterMessage(follow=0.0))
    guide(batch)
    with torch.no_grad():
        guide.paths["z"].numbers[..., 0] = share - 1
    return guide


def gradients(estimator, guide):
    """(copies, 2): by the precision and by the centre of all messages of a series; copies are independent draws."""
    guide.zero_grad()
    ELBO(estimator=estimator).loss(ou, guide, MANY).backward()
    return guide.paths["z"].numbers.grad.sum(-2)


def values(estimator, guide, model=ou, batch=ONE, times=40):
    with torch.no_grad():
        return -torch.stack([ELBO(estimator=estimator).loss(model, guide, batch) for _ in range(times)])


def apart(a, b):
    """Paired: how many standard errors lie between two means."""
    difference = a - b
    return (difference.mean(0) / (difference.std(0) / math.sqrt(len(difference)) + 1e-12)).abs().max().item()


def test_all_agree_in_expectation():
    guide = on_the_way(0.7)
    found = {}
    for estimator in ESTIMATORS:
        pyro.set_rng_seed(1)  # the same draws
        found[type(estimator)] = (
            values(estimator, guide, batch=MANY, times=6) / COPIES,
            gradients(estimator, guide),
        )
    stick, kl, ratio = found.values()
    torch.testing.assert_close(stick[0], ratio[0], rtol=1e-10, atol=1e-10)
    for value, gradient in (kl, ratio):
        assert apart(value, stick[0]) < 4
        assert apart(gradient, stick[1]) < 4
    # Controls: another value, another gradient.
    assert apart(kl[0] + 0.05, stick[0]) > 4
    assert apart(1.5 * kl[1], stick[1]) > 4


def noise(share):
    guide = on_the_way(share)
    return [gradients(estimator, guide).std(0) for estimator in ESTIMATORS]


def test_sticking_the_landing_has_no_noise_at_the_exact_guide():
    stick, kl, ratio = noise(1.0)
    assert stick.max() < 1e-10
    assert kl.min() > 1
    assert ratio.min() > 1


def test_sticking_the_landing_has_the_least_noise_near_it():
    stick, kl, ratio = noise(0.9)
    assert (stick < 0.5 * kl).all()
    assert (kl < ratio).all()


def test_the_exact_guide_has_the_evidence():
    guide = on_the_way(1.0, ONE)
    exact = ou_evidence(ONE).sum()
    for estimator in (StickingTheLanding(), LogRatio()):
        torch.testing.assert_close(values(estimator, guide, times=1)[0], exact, rtol=1e-10, atol=1e-9)
    draws = values(AnalyticKL(), on_the_way(1.0), batch=MANY, times=5) / COPIES
    assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(5) + 1e-9
    assert draws.std() > 1e-3


def test_particles_and_other_latents():
    batch = ou_series(3, own_times(3, 5), hold=[(1, 2)])
    guide = sd.AmortizedGuide(local_theta)
    guide(batch)
    means = []
    for estimator in ESTIMATORS:
        with torch.no_grad():
            loss = torch.stack(
                [ELBO(100, estimator=estimator).loss(local_theta, guide, batch) for _ in range(5)]
            )
        means.append((loss.mean(), loss.std() / math.sqrt(5)))
    for mean, error in means[1:]:
        assert abs(mean - means[0][0]) < 4 * math.hypot(error, means[0][1])


def test_no_density_is_evaluated_for_nothing(monkeypatch):
    guide = on_the_way(0.9, ONE)
    calls = []
    for cls in (GuidedPath, sd.SDEPath):
        for method in ("log_prob", "score_parts"):
            original = getattr(cls, method)

            def counted(self, value, original=original, name=f"{cls.__name__}.{method}"):
                calls.append(name)
                return original(self, value)

            monkeypatch.setattr(cls, method, counted)

    def evaluated(estimator):
        calls.clear()
        estimator.loss(ou, guide, ONE) if hasattr(estimator, "loss") else estimator.differentiable_loss(
            ou, guide, ONE
        )
        return sorted(calls)

    assert evaluated(ELBO(estimator=AnalyticKL())) == []
    assert evaluated(ELBO(estimator=LogRatio())) == ["GuidedPath.log_prob", "SDEPath.log_prob"]
    assert evaluated(ELBO()) == ["GuidedPath.score_parts", "SDEPath.log_prob"]
    assert len(evaluated(TraceMeanField_ELBO())) == 2  # control: Pyro scores what its KL makes needless


# Normal latents, where everything is known.

LOC = torch.tensor([0.4, -0.3, 1.0], dtype=F64, requires_grad=True)
SCALE = torch.tensor([0.7, 0.5, 0.9], dtype=F64)
KL = torch.distributions.kl_divergence(dist.Normal(LOC, SCALE), normal(torch.zeros(3), 1.0)).detach()


def latents(fn):
    with pyro.plate("rows", 3):
        return pyro.sample("z", fn)


def prior():
    latents(normal(torch.zeros(3), 1.0))


def posterior():
    latents(dist.Normal(LOC, SCALE))


def test_scale_and_mask_are_the_models_for_both_sides():
    mask = torch.tensor([True, False, True])
    loss = ELBO(estimator=AnalyticKL()).loss(poutine.mask(prior, mask=mask), posterior)
    torch.testing.assert_close(loss.detach(), KL[mask].sum())
    loss = ELBO(estimator=AnalyticKL()).loss(poutine.scale(prior, scale=2.5), posterior)
    torch.testing.assert_close(loss.detach(), 2.5 * KL.sum())
    stock = TraceMeanField_ELBO().loss(poutine.mask(prior, mask=mask), posterior)
    assert stock == pytest.approx(KL.sum().item())  # control: Pyro's takes the guide's


def test_scale_and_mask_of_a_path_and_of_a_log_ratio():
    batch = ou_series(3, own_times(3, 5))
    guide = sd.AmortizedGuide(ou, paths=sd.FreeMessage())
    guide(batch)
    draws = {}
    for scale in (1.0, 3.0):
        model = poutine.scale(ou, scale=scale)
        pyro.set_rng_seed(5)
        draws[scale] = ELBO(estimator=AnalyticKL()).loss(model, guide, batch).detach()
    torch.testing.assert_close(draws[3.0], 3 * draws[1.0])

    def student():
        latents(dist.StudentT(torch.tensor(5.0, dtype=F64), torch.zeros(3, dtype=F64)))

    mask = torch.tensor([True, False, False])
    pyro.set_rng_seed(5)
    loss = ELBO(estimator=AnalyticKL()).loss(poutine.mask(student, mask=mask), posterior)
    pyro.set_rng_seed(5)
    z = poutine.trace(posterior).get_trace().nodes["z"]["value"][0]
    by_hand = dist.Normal(LOC[0], SCALE[0]).log_prob(z) - dist.StudentT(5.0).log_prob(z)
    torch.testing.assert_close(loss, by_hand, rtol=1e-6, atol=1e-6)


class Normals(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(LOC.detach().clone())

    def forward(self):
        latents(dist.Normal(self.loc, SCALE))


@pytest.mark.parametrize("weight", [0.0, 0.4, 2.0])
def test_kl_weight(weight):
    def first_loss(estimator, kl_weight):
        options = {"steps": 1, "kl_weight": kl_weight, "progress": False}
        return sd.fit(prior, Normals(), (), objective=ELBO(estimator=estimator), **options).losses[0]

    assert first_loss(AnalyticKL(), weight) == pytest.approx(weight * KL.sum().item())
    for estimator in (LogRatio(), StickingTheLanding()):
        assert first_loss(estimator, weight) == pytest.approx(weight * first_loss(estimator, 1.0))


def test_a_path_that_was_not_drawn_by_its_distribution_is_scored():
    guide = on_the_way(0.9, ONE)
    other = poutine.trace(guide).get_trace(ONE)
    other.nodes["z"]["value"] = other.nodes["z"]["value"] + 0.1
    replayed = poutine.replay(guide, trace=other)
    with torch.no_grad():
        mine = ELBO(estimator=AnalyticKL()).loss(ou, replayed, ONE)
        ratio = ELBO(estimator=LogRatio()).loss(ou, replayed, ONE)
    torch.testing.assert_close(mine, ratio)
    pyro.set_rng_seed(3)
    mine = ELBO(estimator=AnalyticKL()).loss(ou, guide, ONE)
    pyro.set_rng_seed(3)
    assert (mine - ELBO(estimator=LogRatio()).loss(ou, guide, ONE)).abs() > 1e-3  # control


def test_latents_drawn_in_another_order_take_the_log_ratio():
    def model():
        a = pyro.sample("a", normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide():  # b first: the KL of b would take a, drawn from it, as given
        b = pyro.sample("b", normal(0.0, 1.5))
        pyro.sample("a", dist.Normal(0.5 * b, 0.6))

    def mean(elbo, times=400):
        with torch.no_grad():
            draws = torch.stack([elbo(model, guide) for _ in range(times)])
        return draws.mean().item(), draws.std().item() / math.sqrt(times)

    joint = torch.distributions.MultivariateNormal
    p = joint(torch.zeros(2, dtype=F64), torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=F64))
    q = joint(
        torch.zeros(2, dtype=F64),
        torch.tensor([[0.25 * 2.25 + 0.36, 0.5 * 2.25], [0.5 * 2.25, 2.25]], dtype=F64),
    )
    exact = torch.distributions.kl_divergence(q, p).item()
    value, error = mean(ELBO(estimator=AnalyticKL()).loss)
    assert abs(value - exact) < 4 * error
    with pytest.warns(UserWarning, match="mean field"):
        stock, error = mean(TraceMeanField_ELBO().differentiable_loss)
    assert abs(stock - exact) > 4 * error  # control


def test_discrete_latents():
    def model():
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(0.8, dtype=F64))

    logit = torch.zeros((), dtype=F64, requires_grad=True)

    def guide():
        pyro.sample("k", dist.Bernoulli(torch.sigmoid(logit)))

    with pytest.raises(FitError, match="latent 'k' has no rsample"):
        ELBO(estimator=AnalyticKL()).loss(model, guide)
    grads = {}
    for estimator in (StickingTheLanding(), LogRatio()):
        pyro.set_rng_seed(7)
        (grads[type(estimator)],) = torch.autograd.grad(ELBO(estimator=estimator).loss(model, guide), logit)
    torch.testing.assert_close(*grads.values())
    assert grads[LogRatio].abs() > 0


def one_too_many(batch, local=False, start=lambda theta: theta[..., None, :]):
    """A latent as the start of a path, with a dimension that belongs to no plate."""
    law = dist.LogNormal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
    grid = sd.TimeGrid(batch.times, substeps=1)
    theta = None if local else pyro.sample("theta", law)
    with batch.plate("series"):
        theta = pyro.sample("theta", law) if local else theta
        path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.3], dtype=F64), start(theta), grid.ts)
        batch.observe("y", dist.Normal(grid.observed(pyro.sample("z", path)), 0.1))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_dimensions_left_of_all_plates_are_refused(estimator):
    """Otherwise every draw of the latent would meet every draw of the path, and the sum would count all pairs."""

    def right(batch):
        one_too_many(batch, start=lambda theta: theta)

    objective = ELBO(particles=4, estimator=estimator)
    with pytest.raises(
        sd.ShapeError, match=r"its log-density has shape \(4, 4, 1\), and particles and plates have 2"
    ):
        objective.loss(one_too_many, sd.AmortizedGuide(one_too_many), ONE)
    assert torch.isfinite(objective.loss(right, sd.AmortizedGuide(right), ONE))


def test_iwae_refuses_them_too():
    def program(batch, index=None):
        with batch.plate("series"):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            if index is not None:
                seen = dist.Normal(theta[index] + 0 * batch.values, 1.0)
                pyro.sample("y", seen.to_event(2), obs=batch.values)

    def right(batch):
        program(batch, (..., None, slice(None)))

    def wrong(batch):
        program(batch, (..., None, None, slice(None)))

    assert torch.isfinite(sd.IWAE(4).loss(right, program, ONE))
    with pytest.raises(sd.ShapeError, match="site 'y': its log-density has shape"):
        sd.IWAE(4).loss(wrong, program, ONE)


def test_a_guide_refuses_a_batch_without_a_plate():
    def local(batch):
        one_too_many(batch, local=True)

    with pytest.raises(
        sd.ShapeError, match=r"site 'z': its batch shape is \(1, 1\), and its plates \['series'\]"
    ):
        sd.AmortizedGuide(local)(ONE)

    def one(batch):
        grid = sd.TimeGrid(batch.times[None], substeps=1)
        path = sd.SDEPath(
            lambda t, z: -z, torch.tensor([0.3], dtype=F64), torch.zeros(1, 1, dtype=F64), grid.ts
        )
        pyro.sample(
            "y", dist.Normal(pyro.sample("z", path)[..., 0], 0.1).to_event(2), obs=batch.values[..., 0]
        )

    assert sd.AmortizedGuide(one)(ONE)["z"].shape == (1, 8, 1)  # a single series needs no plate


def test_draws_with_a_dimension_too_many_are_refused():
    with pytest.raises(sd.ShapeError, match="the start of a path as it is"):
        sd.predict((one_too_many, sd.AmortizedGuide(one_too_many)), ONE, draws=4)
