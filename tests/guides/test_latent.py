"""`LatentNormal` is a transformed normal."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import TransformedDistribution, biject_to, constraints

from stochdyn.guides.latent import LatentNormal
from tests.programs import F64

CASES = {
    "real": (constraints.real, (), ()),
    "positive": (constraints.positive, (), ()),
    "interval": (constraints.interval(-1.0, 2.0), (), ()),
    "vector": (constraints.independent(constraints.positive, 1), (3,), (3,)),
    "simplex": (constraints.simplex, (4,), (3,)),
    "cholesky": (constraints.corr_cholesky, (3, 3), (3,)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(case, batch=(5,), full=False, own=True):
    support, event, free = CASES[case]
    size = torch.Size(free).numel()
    loc = torch.randn(*batch, size, dtype=F64, requires_grad=own)
    factor = torch.rand(*batch, size, dtype=F64) + 0.5
    if full:
        factor = torch.diag_embed(factor) + torch.randn(*batch, size, size, dtype=F64).tril(-1)
    factor.requires_grad_(own)
    shapes = (torch.Size(event), torch.Size(free))
    return LatentNormal(loc, factor, biject_to(support), shapes, (loc.detach(), factor.detach()))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_density_is_that_of_the_transformed_normal(case, full):
    q = make(case, full=full)
    value = q.rsample((2,))
    tril = q.factor if full else torch.diag_embed(q.factor)
    base = dist.MultivariateNormal(q.loc, scale_tril=tril)
    if not q.free_shape:  # torch knows no scalar with a vector base
        base = dist.Normal(q.loc[..., 0], tril[..., 0, 0])
    exact = TransformedDistribution(base, [biject_to(CASES[case][0])])
    assert value.shape == (2, 5, *CASES[case][1])
    assert q.support.check(value).all()
    torch.testing.assert_close(q.log_prob(value), exact.log_prob(value))
    wrong = TransformedDistribution(base.expand(base.batch_shape), [])
    if case != "real":
        assert (
            q.log_prob(value) - wrong.log_prob(q.free(value).reshape(2, 5, *q.free_shape))
        ).abs().min() > 1e-6


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_expand_and_free(case, full):
    q = make(case, full=full)
    wide = q.expand(torch.Size((3, 5)))
    assert wide.batch_shape == (3, 5)
    value = wide.rsample()
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value))
    torch.testing.assert_close(q.transform(wide.free(value).reshape(3, 5, *q.free_shape)), value)


@pytest.mark.parametrize("full", [False, True])
def test_the_score_sees_values_only(full):
    q = make("vector", full=full)
    value = q.rsample()
    parts = q.score_parts(value)
    torch.testing.assert_close(parts.log_prob, q.log_prob(value))
    through = torch.autograd.grad(parts.entropy_term.sum(), q.factor, retain_graph=True)[0]
    assert through.abs().max() > 0
    held = value.detach()
    assert not q.score_parts(held).entropy_term.requires_grad
    assert q.log_prob(held).requires_grad
