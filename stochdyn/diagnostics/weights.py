"""Importance weights of a fit, split into what belongs to each series and what all series share."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stochdyn.data import AbstractPopulation
from stochdyn.diagnostics.importance import ParetoK, pareto_k
from stochdyn.diagnostics.tree import as_array
from stochdyn.errors import DataError, StochdynError
from stochdyn.inference.draws import Draws, Site
from stochdyn.inference.evidence import Evidence, evidence


@dataclass(frozen=True)
class Weights:
    """log p - log q of draws from the guide: everything, or with the path integrated out.

    Attributes:
        series: (draw, series), what stands in the plates of the series; None where there are no such plates.
        shared: (draw,), the rest.

    Example:
        >>> Weights(np.zeros((100, 3)), np.ones(100)).joint.mean()
        np.float64(1.0)
    """

    series: np.ndarray | None
    shared: np.ndarray

    @property
    def joint(self) -> np.ndarray:
        """(draw,) the sum."""
        return self.shared if self.series is None else self.shared + self.series.sum(1)


def series_count(found: Draws, data: Any) -> int | None:
    """How many series there are: of the data, or of the first observed site in a plate.

    Example:
        >>> series_count(Draws({}, {}, {}, {}, 0, 1), None) is None
        True
    """
    if isinstance(data, AbstractPopulation):
        return len(data)
    sizes = (
        site.value.shape[1 : 1 + len(site.plates)].numel() for site in found.observed.values() if site.plates
    )
    return next(sizes, None)


def is_local(site: Site, plates: Collection[tuple[str, ...]]) -> bool:
    """Whether a site has one member for every series.

    Args:
        site: of the model.
        plates: what `series_plates` found.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> site = Site("z", dist.Normal(0.0, 1.0), torch.zeros(5, 3), torch.zeros(5, 3), ("series",), False)
        >>> is_local(site, {("series",)}), is_local(site, {("group",)})
        (True, False)
    """
    return site.plates in plates


def series_plates(found: Draws, series: int | None) -> set[tuple[str, ...]]:
    """The plates that hold the series: as many members, and something is observed in them.

    As many alone says little: channels or groups may be as many as the series. Empty where there are none, or several
    that could be them, or where the guide has no such plates.

    Example:
        >>> series_plates(Draws({}, {}, {}, {}, 0, 1), 3)
        set()
    """
    seen = [set(site.plates) for site in found.observed.values()]
    sites = (*found.prior.values(), *found.observed.values())
    own = {s.plates for s in sites if s.plates and _members(s) == series}
    own = {plates for plates in own if any(set(plates) <= names for names in seen)}
    widest = set(max(own, key=len, default=()))
    guided = all(
        _members(found.latents[name]) == series for name, site in found.prior.items() if site.plates in own
    )
    return own if guided and all(set(plates) <= widest for plates in own) else set()


def _members(site: Site) -> int:
    return site.value.shape[1 : 1 + len(site.plates)].numel()


def joint_weights(found: Draws, series: int | None) -> Weights:
    """log p(data, latents) - log q(latents) of every draw; what is observed several times in a series is summed.

    Example:
        >>> joint_weights(Draws({}, {}, {}, {}, 0, 4), None).joint
        array([0., 0., 0., 0.])
    """
    plates = series_plates(found, series)
    own = {name for name, site in found.prior.items() if is_local(site, plates)}
    names = set(max(plates, key=len, default=()))
    local, shared = np.zeros((found.size, series or 0)), np.zeros(found.size)
    terms = [(+1, site) for site in (*found.prior.values(), *found.observed.values())]
    terms += [(-1, site) for site in found.latents.values()]
    for sign, site in terms:
        log_prob = as_array(site.log_prob.double())
        if site.name in own or is_local(site, plates):
            local = local + sign * log_prob.reshape(found.size, -1)
        elif site.observed and names and names <= set(site.plates):
            extra = tuple(1 + k for k, name in enumerate(site.plates) if name not in names)
            local = local + log_prob.sum(extra).reshape(found.size, -1)
        else:
            shared = shared + sign * log_prob.reshape(found.size, -1).sum(1)
    return Weights(local if plates else None, shared)


def try_evidence(fit: Any, data: Any, **options: Any) -> tuple[Evidence | None, str]:
    """The evidence of a fit, or why there is none, in its own words.

    Example:
        >>> try_evidence((None, None), None)
        (None, 'sd.evidence takes sd.Series, got NoneType.')
    """
    if not isinstance(data, AbstractPopulation):
        return None, f"sd.evidence takes sd.Series, got {type(data).__name__}."
    try:
        return evidence(fit, data, **options), ""  # pyright: ignore[reportArgumentType]
    except (StochdynError, RuntimeError, ValueError) as error:  # the reason is shown, and the rest goes on
        return None, reason(error)


def reason(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing.

    Example:
        >>> reason(ValueError("Wrong.\\nMore.")), reason(NotImplementedError())
        ('Wrong.', 'NotImplementedError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0]


def integrated(found: Evidence) -> Weights:
    """The weights of the latents other than the path.

    Example:
        >>> import torch
        >>> integrated(Evidence(torch.zeros(10, 3), torch.zeros(10))).series.shape
        (10, 3)
    """
    return Weights(as_array(found.log_likelihood.double()), as_array(found.log_weights.double()))


@dataclass(frozen=True)
class Estimate:
    """A number, or one per series, with its standard error.

    Example:
        >>> print(Estimate(1.234, 0.1))
        1.23 +- 0.10
    """

    value: Any
    error: Any

    def __str__(self) -> str:
        return f"{self.value:.2f} +- {self.error:.2f}"


def mean(x: np.ndarray) -> Estimate:
    """The mean over draws.

    Example:
        >>> print(mean(np.array([1.0, 3.0])))
        2.00 +- 1.00
    """
    value, error = x.mean(0), x.std(0, ddof=1) / np.sqrt(len(x))
    return Estimate(float(value), float(error)) if x.ndim == 1 else Estimate(value, error)


def log_mean(x: np.ndarray, less: np.ndarray | float = 0.0) -> Estimate:
    """log mean exp(x) - mean(less) over draws; the error is that of the difference.

    Example:
        >>> print(log_mean(np.zeros(10), less=np.full(10, -2.0)))
        2.00 +- 0.00
    """
    top = x.max(0)
    value = top + np.log(np.exp(x - top).mean(0))
    influence = np.exp(x - value) - less
    error = influence.std(0, ddof=1) / np.sqrt(len(x))
    value = value - (less.mean(0) if isinstance(less, np.ndarray) else less)
    return Estimate(float(value), float(error)) if x.ndim == 1 else Estimate(value, error)


def tails(log_weights: np.ndarray) -> Sequence[ParetoK]:
    """`pareto_k` of each column; one with weights that are not finite has k = NaN.

    Example:
        >>> [k.exact for k in tails(np.zeros((30, 2)))]
        [True, True]
    """
    return [_tail(column) for column in log_weights.T]


def _tail(column: np.ndarray) -> ParetoK:
    try:
        return pareto_k(column)
    except DataError:
        return ParetoK(np.nan, False, len(column), min(1 - 1 / float(np.log10(len(column))), 0.7), np.nan)
