"""Simulation-based calibration: are posteriors right on average over the prior?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from stochdyn.diagnostics.tree import as_array
from stochdyn.errors import DataError, ShapeError


@dataclass(frozen=True)
class Calibration:
    """Ranks of true values among posterior draws, per quantity.

    Attributes:
        ranks: by quantity, (simulation,) integers from 0 to `draws`; uniform where the posterior is right.
        draws: posterior draws per simulation.

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import Calibration
        >>> ranks = np.random.default_rng(0).integers(0, 101, size=1000)
        >>> Calibration({"theta": ranks}, draws=100).passed(alpha=0.01)
        True
    """

    ranks: Mapping[str, np.ndarray]
    draws: int

    def escape(self, name: str) -> float:
        """How far the ranks of a quantity leave uniformity: the smallest pointwise two-sided tail probability of
        their empirical distribution over all positions. Small is bad."""
        return float(_smallest_tail(np.asarray(self.ranks[name])[None], self.draws)[0])

    def p_value(self, name: str) -> float:
        """Simultaneous over all ranks: how often uniform ranks escape as far."""
        null = _null_tails(len(self.ranks[name]), self.draws)
        return float((1 + (null <= self.escape(name)).sum()) / (1 + len(null)))

    def passed(self, alpha: float = 0.01) -> bool:
        """Whether no quantity is rejected, at level alpha for all quantities together (Bonferroni)."""
        return all(self.p_value(name) > alpha / len(self.ranks) for name in self.ranks)

    def coverage(self, name: str, interval: float = 0.9) -> float:
        """The share of simulations whose true value is in the central interval of the draws."""
        u = (np.asarray(self.ranks[name]) + 0.5) / (self.draws + 1)
        return float((np.abs(u - 0.5) <= interval / 2).mean())

    def band(self, name: str, alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, and the lower and upper simultaneous limits of the empirical distribution of the ranks."""
        n = len(self.ranks[name])
        tail = float(np.quantile(_null_tails(n, self.draws), alpha))
        positions = np.arange(1, self.draws + 1) / (self.draws + 1)
        lower, upper = _binomial_limits(n, positions, tail)
        return positions, lower / n, upper / n

    def __str__(self) -> str:
        lines = [f"{'quantity':<20} {'p':>7} {'50 %':>7} {'90 %':>7}"]
        for name in self.ranks:
            cover = [self.coverage(name, p) for p in (0.5, 0.9)]
            lines.append(f"{name:<20} {self.p_value(name):>7.3f} {cover[0]:>7.3f} {cover[1]:>7.3f}")
        return "\n".join(lines)


def sbc(
    simulate: Callable[[np.random.Generator], tuple[Mapping[str, Any], Any]],
    infer: Callable[[Any], Mapping[str, Any]],
    *,
    simulations: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Simulate from the prior, infer, and rank the truth among the posterior draws.

    For one simulation per call, or for many at once: where `simulate` returns true values of shape (batch,), `infer`
    returns draws of shape (draw, batch), and every member counts as a simulation (an amortised guide does a thousand
    in one pass). Parameters alone do not see a missing likelihood: add the log likelihood of the data as a quantity,
    of the truth and of the draws.

    Args:
        simulate: `(rng) -> (truth, data)`, truth by quantity: a number or (batch,).
        infer: `data -> draws` by quantity: (draw,) or (draw, batch).
        simulations: how many, at least.
        seed: of the generator that `simulate` gets.
        progress: whether to show a progress bar.

    Raises:
        ShapeError: if draws and truth do not fit, or quantities differ.
        DataError: if a value is not finite.

    References:
        Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration", 2018,
        https://arxiv.org/abs/1804.06788; Säilynoja, Bürkner & Vehtari, "Graphical test for discrete uniformity", 2022,
        https://doi.org/10.1007/s11222-022-10090-6; Modrák et al., "SBC with test quantities", 2023,
        https://doi.org/10.1214/23-BA1404

    Example:
        >>> import numpy as np
        >>> import stochdyn as sd
        >>> def simulate(rng):
        ...     mu = rng.normal(size=500)
        ...     return {"mu": mu}, mu + rng.normal(size=500)
        >>> def infer(y):
        ...     return {"mu": y / 2 + np.random.default_rng(1).normal(size=(99, 500)) * 0.5**0.5}
        >>> sd.sbc(simulate, infer, simulations=500, progress=False).passed()
        True
    """
    if simulations < 1:
        raise DataError(f"`simulations` must be at least 1, got {simulations}.")
    rng = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {}
    done, draws = 0, 0
    with tqdm(total=simulations, disable=not progress, unit="sim") as bar:
        while done < simulations:
            truth, data = simulate(rng)
            ranked, draws = _ranked(truth, infer(data), rng)
            for name, ranks in ranked.items():
                found.setdefault(name, []).append(ranks)
            size = len(next(iter(ranked.values())))
            done += size
            bar.update(size)
    return Calibration({name: np.concatenate(parts) for name, parts in found.items()}, draws)


def tarp(truth: Any, draws: Any, *, references: Any = None, seed: int = 0) -> Calibration:
    """Ranks of the truth's distance to a reference point among the distances of the draws: expected coverage by balls.

    One number for all dimensions jointly: it sees grossly wrong correlations, which ranks of single quantities do not,
    and little of a bias. Columns are scaled by the spread of the truths. References must not depend on the truth of
    their own simulation. By default each is the truth of another one, and a posterior that ignores the data passes;
    references that depend on the data (and on nothing else) see that too.

    Args:
        truth: (simulation, d) true values, simulated independently.
        draws: (draw, simulation, d) of the posterior.
        references: (simulation, d).
        seed: of the default references and of ties.

    Returns:
        A `Calibration` with the one quantity "distance".

    Raises:
        ShapeError: if shapes do not fit.
        DataError: if a value is not finite, or there is one simulation only.

    References:
        Lemos et al., "Sampling-based accuracy testing of posterior estimators for general inference", 2023,
        https://arxiv.org/abs/2302.03026

    Example:
        >>> import numpy as np
        >>> import stochdyn as sd
        >>> rng = np.random.default_rng(0)
        >>> sd.tarp(rng.normal(size=(500, 3)), rng.normal(size=(99, 500, 3))).passed()
        True
    """
    true, sample = as_array(truth).astype(float), as_array(draws).astype(float)
    if true.ndim != 2 or sample.ndim != 3 or sample.shape[1:] != true.shape:
        raise ShapeError(
            f"truth has shape {true.shape}, draws {sample.shape}; expected (simulation, d) and (draw, simulation, d)."
        )
    if len(true) < 2:
        raise DataError("one simulation says nothing about coverage. Take hundreds.")
    rng = np.random.default_rng(seed)
    if references is None:
        order = rng.permutation(len(true))
        points = np.empty_like(true)
        points[order] = true[np.roll(order, 1)]
    else:
        points = as_array(references).astype(float)
    if points.shape != true.shape:
        raise ShapeError(f"references have shape {points.shape}, truth {true.shape}. Give one for each.")
    spread = true.std(0)
    scale = np.where(spread > 0, spread, 1.0)
    distances = {"distance": np.linalg.norm((true - points) / scale, axis=-1)}
    ranks, count = _ranked(distances, {"distance": np.linalg.norm((sample - points) / scale, axis=-1)}, rng)
    return Calibration(ranks, count)


def _ranked(
    truth: Mapping[str, Any], draws: Mapping[str, Any], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], int]:
    if not truth or set(truth) != set(draws):
        raise ShapeError(
            f"`simulate` gives {sorted(truth)}, `infer` gives {sorted(draws)}. Give the same quantities."
        )
    out, count = {}, 0
    for name, value in truth.items():
        true, sample = np.atleast_1d(as_array(value)).astype(float), as_array(draws[name]).astype(float)
        sample = sample[:, None] if sample.ndim == 1 else sample
        if sample.ndim != 2 or true.ndim != 1 or sample.shape[1] != len(true):
            raise ShapeError(
                f"'{name}': truth has shape {true.shape}, draws {sample.shape}; expected (batch,) and (draw, batch)."
            )
        if not (np.isfinite(true).all() and np.isfinite(sample).all()):
            raise DataError(
                f"'{name}': a true value or a draw is not finite. Look at the simulation before ranking it."
            )
        below, ties = (sample < true).sum(0), (sample == true).sum(0)
        out[name], count = below + rng.integers(0, ties + 1), len(sample)
    return out, count


def _smallest_tail(ranks: np.ndarray, draws: int) -> np.ndarray:
    """(row,) the smallest pointwise tail probability of the empirical distribution of each row of ranks."""
    n = ranks.shape[1]
    counts = np.stack([np.bincount(row, minlength=draws + 1) for row in ranks])[:, :-1].cumsum(1)
    positions = np.arange(1, draws + 1) / (draws + 1)
    lower = np.stack([_binomial_cdf(n, p) for p in positions])
    columns = np.arange(draws)
    below = lower[columns, counts]
    above = 1 - np.where(counts > 0, lower[columns, np.maximum(counts - 1, 0)], 0.0)
    return 2 * np.minimum(below, above).min(1)


@lru_cache(maxsize=16)
def _null_tails(simulations: int, draws: int, replicates: int = 2000) -> np.ndarray:
    ranks = np.random.default_rng(0).integers(0, draws + 1, size=(replicates, simulations))
    return _smallest_tail(ranks, draws)


@lru_cache(maxsize=4096)
def _binomial_cdf(n: int, p: float) -> np.ndarray:
    """P(X <= k) for k = 0 .. n."""
    k = np.arange(1, n + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    log_pmf = log_choose + np.arange(n + 1) * np.log(p) + (n - np.arange(n + 1)) * np.log1p(-p)
    return np.minimum(np.exp(log_pmf).cumsum(), 1.0)


def _binomial_limits(n: int, positions: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
    cdfs = [_binomial_cdf(n, p) for p in positions]
    lower = np.array([np.searchsorted(cdf, tail / 2) for cdf in cdfs])
    upper = np.array([np.searchsorted(cdf, 1 - tail / 2) for cdf in cdfs])
    return lower, upper
