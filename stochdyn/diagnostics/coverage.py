"""How often central intervals of the posterior predictive hold what was observed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.data import Series
from stochdyn.diagnostics.tree import as_array
from stochdyn.inference.draws import Draws, evaluating, pair, replicated
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
        held_out: whether each was hidden from the guide when it was predicted. If not, these are smoothing
            residuals: the posterior saw each value that it is compared with, so coverage is too high, and a posterior
            that is too narrow does not show.

    Example:
        >>> Coverage.of(("y",), [np.linspace(0, 1, 101)], held_out=True).covered.round(1)
        array([[0.5, 0.9]])
    """

    channels: tuple[str, ...]
    covered: np.ndarray
    error: np.ndarray
    points: np.ndarray
    held_out: bool

    @classmethod
    def of(
        cls, channels: tuple[str, ...], ranks: list[np.ndarray], *, held_out: bool, series: Any = None
    ) -> "Coverage":
        """From the ranks of the observations among draws, on (0, 1), a list entry per channel; `series` likewise."""
        series = [np.arange(len(u)) for u in ranks] if series is None else series
        inside = [np.abs(u[:, None] - 0.5) <= np.array(LEVELS) / 2 for u in ranks]
        found = [_share(i, s) for i, s in zip(inside, series, strict=True)]
        points = np.array([len(u) for u in ranks])
        return cls(
            channels, np.stack([f[0] for f in found]), np.stack([f[1] for f in found]), points, held_out
        )


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
    Parameters stay as fitted to all. Where hiding changes nothing (a guide that does not read its data), or the data
    are no `Series`, it is the coverage of smoothing residuals.

    Example:
        >>> import pyro, pyro.distributions as dist, stochdyn as sd
        >>> from stochdyn.inference.draws import draw
        >>> def model(batch):
        ...     with batch.plate("series"):
        ...         pyro.sample("y", dist.Normal(batch.values * 0, 1.0).to_event(2), obs=batch.values)
        >>> data, fit = sd.Series([0.0, 1.0], torch.zeros(3, 2, 1)), (model, lambda batch: None)
        >>> coverage(fit, data, draw(fit, data, 10), draws=100, seed=0).covered
        array([[1., 1.]])
    """
    sites = [s for s in found.replicable.values() if not isinstance(s.fn, AbstractPointProcess)]
    if not sites:
        return None
    if isinstance(data, Series):
        return _of_series(fit, data, sites, draws, seed)
    generator = np.random.default_rng(seed)
    with evaluating(*pair(fit), seed=seed):
        ranks = [_ranks(replicated(s), s.value[0], generator)[_numpy(_scored(s, s.value[0]))] for s in sites]
    return Coverage.of(tuple(s.name for s in sites), [u.ravel() for u in ranks], held_out=False)


def _of_series(fit: Any, data: Series, sites: list[Any], draws: int, seed: int | None) -> Coverage:
    scored = data.mask & ~data.censored
    for site in sites:
        if site.value[0].numel() == data.values.numel():
            scored = scored & _scored(site, site.value[0]).reshape(scored.shape)
    seen = predict(fit, data, draws=draws, seed=seed).observations
    generator = np.random.default_rng(seed)
    ranks = np.full(data.values.shape, np.nan)
    moved = torch.zeros((), device=data.device)
    for hold in _folds(data):
        hidden = data.mask & ~hold
        part = data._with(mask=hidden, values=torch.where(hidden, data.values, torch.zeros_like(data.values)))
        again = predict(fit, part, draws=draws, seed=seed).observations
        moved = moved + ((again != seen).any(0) & hold & scored).sum()
        ranks = np.where(_numpy(hold), _ranks(again, data.values, generator), ranks)
    held_out = bool(moved > 0.5 * scored.sum())
    if not held_out:
        ranks = _ranks(seen, data.values, generator)
    use, label = _numpy(scored), np.arange(len(data))[:, None].repeat(scored.shape[1], 1)
    channels = range(data.obs_dim)
    return Coverage.of(
        tuple(data.channels),
        [ranks[..., c][use[..., c]] for c in channels],
        held_out=held_out,
        series=[label[use[..., c]] for c in channels],
    )


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
