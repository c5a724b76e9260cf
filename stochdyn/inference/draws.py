"""Posterior draws: the guide and the model replayed on it, all draws at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from stochdyn.data import Series
from stochdyn.errors import FitError, GuideError
from stochdyn.inference import scopes
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
        log_prob: (draws, *batch).
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
    """The traces of guide and model, with the draws as leftmost dimension of every site."""

    latents: dict[str, Site]
    prior: dict[str, Site]
    observed: dict[str, Site]
    plates: int
    size: int


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
    with poutine.block(), torch.random.fork_rng():
        guide_trace = poutine.trace(guide).get_trace(data)
        trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(data)
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
    with pyro.plate("_draws", draws, dim=-nesting - 1):
        guide_trace = poutine.trace(guide).get_trace(data)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(data)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
    latents = {n: _site(n, s, draws, nesting) for n, s in guide_trace.nodes.items() if _is_latent(s)}
    prior, observed = {}, {}
    for name, site in model_trace.nodes.items():
        if _is_latent(site):
            if name not in latents:
                _refuse(name, site)
            else:
                prior[name] = _site(name, site, draws, nesting)
        elif _is_observed(site):
            observed[name] = _site(name, site, draws, nesting)
    return Draws(latents, prior, observed, nesting, draws)


def _is_latent(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def _is_observed(site: dict[str, Any]) -> bool:
    if site["type"] != "sample" or not site["is_observed"] or site_is_subsample(site):
        return False
    return not (site["infer"] or {}).get("_deterministic")


def _refuse(name: str, site: dict[str, Any]) -> None:
    if not (site["infer"] or {}).get("enumerate"):
        raise GuideError(
            f"latent '{name}' is in the model but not in the guide. Make the guide for this model."
        )
    raise GuideError(
        f"latent '{name}' is summed out in training, so draws of it and the log densities need its posterior, which "
        "the guide does not hold. Sum it out of the likelihood itself (a mixture distribution) to get draws."
    )


def _site(name: str, site: dict[str, Any], draws: int, nesting: int) -> Site:
    """Bring value and log density to (draws, *batch, ...), batch without what lies left of the site's own plates."""
    fn = site["fn"]
    event = len(fn.event_shape)
    frames = {f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized and f.name != "_draws"}
    batch = max((-dim for dim in frames), default=0)
    value, log_prob = site["value"], site["log_prob"]
    value = _squeezed(value, draws, nesting, batch, event)
    log_prob = _squeezed(torch.as_tensor(log_prob), draws, nesting, batch, 0)
    plates = tuple(frames.get(-k, "") for k in range(batch, 0, -1))
    return Site(name, fn, value, log_prob, plates, site["is_observed"])


def _squeezed(x: Tensor, draws: int, nesting: int, batch: int, event: int) -> Tensor:
    have = x.dim() - event
    if have <= nesting:
        x = x.expand(draws, *[1] * (nesting - have), *x.shape)
    tail = x.shape[x.dim() - event - batch :] if event + batch else torch.Size()
    return x.expand(draws, *x.shape[1:]).reshape(draws, *tail)


def check_follows(draws: Draws, data: Series) -> None:
    """Refuse a model whose path does not reach the batch's last time.

    Raises:
        GuideError: naming the site and both times.
    """
    last = float(data.times.max())
    for name, site in draws.latents.items():
        ts = getattr(site.fn, "ts", None)
        if ts is not None and float(ts.max()) < last:
            raise GuideError(
                f"path '{name}' ends at {float(ts.max()):g}, the data at {last:g}: the model uses a grid from outside. "
                "Build it inside the model: grid = sd.TimeGrid(batch.times)."
            )
