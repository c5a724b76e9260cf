from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt

import stochdyn as sd
from stochdyn.diagnostics.plots import plot_forecast, plot_losses, plot_phase
from stochdyn.errors import DataError, ShapeError

DRAWS, SERIES, TIME = 60, 2, 41


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def make(**changes):
    """Two species over forty years, two series, data to year thirty."""
    rng = np.random.default_rng(0)
    times = np.linspace(1900, 1940, TIME)
    phase = 2 * np.pi * (times - 1900) / 10
    cycle = np.stack([30 + 20 * np.sin(phase), 25 + 15 * np.sin(phase - 1)], -1)
    draws = cycle * np.exp(0.2 * rng.normal(size=(DRAWS, SERIES, TIME, 2)))
    mask = np.ones((SERIES, TIME, 2), bool)
    mask[:, 4, 0] = False
    data = SimpleNamespace(times=times, values=draws[0], mask=mask, channels=("hare", "lynx"))
    given = {
        "times": times,
        "observations": draws,
        "states": draws.mean(-1, keepdims=True),
        "channels": ("hare", "lynx"),
        "last_observed": np.array([1930.0, 1920.0]),
        "data": data,
    }
    return SimpleNamespace(**{**given, **changes})


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def drawn(ax):
    """Rendering must not warn either."""
    ax.figure.canvas.draw()
    return ax


def test_forecast_has_a_labelled_panel_per_channel():
    axes = plot_forecast(make(), time_label="year")
    drawn(axes[0])
    assert [ax.get_ylabel() for ax in axes] == ["hare", "lynx"]
    assert axes[-1].get_xlabel() == "year"
    handles = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert handles == ["95%", "80%", "50%", "median", "data", "later data"]


def test_forecast_shows_the_right_numbers():
    prediction = make()
    ax = plot_forecast(prediction, series=1, channels=["lynx"])[0]
    expected = np.median(prediction.observations[:, 1, :, 1], 0)
    np.testing.assert_allclose(lines(ax)["median"].get_ydata(), expected)
    outer = ax.collections[0].get_paths()[0].get_extents()
    low, high = np.quantile(prediction.observations[:, 1, :, 1], [0.025, 0.975], axis=0)
    assert (outer.ymin, outer.ymax) == pytest.approx((low.min(), high.max()))
    assert lines(ax)["data"].get_xdata().max() == 1920
    assert lines(ax)["later data"].get_xdata().min() == 1921


def test_unobserved_points_are_left_out():
    hare, lynx = plot_forecast(make())
    assert 1904.0 not in lines(hare)["data"].get_xdata()
    assert 1904.0 in lines(lynx)["data"].get_xdata()


def test_censored_points_point_to_where_the_truth_is():
    prediction = make()
    data = sd.Series(
        [1900.0, 1901.0, 1902.0, 1903.0],
        torch.tensor([[[1.0, 5.0], [30.0, 5.0], [99.0, 5.0], [40.0, 5.0]]]).expand(2, 4, 2),
        lower=[2.0, 0.0],
        upper=[90.0, 100.0],
        channels=["hare", "lynx"],
    )
    hare, lynx = plot_forecast(prediction, observed=data)
    assert lines(hare)["data"].get_xdata().tolist() == [1901.0, 1903.0]
    markers = {line.get_marker(): line.get_xydata().tolist() for line in hare.get_lines()}
    assert markers["v"] == [[1900.0, 2.0]] and markers["^"] == [[1902.0, 90.0]]
    assert "v" not in {line.get_marker() for line in lynx.get_lines()}
    nan = float("nan")
    between = sd.Series([1900.0], [[[5.0, 5.0]]], between=([1.0, nan], [8.0, nan]), channels=["hare", "lynx"])
    hare = plot_forecast(prediction, observed=between)[0]
    segments = [c.get_segments() for c in hare.collections if hasattr(c, "get_segments")]
    assert [s.tolist() for s in segments[-1]] == [[[1900.0, 1.0], [1900.0, 8.0]]]


def test_intervals_go_from_light_to_dark():
    ax = plot_forecast(make())[0]
    shades = [band.get_facecolor()[0, :3].mean() for band in ax.collections[:3]]
    assert shades[0] > shades[1] > shades[2]


def test_without_a_forecast_there_is_no_dashed_line():
    assert len(plot_forecast(make())[0].texts) == 1
    assert not plot_forecast(make(last_observed=np.array([1940.0, 1940.0])))[0].texts
    padded = np.minimum(make().times, 1930)  # own times end in repeats of the last one
    assert not plot_forecast(make(times=padded))[0].texts
    assert not plot_forecast(make(last_observed=np.array([-np.inf, -np.inf])))[0].texts


def test_own_times_tensors_and_padding():
    prediction = make()
    own = torch.tensor(np.stack([prediction.times, prediction.times + 0.5]))
    own[1, -3:] = torch.inf
    draws = torch.tensor(prediction.observations, requires_grad=True)
    ax = plot_forecast(make(times=own, observations=draws, data=None), series=1)[0]
    assert lines(ax)["median"].get_xdata().tolist() == own[1, :-3].tolist()
    assert "data" not in lines(ax)


def test_states_truth_log_and_given_axes():
    prediction = make()
    _, axes = plt.subplots(1, 2)
    got = plot_forecast(prediction, axes=axes, truth=prediction.observations[0], log=True)
    assert list(got) == list(axes)
    assert got[0].get_yscale() == "log"
    truth = lines(drawn(got[1]))["truth"].get_ydata()
    np.testing.assert_array_equal(truth, prediction.observations[0, 0, :, 1])
    states = plot_forecast(prediction, states=True)
    assert [ax.get_ylabel() for ax in states] == ["state 0"]
    assert "data" not in lines(states[0])


def test_later_data_can_be_given():
    full = make().data
    ax = plot_forecast(make(data=None), observed=full)[0]
    assert "later data" in lines(ax)


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, {"series": 2}, DataError, "series 2 does not exist: the prediction has 2"),
        ({}, {"channels": ["fox"]}, DataError, r"channels \['fox'\]: there are \('hare', 'lynx'\)"),
        ({}, {"channels": [2]}, DataError, r"channels \[2\]"),
        ({}, {"channels": []}, DataError, "channels none"),
        (
            {"observations": np.ones((3, 4, 2))},
            {},
            ShapeError,
            r"\(draw, series, time, channel\), got \(3, 4, 2\)",
        ),
        ({"times": np.arange(3.0)}, {}, ShapeError, "3 times but 41 rows"),
        ({"channels": ("hare",)}, {}, ShapeError, "but 2 channels"),
        ({"observations": np.full((5, 2, TIME, 2), np.nan)}, {}, DataError, "5 of 5 draws are not finite"),
        ({"observations": -np.ones((5, 2, TIME, 2))}, {"log": True}, DataError, "no positive draw"),
        ({"states": None}, {"states": True}, DataError, "no `states`"),
        ({}, {"truth": np.ones((3, 2))}, ShapeError, r"`truth` has shape \(3, 2\)"),
        ({}, {"axes": [None]}, ShapeError, "1 axes for 2 panels"),
    ],
)
def test_bad_predictions_are_refused(changes, options, error, message):
    with pytest.raises(error, match=message):
        plot_forecast(make(**changes), **options)


def test_data_of_other_channels_or_series_are_refused():
    data = make().data
    with pytest.raises(DataError, match=r"channels \['fox', 'owl'\], the prediction 'hare'"):
        plot_forecast(make(), observed=SimpleNamespace(**{**vars(data), "channels": ("fox", "owl")}))
    fewer = SimpleNamespace(**{**vars(data), "values": data.values[:1]})
    with pytest.raises(DataError, match="series 1 is not in the data, which hold 1"):
        plot_forecast(make(), observed=fewer, series=1)


def test_phase_plane():
    prediction = make()
    ax = drawn(plot_phase(prediction, ("lynx", "hare"), series=0, draws=10))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("lynx", "hare")
    shown = lines(ax)
    np.testing.assert_allclose(
        shown["median"].get_xdata(), np.median(prediction.observations[:, 0, :31, 1], 0)
    )
    assert len(shown["forecast"].get_xdata()) == 11
    assert len(shown["data"].get_xdata()) == 30  # to year 30, without the year when no hare was counted
    assert sum(line.get_alpha() == 0.12 for line in ax.lines) == 10


def test_phase_plane_without_data_or_forecast():
    ax = plot_phase(make(data=None, last_observed=np.array([1940.0] * 2)))
    assert not {"data", "forecast"} & set(lines(ax))
    with pytest.raises(ShapeError, match="a phase plane has two"):
        plot_phase(make(), channels=(0, 1, 1))


def test_losses_ignore_the_first_explosion_and_skipped_steps():
    steps = np.arange(1000)
    trace = 50 + 1e6 * np.exp(-steps / 5) + np.random.default_rng(0).normal(size=1000)
    trace[500:540] = np.nan
    ax = drawn(plot_losses(SimpleNamespace(losses=trace.tolist())))
    low, high = ax.get_ylim()
    assert 30 < low < 50 < high < 100
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")
    median = lines(ax)["running median"].get_ydata()
    assert np.abs(median[len(median) // 2 :] - 50).max() < 1.5


def test_losses_per_series_are_elbos():
    ax = plot_losses(np.linspace(100, 40, 50), per=20)
    assert ax.get_ylabel() == "ELBO per series"
    assert lines(ax)["each step"].get_ydata()[[0, -1]].tolist() == [-5.0, -2.0]
    fit = SimpleNamespace(losses=[100.0, 40.0], population=20)
    assert lines(plot_losses(fit))["each step"].get_ydata().tolist() == [-5.0, -2.0]
    assert lines(plot_losses(fit, per=1))["each step"].get_ydata().tolist() == [-100.0, -40.0]


@pytest.mark.parametrize("trace", [[3.0], [2.0] * 100, [np.nan, 1.0, np.inf]])
def test_short_and_flat_traces_plot(trace):
    _, ax = plt.subplots()
    assert drawn(plot_losses(trace, ax=ax)) is ax


@pytest.mark.parametrize(
    ("trace", "per", "error", "message"),
    [
        ([], None, DataError, "none of the 0 losses"),
        ([np.nan, np.nan], 1, DataError, "none of the 2 losses is finite"),
        ([[1.0]], 1, ShapeError, r"shape \(1, 1\)"),
        ([1.0], 0, DataError, "per=0"),
    ],
)
def test_bad_traces_are_refused(trace, per, error, message):
    with pytest.raises(error, match=message):
        plot_losses(trace, per=per)
