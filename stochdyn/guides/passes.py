"""Running a model as its own guide: the messengers.

A guide runs the model with every latent's distribution replaced. At a path site that wants messages it leaves the
model (by an exception), asks what the likelihood of the path would be, and runs the model again, giving the latents
that were already sampled; so a message may depend on everything sampled before the path.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import apply_stack
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from stochdyn.data import Series
from stochdyn.encoders import AbstractEncoder
from stochdyn.errors import DivergedError, GuideError
from stochdyn.guides.plates import Place
from stochdyn.guides.sites import Residuals
from stochdyn.guides.upstream import for_path, seen_by_path, series_of
from stochdyn.paths import JumpDiffusionPath, Message, SDEPath

LatentPath = SDEPath | JumpDiffusionPath


@dataclass
class Run:
    """One call of a guide: what was sampled so far."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: dict[str, Tensor] = field(default_factory=dict)
    batch_shapes: dict[str, torch.Size] = field(default_factory=dict)
    members: dict[str, Tensor] = field(default_factory=dict)
    potentials: dict[str, tuple[Message, Tensor]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    residuals: Any = field(default_factory=Residuals)
    encoding: Tensor | None = None
    population: Tensor | None = None

    def leading(self, plates: int) -> torch.Size:
        """Batch dimensions left of the model's plates (particles), over everything sampled so far."""
        shapes = [s[: len(s) - plates] for s in self.batch_shapes.values() if len(s) > plates]
        return torch.broadcast_shapes(*shapes) if shapes else torch.Size()

    def upstream(self, place: Place) -> list[Tensor]:
        """The unconstrained values of the latents sampled before a path that its head sees.

        Those in none but its own plates, and those of the groups that its series belong to.
        """
        batch = series_of(self.args)
        return [
            for_path(value, self.places[name], place, batch)
            for name, value in self.features.items()
            if seen_by_path(self.places[name], place, batch)
        ]

    def encoded(self, encoder: AbstractEncoder) -> Tensor:
        """The encoding of the data, made once per run: (series, time, hidden)."""
        if self.encoding is None:
            self.encoding = encoder(self.args[0])
        return self.encoding


class PathReached(BaseException):
    """Leaves the model at a path site whose messages are not there yet."""

    def __init__(self, name: str, prior: LatentPath, place: Place) -> None:
        super().__init__(name)
        self.name, self.prior, self.place = name, prior, place


def is_enumerated(msg: dict[str, Any]) -> bool:
    """Whether a discrete site is summed out by TraceEnum_ELBO."""
    return bool(msg["infer"] and msg["infer"].get("enumerate"))


def likeliest(fn: dist.TorchDistribution) -> Tensor:
    """The mode of a discrete distribution."""
    values = fn.enumerate_support(expand=True)
    best = fn.log_prob(values).argmax(0)
    index = best.reshape(1, *best.shape, *[1] * len(fn.event_shape)).expand(1, *best.shape, *fn.event_shape)
    return values.gather(0, index)[0]


Posterior = Callable[[str, dist.TorchDistribution, Place, Run], dist.TorchDistribution]


class AsGuide(Messenger):
    """Replaces latents by posteriors; hides what the guide does not sample."""

    def __init__(
        self, run: Run, posterior: Posterior, sampled: Callable[[str, Any, Tensor, Place, Run], None]
    ) -> None:
        super().__init__()
        self.run, self.posterior, self.sampled = run, posterior, sampled

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, run = msg["name"], self.run
        if site_is_subsample(msg):
            if name in run.members:
                msg.update(value=run.members[name], done=True, stop=True)
        elif msg["is_observed"]:
            msg["stop"] = True
        elif name in run.values:
            msg.update(value=run.values[name], done=True, stop=True)
        elif is_enumerated(msg):
            msg.update(value=likeliest(msg["fn"]), done=True, stop=True)
            run.values[name], run.batch_shapes[name] = msg["value"], msg["fn"].batch_shape
        else:
            place = Place.of(name, tuple(msg["cond_indep_stack"]), run.members)
            posterior = self.posterior(name, msg["fn"], place, run)
            run.places[name] = place
            msg["fn"] = posterior

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        name, run = msg["name"], self.run
        if site_is_subsample(msg):
            run.members.setdefault(name, msg["value"])
        elif name in run.places and name not in run.values:
            run.values[name] = msg["value"]
            run.batch_shapes[name] = msg["fn"].batch_shape
            self.sampled(name, msg["fn"], msg["value"], run.places[name], run)


class Given(Messenger):
    """Runs the model with latents fixed: those sampled, and medians for those that come later."""

    def __init__(
        self, run: Run, values: dict[str, Tensor], median: Callable[[str, Any, Place], Tensor | None]
    ) -> None:
        super().__init__()
        self.run, self.fixed, self.median = run, values, median

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if name in self.run.members:
                msg.update(value=self.run.members[name], done=True)
        elif msg["is_observed"]:
            return
        elif name in self.fixed:
            msg.update(value=self.fixed[name], done=True)
        elif is_enumerated(msg):
            msg.update(value=likeliest(msg["fn"]), done=True)
        elif is_path(msg["fn"]):
            msg.update(value=prior_mode(msg["fn"]), done=True)
        else:
            value = self.median(
                name, msg["fn"], Place.of(name, tuple(msg["cond_indep_stack"]), self.run.members)
            )
            if value is not None:
                msg.update(value=value, done=True)


def prior_runs(model: Callable[..., Any], run: Run, count: int) -> list[dict[str, dist.TorchDistribution]]:
    """The priors of the latents that are no paths, in independent runs of the model; none where it diverges."""
    out = []
    for _ in range(count):
        try:
            with torch.no_grad(), poutine.block(), poutine.trace() as tracer, PathsWithoutNoise():
                model(*run.args, **run.kwargs)
        except DivergedError:
            continue
        sites = [(n, s) for n, s in tracer.trace.nodes.items() if s["type"] == "sample"]
        out.append({n: s["fn"] for n, s in sites if is_free_latent(s)})
    return out


def is_free_latent(site: dict[str, Any]) -> bool:
    """Whether a site is a latent that is neither a path nor enumerated."""
    hidden = site["is_observed"] or site_is_subsample(site) or is_enumerated(site)
    return not hidden and not is_path(site["fn"])


class PathsWithoutNoise(Messenger):
    """Gives every path its prior's path without noise, so that a first run cannot diverge by chance."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_path(msg["fn"]) and not msg["is_observed"]:
            value = prior_mode(msg["fn"])
            msg["fn"].chain.check_finite(value)
            msg.update(value=value, done=True)


def check_masked(nodes: Mapping[str, Any], args: tuple[Any, ...]) -> None:
    """Refuse a model that observes the batch's values without its mask: what stands in for a missing value would count.

    Raises:
        GuideError: naming the site and the line to write.
    """
    batch = args[0] if args else None
    if not isinstance(batch, Series) or bool(batch.mask.all()):
        return
    for name, site in nodes.items():
        if (
            site["is_observed"]
            and site["value"] is batch.values
            and site["mask"] is None
            and not _is_masked(site["fn"])
        ):
            fix = "Write .mask(batch.mask).to_event(2)."
            if is_path(site["fn"]):
                fix = (
                    "A path with missing values, or with series of different lengths, is latent: sample it on a "
                    "TimeGrid, and observe grid.observed(z)."
                )
            raise GuideError(
                f"site '{name}' observes batch.values, of which {int((~batch.mask).sum())} are missing, without a "
                f"mask: what stands in for them would count as data. {fix}"
            )


def _is_masked(fn: Any) -> bool:
    while not hasattr(fn, "_mask"):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return True


def is_path(fn: object) -> bool:
    """Whether a distribution is a path that a guide samples."""
    return isinstance(fn, LatentPath)


def smooth(path: LatentPath) -> SDEPath:
    """The path without jumps that has the same mean and variance: where a guide looks first."""
    return path.matched if isinstance(path, JumpDiffusionPath) else path


def prior_mode(path: LatentPath, message: Message | None = None) -> Tensor:
    """The path without noise, twisted by a message if there is one: (*batch, time, state)."""
    guided = smooth(path).guided(message)
    chain = guided.chain
    zeros = torch.zeros(
        chain.steps + 1, *chain.batch_shape, chain.state_dim, dtype=chain.dtype, device=chain.device
    )
    return guided.transport(zeros)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Draws inside leave the random state outside as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def observed_sites(model: Callable[..., Any], run: Run, given: Given) -> list[dict[str, Any]]:
    """The observed sites of the model under `given`, hidden from every handler outside."""
    with poutine.block(), poutine.trace() as trace, given:
        model(*run.args, **run.kwargs)
    return [
        site
        for name, site in trace.trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not (site["infer"] or {}).get("_deterministic")
    ]


def emit_parameters(module: nn.Module, prefix: str) -> None:
    """Tell Pyro of plain parameters without its store, so that its own `SVI` trains them."""
    for name, parameter in module.named_parameters():
        value = parameter.view(parameter.shape)
        value.unconstrained = _returning(parameter)
        apply_stack(
            {
                "type": "param", "name": f"{prefix}.{name}", "fn": _returning(value), "args": (), "kwargs": {},
                "value": None, "is_observed": False, "infer": {}, "scale": 1.0, "mask": None,
                "cond_indep_stack": (), "done": False, "stop": False, "continuation": None,
            }
        )  # fmt: skip


def _returning(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value
