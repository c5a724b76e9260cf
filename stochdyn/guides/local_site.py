"""Amortised latents: of a series, or of a group of series, from the encoding of the data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from stochdyn.data import Series
from stochdyn.encoders import AbstractEncoder
from stochdyn.errors import GuideError
from stochdyn.guides.latent import LatentNormal
from stochdyn.guides.local_flow import LocalFlow, SiteFlow, of_groups
from stochdyn.guides.messages import FreeMessage
from stochdyn.guides.passes import Run
from stochdyn.guides.plates import Place, key_of
from stochdyn.guides.pooling import Summaries
from stochdyn.guides.sites import centre_and_spread
from stochdyn.guides.twist import NaturalMessage, coordinates, gaussian_base, twisted
from stochdyn.guides.upstream import for_series, group_frame, seen_by_series, series_frame, series_of

Scale = tuple[Tensor, Tensor]
_FAMILY = FreeMessage()


class SiteHead(nn.Module):
    """Encoding and upstream latents to the numbers of a message: linear plus one hidden layer; begins constant."""

    def __init__(self, features: int, hidden: int, numbers: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, hidden)
        self.outer = nn.Linear(hidden, numbers)
        self.linear = nn.Linear(features, numbers, bias=False)

    def begin(self, start: Tensor) -> "SiteHead":
        """Make the output constant: the start."""
        with torch.no_grad():
            self.outer.weight.zero_()
            self.linear.weight.zero_()
            self.outer.bias.copy_(start)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.outer(torch.tanh(self.inner(x)))


class AmortizedSite(nn.Module):
    """The head of one latent.

    Buffers: `centre` and `unit` the prior's median and spread in the coordinates of the messages; `before` the same
    two of the latents that the head sees, (2, features).
    """

    centre: Tensor
    unit: Tensor
    before: Tensor

    def __init__(self, scale: Scale, before: Tensor, head: SiteHead, family: LocalFlow | None) -> None:
        super().__init__()
        self.register_buffer("centre", scale[0])
        self.register_buffer("unit", scale[1])
        self.register_buffer("before", before)
        self.head = head
        features = head.inner.in_features
        self.flow = None if family is None else SiteFlow(features, len(scale[0]), family).to(scale[0])

    @classmethod
    def begin(
        cls, scale: Scale, before: list[Scale], encoding: int, hidden: int, family: LocalFlow | None = None
    ) -> "AmortizedSite":
        """A new one, with a weak message that knows no data yet."""
        columns = [torch.stack(pair) for pair in before]
        stacked = torch.cat(columns, -1) if columns else scale[0].new_zeros(2, 0)
        start = _FAMILY.start(len(scale[0])).to(scale[0])
        head = SiteHead(encoding + stacked.shape[-1], hidden, len(start)).to(start).begin(start)
        return cls(scale, stacked, head, family)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], family: LocalFlow | None = None) -> "AmortizedSite":
        """An empty one with the shapes of a state_dict."""
        hidden, features = state["head.inner.weight"].shape
        head = SiteHead(features, hidden, len(state["head.outer.bias"])).to(state["head.inner.weight"])
        zeros = {name: torch.zeros_like(state[name]) for name in ("centre", "unit", "before")}
        return cls((zeros["centre"], zeros["unit"]), zeros["before"], head, family)

    def messages(self, encoding: Tensor, upstream: list[Tensor]) -> tuple[NaturalMessage, NaturalMessage]:
        """One message per row, and the same with only the guide's own parameters detached.

        Args:
            encoding: (rows, hidden).
            upstream: (*particles, rows or 1, size) unconstrained values of the latents sampled before.
        """
        x, x_score = self._inputs(encoding, upstream)
        numbers = self.head(x)
        if not upstream:
            return self._message(numbers), self._message(numbers.detach())
        own = {name: p.detach() for name, p in self.head.named_parameters()}
        return self._message(numbers), self._message(torch.func.functional_call(self.head, own, (x_score,)))

    def contexts(self, encoding: Tensor, upstream: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """What the flow reads, of every row, in the same two ways; None without a flow."""
        return None if self.flow is None else self.flow.contexts(*self._inputs(encoding, upstream))

    def _inputs(self, encoding: Tensor, upstream: list[Tensor]) -> tuple[Tensor, Tensor]:
        encoding = encoding.to(self.unit)
        lead = torch.broadcast_shapes(encoding.shape[:-1], *[v.shape[:-1] for v in upstream])
        parts = [v.expand(*lead, -1).to(self.unit) for v in upstream]
        seen = torch.cat([*parts, self.unit.new_zeros(*lead, 0)], -1)
        seen = (seen - self.before[0]) / self.before[1]
        encodings = encoding, encoding.detach()
        attached, detached = (torch.cat([e.expand(*lead, -1), seen], -1) for e in encodings)
        return attached, detached

    def _message(self, numbers: Tensor) -> NaturalMessage:
        message = _FAMILY.build(numbers, self.unit, self.centre, None)
        return NaturalMessage(message.information, message.precision)


@dataclass(frozen=True)
class Latent:
    """A latent that is no path, as the set-up finds it."""

    prior: dist.TorchDistribution
    place: Place


class AmortizedLatents(nn.Module):
    """All amortised latents of a guide.

    Args:
        plates: by the name of a site that of the plate over whose members it is amortised, or a flow in it.
    """

    def __init__(self, plates: Mapping[str, str | LocalFlow]) -> None:
        super().__init__()
        self.plates = {n: p.plate if isinstance(p, LocalFlow) else p for n, p in plates.items()}
        self.flows = {key_of(n): p for n, p in plates.items() if isinstance(p, LocalFlow)}
        self.sites = nn.ModuleDict()
        self.summaries: Summaries | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.plates

    def set_up(
        self,
        latents: Mapping[str, Latent],
        args: tuple[Any, ...],
        scales: Mapping[str, Scale],
        sizes: tuple[int, int],
    ) -> None:
        """Make the heads that are not there yet.

        Args:
            latents: all latents that are no paths, in the order of the model.
            args: of the model.
            scales: median and spread of each latent.
            sizes: of the encoding, and of the head's hidden layer.

        Raises:
            GuideError: for a site or a plate that is not there.
        """
        if not self.plates:
            return
        batch = _series(args)
        unknown = sorted(set(self.plates) - set(latents))
        if unknown:
            raise GuideError(
                f"amortize: the model has no latent '{unknown[0]}' that is not a path; it has {sorted(latents)}. Paths "
                "are amortised by the encoder alone."
            )
        before: list[tuple[str, Place]] = []
        for name, latent in latents.items():
            if name in self.plates:
                _check_place(latent.place, self.plates[name], batch)
                if key_of(name) not in self.sites:
                    seen = [scales[n] for n, p in before if seen_by_series(p, batch, self.plates[name])]
                    flow = self.flows.get(key_of(name))
                    self.sites[key_of(name)] = AmortizedSite.begin(scales[name], seen, *sizes, flow)
            before.append((name, latent.place))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in state_dict.items():
            if key.startswith(f"{prefix}sites."):
                name, _, rest = key[len(f"{prefix}sites.") :].partition(".")
                states.setdefault(name, {})[rest] = value
        for name, state in states.items():
            self._check_flow(name, state)
            own = self.sites[name].state_dict() if name in self.sites else {}
            if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
                self.sites[name] = AmortizedSite.of_state(state, self.flows.get(name))
        rows = state_dict.get(f"{prefix}summaries.rows")
        if rows is not None and (self.summaries is None or self.summaries.rows.shape != rows.shape):
            self.summaries = Summaries.of_state({"rows": rows})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_flow(self, key: str, state: Mapping[str, Tensor]) -> None:
        stored, own = any(k.startswith("flow.") for k in state), self.flows.get(key)
        if stored != (own is not None):
            raise GuideError(
                f"The state of amortised site '{key}' has {'a' if stored else 'no'} flow, this guide was made with "
                f"{'none' if own is None else own}. Make it with the same `amortize`."
            )

    def posterior(
        self, prior: dist.TorchDistribution, place: Place, run: Run, encoder: AbstractEncoder
    ) -> LatentNormal:
        """The prior times the message of the member's own data, or of all data of a group."""
        plate, batch = self.plates[place.name], _series(run.args)
        frame = _check_place(place, plate, batch)
        pooled = plate in batch.groups
        encoding = run.encoded(encoder)[:, 0]
        upstream = [
            for_series(value, run.places[n], batch, pooled)
            for n, value in run.features.items()
            if seen_by_series(run.places[n], batch, plate)
        ]
        site = self.sites[key_of(place.name)]
        if pooled:
            encoding = self._whole(batch, encoding, run)
        messages, contexts = site.messages(encoding, upstream), site.contexts(encoding, upstream)
        if pooled:
            grouping = batch.grouping(plate)
            group = grouping.member, len(grouping)
            messages = tuple(m.pooled(*group) for m in messages)
            contexts = contexts and (of_groups(contexts[0], *group), of_groups(contexts[1], *group))
        message, score = (m.moved(frame.dim) for m in messages)
        warp = None if contexts is None else site.flow.warp(contexts, frame.dim)
        return twisted(prior, gaussian_base(prior, site.centre, site.unit), message, score, warp)

    def median(self, name: str, prior: dist.TorchDistribution) -> Tensor:
        """The prior's median: what a path's estimate holds a latent at that comes after it."""
        site = self.sites[key_of(name)]
        base = gaussian_base(prior, site.centre, site.unit)
        free = base.transform.inverse_shape(prior.batch_shape + prior.event_shape)
        return base.transform(base.loc.reshape(free)).detach()

    def _whole(self, batch: Series, encoding: Tensor, run: Run) -> Tensor:
        if self.summaries is None:
            self.summaries = Summaries.begin(batch.population, encoding.detach()).train(self.training)
        if run.population is None:
            run.population = self.summaries.whole(batch, encoding)
        return run.population


@torch.no_grad()
def pooled_scales(
    runs: list[Mapping[str, dist.TorchDistribution]], amortised: Mapping[str, str], draws: int = 25
) -> dict[str, Scale]:
    """Median and spread of every latent over runs of the model and members of its plates: (size,) each.

    Args:
        runs: the priors of the latents in several runs, each with latents sampled before of its own.
        amortised: names of latents with coordinates of their own.
        draws: from each prior.
    """
    out = {}
    for name, first in runs[0].items():
        own, shape = name in amortised, first.batch_shape + first.event_shape
        size = _in_coordinates(first, own).inverse_shape(shape)[len(first.batch_shape) :].numel()
        u = torch.cat(
            [
                _in_coordinates(run[name], own).inv(run[name].sample(torch.Size((draws,)))).reshape(-1, size)
                for run in runs
                if name in run
            ]
        )
        out[name] = centre_and_spread(u[torch.isfinite(u).all(-1)])
    return out


def _in_coordinates(prior: dist.TorchDistribution, own: bool) -> torch.distributions.Transform:
    return coordinates(prior) if own else torch.distributions.biject_to(prior.support)


def _series(args: tuple[Any, ...]) -> Series:
    batch = series_of(args)
    if batch is None:
        got = type(args[0]).__name__ if args else "none"
        raise GuideError(
            f"amortize: the encoder needs a Series as the model's first argument, got {got}. Call model(batch)."
        )
    return batch


def _check_place(place: Place, plate: str, batch: Series) -> Any:
    """The frame of the plate over which a site is amortised."""
    if plate in batch.groups:
        frame, what = group_frame(place, batch), f"batch.group_plate('{plate}')"
    else:
        frame, what = series_frame(place, batch), f"batch.plate('{plate}')"
    if frame is not None and frame.name == plate and len(place.frames) == 1:
        return frame
    names = [f.name for f in place.frames]
    if plate in names and frame is None:
        raise GuideError(
            f"amortize: plate '{plate}' of site '{place.name}' is neither over the {batch.population} series nor over "
            f"groups of them (the Series has groups {sorted(batch.groups)}). Make it with batch.plate(...), or give "
            f"sd.Series(..., groups={{'{plate}': labels}}) and use batch.group_plate('{plate}')."
        )
    raise GuideError(
        f"amortize: site '{place.name}' stands in plates {names}, it is to be amortised over '{plate}'. Sample it "
        f"inside {what} alone, or leave it out of amortize."
    )
