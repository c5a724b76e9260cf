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


def test_what_is_no_law_of_marks():
    with pytest.raises(sd.ShapeError, match="`marks` must be a distribution"):
        mark_dim(3.0)
    with pytest.raises(sd.ShapeError, match="event_shape"):
        mark_dim(dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
