"""Normals over latents: the sequential conditionals are one joint normal, and conjugate posteriors are exact."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import stochdyn as sd
from stochdyn.guides.plates import Place
from stochdyn.guides.sites import (
    JointNormal,
    LocalNormal,
    Residuals,
    centre_and_spread,
    free_shape,
    prior_start,
)
from tests.programs import F64, elbos, mean_and_error, normal

NOWHERE = Place("x", (), {})
PRIORS = {
    "a": dist.Normal(torch.tensor(0.0, dtype=F64), 1.0),
    "b": dist.LogNormal(torch.zeros(2, dtype=F64), 1.0).to_event(1),
    "c": dist.Dirichlet(torch.ones(3, dtype=F64)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def joint_normal():
    starts = {name: prior_start(name, prior, NOWHERE) for name, prior in PRIORS.items()}
    joint = JointNormal.begin(starts, sd.FullRank())
    joint.arrange({name: s.loc.shape[-1] for name, s in starts.items()})
    with torch.no_grad():
        joint.lower.normal_(), joint.log_scale.normal_(std=0.3)
    return joint


def factor_of(joint):
    """The Cholesky factor, written out: unit triangular, its rows scaled."""
    return torch.diag(joint.log_scale.exp()) @ (torch.eye(len(joint.loc), dtype=F64) + joint.lower.tril(-1))


def in_order(joint, sample_shape=()):
    """log q and the unconstrained values, site by site."""
    before, total, free = Residuals(), 0.0, []
    for name, prior in PRIORS.items():
        q = joint.posterior(name, prior, before)
        q = q.expand(torch.Size(sample_shape)) if q.batch_shape != torch.Size(sample_shape) else q
        value = q.rsample()
        u = q.free(value)
        ladj = q.transform.log_abs_det_jacobian(q.transform.inv(value), value)
        total = total + q.log_prob(value) + ladj.reshape(*u.shape[:-1], -1).sum(-1)
        before.add(q, value)
        free.append(u)
    return total, torch.cat(free, -1)


@pytest.mark.parametrize("shape", [(), (7,), (4, 1)])
def test_the_conditionals_are_one_joint_normal(shape):
    joint = joint_normal()
    log_q, u = in_order(joint, shape)
    L = factor_of(joint)
    exact = dist.MultivariateNormal(joint.loc, scale_tril=L).log_prob(u)
    torch.testing.assert_close(log_q, exact, rtol=0, atol=1e-10)
    off = dist.MultivariateNormal(joint.loc, scale_tril=torch.diag(joint.log_scale.exp())).log_prob(u)
    assert (log_q - off).abs().min() > 1e-3


def test_its_draws_have_the_joint_covariance():
    joint = joint_normal()
    u = in_order(joint, (40000,))[1].detach()
    L = factor_of(joint)
    exact = (L @ L.mT).detach()
    r = u - joint.loc.detach()
    products = r[:, :, None] * r[:, None, :]
    error = products.std(0) / len(u) ** 0.5
    assert ((products.mean(0) - exact).abs() < 5 * error).all()
    assert ((products.mean(0) - torch.diag(exact.diagonal())).abs() > 5 * error).any()


# y ~ N(A x, R), x = (mu, w1, w2) with a prior: everything is known.

A = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, -1.0], [1.0, 1.0, 1.0], [2.0, 0.0, 1.0]], dtype=F64)
Y = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=F64)
PRIOR_COV = torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=F64))
NOISE = 0.25 * torch.eye(4, dtype=F64)


def regression():
    mu = pyro.sample("mu", normal(0.0, 2.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    x = torch.cat([mu[..., None], w.expand(*mu.shape, 2)], -1)
    pyro.sample("y", dist.MultivariateNormal(x @ A.mT, NOISE), obs=Y)


def exact_regression(guide):
    precision = PRIOR_COV.inverse() + A.mT @ NOISE.inverse() @ A
    covariance = precision.inverse()
    L = torch.linalg.cholesky(covariance)
    with torch.no_grad():
        guide.joint.loc.copy_(covariance @ A.mT @ NOISE.inverse() @ Y)
        guide.joint.log_scale.copy_(L.diagonal().log())
        guide.joint.lower.copy_((L / L.diagonal()[:, None]).tril(-1))
    return dist.MultivariateNormal(torch.zeros(4, dtype=F64), A @ PRIOR_COV @ A.mT + NOISE).log_prob(Y).item()


def test_a_correlated_posterior_is_exact():
    guide = sd.AmortizedGuide(regression)
    guide()
    evidence = exact_regression(guide)
    values = elbos(regression, guide, draws=50, plates=0)
    assert values.mean().item() == pytest.approx(evidence, abs=1e-10)
    assert values.var() < 1e-18
    with torch.no_grad():
        guide.joint.lower.zero_()
    mean, error = mean_and_error(elbos(regression, guide, draws=4000, plates=0))
    assert mean + 4 * error < evidence - 0.1


def test_at_the_exact_posterior_the_gradient_is_zero():
    guide = sd.AmortizedGuide(regression)
    guide()
    exact_regression(guide)
    Trace_ELBO().differentiable_loss(regression, guide).backward()
    for parameter in guide.parameters():
        assert parameter.grad.abs().max() < 1e-10
    plain = poutine.trace(guide).get_trace()
    log_q = sum(plain.nodes[name]["fn"].log_prob(plain.nodes[name]["value"]) for name in ("mu", "w"))
    gradient = torch.autograd.grad(log_q, guide.joint.log_scale)[0]
    assert gradient.abs().min() > 0.1  # the part of log q that sticking the landing leaves out


@pytest.mark.slow
def test_it_trains_to_the_evidence():
    guide = sd.AmortizedGuide(regression)
    sd.fit(regression, guide, (), steps=800, lr=0.05, progress=False)
    values = elbos(regression, guide, draws=1000, plates=0)
    evidence = exact_regression(guide)
    assert values.mean().item() == pytest.approx(evidence, abs=0.01)


def hierarchical(ys):
    """The hierarchy of three groups."""
    mu = pyro.sample("mu", normal(0.0, 2.0))
    with pyro.plate("group", len(ys)):
        theta = pyro.sample("theta", dist.Normal(mu, 0.7))
    group = torch.cat([torch.full((len(y),), i) for i, y in enumerate(ys)])
    with pyro.plate("row", len(group)):
        pyro.sample("y", dist.Normal(theta[..., group], 0.5), obs=torch.cat(ys))


GROUPS = [torch.tensor(y, dtype=F64) for y in ([1.2, 0.8, 1.0], [-0.3], [0.4, 0.9])]
HIERARCHICAL_EVIDENCE = -6.2625019068779775


def test_latents_in_plates_are_mean_field():
    guide = sd.AmortizedGuide(hierarchical)
    guide(GROUPS)
    counts = torch.tensor([3.0, 1.0, 2.0], dtype=F64)
    P = torch.zeros(4, 4, dtype=F64)
    P[0, 0] = 1 / 4 + 3 / 0.49
    P[0, 1:] = P[1:, 0] = -1 / 0.49
    P[1:, 1:] = torch.diag(1 / 0.49 + counts / 0.25)
    h = torch.stack([torch.zeros((), dtype=F64), *(y.sum() / 0.25 for y in GROUPS)])
    mean, sds = torch.linalg.solve(P, h), P.diagonal().rsqrt()
    with torch.no_grad():
        guide.joint.loc.copy_(mean[:1]), guide.joint.log_scale.copy_(sds[:1].log())
        (
            guide.locals["theta"].loc.copy_(mean[1:, None]),
            guide.locals["theta"].log_scale.copy_(sds[1:, None].log()),
        )
    gap = 0.5 * (P.diagonal().log().sum() - torch.logdet(P)).item()
    got, error = mean_and_error(elbos(hierarchical, guide, GROUPS, draws=20000))
    assert abs(got - (HIERARCHICAL_EVIDENCE - gap)) < 4 * error
    assert abs(got - HIERARCHICAL_EVIDENCE) > 10 * error
    exact = dist.MultivariateNormal(torch.zeros(4, dtype=F64), P.inverse()).stddev
    assert (sds < exact * 0.99).all()


def test_local_normals_start_at_the_prior():
    prior = dist.LogNormal(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], dtype=F64), 0.5).to_event(1)
    start = prior_start("x", prior, NOWHERE, draws=4000)
    torch.testing.assert_close(start.loc, prior.base_dist.base_dist.loc, atol=0.05, rtol=0)
    torch.testing.assert_close(start.scale, torch.full((3, 2), 0.5, dtype=F64), atol=0.05, rtol=0)
    q = LocalNormal.begin(start, sd.FullRank(0.1)).posterior(prior, NOWHERE)
    assert q.batch_shape == (3,)
    assert q.factor.shape == (3, 2, 2)
    q = LocalNormal.begin(start, sd.MeanField(0.1)).posterior(prior.expand((5, 3)), NOWHERE)
    assert q.batch_shape == (5, 3)
    torch.testing.assert_close(q.factor[0], 0.1 * start.scale)


def test_free_shapes():
    assert free_shape(PRIORS["a"]) == ()
    assert free_shape(PRIORS["b"]) == (2,)
    assert free_shape(PRIORS["c"]) == (2,)
    assert free_shape(dist.LKJCholesky(4)) == (6,)


def test_centre_and_spread_are_those_of_a_normal():
    rows = 3 + 2 * torch.randn(40001, 1, dtype=F64)
    centre, spread = centre_and_spread(rows)
    assert centre.item() == pytest.approx(3, abs=0.05)
    assert spread.item() == pytest.approx(2, abs=0.05)
    for few in (rows[:0], rows[:1], torch.ones(5, 1), torch.full((5, 1), float("inf"))):
        assert centre_and_spread(few)[1].item() == 1.0
    assert 0 < centre_and_spread(rows[:2])[1].item() < 10


def test_a_latent_left_out_is_noticed():
    left_out = []

    def model():
        for name in ("a", "b", "c"):
            if name not in left_out:
                pyro.sample(name, normal(0.0, 1.0))

    guide = sd.AmortizedGuide(model)
    guide()
    left_out.append("b")
    with pytest.raises(sd.GuideError, match=r"site 'c' comes after 1 numbers.*came after 2.*same order"):
        guide()
