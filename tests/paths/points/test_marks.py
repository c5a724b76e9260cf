import math

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.paths.points.marks import draw_marks, mark_dim, mark_log_prob, marks_inside


@pytest.mark.parametrize(
    ("law", "width"),
    [
        (None, 0),
        (dist.Normal(0.0, 1.0), 1),
        (dist.Categorical(torch.ones(3) / 3), 1),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), 2),
    ],
)
def test_width_and_draws(law, width):
    assert mark_dim(law) == width
    drawn = draw_marks(law, torch.Size((1, 4)), torch.zeros(1).double())
    assert drawn.shape == (1, 4, width) and drawn.dtype == torch.float64


def test_batches_of_laws():
    law = dist.Normal(torch.tensor([0.0, 100.0]), 1.0)
    drawn = draw_marks(law, torch.Size((1, 5, 2)), torch.zeros(1))
    assert bool((drawn[..., 0, 0] < 50).all() and (drawn[..., 1, 0] > 50).all())
    assert draw_marks(dist.Normal(torch.zeros(1), 1.0), torch.Size((1, 3)), torch.zeros(1)).shape == (1, 3, 1)


@pytest.mark.parametrize(
    ("law", "mark"),
    [
        (dist.LogNormal(torch.zeros(1), 1.0), [2.0]),
        (dist.Beta(torch.ones(1), 2.0), [0.5]),
        (dist.Poisson(torch.ones(1)), [3.0]),
        (dist.Dirichlet(torch.ones(3)), [0.2, 0.3, 0.5]),
    ],
)
def test_unused_rows_have_no_density_whatever_the_support(law, mark):
    marks = torch.tensor([mark, [0.0] * len(mark)])
    real = torch.tensor([True, False])
    found = mark_log_prob(law, marks, real)
    expected = law.log_prob(marks[:1] if law.event_shape else marks[:1, 0])
    assert torch.allclose(found, torch.cat([expected, torch.zeros(1)]))


def test_support():
    value = torch.tensor([[0.1, 2.0], [0.2, -1.0]])
    assert marks_inside(dist.LogNormal(0.0, 1.0).support, value).tolist() == [True, False]
    assert marks_inside(None, value).tolist() == [True, True]


def test_bounds_of_batch_shape():
    law = dist.Uniform(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
    process = sd.PoissonProcess(1.0, 0.0, 4.0, marks=law)
    value = torch.tensor([[0.5, 0.9], [1.0, 0.5], [float("inf"), 0.0]]).double()
    expected = -4.0 - 2 * torch.tensor([1.0, 2.0, 3.0]).double().log()
    assert torch.allclose(process.log_prob(value), expected, atol=1e-6)
    assert torch.allclose(process.log_prob(value.expand(2, 3, 3, 2)), expected, atol=1e-6)
    value[1, 1] = 1.5
    assert process.support.check(value).tolist() == [False, True, True]
    with pytest.raises(sd.DataError, match="series 0, jump 1, time 1: mark is"):
        process.log_prob(value)


def test_bounds_that_depend_on_the_time():
    process = sd.PointProcess(
        lambda s, h: torch.ones_like(s), 0.0, 4.0, marks=lambda s, h: dist.Uniform(0 * s, 1 + s)
    )
    value = torch.tensor([[0.5, 0.9], [1.0, 1.8], [float("inf"), 0.0]]).double()
    assert float(process.log_prob(value)) == pytest.approx(-4 - math.log(1.5) - math.log(2), abs=1e-8)
    value[1, 1] = 2.1
    with pytest.raises(sd.DataError, match=r"jump 1, time 1: mark is \[2.1"):
        process.log_prob(value)


@pytest.mark.parametrize(
    "law", [dist.OneHotCategorical(torch.tensor([0.2, 0.8])), dist.Multinomial(2, torch.tensor([0.2, 0.8]))]
)
def test_unused_rows_of_vectors_of_counts(law):
    mark = law.sample()
    value = torch.cat([torch.tensor([[0.5], [float("inf")]]), torch.stack([mark, 0 * mark])], 1).double()
    found = sd.PoissonProcess(1.0, 0.0, 4.0, marks=law).log_prob(value)
    assert float(found) == pytest.approx(-4 + float(law.log_prob(mark)), abs=1e-6)


def test_what_is_no_law_of_marks():
    with pytest.raises(sd.ShapeError, match="`marks` must be a distribution"):
        mark_dim(3.0)
    with pytest.raises(sd.ShapeError, match="event_shape"):
        mark_dim(dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
