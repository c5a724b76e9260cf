"""Which latents belong to one series, and several draws of those alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from stochdyn.data import AbstractPopulation
from stochdyn.errors import FitError
from stochdyn.guides.passes import own_randomness
from stochdyn.inference.estimators import samples

_PARTICLES = "_local_particles"


@dataclass(frozen=True)
class Layout:
    """The plate whose members are weighed apart, and the number of dimensions that plates take.

    Sites inside the plate are local, all others global. Without a plate every site is local.

    Example:
        >>> Layout("series", 1).dim
        -2
    """

    plate: str | None
    nesting: int

    @property
    def dim(self) -> int:
        """The dimension of the draws of local sites."""
        return -self.nesting - 1

    def is_local(self, site: dict[str, Any]) -> bool:
        """Whether a site stands inside the plate."""
        return self.plate is None or any(frame.name == self.plate for frame in site["cond_indep_stack"])

    def locals(self, trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """The scored sites inside the plate."""
        return ((name, site) for name, site in scored(trace) if self.is_local(site))

    def globals(self, trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """The scored sites outside the plate."""
        return ((name, site) for name, site in scored(trace) if not self.is_local(site))

    def trace(self, program: Callable[..., Any], args: tuple, draws: int, given: Any = None) -> Any:
        """A trace with `draws` draws of every local site, replayed on another one where given."""
        with ReplayMessenger(trace=given, params=None if given is not None else {}), self.drawn(draws):
            return poutine.trace(program).get_trace(*args)

    def drawn(self, draws: int) -> "LocalDraws":
        """The handler that draws local sites several times."""
        return LocalDraws(self, draws)

    def units(self, *traces: Any) -> "Units":
        """The plates around every local site of some traces."""
        stacks = [
            {f.name: f for f in site["cond_indep_stack"] if f.vectorized and f.name != _PARTICLES}
            for trace in traces
            for _, site in self.locals(trace)
        ]
        if not stacks:
            raise FitError(f"No site stands inside plate '{self.plate}'. Name another one with plate=.")
        common = set.intersection(*(set(stack) for stack in stacks))
        part = {
            n for s in stacks for n, f in s.items() if n not in common and f.full_size not in (None, f.size)
        }
        if part:
            raise FitError(
                f"plate {sorted(part)} is subsampled inside the plate whose members are weighed, {sorted(common)}: "
                "the log of a mean of such weights is no bound. Subsample the outer plate only."
            )
        return Units(tuple(frame for name, frame in stacks[0].items() if name in common), self)


@dataclass(frozen=True)
class Units:
    """What is weighed apart: one unit for each member of the plates that all local sites share."""

    frames: tuple[CondIndepStackFrame, ...]
    layout: Layout

    @property
    def scale(self) -> float:
        """The population over the size of a mini-batch."""
        return prod(f.full_size / f.size for f in self.frames if f.full_size is not None)

    def log_prob(self, site: dict[str, Any]) -> Tensor:
        """(draws, *plates) the log-density of a scored site, not scaled up to the population, summed in units."""
        value = scale_and_mask(site["unscaled_log_prob"], site["scale"] / self.scale, site["mask"])
        value = value.expand(site["fn"].batch_shape)
        kept = {self.layout.dim, *(frame.dim for frame in self.frames)}
        summed = [d for d in range(-value.dim(), 0) if d not in kept]
        return value.sum(summed, keepdim=True) if summed else value

    def total(self, sites: Iterator[tuple[str, dict[str, Any]]]) -> Any:
        """The same over several sites."""
        return sum(self.log_prob(site) for _, site in sites)


class LocalDraws(Messenger):
    """One more dimension on the left, of independent draws, at local sites only."""

    def __init__(self, layout: Layout, draws: int) -> None:
        super().__init__()
        self.layout, self.draws = layout, draws

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or not self.layout.is_local(msg):
            return
        frame = CondIndepStackFrame(_PARTICLES, self.layout.dim, self.draws, 0, self.draws)
        msg["cond_indep_stack"] = (frame, *msg["cond_indep_stack"])
        BroadcastMessenger._pyro_sample(msg)


def scored(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sites that have a log-density: neither subsamples nor `pyro.deterministic`.

    Example:
        >>> import pyro, torch
        >>> trace = pyro.poutine.trace(lambda: pyro.deterministic("a", torch.zeros(2))).get_trace()
        >>> list(scored(trace))
        []
    """
    for name, site in samples(trace):
        if not site_is_subsample(site) and not (site["infer"] or {}).get("_deterministic"):
            yield name, site


def find_layout(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple, plate: str | None
) -> Layout:
    """Run both once; the plate is the one over the series, around everything observed.

    Raises:
        FitError: if there is no such plate, or more than one, or the named one is not there.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> find_layout(model, lambda y: None, (torch.zeros(3),), None)
        Layout(plate='rows', nesting=1)
    """
    with own_randomness(), torch.no_grad(), poutine.block(hide_types=["sample"]):
        guide_trace: Any = poutine.trace(guide).get_trace(*args)
        model_trace: Any = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    sites = [site for trace in (guide_trace, model_trace) for _, site in samples(trace)]
    frames = [f for site in sites for f in site["cond_indep_stack"] if f.vectorized]
    nesting = max((-f.dim for f in frames), default=0)
    return Layout(_plate(model_trace, {f.name for f in frames}, args, plate), nesting)


def _plate(model_trace: Any, plates: set[str], args: tuple, wanted: str | None) -> str | None:
    if wanted is not None and wanted not in plates:
        raise FitError(f"plate={wanted!r}: the model has the plates {sorted(plates)}. Name one of them.")
    if wanted is not None or not plates:
        return wanted
    stacks = {
        name: {f.name: f.size for f in site["cond_indep_stack"] if f.vectorized}
        for name, site in scored(model_trace)
        if site["is_observed"]
    }
    common = set.intersection(*(set(stack) for stack in stacks.values())) if stacks else set()
    if args and isinstance(args[0], AbstractPopulation):
        common = {n for n in common if all(stack[n] == len(args[0]) for stack in stacks.values())}
    if len(common) != 1:
        raise FitError(
            f"Cannot tell which plate holds the series: the observed sites stand in "
            f"{ {name: sorted(stack) for name, stack in stacks.items()} }, and one plate must be around all of them. "
            "Name it with plate=."
        )
    return common.pop()
