"""Posterior draws: the guide and the model replayed on it, all draws at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from stochdyn.data import AbstractPopulation
from stochdyn.errors import FitError, GuideError, StochdynError
from stochdyn.inference import scopes
from stochdyn.inference.batches import arguments
from stochdyn.inference.estimators import check_dimensions
from stochdyn.inference.parameters import modules_of
from stochdyn.inference.result import Fit

Pair = "Fit | tuple[Callable[..., Any], Callable[..., Any]]"


@dataclass(frozen=True)
class Site:
    """One sample site over all draws.

    Attributes:
        name: of the site.
        fn: its distribution in the model (observed sites) or in the guide (latents).
        value: (draws, *batch, *event); batch dimensions are exactly the model's plates.
        log_prob: (draws, *batch), of these members alone: a mini-batch is not scaled up.
        plates: the plates' names, one per batch dimension; "" where a dimension has none.
        observed: whether the model observes it.
    """

    name: str
    fn: Any
    value: Tensor
    log_prob: Tensor
    plates: tuple[str, ...]
    observed: bool

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one value inside its plates."""
        return self.fn.event_shape


@dataclass(frozen=True)
class Draws:
    """The traces of guide and model, with the draws as leftmost dimension of every site.

    Attributes:
        latents: as the guide has them; `prior`: the same sites in the model.
        observed: what the model observes, `pyro.factor` included.
        deterministic: values of `pyro.deterministic` by name: (draws, *batch, *event), and their plates.
    """

    latents: dict[str, Site]
    prior: dict[str, Site]
    observed: dict[str, Site]
    deterministic: dict[str, tuple[Tensor, tuple[str, ...]]]
    plates: int
    size: int

    @property
    def replicable(self) -> dict[str, Site]:
        """The observed sites that can be drawn again."""
        return {name: site for name, site in self.observed.items() if not isinstance(site.fn, dist.Unit)}

    @property
    def paths(self) -> dict[str, Site]:
        """The latents that are paths."""
        return {name: site for name, site in self.latents.items() if hasattr(site.fn, "ts")}


def pair(fit: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide of a `Fit`, or of a tuple of both.

    Raises:
        FitError: if it is neither.
    """
    if isinstance(fit, Fit):
        return fit.model, fit.guide
    if isinstance(fit, tuple) and len(fit) == 2 and all(callable(f) for f in fit):
        return fit
    raise FitError(
        f"Expected a Fit or a pair (model, guide), got {type(fit).__name__}. Pass what sd.fit returns."
    )


@contextmanager
def evaluating(*programs: Any, seed: int | None = None) -> Iterator[None]:
    """Eval mode, no gradients, and a seed of its own where one is given."""
    modules = [module for program in programs for module in modules_of(program)]
    with torch.no_grad(), scopes.mode(modules, train=False), scopes.seeded(seed):
        yield


def plate_nesting(guide: Callable[..., Any], model: Callable[..., Any], data: Any) -> int:
    """How many dimensions the plates of the model take."""
    with poutine.block(), torch.random.fork_rng(devices=[]):
        guide_trace = poutine.trace(guide).get_trace(*arguments(data))
        trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*arguments(data))
    sites = [s for t in (guide_trace, trace) for s in t.nodes.values() if s["type"] == "sample"]
    return max((-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized), default=0)


def draw(fit: Any, data: Any, draws: int) -> Draws:
    """Draw from the guide, and score the model on it. Call it inside `evaluating`.

    Raises:
        FitError: if `draws` is below 1.
        GuideError: if a latent of the model is not in the guide.
    """
    model, guide = pair(fit)
    if draws < 1:
        raise FitError(f"`draws` must be at least 1, got {draws}.")
    nesting = plate_nesting(guide, model, data)
    if draws > 1:
        _check_broadcasts(guide, model, data, nesting)
    with pyro.plate("_draws", draws, dim=-nesting - 1):
        guide_trace = poutine.trace(guide).get_trace(*arguments(data))
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*arguments(data))
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
    latents = {n: _site(n, s, draws, nesting) for n, s in guide_trace.nodes.items() if _is_latent(s)}
    prior, observed, deterministic = {}, {}, {}
    for name, site in model_trace.nodes.items():
        if _is_latent(site):
            if name not in latents:
                _refuse(name, site)
            else:
                prior[name] = _site(name, site, draws, nesting)
        elif _is_observed(site):
            observed[name] = _site(name, site, draws, nesting)
        elif is_deterministic(site):
            deterministic[name] = _deterministic(site, draws, nesting)
    return Draws(latents, prior, observed, deterministic, nesting, draws)


def draw_prior(fit: Any, data: Any, like: Draws) -> dict[str, Site]:
    """Draw the latents from the model instead of the guide, as many as `like`; their `log_prob` is left at 0.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> def guide(y):
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))
        >>> found = draw((model, guide), torch.zeros(3), 5)
        >>> draw_prior((model, guide), torch.zeros(3), found)["z"].value.shape
        torch.Size([5, 3])
    """
    model, _ = pair(fit)
    with pyro.plate("_draws", like.size, dim=-like.plates - 1):
        trace = poutine.trace(model).get_trace(*arguments(data))
    out = {}
    for name, site in trace.nodes.items():
        if _is_latent(site):
            plates, fn = _frames(site), site["fn"]
            value = _squeezed(site["value"], like.size, like.plates, len(plates), len(fn.event_shape))
            out[name] = Site(name, fn, value, torch.zeros(()), plates, False)
    return out


def _check_broadcasts(guide: Callable[..., Any], model: Callable[..., Any], data: Any, nesting: int) -> None:
    """Try a number of draws that no plate has: a parameter on the wrong dimension would pass where they agree."""
    count = next(
        n for n in (3, 5, 7, 11) if n not in {len(data) if isinstance(data, AbstractPopulation) else 0}
    )
    with poutine.block(), torch.random.fork_rng(devices=[]), pyro.plate("_draws", count, dim=-nesting - 1):
        try:
            trace = poutine.trace(guide).get_trace(*arguments(data))
            poutine.replay(model, trace)(*arguments(data))
        except StochdynError:
            raise
        except (ValueError, RuntimeError) as error:
            raise GuideError(
                f"The model works on one draw, and fails on {count} at once: {str(error).splitlines()[0]}. A latent "
                "then has a dimension for the draws on the left, so write theta[..., None] against the state, and "
                "theta[..., None, None] against (time, channel)."
            ) from error


def is_deterministic(site: dict[str, Any]) -> bool:
    """Whether a site is a `pyro.deterministic`."""
    return site["type"] == "sample" and bool((site["infer"] or {}).get("_deterministic"))


def _is_latent(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def _is_observed(site: dict[str, Any]) -> bool:
    if site["type"] != "sample" or not site["is_observed"] or site_is_subsample(site):
        return False
    return not is_deterministic(site)


def _refuse(name: str, site: dict[str, Any]) -> None:
    if not (site["infer"] or {}).get("enumerate"):
        raise GuideError(
            f"latent '{name}' is in the model but not in the guide. Make the guide for this model."
        )
    raise GuideError(
        f"latent '{name}' is summed out in training, so draws of it and the log densities need its "
        "posterior, which the guide does not hold. Sum it out of the likelihood itself (a mixture "
        "distribution) to get draws."
    )


def plate_scale(site: dict[str, Any]) -> float:
    """By how much the plates around a site scale its log density up, for a mini-batch."""
    return prod(f.full_size / f.size for f in site["cond_indep_stack"] if f.full_size is not None)


def _frames(site: dict[str, Any]) -> tuple[str, ...]:
    """The names of the plates at each batch dimension, "" where there is none."""
    names = {f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized and f.name != "_draws"}
    return tuple(names.get(-k, "") for k in range(max((-dim for dim in names), default=0), 0, -1))


def _site(name: str, site: dict[str, Any], draws: int, nesting: int) -> Site:
    """Bring value and log density to (draws, *batch, ...), batch without what lies left of the site's own "
    "plates."""
    fn, plates = site["fn"], _frames(site)
    batch, event = len(plates), len(fn.event_shape)
    log_prob = torch.as_tensor(site["log_prob"]) / plate_scale(site)
    check_dimensions(name, log_prob.shape, nesting + 1)
    value = _squeezed(site["value"], draws, nesting, batch, event)
    return Site(name, fn, value, _squeezed(log_prob, draws, nesting, batch, 0), plates, site["is_observed"])


def _squeezed(x: Tensor, draws: int, nesting: int, batch: int, event: int) -> Tensor:
    have = x.dim() - event
    if have <= nesting:
        x = x.expand(draws, *[1] * (nesting - have), *x.shape)
    tail = x.shape[x.dim() - event - batch :] if event + batch else torch.Size()
    return x.expand(draws, *x.shape[1:]).reshape(draws, *tail)


def _deterministic(site: dict[str, Any], draws: int, nesting: int) -> tuple[Tensor, tuple[str, ...]]:
    """Pyro takes all dimensions of such a value for event dimensions; draws and plates lead where it has "
    "them."""
    value, plates = torch.as_tensor(site["value"]), _frames(site)
    if value.dim() > nesting and value.shape[0] == draws:
        event = value.dim() - nesting - 1
        if all(size == 1 for size in value.shape[1 : 1 + nesting - len(plates)]):
            return _squeezed(value, draws, nesting, len(plates), event), plates
        return value, ("",) * nesting
    return value.expand(draws, *value.shape), ()


def replicated(site: Site) -> Tensor:
    """Draw an observed site again: (draws, *batch, *event); jumps have as many rows as this draw needs."""
    value = site.fn.sample()
    event = value.shape[value.dim() - len(site.fn.event_shape) :]
    batch = site.value.shape[: site.value.dim() - len(event)]
    return value.expand(len(site.value), *value.shape[1:]).reshape(*batch, *event)


def at_times(path: Tensor, ts: Tensor, times: Tensor) -> Tensor | None:
    """A path (draw, *batch, grid, state) at times of its grid: (draw, *batch, time, state).

    None where one of the times is not on the grid.
    """
    batch = path.shape[1:-2]
    if times.dim() == 2 and len(batch) > 1 and batch.numel() == len(times):
        times = times.reshape(*batch, -1)  # the series in nested plates
    shape = torch.broadcast_shapes(ts.shape[:-1], times.shape[:-1])
    ts, times = ts.to(times.device).expand(*shape, -1).contiguous(), times.expand(*shape, -1).contiguous()
    index = torch.searchsorted(ts, times).clamp(max=ts.shape[-1] - 1)
    if not torch.equal(ts.gather(-1, index), times):
        return None
    path = path.reshape(len(path), *[1] * (len(shape) - len(batch)), *path.shape[1:])
    batch = torch.broadcast_shapes(batch, shape)
    path = path.expand(len(path), *batch, *path.shape[-2:])
    index = index.to(path.device)[..., None].expand(len(path), *batch, index.shape[-1], path.shape[-1])
    return path.gather(-2, index)


def check_follows(draws: Draws, data: AbstractPopulation) -> None:
    """Refuse a model whose path does not reach the batch's last time.

    Raises:
        GuideError: naming the site and both times.
    """
    last = float(data.as_series().times.max())
    for name, site in draws.paths.items():
        if float(site.fn.ts.max()) < last:
            raise GuideError(
                f"path '{name}' ends at {float(site.fn.ts.max()):g}, the data at {last:g}: the model uses a "
                "grid from outside. Build it inside the model: grid = sd.TimeGrid(batch.times)."
            )
