"""What a fit has learned: drift and diffusion along a line, the flow in a plane, fixed points on top."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from stochdyn.diagnostics.fields import FieldReading
from stochdyn.diagnostics.fixed_points import FixedPoint, FixedPoints
from stochdyn.diagnostics.plots import COLORS, INK, INTERVALS, MUTED, clean, given_axes, new_axes
from stochdyn.diagnostics.tree import as_array
from stochdyn.errors import DataError, ShapeError

Truth = Callable[[Tensor], Tensor]

_REGION = (0.01, 0.99)
_FADE = 0.8
_NEAR = 1500


def plot_field(
    reading: FieldReading,
    *,
    drift: Truth | None = None,
    diffusion: Truth | None = None,
    names: Sequence[str] | None = None,
    axes: Any = None,
) -> np.ndarray:
    """Plot a learned field: along a line drift above diffusion, with posterior bands; in a plane the flow.

    Where the smoothed states do not go the picture is extrapolation and is faded. Bands are central 50, 80 and 95 %
    intervals over the draws, left out for a single one; they hold the uncertainty of what was sampled, not that of
    trained weights.

    Args:
        reading: what `read_field` returns, on its own points.
        drift, diffusion: the truth, where it is known: (point, state) -> (point, state). Along a line only.
        names: of the states.
        axes: where to draw: two for a line, one for a plane; a new figure by default.

    Returns:
        The axes.

    Raises:
        DataError: if the reading is of points of the user's own, or not finite.
        ShapeError: if axes or names do not fit.

    Example:
        >>> import stochdyn as sd
        >>> x = torch.linspace(-2, 2, 41)[:, None]
        >>> slopes = 1 + 0.1 * torch.randn(50, 1, 1)
        >>> reading = sd.FieldReading(x, -slopes * x, 0.3 + 0 * slopes * x, torch.randn(50, 20, 1), (0,), (41,))
        >>> [ax.get_ylabel() for ax in sd.plot_field(reading, names=["height"])]
        ['drift of height', 'diffusion of height']
    """
    if reading.shape is None:
        raise DataError(
            "The reading has points of your own; plot_field draws lines and planes. Leave `points` out."
        )
    if not bool(torch.isfinite(reading.drift).all() and torch.isfinite(reading.diffusion).all()):
        raise DataError(
            "The drift or diffusion is not finite at some points, so it cannot be drawn. Read a smaller region."
        )
    size = reading.points.shape[-1]
    labels = [f"state {d}" for d in range(size)] if names is None else list(names)
    if len(labels) != size:
        raise ShapeError(f"{len(labels)} names for {size} states. Give one for each.")
    if len(reading.dims) == 1:
        grid = new_axes(2, (6.4, 2.7)) if axes is None else given_axes(axes, 2)
        _draw_line(grid, reading, labels, (drift, diffusion))
    else:
        grid = new_axes(1, (5.8, 5.0)) if axes is None else given_axes(axes, 1)
        _draw_plane(grid[0], reading, labels)
    return grid


def plot_fixed_points(
    found: FixedPoints,
    ax: Axes,
    *,
    dims: Sequence[int] | None = None,
    level: float = 0.0,
    least: float = 0.05,
) -> Axes:
    """Mark fixed points on a plot of a field or on `plot_phase`: filled if stable, hollow if not, a cross for a saddle.

    The cloud or the bar (90 %) around a mark is the posterior of its location. What lies outside the axes is left out.

    Args:
        found: what `fixed_points` returns.
        ax: the axes to draw on.
        dims: the states on its axes; by default the first two, or the only one.
        level: the height of the marks where there is one state: 0 on a plot of the drift.
        least: points in a smaller share of the draws are left out.

    Raises:
        ShapeError: if `dims` are not one or two states.

    Example:
        >>> import stochdyn as sd
        >>> x = torch.linspace(-2, 2, 41)[:, None]
        >>> reading = sd.FieldReading(x, (x - x**3)[None], 0.3 + 0 * x[None], torch.randn(1, 20, 1), (0,), (41,))
        >>> found = sd.fixed_points(lambda t, z: z - z**3, x.double())
        >>> legend = sd.plot_fixed_points(found, sd.plot_field(reading)[0]).get_legend()
        >>> [text.get_text() for text in legend.get_texts()]
        ['learned', 'stable node', 'unstable node']
    """
    shown = [point for point in found.points if point.presence >= least]
    size = shown[0].location.shape[1] if shown else 2
    chosen = list(range(min(size, 2))) if dims is None else list(dims)
    if len(chosen) not in (1, 2) or not set(chosen) <= set(range(size)):
        raise ShapeError(f"dims={tuple(chosen)}: name one or two of the {size} states, numbered from 0.")
    said: set[str] = set()
    for point in shown:
        place = point.location[:, chosen]
        if place.shape[1] == 1:
            place = np.concatenate([place, np.full_like(place, level)], 1)
        if _in_view(ax, np.median(place, 0)):
            _draw_point(ax, point, place, said)
    if said:
        ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _in_view(ax: Axes, place: np.ndarray) -> bool:
    bounds = zip(place, (ax.get_xlim(), ax.get_ylim()), strict=True)
    return all(min(edges) <= x <= max(edges) for x, edges in bounds)


def _draw_point(ax: Axes, point: FixedPoint, place: np.ndarray, said: set[str]) -> None:
    color = COLORS[2] if point.kind.startswith("stable") else COLORS[1]
    flat = np.ptp(place[:, 1]) == 0
    if flat and len(place) > 1:
        low, high = np.quantile(place[:, 0], [0.05, 0.95])
        ax.plot([low, high], place[:2, 1], color=color, lw=5, alpha=0.35, solid_capstyle="round", zorder=6)
    elif len(place) > 1:
        ax.plot(*place.T, "o", color=color, ms=3.5, alpha=0.5, mew=0, zorder=5)
    saddle, solid = point.kind == "saddle", point.kind.startswith("stable")
    label = point.kind if point.kind not in said else None
    said.add(point.kind)
    ax.plot(
        *np.median(place, 0)[:, None],
        "X" if saddle else "o",
        ms=9,
        mfc=color if solid or saddle else "white",
        mec=color if not saddle else "white",
        mew=0.8 if saddle else 1.8,
        ls="",
        zorder=7,
        label=label,
    )


def _draw_line(
    grid: np.ndarray, reading: FieldReading, labels: list[str], truths: "tuple[Truth | None, Truth | None]"
) -> None:
    d = reading.dims[0]
    x = as_array(reading.points[:, d]).astype(float)
    low, high = np.quantile(as_array(reading.states[..., d]), _REGION)
    for ax, name, values, truth, color in zip(
        grid, ("drift", "diffusion"), (reading.drift, reading.diffusion), truths, COLORS[:2], strict=True
    ):
        draws = as_array(values[..., d]).astype(float)
        for width in INTERVALS if len(draws) > 1 else ():
            band = np.quantile(draws, [(1 - width) / 2, (1 + width) / 2], axis=0)
            ax.fill_between(x, *band, color=color, alpha=0.22, lw=0, label=f"{width:.0%}")
        ax.plot(x, np.median(draws, 0), color=color, lw=1.8, label="median" if len(draws) > 1 else "learned")
        if truth is not None:
            ax.plot(
                x, as_array(truth(reading.points)[:, d]), color=INK, lw=1.3, ls=(0, (2, 1.5)), label="truth"
            )
        for edges in ((x[0], low), (high, x[-1])):
            ax.axvspan(*edges, color="white", alpha=0.72, lw=0, zorder=2.3)
        inside = (x >= low) & (x <= high)
        _limits(ax, draws, inside, None if truth is None else as_array(truth(reading.points)[:, d]), name)
        ax.set(ylabel=f"{name} of {labels[d]}", xlim=(x[0], x[-1]))
        clean(ax)
    for ax in grid:
        _say_extrapolated(ax)
    grid[0].axhline(0, color=MUTED, lw=1, zorder=1)
    _draw_counts(grid[1], as_array(reading.states[..., d]).ravel())
    grid[-1].set_xlabel(labels[d])
    grid[0].legend(
        loc="lower left", bbox_to_anchor=(0, 1.01), ncols=8, frameon=False, fontsize="small", borderaxespad=0
    )


def _say_extrapolated(ax: Axes) -> None:
    style = {"color": MUTED, "fontsize": "x-small", "va": "top", "transform": ax.transAxes}
    ax.text(0.01, 0.985, "no data", ha="left", **style)
    ax.text(0.99, 0.985, "no data", ha="right", **style)


def _limits(ax: Axes, draws: np.ndarray, inside: np.ndarray, truth: np.ndarray | None, name: str) -> None:
    """The y axis follows the region of the data; what is extrapolated may leave it."""
    part = draws[:, inside] if inside.any() else draws
    low, high = np.quantile(part, 0.02, axis=0).min(), np.quantile(part, 0.98, axis=0).max()
    if truth is not None and inside.any():
        low, high = min(low, truth[inside].min()), max(high, truth[inside].max())
    low = min(low, 0.0)
    span = max(high - low, 1e-12)
    ax.set_ylim(low - (0.35 * span if name == "drift" else 0.0), high + 0.35 * span)


def _draw_counts(ax: Axes, states: np.ndarray) -> None:
    """Where the smoothed states are, as a histogram along the bottom; as far as the axis reaches."""
    left, right = ax.get_xlim()
    shown = states[(states >= left) & (states <= right)]
    if not len(shown):
        return
    count, edges = np.histogram(shown, 40)
    bottom, top = ax.get_ylim()
    height = 0.2 * (top - bottom) * count / count.max()
    ax.bar(
        edges[:-1],
        height,
        np.diff(edges),
        bottom=bottom,
        align="edge",
        color=MUTED,
        alpha=0.35,
        lw=0,
        zorder=4,
    )
    peak = edges[count.argmax() : count.argmax() + 2].mean()
    ax.text(
        peak,
        bottom + 0.21 * (top - bottom),
        "states",
        color=MUTED,
        fontsize="small",
        ha="center",
        va="bottom",
        zorder=4,
    )


def _draw_plane(ax: Axes, reading: FieldReading, labels: list[str]) -> None:
    a, b = reading.dims
    shape = reading.shape or ()
    points = as_array(reading.points).astype(float)[:, [a, b]].reshape(*shape, 2)
    mean = as_array(reading.drift.mean(0)).astype(float)[:, [a, b]].reshape(*shape, 2)
    # In single precision the lattice is not even enough for streamplot.
    x, y = (np.linspace(v[0], v[-1], len(v)) for v in (points[:, 0, 0], points[0, :, 1]))
    states = as_array(reading.states).astype(float)[..., [a, b]].reshape(-1, 2)
    speed = np.linalg.norm(mean, axis=-1)
    width = 0.6 + 1.8 * (speed / max(np.quantile(speed, 0.95), 1e-300)).clip(0, 1)
    ax.streamplot(
        x, y, mean[..., 0].T, mean[..., 1].T, color=COLORS[0], linewidth=width.T, density=1.3, arrowsize=1.1
    )
    some = states[np.linspace(0, len(states) - 1, min(len(states), _NEAR)).astype(int)]
    ax.plot(*some.T, ".", color=INK, ms=3, alpha=0.3, mew=0, zorder=3.5, label="smoothed states")
    _fade(ax, x, y, some)
    ax.set(xlabel=labels[a], ylabel=labels[b], xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    clean(ax)


def _fade(ax: Axes, x: np.ndarray, y: np.ndarray, states: np.ndarray) -> None:
    """White over what is far from every smoothed state, from nothing at 5 % of the width to 80 % at 20 %."""
    fine = [np.linspace(v[0], v[-1], 101) for v in (x, y)]
    scale = np.array([np.ptp(states[:, 0]), np.ptp(states[:, 1])])
    scale = np.where(scale > 0, scale, 1.0)
    mesh = np.stack(np.meshgrid(*fine), -1).reshape(-1, 1, 2) / scale
    near = np.concatenate(
        [np.linalg.norm(part - states[None] / scale, axis=-1).min(1) for part in np.array_split(mesh, 100)]
    )
    share = ((near - 0.05) / 0.15).clip(0, 1).reshape(101, 101)
    image = np.ones((101, 101, 4))
    image[..., 3] = _FADE * share
    extent = (x[0], x[-1], y[0], y[-1])
    ax.imshow(image, extent=extent, origin="lower", aspect="auto", zorder=3, interpolation="bilinear")
