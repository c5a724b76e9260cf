import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.models.ahead import OneStepAhead


def counting(n):
    return torch.arange(float(n)).reshape(n, 1, 1, 1).expand(n, 4, 3, 2)


def test_densities_are_those_of_the_prediction():
    seen = dist.Normal(torch.randn(4, 3, 2), 0.5)
    fn, y = OneStepAhead(seen, counting), torch.randn(4, 3, 2)
    assert torch.equal(fn.log_prob(y), seen.log_prob(y))
    assert torch.equal(fn.mean, seen.mean) and torch.equal(fn.variance, seen.variance)
    assert fn.support is seen.support


@pytest.mark.parametrize(("lead", "sample_shape"), [((7,), ()), ((), (7,)), ((2, 1), (3,))])
def test_draws_come_from_the_function_in_any_shape(lead, sample_shape):
    fn = OneStepAhead(dist.Normal(torch.zeros(4, 3, 2), 1.0), counting).expand((*lead, 4, 3, 2))
    found = fn.sample(sample_shape)
    assert found.shape == (*sample_shape, *lead, 4, 3, 2)
    assert sorted(found[..., 0, 0, 0].flatten().tolist()) == list(range(found[..., 0, 0, 0].numel()))


def test_it_can_be_censored():
    seen = dist.Normal(torch.linspace(-1, 1, 24).double().reshape(4, 3, 2), 0.5)
    high = torch.full((4, 3, 2), 0.3, dtype=torch.float64)
    found = sd.Censored(OneStepAhead(seen, counting), torch.full((4, 3, 2), -torch.inf), high)
    torch.testing.assert_close(found.log_prob(high), seen.cdf(high).log(), rtol=1e-4, atol=1e-5)
    gumbel = OneStepAhead(dist.Gumbel(torch.zeros(4, 3, 2), 1.0), counting)
    unknown = sd.Censored(gumbel, torch.full((4, 3, 2), -torch.inf), high)
    with pytest.raises(sd.SupportError, match="Gumbel has no distribution function"):
        unknown.log_prob(high)
