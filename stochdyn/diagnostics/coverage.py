"""How often central intervals of the posterior predictive hold what was observed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.data import Series
from stochdyn.data.checks import fill_missing
from stochdyn.diagnostics.importance import psis_weights
from stochdyn.diagnostics.tree import as_array
from stochdyn.diagnostics.weights import tails
from stochdyn.errors import StochdynError
from stochdyn.inference.draws import Draws, Site, evaluating, pair, replicated
from stochdyn.inference.evidence import pointwise
from stochdyn.inference.predict import predict
from stochdyn.paths import AbstractPointProcess

LEVELS = (0.5, 0.9)
_FOLDS = 5


@dataclass(frozen=True)
class Coverage:
    """The share of observations inside central intervals, by channel.

    Attributes:
        channels: their names; of sites where the data are no series.
        covered: (channel, level) for the levels 0.5 and 0.9; NaN for a channel without observations.
        error: (channel, level) standard errors, with whole series as units where there are eight or more.
        points: (channel,) how many observations were counted.
        how: "hidden", each was hidden from the guide when it was predicted; "reweighted", each was taken out of the
            posterior by importance weights, which must be light (k-hat) to count; "seen", smoothing residuals: the
            posterior saw each value that it is compared with, so coverage is too high, and a posterior that is too
            narrow does not show.

    Example:
        >>> Coverage.of(("y",), [np.linspace(0, 1, 101)], how="hidden").covered.round(1)
        array([[0.5, 0.9]])
    """

    channels: tuple[str, ...]
    covered: np.ndarray
    error: np.ndarray
    points: np.ndarray
    how: str

    @classmethod
    def of(
        cls, channels: tuple[str, ...], ranks: list[np.ndarray], *, how: str, series: Any = None
    ) -> "Coverage":
        """From the ranks of the observations among draws, on (0, 1), a list entry per channel; `series` likewise."""
        series = [np.arange(len(u)) for u in ranks] if series is None else series
        inside = [np.abs(u[:, None] - 0.5) <= np.array(LEVELS) / 2 for u in ranks]
        found = [_share(i, s) for i, s in zip(inside, series, strict=True)]
        points = np.array([len(u) for u in ranks])
        return cls(channels, np.stack([f[0] for f in found]), np.stack([f[1] for f in found]), points, how)


def _share(inside: np.ndarray, series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(inside) == 0:
        return np.full(len(LEVELS), np.nan), np.full(len(LEVELS), np.nan)
    share, level = inside.mean(0), np.array(LEVELS)
    error = np.sqrt(level * (1 - level) / len(inside))
    names, index = np.unique(series, return_inverse=True)
    if 8 <= len(names) < len(inside):
        off = np.zeros((len(names), len(LEVELS)))
        np.add.at(off, index, inside - share)
        clustered = np.sqrt((off**2).sum(0) * len(names) / (len(names) - 1)) / len(inside)
        error = np.maximum(error, clustered)
    return share, error


def coverage(fit: Any, data: Any, found: Draws, *, draws: int, seed: int | None) -> Coverage | None:
    """Coverage of what the model observes; None where it observes nothing but jumps.

    Of a `Series` every fifth reading of each series is hidden in turn, and predicted by the guide from the others.
    Parameters stay as fitted to all. Where the guide cannot take other data than its own, or hiding changes nothing, or
    the data are no `Series`, each reading is left out by reweighting the draws. Where most of these weights are too
    heavy, it is the coverage of smoothing residuals.

    Example:
        >>> import pyro, pyro.distributions as dist, stochdyn as sd
        >>> from stochdyn.inference.draws import draw
        >>> def model(batch):
        ...     with batch.plate("series"):
        ...         pyro.sample("y", dist.Normal(batch.values * 0, 1.0).to_event(2), obs=batch.values)
        >>> data, fit = sd.Series([0.0, 1.0], torch.zeros(3, 2, 1)), (model, lambda batch: None)
        >>> coverage(fit, data, draw(fit, data, 30), draws=100, seed=0).covered
        array([[1., 1.]])
    """
    sites = [s for s in found.replicable.values() if not isinstance(s.fn, AbstractPointProcess)]
    if not sites:
        return None
    if isinstance(data, Series):
        return _of_series(fit, data, sites, draws, seed)
    generator = np.random.default_rng(seed)
    with evaluating(*pair(fit), seed=seed):
        rows = [_left_out(s, replicated(s), _scored(s, s.value[0]), len(s.plates), generator) for s in sites]
    how = "reweighted" if all(row.reliable for row in rows) else "seen"
    ranks = [row.ranks(how) for row in rows]
    return Coverage.of(tuple(s.name for s in sites), ranks, how=how)


def _of_series(fit: Any, data: Series, sites: list[Site], draws: int, seed: int | None) -> Coverage:
    scored = data.mask & ~data.censored
    like = [site for site in sites if site.value[0].numel() == data.values.numel()]
    for site in like:
        scored = scored & _scored(site, site.value[0]).reshape(scored.shape)
    seen = predict(fit, data, draws=draws, seed=seed).observations
    generator = np.random.default_rng(seed)
    ranks, how = _hidden(fit, data, scored, seen, generator, seed), "hidden"
    if ranks is None:
        ranks, how = _ranks(seen, data.values, generator), "seen"
        left = _left_out_of_series(fit, like, scored, generator, seed)
        if left is not None and left.reliable:
            ranks, how = left.u.reshape(scored.shape), "reweighted"
            scored = scored & torch.tensor(left.good, device=scored.device).reshape(scored.shape)
    kept, label = _numpy(scored), np.arange(len(data))[:, None].repeat(scored.shape[1], 1)
    channels = range(data.obs_dim)
    return Coverage.of(
        tuple(data.channels),
        [ranks[..., c][kept[..., c]] for c in channels],
        how=how,
        series=[label[kept[..., c]] for c in channels],
    )


def _hidden(
    fit: Any, data: Series, scored: Tensor, seen: Tensor, generator: np.random.Generator, seed: int | None
) -> np.ndarray | None:
    """Ranks of hidden readings; None where the guide refuses data with holes, or does not look at them."""
    ranks, moved = np.full(data.values.shape, np.nan), torch.zeros((), device=data.device)
    for hold in _folds(data):
        rest = data.mask & ~hold
        part = data._with(mask=rest, values=fill_missing(data.values, rest, data.values.dtype, str))
        try:
            again = predict(fit, part, draws=len(seen), seed=seed).observations
        except (StochdynError, RuntimeError, ValueError):
            return None
        moved = moved + ((again != seen).any(0) & hold & scored).sum()
        ranks = np.where(_numpy(hold), _ranks(again, data.values, generator), ranks)
    return ranks if bool(moved > 0.5 * scored.sum()) else None


@dataclass(frozen=True)
class _LeftOut:
    """Ranks of one site's values with and without their own readings' weight, all of the shape of one value."""

    u: np.ndarray
    seen: np.ndarray
    good: np.ndarray
    scored: np.ndarray

    @property
    def reliable(self) -> bool:
        return self.good[self.scored].mean() > 0.5 if self.scored.any() else False

    def ranks(self, how: str) -> np.ndarray:
        return self.u[self.scored & self.good] if how == "reweighted" else self.seen[self.scored]


def _left_out_of_series(
    fit: Any, sites: list[Site], scored: Tensor, generator: np.random.Generator, seed: int | None
) -> _LeftOut | None:
    if not sites:
        return None
    with evaluating(*pair(fit), seed=seed):
        again = replicated(sites[0])
    return _left_out(sites[0], again, scored.reshape(sites[0].value.shape[1:]), -1, generator)


def _left_out(
    site: Site, again: Tensor, scored: Tensor, dims: int, generator: np.random.Generator
) -> _LeftOut:
    """Leave each reading out: draws weighted by 1 / p(reading | draw). `dims` of a value number the readings."""
    value = site.value[0]
    rows = site.log_prob if dims >= 0 else pointwise(site.fn, site.value)[0].expand(site.value.shape).sum(-1)
    rows, shape = as_array(rows.double()), value.shape[:dims]
    seen = _ranks(again, value, generator)
    u, good = seen.reshape(shape.numel(), -1).copy(), np.zeros(shape.numel(), dtype=bool)
    draws, values = (
        _numpy(x).reshape(*lead, shape.numel(), -1) for x, lead in ((again, (len(again),)), (value, ()))
    )
    wanted = _numpy(scored).reshape(shape.numel(), -1).any(1)
    for k in np.flatnonzero(wanted):
        (tail,) = tails(-rows.reshape(len(rows), -1)[:, [k]])
        if not tail.good:
            continue
        weights, good[k] = np.exp(psis_weights(-rows.reshape(len(rows), -1)[:, k])), True
        below, ties = weights @ (draws[:, k] < values[k]), weights @ (draws[:, k] == values[k])
        n = len(weights)
        u[k] = (n * below + generator.uniform(size=below.shape) * (n * ties + 1)) / (n + 1)
    fits = np.broadcast_to(good[:, None], u.shape).reshape(value.shape)
    return _LeftOut(u.reshape(value.shape), seen, fits, _numpy(scored))


def _folds(data: Series) -> Iterator[Tensor]:
    """(series, time, channel) masks: every reading is hidden once, with all its channels."""
    rows = data.mask.any(-1)
    count = min(_FOLDS, max(int(rows.sum(1).max()), 1))
    order = rows.cumsum(1) - 1 + torch.arange(len(data), device=rows.device)[:, None]
    for k in range(count):
        yield (rows & (order % count == k))[..., None] & data.mask


def _ranks(draws: Tensor, value: Tensor, generator: np.random.Generator) -> np.ndarray:
    """Where each value stands among its draws, on (0, 1); ties, as of counts, are broken at random."""
    below, ties = _numpy((draws < value).sum(0)), _numpy((draws == value).sum(0))
    return (below + generator.uniform(size=below.shape) * (ties + 1)) / (len(draws) + 1)


def _scored(site: Any, value: Tensor) -> Tensor:
    """Which entries count towards the likelihood."""
    fn, mask = site.fn, torch.ones((), dtype=torch.bool, device=value.device)
    while hasattr(fn, "base_dist"):
        own = getattr(fn, "_mask", None)
        if own is not None:
            own = torch.as_tensor(own, device=value.device)
            mask = mask & own.reshape(own.shape + (1,) * len(fn.base_dist.event_shape))
        fn = fn.base_dist
    while mask.dim() > value.dim():
        mask = mask[0]  # draws
    return mask.expand(value.shape)


def _numpy(x: Tensor) -> np.ndarray:
    return as_array(x)
