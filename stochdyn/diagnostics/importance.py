"""Importance weights of a guide, the Pareto k-hat, and a table of posterior draws; numpy alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stochdyn.diagnostics.tree import as_array
from stochdyn.errors import DataError, ShapeError

MIN_DRAWS = 25
MIN_TAIL = 5
PRIOR_TAIL = 10  # the prior of Vehtari et al.: as many tail draws with k = 1/2


@dataclass(frozen=True)
class ParetoK:
    """How heavy the tail of the importance weights is.

    Attributes:
        k: the shape of the tail; -inf where the weights are equal or end in ties, inf where fewer than five
            draws carry all the weight.
        exact: all weights are equal to rounding, so the guide is the posterior.
        draws: the number of weights.
        threshold: the largest good k for so many draws, min(1 - 1/log10(draws), 0.7).
        ess: the effective number of draws after smoothing, 1 / sum(w^2).

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import pareto_k
        >>> pareto_k(np.zeros(1000)).good
        True
    """

    k: float
    exact: bool
    draws: int
    threshold: float
    ess: float

    @property
    def good(self) -> bool:
        """Whether importance sampling with so many draws can be trusted: k below the threshold."""
        return self.k < self.threshold

    def __str__(self) -> str:
        if self.exact:
            return "exact (all importance weights equal)"
        verdict = "good, below" if self.good else "bad, not below"
        return f"k-hat {self.k:.2f} ({verdict} {self.threshold:.2f})"


def pareto_k(log_weights: Any) -> ParetoK:
    """Fit the tail of the importance weights: does the guide cover the posterior?

    Weights w = p/q have about 1/k finite moments. A small k does not prove a calibrated guide, least of all
    in few dimensions: q = N(0, .55^2) for p = N(0, 1) has k = 0.7. In many, small errors make k large.

    Args:
        log_weights: **log p - log q**, one number per draw from q; constants do not matter. The sign does:
            -log p + log q certifies narrow guides as good.

    Returns:
        The fit; prints as "k-hat 0.21 (good, below 0.67)".

    Raises:
        DataError: if a weight is not finite, or there are fewer than 25.
        ShapeError: if the weights are not one per draw.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry: Pareto smoothed importance sampling, JMLR 25(72), 2024,
            https://jmlr.org/papers/v25/19-556.html
        Yao, Vehtari, Simpson, Gelman: Yes, but did it work? Evaluating variational inference, ICML 2018,
            https://arxiv.org/abs/1802.02538
        Zhang, Stephens: A new and efficient estimation method for the generalized Pareto distribution,
            Technometrics 51(3), 2009, https://doi.org/10.1198/tech.2009.08017

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import pareto_k
        >>> z = 0.6 * np.random.default_rng(0).normal(size=4000)   # draws from q = N(0, .6^2)
        >>> fit = pareto_k(-(z**2) / 2 + (z / 0.6) ** 2 / 2)       # log p - log q, p = N(0, 1)
        >>> 0.45 < fit.k < 0.75                                    # exactly 1 - .6^2 = .64 for many draws
        True
    """
    values = _checked(log_weights)
    draws = len(values)
    smoothed, k = _smooth(values)
    exact = _equal(values)
    return ParetoK(
        k=-np.inf if exact else k,
        exact=exact,
        draws=draws,
        threshold=min(1 - 1 / float(np.log10(draws)), 0.7),
        ess=float(draws) if exact else float(1 / np.exp(2 * smoothed).sum()),
    )


def psis_weights(log_weights: Any) -> np.ndarray:
    """Pareto-smoothed log weights, normalised: `np.exp` of them sums to 1.

    Args:
        log_weights: log p - log q, one number per draw from q, as for `pareto_k`.

    Returns:
        The smoothed log weights in the order of the draws; the raw ones where the tail cannot be fitted.

    Raises:
        DataError: if a weight is not finite, or there are fewer than 25.
        ShapeError: if the weights are not one per draw.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry: Pareto smoothed importance sampling, JMLR 25(72), 2024,
            https://jmlr.org/papers/v25/19-556.html

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import psis_weights
        >>> z = 0.8 * np.random.default_rng(0).normal(size=4000)
        >>> weights = np.exp(psis_weights(-(z**2) / 2 + (z / 0.8) ** 2 / 2))
        >>> bool(0.9 < (weights * z**2).sum() < 1.1)   # the variance under p = N(0, 1)
        True
    """
    return _smooth(_checked(log_weights))[0]


def _checked(log_weights: Any) -> np.ndarray:
    values = as_array(log_weights)
    if values.ndim != 1:
        raise ShapeError(
            f"log weights must have shape (draw,), got {values.shape}. "
            "Sum over the other dimensions, or take one series."
        )
    if len(values) < MIN_DRAWS:
        raise DataError(
            f"{len(values)} log weights are too few to fit a tail. "
            f"Take at least {MIN_DRAWS} draws, better 1000."
        )
    bad = ~np.isfinite(values)
    if bad.any():
        raise DataError(
            f"{int(bad.sum())} of {len(values)} log weights are not finite, first draw {int(bad.argmax())}. "
            "The model or the guide has no density there: look at that draw, do not drop it."
        )
    return values if values.dtype == np.float32 else values.astype(float)


def _equal(values: np.ndarray) -> bool:
    tolerance = max(1e-8, 8 * float(np.finfo(values.dtype).eps))
    return bool(np.ptp(values) <= tolerance * max(1.0, float(np.abs(values).max())))


def _smooth(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Normalised smoothed log weights, and k."""
    x = values.astype(float) - values.max()
    if _equal(values):
        return x - _log_sum_exp(x), -np.inf
    order = np.argsort(x, kind="stable")
    size = int(np.ceil(min(len(x) / 5, 3 * np.sqrt(len(x)))))
    cutoff = max(x[order[-size - 1]], np.log(np.finfo(float).tiny))
    excess = np.exp(x) - np.exp(cutoff)
    tail = order[excess[order] > 0]
    if len(tail) < MIN_TAIL:
        return x - _log_sum_exp(x), -np.inf if cutoff == 0 else np.inf
    k, scale = _fit_pareto(excess[tail])
    if np.isfinite(k):
        p = np.arange(0.5, len(tail)) / len(tail)
        log_survival = np.log1p(-p)
        quantiles = -scale * (np.expm1(-k * log_survival) / -k if k else log_survival)
        x[tail] = np.minimum(np.log(quantiles + np.exp(cutoff)), 0)
    return x - _log_sum_exp(x), float(k)


def _fit_pareto(excess: np.ndarray) -> tuple[float, float]:
    """Shape and scale of a generalized Pareto distribution from sorted excesses (Zhang and Stephens 2009)."""
    n = len(excess)
    grid = 30 + int(np.sqrt(n))
    quarter = excess[int(n / 4 + 0.5) - 1]
    b = (1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3 * quarter) + 1 / excess[-1]
    shapes = np.log1p(-b[:, None] * excess).mean(1)
    profile = n * (np.log(-b / shapes) - shapes - 1)
    weights = np.exp(profile - profile.max())
    weights /= weights.sum()
    weights[weights < 10 * np.finfo(float).eps] = 0
    best = (b * weights).sum() / weights.sum()
    shape = np.log1p(-best * excess).mean()
    return (n * shape + PRIOR_TAIL * 0.5) / (n + PRIOR_TAIL), -shape / best


def _log_sum_exp(x: np.ndarray) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


@dataclass(frozen=True)
class SummaryRow:
    """One number's posterior: mean, standard deviation and an equal-tailed interval."""

    name: str
    mean: float
    sd: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Summary:
    """A table of posterior draws; prints as aligned text.

    Attributes:
        rows: one `SummaryRow` per number.
        interval: the probability between `lower` and `upper`.

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import summarise
        >>> print(summarise({"mu": np.arange(101.0)}))
        name   mean     sd     5%    95%
        mu    50.00  29.30  5.000  95.00
    """

    rows: tuple[SummaryRow, ...]
    interval: float

    def __str__(self) -> str:
        tail = 50 * (1 - self.interval)
        header = ["name", "mean", "sd", f"{tail:g}%", f"{100 - tail:g}%"]
        cells = [header, *([r.name, *map(_format, (r.mean, r.sd, r.lower, r.upper))] for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(_line(row, widths) for row in cells)


def summarise(
    draws: Mapping[str, Any], interval: float = 0.9, labels: Mapping[str, Sequence[str]] | None = None
) -> Summary:
    """Summarise posterior draws, one row per number.

    Args:
        draws: arrays `(draw, ...)` by name; one with several numbers gets the rows `name[0]`, `name[1]` ...
        interval: the probability of the equal-tailed interval.
        labels: by name, what to print instead of the numbers, one per element.

    Returns:
        The table, which prints as text.

    Raises:
        DataError: if there are no draws, one is not finite, or `interval` is not between 0 and 1.
        ShapeError: if the labels do not fit.

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import summarise
        >>> theta = np.random.default_rng(0).normal(size=(4000, 2)) * [1, 10]
        >>> table = summarise({"theta": theta}, labels={"theta": ["growth", "death"]})
        >>> [row.name for row in table.rows]
        ['theta[growth]', 'theta[death]']
    """
    if not 0 < interval < 1:
        raise DataError(f"interval={interval} is not a probability between 0 and 1. Give for example 0.9.")
    labels = labels or {}
    unknown = sorted(set(labels) - set(draws))
    if unknown:
        raise DataError(f"labels for {unknown}, but the draws are of {sorted(draws)}. Correct the names.")
    rows = (row for name, values in draws.items() for row in _rows(name, values, interval, labels.get(name)))
    return Summary(tuple(rows), interval)


def _rows(name: str, given: Any, interval: float, labels: Sequence[str] | None) -> Iterable[SummaryRow]:
    values = as_array(given).astype(float)
    if values.ndim == 0 or values.size == 0:
        raise DataError(f"{name} has shape {values.shape}, so no draws. Give an array (draw, ...).")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise DataError(f"{name}: {bad} of {values.size} values are not finite. Look at those draws first.")
    if labels is None:
        labels = [", ".join(map(str, index)) for index in np.ndindex(values.shape[1:])]
    columns = values.reshape(len(values), -1)
    if len(labels) != columns.shape[1]:
        raise ShapeError(
            f"{name} has {columns.shape[1]} elements but {len(labels)} labels. Give one for each."
        )
    sd = columns.std(0, ddof=1) if len(columns) > 1 else np.zeros(columns.shape[1])
    lower, upper = np.quantile(columns, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
    names = [f"{name}[{label}]" if values.ndim > 1 else name for label in labels]
    numbers = np.stack([columns.mean(0), sd, lower, upper], 1).tolist()
    return [SummaryRow(label, *row) for label, row in zip(names, numbers, strict=True)]


def _format(number: float) -> str:
    text = f"{number:#.4g}"
    return text.removesuffix(".")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = (
        cell.ljust(w) if i == 0 else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([name, *numbers])
