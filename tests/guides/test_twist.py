"""A prior times a message, against completing the square and quadrature."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform

from stochdyn.guides.twist import NaturalMessage, coordinates, gaussian_base, twisted
from tests.programs import F64

CENTRE, UNIT = torch.tensor([0.3], dtype=F64), torch.tensor([0.8], dtype=F64)
H, J = torch.tensor([[1.2], [-0.4]], dtype=F64), torch.tensor([[[2.0]], [[0.0]]], dtype=F64)
MESSAGE = NaturalMessage(H, J)


def number(x):
    return torch.tensor(x, dtype=F64)


PRIORS = {
    "normal": (dist.Normal(number([0.2, -1.0]), 0.7), True),
    "log-normal": (dist.LogNormal(number([0.2, -1.0]), 0.7), True),
    "shifted": (dist.TransformedDistribution(dist.Normal(number(0.0), 1.0), [AffineTransform(number([0.2, -1.0]), 0.7)]), True),
    "logit-normal": (dist.TransformedDistribution(dist.Normal(number([0.2, -1.0]), 0.7), [SigmoidTransform()]), True),
    "gamma": (dist.Gamma(number([2.0, 5.0]), 1.5), False),
    "half-normal": (dist.HalfNormal(number([2.0, 5.0])), False),
}  # fmt: skip


@pytest.mark.parametrize("name", PRIORS)
def test_one_number(name):
    prior, own = PRIORS[name]
    base = gaussian_base(prior, CENTRE, UNIT)
    assert base.own == own
    q = twisted(prior, base, MESSAGE, MESSAGE)
    u = torch.linspace(-15, 15, 60001, dtype=F64)[:, None]
    value = base.transform(u)
    ladj = base.transform.log_abs_det_jacobian(u, value)
    start = prior.log_prob(value) + ladj if own else dist.Normal(CENTRE, UNIT).log_prob(u)
    product = start + H[:, 0] * u - 0.5 * J[:, 0, 0] * u.square()
    exact = product - torch.log(torch.trapezoid(product.exp(), u, dim=0))
    near = u[:, 0].abs() < 5
    got = q.log_prob(value) + ladj
    torch.testing.assert_close(got[near], exact[near], atol=1e-6, rtol=1e-6)
    assert (got[near] - start[near]).abs().max() > 0.1


def vector(case):
    loc = torch.randn(4, 3, dtype=F64)
    if case == "independent":
        return dist.Normal(loc, torch.rand(3, dtype=F64) + 0.5).to_event(1)
    A = torch.randn(3, 3, dtype=F64)
    full = dist.MultivariateNormal(loc, A @ A.mT + torch.eye(3, dtype=F64))
    return full if case == "full" else dist.TransformedDistribution(full, [ExpTransform()])


@pytest.mark.parametrize("case", ["independent", "full", "exp of full"])
def test_vectors(case):
    torch.manual_seed(0)
    prior = vector(case)
    A = torch.randn(4, 3, 3, dtype=F64)
    h, precision = torch.randn(4, 3, dtype=F64), A @ A.mT
    base = gaussian_base(prior, torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64))
    q = twisted(prior, base, NaturalMessage(h, precision), NaturalMessage(h, precision))
    tril = base.factor if base.factor.dim() == 3 else torch.diag_embed(base.factor)
    P = torch.linalg.inv(tril @ tril.mT)
    mean = torch.linalg.solve(P + precision, (P @ base.loc[..., None])[..., 0] + h)
    exact = dist.MultivariateNormal(mean, precision_matrix=P + precision)
    u = torch.randn(4, 3, dtype=F64)
    value = base.transform(u)
    ladj = base.transform.log_abs_det_jacobian(u, value)
    ladj = ladj.reshape(4, -1).sum(-1) if case == "exp of full" else 0.0
    torch.testing.assert_close(q.log_prob(value) + ladj, exact.log_prob(u))
    none = NaturalMessage(torch.zeros_like(h), torch.zeros_like(precision))
    torch.testing.assert_close(twisted(prior, base, none, none).log_prob(value), prior.log_prob(value))


def test_the_batch_is_that_of_prior_and_message():
    prior = dist.Normal(torch.zeros(7, 1, dtype=F64), 1.0)
    base = gaussian_base(prior, CENTRE, UNIT)
    assert twisted(prior, base, MESSAGE, MESSAGE).batch_shape == (7, 2)
    wide = NaturalMessage(H.expand(5, 1, 2, 1), J.expand(5, 1, 2, 1, 1))
    assert twisted(prior, base, wide, wide).batch_shape == (5, 7, 2)
    assert twisted(prior.expand((3, 7, 2)), base, MESSAGE, MESSAGE).batch_shape == (3, 7, 2)


def test_messages_of_members_add_up():
    group = torch.tensor([1, 0, 1])
    h, precision = torch.randn(4, 3, 2), torch.randn(4, 3, 2, 2)
    pooled = NaturalMessage(h, precision).pooled(group, 3)
    torch.testing.assert_close(pooled.information[:, 1], h[:, 0] + h[:, 2])
    torch.testing.assert_close(pooled.precision[:, 0], precision[:, 1])
    assert not pooled.information[:, 2].any()
    moved = NaturalMessage(h, precision).moved(-2)
    assert moved.information.shape == (3, 4, 2)
    assert NaturalMessage(h[0], precision[0]).moved(-2).precision.shape == (3, 1, 2, 2)


def test_coordinates_are_where_the_prior_is_gaussian():
    for prior, own in PRIORS.values():
        transform = coordinates(prior)
        x = prior.sample()
        torch.testing.assert_close(transform(transform.inv(x)), x)
        assert gaussian_base(prior, CENTRE, UNIT).own == own
    assert coordinates(dist.Dirichlet(torch.ones(3))).inverse_shape((5, 3)) == (5, 2)
    assert not gaussian_base(dist.Normal(number(0.0), 1.0).mask(False), CENTRE, UNIT).own
