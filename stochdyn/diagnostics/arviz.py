"""The bridge to ArviZ, and the only file that imports it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from stochdyn.data import Series
from stochdyn.diagnostics.tree import Variable, build_tree
from stochdyn.inference.draws import Draws, Site, check_follows, draw, evaluating, pair
from stochdyn.inference.predict import at_times

with warnings.catch_warnings():
    # ArviZ 0.x announces 1.0 on its first import of the day.
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az


def to_inference_data(tree: xr.DataTree) -> Any:
    """Turn a tree into what the installed ArviZ works on.

    The choice is by version number: ArviZ 1.x still answers `hasattr(az, "InferenceData")` with yes.

    Args:
        tree: what `build_tree` returns.

    Returns:
        `arviz.InferenceData` with ArviZ 0.x, the tree itself with ArviZ 1.x and later.

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import Variable, build_tree, to_inference_data
        >>> mu = Variable(("draw",), np.random.default_rng(0).normal(size=500))
        >>> data = to_inference_data(build_tree({"posterior": {"mu": mu}}))
        >>> dict(data["posterior"].sizes)
        {'chain': 1, 'draw': 500}
    """
    major = int(az.__version__.split(".")[0])
    return az.from_datatree(tree) if major == 0 else tree


def to_arviz(
    fit: Any,
    data: Series,
    draws: int = 500,
    coords: Mapping[str, Sequence[Any]] | None = None,
    *,
    seed: int | None = 0,
) -> Any:
    """Export a fit to ArviZ.

    Groups: `posterior` (every latent; paths at the observation times), `posterior_predictive`, `observed_data` (NaN
    where nothing was observed), `log_likelihood` (per member of the plates, given the path of the draw), and
    `sample_stats` with `lp` = log p(y, latents) and `log_q`, one per draw. Dimensions are named after the plates, and
    `time`, `state`, `channel`; the coordinate of `time` are the real times (`time_value` per series where each has its
    own). Draws are independent, so r-hat and ess say nothing here; use `pareto_k` on lp - log_q.

    Args:
        fit: what `sd.fit` returned, or (model, guide).
        data: the series.
        draws: how many.
        coords: labels by dimension, e.g. {"state": ["hare", "lynx"]}.
        seed: of the draws; None uses the current random state.

    Returns:
        `arviz.InferenceData` with ArviZ 0.x, `xarray.DataTree` with ArviZ 1.x.

    Raises:
        GuideError: if a latent has no posterior in the guide.
        DataError: if `coords` names a dimension that is not there, or has the wrong length.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import stochdyn as sd
        >>> def model(batch):
        ...     grid = sd.TimeGrid(batch.times)
        ...     with batch.plate("series"):
        ...         z = pyro.sample("z", sd.SDEPath(lambda t, z: -z, torch.tensor([0.3]),
        ...                                         dist.Normal(torch.zeros(1), 1.0).to_event(1), grid.ts))
        ...         seen = dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2)
        ...         pyro.sample("y", seen, obs=batch.values)
        >>> data = sd.Series([0.0, 1.0], torch.randn(3, 2, 1))
        >>> idata = sd.to_arviz((model, sd.AmortizedGuide(model)), data, draws=10)
        >>> dict(idata["posterior"]["z"].sizes)
        {'chain': 1, 'draw': 10, 'series': 3, 'time': 2, 'state': 1}
    """
    model, guide = pair(fit)
    with evaluating(model, guide, seed=seed):
        found = draw(fit, data, draws)
        check_follows(found, data)
        replicates = {name: site.fn.sample() for name, site in found.observed.items()}
    groups: dict[str, dict[str, Variable]] = {
        "posterior": {n: _latent(s, data) for n, s in found.latents.items()},
        "posterior_predictive": {},
        "log_likelihood": {},
        "observed_data": {},
        "sample_stats": {"lp": _total(found, "p"), "log_q": _total(found, "q")},
    }
    for name, site in found.observed.items():
        dims = _dims(site, data)
        value = replicates[name].expand(draws, *replicates[name].shape[1:]).reshape(site.value.shape)
        groups["posterior_predictive"][name] = Variable(("draw", *dims), _array(value))
        groups["log_likelihood"][name] = Variable(("draw", *_plates(site)), _array(site.log_prob))
        groups["observed_data"][name] = Variable(dims, _observed(site, data))
    known = {dim for group in groups.values() for v in group.values() for dim in v.dims}
    return to_inference_data(build_tree(groups, {**_coords(data, known), **(coords or {})}))


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _plates(site: Site) -> tuple[str, ...]:
    return tuple(name or f"{site.name}_batch_{k}" for k, name in enumerate(site.plates))


def _dims(site: Site, data: Series) -> tuple[str, ...]:
    """Names of the dimensions of an observed site, draws left out."""
    event = tuple(site.event_shape)
    if event == tuple(data.values.shape[-2:]):
        return (*_plates(site), "time", "channel")
    return (*_plates(site), *(f"{site.name}_dim_{k}" for k in range(len(event))))


def _latent(site: Site, data: Series) -> Variable:
    if not hasattr(site.fn, "ts"):
        names = tuple(f"{site.name}_dim_{k}" for k in range(len(site.event_shape)))
        return Variable(("draw", *_plates(site), *names), _array(site.value))
    value = at_times(site.value, site.fn.ts, data.times)
    return Variable(("draw", *_plates(site), "time", "state"), _array(value))


def _observed(site: Site, data: Series) -> np.ndarray:
    value = _array(site.value[0])
    if value.shape == tuple(data.values.shape):
        value = np.where(_array(data.mask), value, np.nan)
    return value


def _total(found: Draws, which: str) -> Variable:
    sites = list(found.latents.values()) if which == "q" else [*found.prior.values(), *found.observed.values()]
    total = sum(_array(s.log_prob.double()).reshape(found.size, -1).sum(-1) for s in sites)
    return Variable(("draw",), np.asarray(total))


def _coords(data: Series, known: set[str]) -> dict[str, Any]:
    times = _array(data.times)
    given: dict[str, Any] = {
        "time": times if times.ndim == 1 else Variable(("series", "time"), times),
        "channel": list(data.channels),
        "series": list(data.ids),
    }
    return {name: value for name, value in given.items() if name in known}
