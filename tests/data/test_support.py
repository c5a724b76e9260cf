"""Values that a likelihood cannot produce are named."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd

ONE = torch.ones(2, 2, 1)


def observe(values, fn, **options):
    batch = sd.Series([0.0, 0.5], values, ids=["Ada", "Bo"], channels=["cells"], **options)
    with batch.plate("series"):
        return batch.observe("y", fn)


@pytest.mark.parametrize(
    ("bad", "fn", "message"),
    [
        (2.5, dist.Poisson(ONE), "value is 2.5, and Poisson takes counts 0, 1, 2, ..."),
        (-1.0, dist.NegativeBinomial(ONE, logits=ONE), "value is -1, and NegativeBinomial takes counts"),
        (2.0, dist.Bernoulli(logits=ONE), "value is 2, and Bernoulli takes 0 and 1"),
        (
            3.0,
            dist.Categorical(logits=torch.zeros(2, 2, 1, 3)),
            r"value is 3, and Categorical takes classes 0, 1, ... 2",
        ),
        (0.5, dist.Categorical(logits=torch.zeros(2, 2, 1, 3)), "value is 0.5"),
        (0.0, dist.LogNormal(ONE, 1.0), "value is 0, and LogNormal takes positive numbers"),
    ],
)
def test_the_place_of_a_bad_value(bad, fn, message):
    values = ONE.clone()
    assert observe(values, fn).equal(values)
    values[1, 1, 0] = bad
    with pytest.raises(sd.DataError, match="series Bo, time 0.5, channel cells: " + message + ".*mask it"):
        observe(values, fn)
    mask = torch.ones(2, 2, 1, dtype=torch.bool)
    mask[1, 1, 0] = False
    assert observe(values, fn, mask=mask)[1, 1, 0] == 1


def test_a_censored_value_may_be_anything():
    values = ONE.clone()
    values[1, 1, 0] = 2.5
    assert observe(values, dist.Poisson(ONE), upper=2.5)[1, 1, 0] == 2.5


def test_draws_on_the_left_are_all_looked_at():
    values = ONE.clone()
    values[0, 0, 0] = 3.0
    with pyro.plate("draws", 5, dim=-2), pytest.raises(sd.DataError, match="series Ada, time 0"):
        observe(values, dist.Bernoulli(logits=torch.zeros(5, 2, 2, 1)))


def test_without_validation_nothing_is_checked():
    values = ONE.clone()
    values[0, 0, 0] = 2.5
    with pyro.validation_enabled(False):
        assert observe(values, dist.Poisson(ONE)).equal(values)


def test_a_likelihood_over_scalars():
    with pytest.raises(sd.ShapeError, match=r"got event_shape \(2, 1\).*pass it without"):
        observe(ONE, dist.Normal(ONE, 1.0).to_event(2))
