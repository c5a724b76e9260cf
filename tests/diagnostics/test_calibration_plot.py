import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

import stochdyn as sd

SIMULATIONS, DRAWS = 500, 50


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def calibration():
    """Ranks of N(mu, 1) among right draws, draws too narrow, and draws too high."""
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=SIMULATIONS), rng.normal(size=(DRAWS, SIMULATIONS))
    named = {"right": noise, "narrow": 0.6 * noise, "high": noise + 0.4}
    return sd.Calibration({name: (draws < truth).sum(0) for name, draws in named.items()}, DRAWS)


def curves(ax):
    """The ranks' curve and the band's lower and upper edge, at the same places."""
    curve = next(line for line in ax.lines if line.get_label() == "ranks").get_xydata()
    corners = ax.collections[0].get_paths()[0].vertices
    lower, upper = ([corners[np.isclose(corners[:, 0], x), 1] for x in curve[1:-1, 0]] for _ in range(2))
    return curve, np.array([y.min() for y in lower]), np.array([y.max() for y in upper])


def test_a_panel_per_quantity_with_its_verdict(calibration):
    axes = sd.plot_calibration(calibration)
    axes[0].figure.canvas.draw()
    assert [ax.get_title(loc="left") for ax in axes] == ["right", "narrow", "high"]
    assert "inside the band" in axes[0].get_title(loc="right")
    assert all("p < 0.001, leaves the band at" in ax.get_title(loc="right") for ax in axes[1:])


def test_curve_and_band_show_the_right_numbers(calibration):
    ax = sd.plot_calibration(calibration, quantities=["narrow"], alpha=0.1)[0]
    curve, low, high = curves(ax)
    positions, lower, upper = calibration.band("narrow", 0.1)
    np.testing.assert_allclose(curve[1:-1, 0], positions)
    ecdf = [(calibration.ranks["narrow"] < k).mean() for k in range(1, DRAWS + 1)]
    np.testing.assert_allclose(curve[1:-1, 1], np.array(ecdf) - positions)
    assert not curve[[0, -1], 1].any()
    np.testing.assert_allclose(low, lower - positions)
    np.testing.assert_allclose(high, upper - positions)


def test_the_shape_says_what_is_wrong_as_the_docstring_has_it(calibration):
    _, narrow, high = sd.plot_calibration(calibration)
    rises, high = curves(narrow)[0][:, 1], curves(high)[0][:, 1]
    assert rises[: DRAWS // 4].max() > 0.03
    assert rises[-DRAWS // 4 :].min() < -0.03
    assert high.min() > -0.01
    assert high.max() > 0.1


def test_more_panels_widen_the_band(calibration):
    one = curves(sd.plot_calibration(calibration, quantities=["right"])[0])
    three = curves(sd.plot_calibration(calibration)[0])
    assert (three[2] - three[1]).sum() > (one[2] - one[1]).sum()


def test_it_draws_into_given_axes(calibration):
    _, given = plt.subplots(3)
    assert list(sd.plot_calibration(calibration, axes=given)) == list(given)
    with pytest.raises(sd.ShapeError, match="3 axes for 1 panels"):
        sd.plot_calibration(calibration, quantities=["high"], axes=given)


def test_bad_input_is_named(calibration):
    with pytest.raises(sd.DataError, match=r"quantities \['mu'\]: there are \['right', 'narrow', 'high'\]"):
        sd.plot_calibration(calibration, quantities=["mu"])
    with pytest.raises(sd.DataError, match="quantities none"):
        sd.plot_calibration(calibration, quantities=[])
    with pytest.raises(sd.DataError, match="`alpha` must be between 0 and 1, got 2"):
        sd.plot_calibration(calibration, alpha=2)
