"""The figure of a diagnosis: gap or k-hat per series, latents against their priors, coverage, losses' verdicts."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from stochdyn.diagnostics.coverage import LEVELS
from stochdyn.diagnostics.diagnosis import Diagnosis
from stochdyn.diagnostics.plots import COLORS, INK, MUTED, clean, given_axes
from stochdyn.diagnostics.rescaling import plot_time_rescaling

Panel = Callable[[Diagnosis, Axes], None]


def plot_diagnosis(diagnosis: Diagnosis, *, axes: Any = None) -> np.ndarray:
    """Plot what was measured, side by side: the gap per series, posterior over prior sd, coverage, rescaled jumps.

    Args:
        diagnosis: what `sd.diagnose` returned.
        axes: where to draw, one for each panel; a new figure by default.

    Returns:
        The axes.

    Raises:
        ShapeError: if there is not one of the axes for each panel.

    Example:
        >>> from stochdyn.diagnostics.weights import Estimate
        >>> gap = Estimate(np.array([0.1, 2.0]), np.array([0.05, 0.1]))
        >>> found = Diagnosis((), ("Ada", "Bo"), 400, Estimate(-3.0, 0.1), gap_per_series=gap)
        >>> [ax.get_title(loc="left") for ax in plot_diagnosis(found)]
        ['gap per series']
    """
    panels = _panels(diagnosis)
    grid = given_axes(axes, len(panels)) if axes is not None else _new(len(panels))
    for draw, ax in zip(panels, grid, strict=True):
        clean(ax)  # before, since it sets ticks
        draw(diagnosis, ax)
    return grid


def _panels(found: Diagnosis) -> list[Panel]:
    have: list[tuple[bool, Panel]] = [
        (found.gap_per_series is not None, _gap),
        (found.gap_per_series is None and found.k_hat_per_series is not None, _tails),
        (bool(found.latents), _latents),
        (found.coverage is not None, _coverage),
    ]
    panels = [panel for there, panel in have if there]
    return panels + [_jumps(name) for name in found.rescaling or {}] or [_nothing]


def _new(count: int) -> np.ndarray:
    import matplotlib.pyplot as plt

    _, grid = plt.subplots(1, count, figsize=(3.6 * count, 3.2), squeeze=False, layout="constrained")
    return grid[0]


def _gap(found: Diagnosis, ax: Axes) -> None:
    gap = found.gap_per_series
    if gap is not None:
        ax.errorbar(np.arange(len(gap.value)), gap.value, 2 * gap.error, fmt="o", ms=4, color=COLORS[0], lw=1)
    ax.axhline(0, color=INK, lw=0.8)
    _by_series(found, ax, "evidence - ELBO, nats (2 s.e.)")
    ax.set_title("gap per series", loc="left", fontsize="medium")


def _tails(found: Diagnosis, ax: Axes) -> None:
    k = np.asarray(found.k_hat_per_series)
    ax.plot(np.arange(len(k)), np.where(np.isneginf(k), 0.0, k), "o", ms=4, color=COLORS[0])
    ax.axhline(min(1 - 1 / np.log10(found.draws), 0.7), color=COLORS[1], lw=1)
    _by_series(found, ax, "k-hat (good below the line)")
    ax.set_title("k-hat per series", loc="left", fontsize="medium")


def _by_series(found: Diagnosis, ax: Axes, label: str) -> None:
    if len(found.ids) <= 8:
        ax.set_xticks(range(len(found.ids)), [str(name) for name in found.ids])
        ax.set_xlim(-0.5, len(found.ids) - 0.5)
    ax.set(xlabel="series", ylabel=label)


def _latents(found: Diagnosis, ax: Axes) -> None:
    shown = found.latents[:12]
    ratios = [latent.ratio for latent in shown]
    colors = [COLORS[1] if latent.collapsed or latent.is_point else COLORS[0] for latent in shown]
    ax.barh(range(len(shown)), ratios, color=colors, height=0.6)
    ax.axvline(1, color=INK, lw=0.8)
    ax.set_yticks(range(len(shown)), [latent.name for latent in shown])
    ax.set_ylim(max(len(shown), 3) - 0.4, -0.6)
    ax.set_xlabel("posterior sd / prior sd")
    ax.set_title("what the data said", loc="left", fontsize="medium")


def _coverage(found: Diagnosis, ax: Axes) -> None:
    cover = found.coverage
    if cover is None:
        return
    at = np.arange(len(cover.channels))
    for k, level in enumerate(LEVELS):
        ax.axhline(level, color=COLORS[k], lw=0.8, ls="--")
        bars = {"fmt": "o", "ms": 4, "color": COLORS[k], "lw": 1, "label": f"{100 * level:.0f} % intervals"}
        ax.errorbar(at + 0.1 * k, cover.covered[:, k], 2 * cover.error[:, k], **bars)
    ax.set_ylim(0, 1.05)
    if len(at) <= 8:
        ax.set_xticks(at, cover.channels)
        ax.set_xlim(-0.5, len(at) - 0.5)
    ax.set(xlabel="channel", ylabel="share inside (2 s.e.)")
    ax.legend(frameon=False, fontsize="small", loc="best")
    ax.set_title("coverage, optimistic" if cover.how == "seen" else "coverage", loc="left", fontsize="medium")


def _jumps(name: str) -> Panel:
    def panel(found: Diagnosis, ax: Axes) -> None:
        if found.rescaling is not None:
            plot_time_rescaling(found.rescaling[name], ax=ax)
        ax.set_xlabel("share of gaps that are shorter")
        ax.set_title(f"time rescaling of {name}", loc="left", fontsize="medium")
        ax.set_title("")

    return panel


def _nothing(found: Diagnosis, ax: Axes) -> None:
    ax.text(0.5, 0.5, "nothing to plot", ha="center", va="center", color=MUTED, transform=ax.transAxes)
    ax.set_title("diagnosis", loc="left", fontsize="medium")
