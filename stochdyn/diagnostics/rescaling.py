"""Time rescaling: whether jumps are such as a point process says."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from stochdyn.data import Jumps
from stochdyn.diagnostics.plots import COLORS, INK, MUTED, clean, new_axes
from stochdyn.errors import DataError
from stochdyn.paths import AbstractPointProcess


@dataclass(frozen=True)
class TimeRescaling:
    """Rescaled gaps between jumps, independent Exp(1) under the true law, and two tests of that.

    Attributes:
        residuals: (n,) the compensator over each gap.
        ks: Kolmogorov's and Smirnov's distance of their distribution from Exp(1).
        ks_pvalue: how often the true law has a larger one.
        lag: correlation of the normal scores of successive residuals.
        lag_pvalue: how often the true law has one further from 0.

    Example:
        >>> import numpy as np
        >>> print(TimeRescaling(np.array([0.2, 1.1, 0.7]), 0.3, 0.9, 0.01, 0.8))
        3 rescaled gaps: KS 0.3000 (p 0.9), lag-1 correlation 0.0100 (p 0.8)
    """

    residuals: np.ndarray
    ks: float
    ks_pvalue: float
    lag: float
    lag_pvalue: float

    def rejects(self, alpha: float = 0.01) -> bool:
        """Whether one of the two tests rejects the law, at level alpha for both together. False proves nothing."""
        return min(self.ks_pvalue, self.lag_pvalue) < alpha / 2

    def __str__(self) -> str:
        return (
            f"{len(self.residuals)} rescaled gaps: KS {self.ks:.4f} (p {self.ks_pvalue:.2g}), "
            f"lag-1 correlation {self.lag:.4f} (p {self.lag_pvalue:.2g})"
        )


@torch.no_grad()
def time_rescaling(process: AbstractPointProcess, jumps: Any, *, given: int = 0) -> TimeRescaling:
    """Test a point process, with its parameters, on jumps: by the compensator between them.

    Sequences are put end to end on the scale of the compensator, where the true law is one long Poisson process of rate
    1: what is left over after the last jump of one counts towards the first gap of the next. So windows that end early
    bias nothing. Marks play no part beyond their effect on the times. Parameters fitted to the same jumps make the test
    mild.

    Args:
        process: over the windows of the jumps.
        jumps: `Jumps`, or the padded tensor (*batch, jump, 1 + mark).
        given: how many jumps at the start of each sequence are not put to the test, with the time up to them; 1 where
            the clock starts at the first.

    Raises:
        DataError: if there are fewer than 10 jumps, or the compensator over a gap is not finite.

    References:
        Brown et al., "The time-rescaling theorem and its application to neural spike train data analysis", 2002,
        https://doi.org/10.1162/08997660252741149

    Example:
        >>> import stochdyn as sd
        >>> with torch.random.fork_rng():
        ...     _ = torch.manual_seed(0)
        ...     value = sd.Hawkes(0.5, 0.8, 1.6, 0.0, 1000.0).sample()
        >>> sd.time_rescaling(sd.Hawkes(0.5, 0.8, 1.6, 0.0, 1000.0), value).rejects()
        False
        >>> sd.time_rescaling(sd.PoissonProcess(1.0, 0.0, 1000.0), value).rejects()
        True
    """
    from scipy import stats

    values = jumps.values if isinstance(jumps, Jumps) else jumps
    own, after = process.residuals(values)
    _check_finite(own, values)
    own = own.reshape(after.numel(), own.shape[-1])
    # Where fewer jumps came than are given, all of the window is before those.
    after = torch.where((~own.isnan()).sum(1) < given, 0.0, after.reshape(-1))
    # Rounding may leave less than nothing between jumps, or after one at the end of the window.
    residuals = _end_to_end(own[:, given:].clamp(min=0), after.clamp(min=0))
    if len(residuals) < 10:
        raise DataError(f"There are {len(residuals)} jumps. Take at least 10: below, the tests see nothing.")
    ks = stats.kstest(residuals, "expon")
    # Both tails: of small residuals 1 - exp(-x), of large ones exp(-x) loses no digits.
    scores = np.where(
        residuals < 1, stats.norm.ppf(-np.expm1(-residuals)), -stats.norm.ppf(np.exp(-residuals))
    )
    scores = scores.clip(-8, 8)
    lag = float(np.corrcoef(scores[:-1], scores[1:])[0, 1])
    pvalue = float(2 * stats.norm.sf(abs(lag) * np.sqrt(len(scores) - 1)))
    return TimeRescaling(residuals, float(ks.statistic), float(ks.pvalue), lag, pvalue)


def _check_finite(own: torch.Tensor, values: torch.Tensor) -> None:
    """Refuse gaps whose compensator is no number: an unused row has none, a jump must."""
    bad = torch.isfinite(values[..., 0]).expand(own.shape) & ~torch.isfinite(own)
    if bool(bad.any()):
        *series, k = bad.nonzero()[0].tolist()
        raise DataError(
            f"series {series[0] if len(series) == 1 else tuple(series) or 0}, time "
            f"{float(values.expand(*own.shape, values.shape[-1])[(*series, k, 0)]):g}: the compensator over the gap "
            "before this jump is not finite. Bound the intensity."
        )


def _end_to_end(own: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    out, carried = [], 0.0
    for row, rest in zip(own.double().cpu().numpy(), after.double().cpu().numpy(), strict=True):
        gaps = row[~np.isnan(row)]
        if len(gaps):
            gaps[0] += carried
            out.append(gaps)
        carried = rest + (0.0 if len(gaps) else carried)
    return np.concatenate(out) if out else np.zeros(0)


def plot_time_rescaling(found: TimeRescaling, *, ax: Axes | None = None) -> Axes:
    """Plot the distribution of the rescaled gaps minus that of Exp(1), with the band in which the true law stays.

    The curve rises above 0 where there are too many short gaps (jumps cluster more than the process says), and falls
    below where there are too few.

    Args:
        found: what `time_rescaling` returns.
        ax: where to draw; a new figure by default.

    Returns:
        The axes.

    Example:
        >>> import stochdyn as sd
        >>> value = sd.PoissonProcess(1.0, 0.0, 200.0).sample()
        >>> ax = sd.plot_time_rescaling(sd.time_rescaling(sd.PoissonProcess(1.0, 0.0, 200.0), value))
        >>> ax.get_xlabel()
        'share of gaps that are shorter, if the process is right'
    """
    from scipy import stats

    ax = new_axes(1, (6, 3.2))[0] if ax is None else ax
    n = len(found.residuals)
    u = np.sort(-np.expm1(-found.residuals))
    band = stats.kstwo.ppf(0.95, n)
    ax.axhspan(-band, band, color=MUTED, alpha=0.2, lw=0, label="95% of right processes stay inside")
    ax.axhline(0, color=INK, lw=0.8)
    steps = np.arange(n + 1) / n
    ends = np.concatenate([[0.0], u, [1.0]])
    ax.plot(np.repeat(ends, 2)[1:-1], np.repeat(steps, 2) - np.repeat(ends, 2)[1:-1], color=COLORS[0], lw=1.4)
    ax.set(xlim=(0, 1), xlabel="share of gaps that are shorter, if the process is right")
    ax.set_ylabel("empirical - expected")
    ax.set_title(
        f"KS {found.ks:.3g} (p {found.ks_pvalue:.2g}), lag-1 {found.lag:.3g} (p {found.lag_pvalue:.2g})"
    )
    ax.legend(frameon=False, fontsize="small")
    clean(ax)
    return ax
