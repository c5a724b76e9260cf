"""The flow over latents outside plates: one density, whatever is drawn, replayed or given."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch.distributions import Distribution

import stochdyn as sd
from stochdyn.errors import GuideError
from stochdyn.guides.flow import Drawn, JointFlow
from tests.programs import F64, elbos, mean_and_error, normal

SMALL = sd.Flow(transforms=2, hidden=(8,), init_scale=0.5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def banana(y=0.5):
    """A curved posterior of known evidence: `a` is seen, and `b` (a vector) and `c` (positive) follow it."""
    a = pyro.sample("a", normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal((a**2)[..., None] * torch.ones(2, dtype=F64), 0.3).to_event(1))
    c = pyro.sample("c", dist.LogNormal(a, 0.5))
    pyro.sample("y", dist.Normal(a, 1.5), obs=torch.tensor(y, dtype=F64))
    return b, c


NAMES = ("a", "b", "c")


def made(family=SMALL, by=0.2):
    guide = sd.AmortizedGuide(banana, latents=family)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += by * torch.randn_like(parameter)
    return guide


def log_density(guide, trace):
    """log q of all latents at once, by the whole Jacobian of the flow."""
    u = torch.cat(
        [trace.nodes[n]["value"].reshape(-1) for n in ("a", "b")] + [trace.nodes["c"]["value"].log()[None]]
    )
    z = guide.joint(u)[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: guide.joint(x)[0], u)
    return normal(0.0, 1.0).log_prob(z).sum() + jacobian.det().abs().log() - trace.nodes["c"]["value"].log()


def total(trace):
    trace.compute_log_prob()
    return sum(trace.nodes[n]["log_prob"] for n in NAMES)


def test_the_conditionals_make_one_joint_density():
    guide = made()
    trace = poutine.trace(guide).get_trace()
    torch.testing.assert_close(total(trace), log_density(guide, trace))
    given = {"a": torch.tensor(0.4, dtype=F64), "c": torch.tensor(1.7, dtype=F64)}
    other = {"a": trace.nodes["a"]["value"] + 0.5}
    for held in (given, other):
        replayed = poutine.trace(poutine.replay(guide, as_trace(held))).get_trace()
        assert all(torch.equal(replayed.nodes[n]["value"], v) for n, v in held.items())
        torch.testing.assert_close(total(replayed), log_density(guide, replayed))


def as_trace(values):
    def program():
        for name, value in values.items():
            pyro.sample(name, dist.Delta(value))

    return poutine.trace(program).get_trace()


def test_given_one_latent_the_others_follow_their_conditional():
    """Draws given `a`: their mean is that by weighting free draws with a near that value."""
    guide = made(by=0.3)
    fixed = torch.tensor(0.2, dtype=F64)
    with torch.no_grad(), pyro.plate("draws", 40000):
        free = guide()
    near = (free["a"] - fixed).abs() < 0.03
    with torch.no_grad(), poutine.condition(data={"a": fixed.expand(8000)}), pyro.plate("draws", 8000):
        held = guide()
    for name in ("b", "c"):
        a, b = free[name][near].reshape(int(near.sum()), -1), held[name].reshape(8000, -1)
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()
        everyone = free[name].reshape(40000, -1).mean(0)
        assert ((b.mean(0) - everyone).abs() > 5 * error).any()


@pytest.mark.parametrize("shape", [(), (5,), (4, 1)])
def test_one_joint_draw_serves_all_sites(shape, monkeypatch):
    guide, calls = made(), []
    inverse = JointFlow.inverse
    monkeypatch.setattr(JointFlow, "inverse", lambda self, z: calls.append(z.shape) or inverse(self, z))
    plates = [pyro.plate(f"p{k}", n, dim=k - len(shape)) for k, n in enumerate(shape)]
    for plate in plates:
        plate.__enter__()
    values = guide()
    for plate in reversed(plates):
        plate.__exit__(None, None, None)
    assert calls == [(*shape, 4)]
    assert values["b"].shape == (*shape, 2)
    assert (values["c"] > 0).all()


def test_it_starts_as_a_narrow_normal():
    guide = sd.AmortizedGuide(banana, latents=sd.Flow(init_scale=0.01))
    guide()
    joint = guide.joint
    z = torch.randn(7, 4, dtype=F64)
    torch.testing.assert_close(joint.inverse(z), joint.centre + 0.01 * joint.unit * z)
    torch.testing.assert_close(joint(joint.inverse(z))[0], z)


def test_the_map_is_triangular_and_its_inverse_right():
    joint = made(by=0.4).joint
    z = 2 * torch.randn(20, 4, dtype=F64)
    u = joint.inverse(z)
    back, ladj = joint(u)
    torch.testing.assert_close(back, z)
    jacobian = torch.autograd.functional.jacobian(lambda x: joint(x)[0], u[0])
    assert not jacobian.triu(1).any()
    torch.testing.assert_close(jacobian.diagonal().log(), ladj[0])
    assert (jacobian.tril(-1).abs().sum(-1) > 0)[1:].all()


def test_sticking_the_landing_leaves_out_the_flows_own_score():
    guide = made()
    trace = poutine.trace(guide).get_trace()
    q, value = trace.nodes["b"]["fn"], trace.nodes["b"]["value"].detach()
    entropy = q.score_parts(value).entropy_term
    torch.testing.assert_close(entropy, q.log_prob(value))
    a = torch.autograd.grad(entropy, trace.nodes["a"]["value"], retain_graph=True)[0]
    assert a.abs() > 1e-6
    q.known = q.known.detach()
    assert not q.score_parts(value).entropy_term.requires_grad
    assert q.log_prob(value).requires_grad


def test_engines_and_state():
    guide = made()
    many = mean_and_error(elbos(banana, guide, draws=4000, plates=0))
    with torch.no_grad():
        one = mean_and_error(torch.tensor([-Trace_ELBO().loss(banana, guide) for _ in range(80)]))
    assert abs(many[0] - one[0]) < 4 * math.hypot(many[1], one[1])
    svi = SVI(banana, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    svi.step()
    assert not any(torch.equal(p, before[n]) for n, p in guide.named_parameters() if n != "joint.lower")
    assert Predictive(banana, guide=guide, num_samples=6, parallel=True)()["b"].shape[0] == 6
    fresh = sd.AmortizedGuide(banana, latents=SMALL)
    fresh.load_state_dict(guide.state_dict())
    twin = copy.deepcopy(guide)
    outcomes = []
    for part in (guide, fresh, twin):
        torch.manual_seed(1)
        outcomes.append(elbos(banana, part, draws=3, plates=0))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in guide.parameters()}


def test_a_single_number_and_latents_in_plates():
    def model(batch):
        mu = pyro.sample("mu", normal(0.0, 1.0))
        with batch.plate("series"):
            x = pyro.sample("x", dist.Normal(mu, 1.0))
            seen = dist.Normal(x[..., None, None], 0.5).mask(batch.mask).to_event(2)
            pyro.sample("y", seen, obs=batch.values)

    batch = sd.Series([0.0, 1.0], torch.randn(3, 2, 1, dtype=F64))
    guide = sd.AmortizedGuide(model, latents=SMALL)
    sd.fit(model, guide, batch, steps=3, progress=False)
    assert sorted(guide.locals) == ["x"]
    assert guide.joint.slices == {"mu": slice(0, 1)}
    assert elbos(model, guide, batch, draws=5).isfinite().all()
    assert guide.joint.median("mu", normal(0.0, 1.0)).shape == ()


def test_zuko_leaves_validation_as_it_was():
    for status in (True, False):
        Distribution.set_default_validate_args(status)
        made()
        assert Distribution._validate_args == status
    Distribution.set_default_validate_args(True)


def test_errors():
    for options in ({"transforms": 0}, {"bins": 1}, {"hidden": ()}):
        with pytest.raises(
            GuideError, match="transforms must be at least 1, bins at least 2, hidden not empty"
        ):
            sd.Flow(**options)
    left_out = []

    def model():
        for name in ("a", "b"):
            if name not in left_out:
                pyro.sample(name, normal(0.0, 1.0))

    guide = sd.AmortizedGuide(model, latents=SMALL)
    guide()
    left_out.append("a")
    with pytest.raises(GuideError, match="site 'b' comes after 0 numbers.*came after 1"):
        guide()
    assert Drawn().count == 0


@pytest.mark.slow
def test_a_banana_is_nearly_reached_where_a_normal_falls_short():
    """The whole gradient: far from the optimum the other estimator is twenty times as noisy for a flow."""
    exact = dist.Normal(0.0, math.sqrt(1 + 1.5**2)).log_prob(torch.tensor(0.5)).item()
    objective, gaps = sd.ELBO(particles=4, estimator=sd.LogRatio()), []
    for family, steps in ((sd.FullRank(), 600), (sd.Flow(init_scale=1.0), 2000)):
        torch.manual_seed(0)
        guide = sd.AmortizedGuide(banana, latents=family)
        sd.fit(banana, guide, (), steps=steps, lr=0.01, objective=objective, progress=False)
        mean, error = mean_and_error(elbos(banana, guide, draws=10000, plates=0))
        assert mean < exact + 4 * error
        gaps.append(exact - mean)
    assert gaps[1] < 0.3
    assert gaps[0] > 2.5 * gaps[1]
