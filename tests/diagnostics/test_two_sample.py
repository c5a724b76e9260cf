import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.diagnostics.two_sample import TwoSample, c2st

DRAWS = 4000


def draw(seed, d=5, size=DRAWS):
    return np.random.default_rng(seed).normal(size=(size, d))


def correlated(seed, r, d=5):
    z = draw(seed, d)
    z[:, 1] = r * z[:, 0] + (1 - r * r) ** 0.5 * z[:, 1]
    return z


def shifted(seed):
    z = draw(seed)
    z[:, 0] += 0.3
    return z


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 6))])
def test_draws_of_one_law_cannot_be_told_apart(seed):
    found = c2st(draw(2 * seed), draw(2 * seed + 1), seed=seed)
    assert abs(found.accuracy - 0.5) < 0.02
    assert not found.differs(errors=4)


@pytest.mark.parametrize(
    ("x", "y", "best"),
    [
        (draw(0), 0.8 * draw(1), 0.633),
        (draw(0), shifted(1), 0.560),
        (correlated(0, 0.5), correlated(1, -0.5), 0.667),
    ],
    ids=["sd x 0.8", "mean + 0.3 sd of one", "the sign of one correlation"],
)
def test_a_difference_is_found_nearly_as_well_as_can_be(x, y, best):
    """`best` is the accuracy of the exact likelihood ratio."""
    found = c2st(x, y)
    error = (best * (1 - best) / (2 * DRAWS)) ** 0.5
    assert best - 0.02 - 4 * error < found.accuracy < best + 4 * error
    assert found.accuracy > 0.53
    assert found.differs()


def test_few_draws_far_apart_are_told_apart():
    found = c2st(draw(0, 2, 100), draw(1, 2, 100) + 4)
    assert found.accuracy > 0.95
    assert found.draws == 200


def test_the_seed_gives_the_same_figure_and_the_outer_state_is_kept():
    x, y = draw(0, 1, 200), draw(1, 1, 200) + 0.5
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad():
        found = c2st(x, y, seed=1)
    assert found == c2st(torch.from_numpy(x), torch.from_numpy(y), seed=1)
    assert {found.accuracy} != {c2st(x, y, seed=k).accuracy for k in (2, 3, 4)}
    assert torch.equal(before, torch.get_rng_state())
    assert (state == np.random.get_state()[1]).all()


def test_scale_and_units_do_not_count():
    x, y = draw(0, size=500), draw(1, size=500) + 0.5
    scale, shift = np.array([1e-6, 1.0, 1e3, 1e6, 1.0]), np.array([0.0, 5.0, -1e4, 0.0, 0.0])
    a, b = c2st(x, y), c2st(x * scale + shift, y * scale + shift)
    assert abs(a.accuracy - b.accuracy) < 0.01


def test_a_constant_column_and_unequal_sizes_are_no_trouble():
    x = np.column_stack([draw(0, 1, 300), np.ones(300)])
    y = np.column_stack([draw(1, 1, 700) + 3, np.ones(700)])
    found = c2st(x, y)
    assert found.draws == 600
    assert found.accuracy > 0.85


def test_one_column_may_be_flat():
    assert c2st(draw(0, 1, 200)[:, 0], draw(1, 1, 200)[:, 0] + 3).differs()


def test_the_error_is_that_of_a_fair_coin():
    found = TwoSample(0.5, 10000)
    assert found.error == 0.005
    assert not found.differs()
    assert str(found) == "C2ST 0.500 (0.5 +- 0.010 if the same)"


def test_bad_input_is_named():
    x = draw(0, 2, 200)
    with pytest.raises(sd.ShapeError, match="x has 2 columns, y has 3"):
        c2st(x, draw(0, 3, 200))
    with pytest.raises(sd.ShapeError, match=r"`y` has shape \(2, 3, 4\)"):
        c2st(x, np.zeros((2, 3, 4)))
    with pytest.raises(sd.DataError, match="`x`: 1 of 200 draws are not finite"):
        c2st(np.where(np.arange(400).reshape(200, 2) == 3, np.nan, x), x)
    with pytest.raises(sd.DataError, match="200 draws of each set for 11 folds"):
        c2st(x, x, folds=11)
