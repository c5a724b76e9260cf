"""The plot of a calibration: by how much the ranks of every quantity leave uniformity, with a band."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from stochdyn.diagnostics.calibration import Calibration
from stochdyn.diagnostics.plots import COLORS, INK, MUTED, clean, given_axes, new_axes
from stochdyn.errors import DataError


def plot_calibration(
    calibration: Calibration,
    *,
    quantities: Sequence[str] | None = None,
    alpha: float = 0.05,
    axes: Any = None,
) -> np.ndarray:
    """Plot the empirical distribution of the ranks minus the uniform one, a panel per quantity, with its band.

    Right posteriors stay inside all bands with probability 1 - alpha (simultaneous over ranks and panels). Too narrow a
    posterior first rises and then falls, too wide a one the other way round; a posterior that lies too high (its truths
    have low ranks) stays above zero, one that lies too low below.

    Args:
        calibration: what `sbc` returns.
        quantities: names of the panels; all by default.
        alpha: how often right posteriors leave some band.
        axes: where to draw, one per panel; a new figure by default.

    Returns:
        The axes, one per panel.

    Raises:
        ShapeError: if there is not one of the axes for each panel.
        DataError: if there is no such quantity, or `alpha` is not between 0 and 1.

    References:
        Säilynoja, Bürkner & Vehtari, "Graphical test for discrete uniformity", 2022,
        https://doi.org/10.1007/s11222-022-10090-6

    Example:
        >>> import numpy as np
        >>> import stochdyn as sd
        >>> ranks = np.random.default_rng(0).integers(0, 100, size=500)
        >>> [ax.get_title(loc="left") for ax in sd.plot_calibration(sd.Calibration({"theta": ranks}, draws=99))]
        ['theta']
    """
    names = list(calibration.ranks) if quantities is None else list(quantities)
    unknown = [name for name in names if name not in calibration.ranks]
    if unknown or not names:
        raise DataError(f"quantities {unknown or 'none'}: there are {list(calibration.ranks)}.")
    if not 0 < alpha < 1:
        raise DataError(f"`alpha` must be between 0 and 1, got {alpha}.")
    grid = given_axes(axes, len(names)) if axes is not None else new_axes(len(names), (6.5, 2.2))
    for i, (ax, name) in enumerate(zip(grid, names, strict=True)):
        _draw(ax, calibration, name, alpha / len(names), COLORS[i % len(COLORS)])
    grid[-1].set_xlabel(
        f"rank of the truth / number of draws (grey: where right posteriors stay, {1 - alpha:.3g})"
    )
    return grid


def _draw(ax: Axes, calibration: Calibration, name: str, alpha: float, color: str) -> None:
    positions, lower, upper = calibration.band(name, alpha)
    ranks = np.sort(np.asarray(calibration.ranks[name]))
    found = np.searchsorted(ranks, np.arange(1, calibration.draws + 1)) / len(ranks)
    ends = np.concatenate([[0.0], positions, [1.0]])
    low, high, curve = (np.pad(x - positions, 1) for x in (lower, upper, found))
    ax.fill_between(ends, low, high, color=MUTED, alpha=0.25, lw=0, label="band")
    ax.axhline(0, color=INK, lw=0.8)
    ax.plot(ends, curve, color=color, lw=1.6, label="ranks")
    ax.set_xlim(0, 1)
    ax.set_ylabel("ECDF - uniform")
    ax.set_title(name, loc="left", fontsize="medium")
    clean(ax)
    outside = int(((curve < low - 1e-12) | (curve > high + 1e-12)).sum())
    verdict = f"leaves the band at {outside} of {calibration.draws}" if outside else "inside the band"
    p = calibration.p_value(name)
    p_text = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
    ax.set_title(f"{p_text}, {verdict}", loc="right", fontsize="small", color=INK)
