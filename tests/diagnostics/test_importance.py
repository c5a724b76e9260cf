import arviz as az
import numpy as np
import pytest
import torch

from stochdyn.diagnostics.importance import pareto_k, psis_weights, summarise
from stochdyn.errors import DataError, ShapeError


def weights(s, seed, draws=4000):
    """log p - log q for p = N(0, 1), q = N(0, s^2), at draws from q."""
    z = s * np.random.default_rng(seed).normal(size=draws)
    return -(z**2) / 2 + (z / s) ** 2 / 2 + np.log(s)


def median_k(s, sign=1):
    return float(np.median([pareto_k(sign * weights(s, seed)).k for seed in range(20)]))


@pytest.mark.skipif(not hasattr(az, "psislw"), reason="ArviZ 1.x moved psislw and flipped its sign")
@pytest.mark.parametrize("draws", [25, 26, 100, 1000, 4000])
def test_agrees_with_arviz(draws):
    rng = np.random.default_rng(draws)
    for scale in (0.01, 0.5, 1, 3, 20):
        given = scale * rng.standard_t(4, size=draws)
        smoothed, k = az.psislw(given.copy())
        np.testing.assert_allclose(pareto_k(given).k, k, atol=1e-6)
        np.testing.assert_allclose(psis_weights(given), smoothed, atol=1e-6)


@pytest.mark.parametrize("s", [0.6, 0.7, 0.8, 0.9])
def test_narrow_normal_guides_have_k_one_minus_variance(s):
    # The estimator's bias at 4000 draws is .05 at most; the median of 20 scatters by .01.
    assert median_k(s) == pytest.approx(1 - s**2, abs=0.08)


def test_the_sign_matters():
    assert 0.45 < median_k(0.6) < 0.75
    assert median_k(0.6, sign=-1) < 0.2  # the bad guide that a flipped sign certifies


def test_verdicts():
    narrow, close = pareto_k(weights(0.4, 0)), pareto_k(weights(0.9, 0, draws=1000))
    assert not narrow.good
    assert str(narrow) == f"k-hat {narrow.k:.2f} (bad, not below 0.70)"
    assert close.good
    assert str(close) == f"k-hat {close.k:.2f} (good, below 0.67)"
    assert narrow.ess < 0.5 * narrow.draws < 0.9 * close.draws * 4 < close.ess * 4


@pytest.mark.parametrize("level", [0.0, -1234.5])
def test_an_exact_guide_is_called_exact(level):
    rounding = 1e-10 * np.random.default_rng(0).normal(size=500)
    fit = pareto_k(level + rounding)
    assert (fit.k, fit.exact, fit.good, fit.ess) == (-np.inf, True, True, 500.0)
    assert str(fit) == "exact (all importance weights equal)"


def test_an_almost_exact_guide_is_not_called_exact():
    assert not pareto_k(1e-4 * np.random.default_rng(0).normal(size=500)).exact


def test_single_precision_rounding_is_still_exact():
    level = np.float32(-1234.5)
    assert pareto_k(np.where(np.arange(500) % 2, level, np.nextafter(level, np.float32(0)))).exact


def test_one_draw_with_all_the_weight_is_bad_and_ties_are_not():
    lonely = np.zeros(100)
    lonely[3] = 800.0
    fit = pareto_k(lonely)
    assert fit.k == np.inf
    assert not fit.good
    assert fit.ess == pytest.approx(1)
    assert pareto_k(np.arange(100) % 2).k == -np.inf


def test_smoothing_helps_and_keeps_the_order():
    given = weights(0.55, 3)
    z = 0.55 * np.random.default_rng(3).normal(size=4000)
    smoothed = np.exp(psis_weights(given))
    assert smoothed.sum() == pytest.approx(1)
    assert (np.diff(smoothed[np.argsort(given)]) >= -1e-15).all()
    plain = (z**2).mean()  # .30, where p has variance 1
    assert abs((smoothed * z**2).sum() - 1) < 0.3 < abs(plain - 1)


def test_takes_tensors():
    assert pareto_k(torch.tensor(weights(0.8, 0), requires_grad=True)) == pareto_k(weights(0.8, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [pareto_k, psis_weights])
def test_weights_that_are_not_finite_are_counted_and_refused(function, bad):
    given = weights(0.8, 0, draws=100)
    given[[7, 50]] = bad
    with pytest.raises(DataError, match=r"2 of 100 log weights are not finite, first draw 7\."):
        function(given)


def test_too_few_draws_and_wrong_shapes_are_refused():
    with pytest.raises(DataError, match="24 log weights are too few"):
        pareto_k(weights(0.8, 0, draws=24))
    with pytest.raises(ShapeError, match=r"\(draw,\), got \(50, 2\)"):
        pareto_k(np.zeros((50, 2)))


def test_summary_numbers():
    draws = np.random.default_rng(0).normal(size=(1000, 2))
    (first, second) = summarise({"theta": draws}, interval=0.8).rows
    assert (first.name, second.name) == ("theta[0]", "theta[1]")
    assert second.mean == pytest.approx(draws[:, 1].mean())
    assert second.sd == pytest.approx(draws[:, 1].std(ddof=1))
    assert second.lower == pytest.approx(np.quantile(draws[:, 1], 0.1))
    assert second.upper == pytest.approx(np.quantile(draws[:, 1], 0.9))


def test_summary_text_is_aligned():
    table = summarise(
        {"mu": np.linspace(0, 1, 101), "rate": np.linspace(-2000, 2000, 202).reshape(101, 2)},
        interval=0.95,
        labels={"rate": ["hare", "lynx"]},
    )
    lines = str(table).splitlines()
    assert lines[0].split() == ["name", "mean", "sd", "2.5%", "97.5%"]
    assert [line.split()[0] for line in lines[1:]] == ["mu", "rate[hare]", "rate[lynx]"]
    assert len({len(line) for line in lines}) == 1
    assert "0.5000" in lines[1]


def test_summary_of_matrices_and_of_one_draw():
    rows = summarise({"A": np.ones((1, 2, 2))}).rows
    assert [row.name for row in rows] == ["A[0, 0]", "A[0, 1]", "A[1, 0]", "A[1, 1]"]
    assert rows[0].sd == 0


@pytest.mark.parametrize(
    ("draws", "options", "error", "message"),
    [
        ({"mu": [1.0, np.nan]}, {}, DataError, "mu: 1 of 2 values are not finite"),
        ({"mu": []}, {}, DataError, "no draws"),
        ({"mu": [1.0]}, {"interval": 90}, DataError, "interval=90"),
        ({"mu": [1.0]}, {"labels": {"nu": ["a"]}}, DataError, r"labels for \['nu'\]"),
        ({"mu": [[1.0, 2.0]]}, {"labels": {"mu": ["a"]}}, ShapeError, "2 elements but 1 labels"),
    ],
)
def test_bad_draws_are_refused(draws, options, error, message):
    with pytest.raises(error, match=message):
        summarise(draws, **options)
