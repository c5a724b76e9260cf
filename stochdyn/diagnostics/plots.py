"""Three plots: the training trace, the forecast fan, the phase plane.

`matplotlib.pyplot` is imported inside the functions that need a new figure: importing it picks a backend for
the whole process, which `import stochdyn` must not do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from stochdyn.diagnostics.tree import as_array
from stochdyn.errors import DataError, ShapeError

INTERVALS = (0.95, 0.8, 0.5)
COLORS = ("#1f6f8b", "#c8553d", "#5b8c5a", "#7d5ba6", "#a67c00", "#8c4a5f")
INK = "#22262b"
MUTED = "#7a828c"


class Observed(Protocol):
    """What is read from a `Series`; `mask` is True where observed."""

    times: Any  # (time,) or (series, time)
    values: Any  # (series, time, channel)
    mask: Any  # (series, time, channel)
    channels: Any  # names, or None


class Prediction(Protocol):
    """What is read from a prediction; `data` (an `Observed`) and `states` may be there too."""

    times: Any  # (time,) or (series, time)
    observations: Any  # (draw, series, time, channel)
    channels: Any  # names
    last_observed: Any  # (series,), a time


@dataclass(frozen=True)
class _Fan:
    """One series of a prediction: what the panels show."""

    times: np.ndarray  # (time,)
    draws: np.ndarray  # (draw, time, panel)
    names: tuple[str, ...]
    truth: np.ndarray | None  # (time, panel)
    last: float  # the last observed time

    def future(self) -> np.ndarray:
        """Which rows come after the last observation, with the one at it so that lines join; maybe none."""
        ahead = np.isfinite(self.last) and (self.times > self.last).any()
        return (self.times >= self.last) & ahead


def plot_losses(losses: Any, *, per: int | None = None, ax: Axes | None = None) -> Axes:
    """Plot the training trace: every step in light, the running median on top.

    The y axis follows the second half of training, so first steps of 1e6 do not flatten the rest.

    Args:
        losses: a `Fit`, or a sequence of losses, one per step. NaN marks a step that was skipped.
        per: the number of series; the plot then shows `-loss / per`, the ELBO per series. A `Fit` that knows
            its population brings it along; a plain sequence is shown as it is.
        ax: where to draw; a new figure by default.

    Returns:
        The axes.

    Raises:
        ShapeError: if the losses are not one number per step.
        DataError: if no loss is finite, or `per` is below 1.

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import plot_losses
        >>> ax = plot_losses(100 / np.arange(1, 1001))
        >>> ax.get_ylabel()
        'loss'
    """
    trace = as_array(getattr(losses, "losses", losses)).astype(float)
    per = getattr(losses, "population", None) if per is None else per
    if trace.ndim != 1:
        raise ShapeError(f"losses have shape {trace.shape}. Give one number per step.")
    if per is not None and per < 1:
        raise DataError(f"per={per}: the number of series is at least 1.")
    if not np.isfinite(trace).any():
        raise DataError(
            f"none of the {len(trace)} losses is finite, so there is nothing to plot. Check the fit."
        )
    trace = np.where(np.isfinite(trace), trace if per is None else -trace / per, np.nan)
    axes = new_axes(1, (7, 3.2))[0] if ax is None else ax
    centres, medians = _running_median(trace)
    axes.plot(np.arange(1, len(trace) + 1), trace, color=COLORS[0], alpha=0.3, lw=0.7, label="each step")
    axes.plot(centres, medians, color=COLORS[0], lw=1.8, label="running median")
    axes.set_ylim(*_robust_limits(trace))
    axes.set_xlim(1, max(len(trace), 2))
    axes.set(xlabel="step", ylabel="loss" if per is None else "ELBO per series")
    axes.legend(frameon=False, fontsize="small")
    clean(axes)
    return axes


def plot_forecast(
    prediction: Prediction,
    *,
    series: int = 0,
    channels: Sequence[int | str] | None = None,
    observed: Observed | None = None,
    states: bool = False,
    truth: Any = None,
    log: bool = False,
    time_label: str = "time",
    axes: Any = None,
) -> np.ndarray:
    """Plot a fan chart, one panel per channel: central 50, 80 and 95 % intervals, the median, the data.

    A dashed line marks the last observation that the model saw; later data are drawn hollow. Censored values are
    triangles at the limit, which point to where the truth is, or bars from one limit to the other.

    Args:
        prediction: what `sd.predict` returns, or anything with the attributes of `Prediction`.
        series: the row of the series to show.
        channels: names or numbers of the panels to show; all by default.
        observed: the data as a `Series`; `prediction.data` by default, where there is one.
        states: show the latent states (`prediction.states`) in place of the observations.
        truth: a known curve on the prediction's times, ([series,] time, channel) with all channels.
        log: a logarithmic y axis.
        time_label: what the x axis is called, e.g. "year".
        axes: where to draw, one per panel; a new figure by default.

    Returns:
        The axes, one per panel.

    Raises:
        ShapeError: if arrays or axes do not fit together.
        DataError: if a series or channel does not exist, or a draw is not finite, or not positive for `log`.

    Example:
        >>> from types import SimpleNamespace
        >>> import numpy as np
        >>> from stochdyn.diagnostics import plot_forecast
        >>> walk = np.random.default_rng(0).normal(size=(200, 1, 40, 1)).cumsum(2)
        >>> prediction = SimpleNamespace(
        ...     times=np.arange(40.0), observations=walk, channels=("height",), last_observed=np.array([29.0])
        ... )
        >>> [ax.get_ylabel() for ax in plot_forecast(prediction)]
        ['height']
    """
    fan = _read(prediction, series, states, truth)
    panels = _select(channels, fan.names)
    if log and not (fan.draws[..., panels] > 0).any((0, 1)).all():
        raise DataError("log=True, but a panel has no positive draw. Plot it with log=False.")
    grid = given_axes(axes, len(panels)) if axes is not None else new_axes(len(panels), (8, 2.5))
    points = None if states else (observed if observed is not None else getattr(prediction, "data", None))
    for ax, panel in zip(grid, panels, strict=True):
        color = COLORS[panel % len(COLORS)]
        _draw_fan(ax, fan, panel, color)
        if points is not None:
            _draw_points(ax, *_observed_at(points, series, panel, fan.names[panel]), fan.last)
            _draw_censored(ax, points, series, panel, fan.names[panel])
        if log:
            ax.set_yscale("log", nonpositive="clip")
        ax.set_ylabel(fan.names[panel])
        clean(ax)
    grid[-1].set_xlabel(time_label)
    grid[0].legend(
        loc="lower left", bbox_to_anchor=(0, 1.01), ncols=8, frameon=False, fontsize="small", borderaxespad=0
    )
    return grid


def plot_phase(
    prediction: Prediction,
    channels: Sequence[int | str] = (0, 1),
    *,
    series: int = 0,
    draws: int = 30,
    observed: Observed | None = None,
    states: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Plot two channels against each other: some draws, the median (dashed beyond the data), the data.

    Args:
        prediction: as for `plot_forecast`.
        channels: two names or numbers, x then y.
        series: the row of the series to show.
        draws: how many draws to show, evenly spaced among all.
        observed: the data as a `Series`; `prediction.data` by default, where there is one.
        states: show the latent states in place of the observations; they carry no measurement noise.
        ax: where to draw; a new figure by default.

    Returns:
        The axes.

    Raises:
        ShapeError: if arrays do not fit together.
        DataError: if a series or channel does not exist, or a draw is not finite.

    Example:
        >>> from types import SimpleNamespace
        >>> import numpy as np
        >>> from stochdyn.diagnostics import plot_phase
        >>> t = np.linspace(0, 6, 50)
        >>> noise = 0.1 * np.random.default_rng(0).normal(size=(99, 1, 50, 2))
        >>> circle = np.stack([np.cos(t), np.sin(t)], -1) + noise
        >>> prediction = SimpleNamespace(
        ...     times=t, observations=circle, channels=("x", "v"), last_observed=np.array([6.0])
        ... )
        >>> ax = plot_phase(prediction)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('x', 'v')
    """
    fan = _read(prediction, series, states, None)
    if len(channels) != 2:
        raise ShapeError(f"channels={tuple(channels)}: a phase plane has two. Name x, then y.")
    x, y = _select(channels, fan.names)
    axes = new_axes(1, (5.2, 4.8))[0] if ax is None else ax
    some = np.linspace(0, len(fan.draws) - 1, min(draws, len(fan.draws))).round().astype(int)
    for i, draw in enumerate(fan.draws[some]):
        label = "draws" if i == 0 else None
        axes.plot(draw[:, x], draw[:, y], color=COLORS[0], alpha=0.12, lw=0.7, label=label)
    _draw_trajectory(axes, np.median(fan.draws, 0)[:, [x, y]], fan.future())
    points = None if states else (observed if observed is not None else getattr(prediction, "data", None))
    if points is not None:
        times, a = _observed_at(points, series, x, fan.names[x])
        other, b = _observed_at(points, series, y, fan.names[y])
        both, at_x, at_y = np.intersect1d(times, other, return_indices=True)
        _draw_points(axes, a[at_x], b[at_y], fan.last, both)
    axes.set(xlabel=fan.names[x], ylabel=fan.names[y])
    axes.legend(frameon=False, fontsize="small")
    clean(axes)
    return axes


def _read(prediction: Prediction, series: int, states: bool, truth: Any) -> _Fan:
    source = "states" if states else "observations"
    if getattr(prediction, source, None) is None:
        raise DataError(f"the prediction has no `{source}`. Plot what it has, or predict again.")
    draws = as_array(getattr(prediction, source)).astype(float)
    if draws.ndim != 4:
        raise ShapeError(f"`{source}` must have shape (draw, series, time, channel), got {draws.shape}.")
    if not 0 <= series < draws.shape[1]:
        raise DataError(
            f"series {series} does not exist: the prediction has {draws.shape[1]}, numbered from 0."
        )
    times = as_array(prediction.times).astype(float)
    times = times[series] if times.ndim == 2 else times
    if times.shape != draws.shape[2:3]:
        raise ShapeError(
            f"{times.size} times but {draws.shape[2]} rows in `{source}`. Give one time per row."
        )
    names = tuple(f"state {i}" for i in range(draws.shape[3])) if states else tuple(prediction.channels)
    if len(names) != draws.shape[3]:
        raise ShapeError(
            f"channel names {names} but {draws.shape[3]} channels in `{source}`. Give one for each."
        )
    real = np.isfinite(times)
    shown = draws[:, series, real]
    if not np.isfinite(shown).all():
        bad = int((~np.isfinite(shown)).any((1, 2)).sum())
        raise DataError(
            f"series {series}: {bad} of {len(shown)} draws are not finite. Find out why they diverged."
        )
    curve = None if truth is None else _truth(truth, series, draws.shape[2:])[real]
    last = as_array(prediction.last_observed).astype(float).ravel()
    return _Fan(times[real], shown, names, curve, float(last[series] if len(last) > 1 else last[0]))


def _truth(truth: Any, series: int, shape: tuple[int, ...]) -> np.ndarray:
    curve = as_array(truth).astype(float)
    curve = curve[series] if curve.ndim == 3 else curve
    if curve.shape != shape:
        raise ShapeError(
            f"`truth` has shape {curve.shape}, the panels (time, channel) = {shape}. Give all of both."
        )
    return curve


def _select(channels: Sequence[int | str] | None, names: tuple[str, ...]) -> list[int]:
    chosen = range(len(names)) if channels is None else channels
    known = {**{name: i for i, name in enumerate(names)}, **{i: i for i in range(len(names))}}
    unknown = [channel for channel in chosen if channel not in known]
    if unknown or not len(chosen):
        raise DataError(f"channels {unknown or 'none'}: there are {names}. Give names or numbers from 0.")
    return [known[channel] for channel in chosen]


def _observed_at(data: Observed, series: int, panel: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The times and values where one channel of one series is observed, and not censored."""
    channel, times = _locate(data, series, panel, name)
    values, seen = as_array(data.values), as_array(data.mask)[series, :, channel].astype(bool)
    censored = getattr(data, "censored", None)
    if censored is not None:
        seen = seen & ~as_array(censored)[series, :, channel].astype(bool)
    return times[seen], values[series, seen, channel]


def _locate(data: Observed, series: int, panel: int, name: str) -> tuple[int, np.ndarray]:
    """The number of a channel in the data, and the times of one series."""
    names = list(data.channels or ())
    if names and name not in names:
        raise DataError(
            f"the data have channels {names}, the prediction {name!r}. Give the data it was made from."
        )
    channel = names.index(name) if names else panel
    count, times = len(data.values), as_array(data.times)
    if series >= count:
        raise DataError(f"series {series} is not in the data, which hold {count}. Give the same series.")
    return channel, times[series] if times.ndim == 2 else times


def _draw_fan(ax: Axes, fan: _Fan, panel: int, color: str) -> None:
    draws = fan.draws[..., panel]
    for i, width in enumerate(INTERVALS):
        low, high = np.quantile(draws, [(1 - width) / 2, (1 + width) / 2], axis=0)
        ax.fill_between(fan.times, low, high, color=tint(color, 0.2 + 0.16 * i), lw=0, label=f"{width:.0%}")
    ax.plot(fan.times, np.median(draws, 0), color=color, lw=1.8, label="median")
    if fan.truth is not None:
        ax.plot(fan.times, fan.truth[:, panel], color=INK, lw=1, ls=(0, (1, 1)), label="truth")
    if fan.future().any():
        ax.axvspan(fan.last, fan.times[-1], color=MUTED, alpha=0.08, lw=0, zorder=0)
        ax.axvline(fan.last, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        corner = {"xycoords": ("data", "axes fraction"), "xytext": (5, -4), "textcoords": "offset points"}
        ax.annotate("forecast", (fan.last, 1), **corner, va="top", fontsize="small", color=MUTED)
    margin = 0.01 * (fan.times[-1] - fan.times[0]) or 0.5
    ax.set_xlim(fan.times[0] - margin, fan.times[-1] + margin)


def tint(color: str, share: float) -> tuple[float, ...]:
    """A colour mixed with white."""
    return tuple(share * c + 1 - share for c in to_rgb(color))


def _draw_points(
    ax: Axes, x: np.ndarray, y: np.ndarray, last: float, times: np.ndarray | None = None
) -> None:
    """Data points: filled where the model saw them, hollow after the last observation that it saw."""
    later = (x if times is None else times) > last
    for chosen, face, label in ((~later, INK, "data"), (later, "white", "later data")):
        if chosen.any():
            ax.plot(x[chosen], y[chosen], "o", ms=4, mfc=face, mec=INK, mew=0.8, zorder=4, label=label)


def _draw_censored(ax: Axes, data: Any, series: int, panel: int, name: str) -> None:
    """Values of which a limit is known: where it is, and on which side of it the truth."""
    if getattr(data, "low", None) is None:
        return
    channel, times = _locate(data, series, panel, name)
    censored, low, high = (as_array(x)[series, :, channel] for x in (data.censored, data.low, data.high))
    below, above = np.isinf(low), np.isinf(high)
    look = {"ls": "none", "ms": 5, "mfc": "white", "mec": INK, "mew": 0.8, "zorder": 4}
    label = "censored"
    for chosen, at, marker in ((below, high, "v"), (above, low, "^")):
        chosen = chosen & censored
        if chosen.any():
            ax.plot(times[chosen], at[chosen], marker=marker, label=label, **look)
            label = None
    both = censored & ~below & ~above
    if both.any():
        ax.vlines(times[both], low[both], high[both], color=INK, lw=1.2, zorder=4, label=label)


def _draw_trajectory(ax: Axes, median: np.ndarray, future: np.ndarray) -> None:
    seen = median[: len(median) - max(int(future.sum()) - 1, 0)]
    ax.plot(*seen.T, color=COLORS[1], lw=1.8, label="median")
    ax.plot(*median[:1].T, "s", color=COLORS[1], ms=6, zorder=3, label="start")
    if future.any():
        ax.plot(*median[future].T, color=COLORS[1], lw=1.8, ls=(0, (3, 1.5)), label="forecast")
    step = max(len(seen) // 40, 1)
    for i in range(step, len(seen) - step, max(len(seen) // 4, 1)):
        arrow = {"arrowstyle": "-|>", "color": COLORS[1], "mutation_scale": 16, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", seen[i + step], seen[i], arrowprops=arrow)


def _running_median(trace: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Medians over a fiftieth of the trace at no more than 400 steps, skipped steps left out."""
    width = max(len(trace) // 50, 1)
    starts = np.unique(np.linspace(0, len(trace) - width, 400).astype(int))
    windows = np.lib.stride_tricks.sliding_window_view(trace, width)[starts]
    some = np.isfinite(windows).any(1)
    return starts[some] + (width + 1) / 2, np.nanmedian(windows[some], 1)


def _robust_limits(trace: np.ndarray) -> tuple[float, float]:
    """The later half's range, and as much of the way there as fits into three times that range."""
    finite = trace[np.isfinite(trace)]
    low, high = np.quantile(finite[len(finite) // 2 :], [0.005, 0.995])
    span = max(high - low, 1e-3 * abs(high), 1e-12)
    low, high = max(finite.min(), low - 3 * span), min(finite.max(), high + 3 * span)
    return low - 0.05 * (high - low) - 0.01 * span, high + 0.05 * (high - low) + 0.01 * span


def new_axes(count: int, size: tuple[float, float]) -> np.ndarray:
    """A new figure of `count` panels above each other, `size` the width and the height of one."""
    import matplotlib.pyplot as plt

    _, grid = plt.subplots(
        count, figsize=(size[0], size[1] * count + 0.3), sharex=True, squeeze=False, layout="constrained"
    )
    return grid[:, 0]


def given_axes(axes: Any, count: int) -> np.ndarray:
    """The user's axes as a flat array.

    Raises:
        ShapeError: if their number is another.
    """
    grid = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
    if len(grid) != count:
        raise ShapeError(f"{len(grid)} axes for {count} panels. Give one for each channel.")
    return grid


def clean(ax: Axes) -> None:
    """The look of all our plots."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=MUTED, alpha=0.15, lw=0.6)
    ax.tick_params(colors=INK, labelsize="small")
    if ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(5))
