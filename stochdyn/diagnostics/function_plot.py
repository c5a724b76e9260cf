"""A plot of draws of a function: what a prior says of a drift, what a posterior has learned of it."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from stochdyn.diagnostics.plots import COLORS, INK, INTERVALS, MUTED, clean, new_axes, tint
from stochdyn.diagnostics.tree import as_array
from stochdyn.errors import DataError, ShapeError


def plot_function(
    at: Any,
    draws: Any,
    *,
    prior: Any = None,
    truth: Any = None,
    lines: int = 0,
    labels: tuple[str, str] = ("state", "rate"),
    ax: Axes | None = None,
) -> Axes:
    """Plot draws of a function of one state: central 50, 80 and 95 % intervals, the median, some of the draws.

    For a prior-predictive check of a drift, or for the posterior of what a network has learned, against its prior and,
    in a simulation, the truth.

    Args:
        at: (point,) where the function was evaluated.
        draws: (draw, point) its values; further dimensions of size 1 are dropped.
        prior: (draw, point) draws of the prior, shown by their 95 % interval.
        truth: (point,) the known function.
        lines: how many draws to show as lines, evenly spaced among all.
        labels: of the two axes.
        ax: where to draw; a new figure by default.

    Returns:
        The axes.

    Raises:
        ShapeError: if the shapes do not fit together.
        DataError: if a draw is not finite, or there are fewer than two.

    Example:
        >>> import pyro, torch, stochdyn as sd
        >>> net, at = sd.bayesian(sd.NeuralField(1, hidden=(32,)), "drift"), torch.linspace(-2, 2, 50)
        >>> with pyro.plate("draws", 200, dim=-2):
        ...     drift = sd.draw_weights(net, plates=["draws"])
        >>> ax = sd.plot_function(at, drift(torch.zeros(1), at[:, None]), labels=("z", "drift"))
        >>> ax.get_xlabel(), len(ax.collections)
        ('z', 3)
    """
    x = as_array(at).astype(float).reshape(-1)
    values = _rows("draws", draws, len(x))
    ax = new_axes(1, (6, 3.6))[0] if ax is None else ax
    if prior is not None:
        low, high = np.quantile(_rows("prior", prior, len(x)), [0.025, 0.975], axis=0)
        ax.fill_between(x, low, high, color=MUTED, alpha=0.15, lw=0, label="prior 95%", zorder=0)
    for i, width in enumerate(INTERVALS):
        low, high = np.quantile(values, [(1 - width) / 2, (1 + width) / 2], axis=0)
        ax.fill_between(x, low, high, color=tint(COLORS[0], 0.2 + 0.16 * i), lw=0, label=f"{width:.0%}")
    for row in values[np.linspace(0, len(values) - 1, min(lines, len(values))).astype(int)]:
        ax.plot(x, row, color=INK, lw=0.6, alpha=0.45)
    ax.plot(x, np.median(values, 0), color=COLORS[0], lw=1.8, label="median")
    if truth is not None:
        curve = as_array(truth).astype(float).reshape(-1)
        if len(curve) != len(x):
            raise ShapeError(f"`truth` has {len(curve)} points, `at` {len(x)}. Give one for each.")
        ax.plot(x, curve, color=COLORS[1], lw=1.6, ls=(0, (4, 2)), label="truth")
    ax.axhline(0, color=MUTED, lw=0.8, zorder=0)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.set_xlim(x.min(), x.max())
    if prior is not None:
        _focus(ax, values)
    ax.legend(frameon=False, fontsize="small", ncols=2)
    clean(ax)
    return ax


def _focus(ax: Axes, values: np.ndarray) -> None:
    """Limits that show the draws whole: the prior may be far wider."""
    low, high = np.quantile(values, 0.025, axis=0).min(), np.quantile(values, 0.975, axis=0).max()
    margin = 0.6 * max(high - low, 1e-12)
    bottom, top = ax.get_ylim()
    ax.set_ylim(max(bottom, low - margin), min(top, high + margin))


def _rows(name: str, given: Any, points: int) -> np.ndarray:
    values = as_array(given).astype(float)
    if values.ndim < 2 or values.size != len(values) * points:
        raise ShapeError(
            f"`{name}` has shape {values.shape}, expected (draw, point={points}). Give one function."
        )
    values = values.reshape(len(values), points)
    if len(values) < 2 or not np.isfinite(values).all():
        bad = int((~np.isfinite(values).all(1)).sum())
        raise DataError(f"`{name}`: {len(values)} draws, {bad} not finite. Give at least two, all finite.")
    return values
