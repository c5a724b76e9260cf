"""The bridge to ArviZ, and the only file that imports it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from stochdyn.data import Series
from stochdyn.diagnostics.tree import Variable, build_tree
from stochdyn.inference.draws import (
    Draws,
    Site,
    at_times,
    check_follows,
    draw,
    evaluating,
    pair,
    replicated,
)

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

    Groups: `posterior` (every latent and `pyro.deterministic`; paths at the observation times),
    `posterior_predictive`, `observed_data` (NaN where nothing was observed), `log_likelihood` (per member of
    the plates, given the path of the draw), and `sample_stats` with `lp` = log p(y, latents) and `log_q`, one
    per draw. Dimensions are named after the plates, and `time`, `state`, `channel`; the coordinate of `time`
    are the real times (`time_value` per series where each has its own). A path without these times on its
    grid is exported on its own, as `<name>_time`. Draws are independent, so r-hat and ess say nothing here;
    use `pareto_k` on lp - log_q.

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
        DataError: if `coords` names a dimension that is not there; ShapeError: if it has the wrong length.
        FitError: if `draws` is below 1.

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
        replicates = {name: replicated(site) for name, site in found.replicable.items()}
    plates, coordinates = _series(found, data)
    groups: dict[str, dict[str, Variable]] = {
        "posterior": _posterior(found, data, coordinates),
        "posterior_predictive": {},
        "log_likelihood": {},
        "observed_data": {},
        "sample_stats": {"lp": _total(found, "p"), "log_q": _total(found, "q")},
    }
    for name, site in found.replicable.items():
        dims = _dims(name, site.plates, tuple(site.value.shape[1 + len(site.plates) :]), data)
        again = replicates[name]
        other = again.shape[1:] != site.value.shape[1:]  # jumps: another number of rows
        drawn = (*dims[:-2], f"{name}_jump", dims[-1]) if other else dims
        groups["posterior_predictive"][name] = Variable(("draw", *drawn), _array(again))
        groups["log_likelihood"][name] = Variable(
            ("draw", *_plates(name, site.plates)), _array(site.log_prob)
        )
        groups["observed_data"][name] = Variable(dims, _observed(site, data, plates))
    known = {dim for group in groups.values() for v in group.values() for dim in v.dims}
    coordinates = {name: value for name, value in coordinates.items() if name in known}
    return to_inference_data(build_tree(groups, {**coordinates, **(coords or {})}))


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _plates(name: str, plates: Sequence[str]) -> tuple[str, ...]:
    return tuple(plate or f"{name}_batch_{k}" for k, plate in enumerate(plates))


def _dims(name: str, plates: Sequence[str], event: tuple[int, ...], data: Series) -> tuple[str, ...]:
    """Names of the dimensions of a value that is no path, draws left out."""
    if plates and event == tuple(data.values.shape[-2:]):
        return (*_plates(name, plates), "time", "channel")
    return (*_plates(name, plates), *(f"{name}_dim_{k}" for k in range(len(event))))


def _series(found: Draws, data: Series) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The plates that hold the series, and the coordinates of their dimensions."""
    times = _array(data.times)
    coordinates: dict[str, Any] = {"channel": list(data.channels)}
    for site in (*found.replicable.values(), *found.paths.values()):
        shape = site.value.shape[1 : 1 + len(site.plates)]
        if shape and shape.numel() == len(data):
            plates = _plates(site.name, site.plates)
            if len(plates) == 1:
                coordinates[plates[0]] = list(data.ids)
            own = times if times.ndim == 1 else Variable((*plates, "time"), times.reshape(*shape, -1))
            return plates, coordinates | {"time": own}
    return (), coordinates | ({"time": times} if times.ndim == 1 else {})


def _posterior(found: Draws, data: Series, coordinates: dict[str, Any]) -> dict[str, Variable]:
    """The latents; a path that is exported on its own grid adds that to the coordinates."""
    out, states = {}, None
    for name, site in found.latents.items():
        if name not in found.paths:
            dims = _dims(name, site.plates, tuple(site.event_shape), data)
            out[name] = Variable(("draw", *dims), _array(site.value))
            continue
        states = site.value.shape[-1] if states is None else states
        state = "state" if site.value.shape[-1] == states else f"{name}_state"
        plates, ts = _plates(name, site.plates), site.fn.ts
        value, time = at_times(site.value, ts, data.times), "time"
        if value is None or value.dim() != site.value.dim() or value.shape[:-2] != site.value.shape[:-2]:
            value, time = site.value, f"{name}_time"
            coordinates |= {
                time: _array(ts) if ts.dim() == 1 else Variable((*plates[-ts.dim() + 1 :], time), ts)
            }
        out[name] = Variable(("draw", *plates, time, state), _array(value))
    for name, (value, plates) in found.deterministic.items():
        dims = _dims(name, plates, tuple(value.shape[1 + len(plates) :]), data)
        out[name] = Variable(("draw", *dims), _array(value))
    return out


def _observed(site: Site, data: Series, plates: tuple[str, ...]) -> np.ndarray:
    value = _array(site.value[0])
    if value.size == data.values.numel() and _plates(site.name, site.plates) == plates:
        mask = data.mask if data.mask.dim() == data.values.dim() else data.mask[..., None]
        value = np.where(_array(mask.expand(data.values.shape)).reshape(value.shape), value, np.nan)
    return value


def _total(found: Draws, which: str) -> Variable:
    sites = (
        list(found.latents.values()) if which == "q" else [*found.prior.values(), *found.observed.values()]
    )
    total = sum(_array(s.log_prob.double()).reshape(found.size, -1).sum(-1) for s in sites)
    return Variable(("draw",), np.zeros(found.size) + total)
