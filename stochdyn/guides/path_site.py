"""What a guide stores and learns for one path site."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.device import readable
from stochdyn.encoders import AbstractEncoder, align
from stochdyn.errors import GuideError
from stochdyn.guides.control import ControlNet
from stochdyn.guides.messages import AbstractMessageFamily
from stochdyn.guides.passes import LatentPath, Run, smooth
from stochdyn.guides.plates import Place
from stochdyn.guides.signature import same, series_signature
from stochdyn.guides.sites import centre_and_spread
from stochdyn.guides.upstream import beside, series_around, series_of

_DRAWS = 50


class Head(nn.Sequential):
    """Encoding, time to it, step and upstream latents to the numbers of a message; starts at the family's start."""

    def __init__(self, features: int, hidden: int, numbers: int) -> None:
        super().__init__(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, numbers))

    def begin(self, start: Tensor) -> "Head":
        """Make the output constant: the start."""
        with torch.no_grad():
            self[2].weight.zero_()
            self[2].bias.copy_(start)
        return self


def prior_scale(prior: LatentPath) -> tuple[Tensor, Tensor]:
    """Median and spread of every state of a path, (state,) each, over its times and some draws."""
    draws = smooth(prior).guided()
    draws._validate_args = False  # a prior may explode; what stays finite tells the scale
    rows = draws.rsample((math.ceil(_DRAWS / max(prior.batch_shape.numel(), 1)),)).flatten(0, -2)
    return centre_and_spread(rows[torch.isfinite(rows).all(-1)])


class PathSite(nn.Module):
    """Tables (per member of the plates and grid time) and, with an encoder, the head.

    Buffers: `grid` the times of every member, `around` the running estimate of its path, `seen` which members have
    one, `signature` a checksum of their data (a guide without an encoder knows only what it was trained on),
    `centre` and `unit` the prior's median and spread of every state.
    """

    grid: Tensor
    around: Tensor
    seen: Tensor
    signature: Tensor
    centre: Tensor
    unit: Tensor

    def __init__(
        self,
        shape: torch.Size,
        points: int,
        scale: tuple[Tensor, Tensor],
        numbers: Tensor | None,
        head: Head | None,
        control: ControlNet | None = None,
    ) -> None:
        super().__init__()
        self.numbers = None if numbers is None else nn.Parameter(numbers)
        self.head, self.control = head, control
        (centre, unit), state = scale, len(scale[0])
        self.register_buffer("centre", centre)
        self.register_buffer("unit", unit)
        nowhere = torch.full((*shape, points), torch.nan, dtype=torch.float64, device=unit.device)
        self.register_buffer("grid", nowhere)
        self.register_buffer("around", unit.new_zeros(*shape, points, state))
        self.register_buffer("seen", torch.zeros(shape, dtype=torch.bool, device=unit.device))
        self.register_buffer("signature", torch.zeros(shape, dtype=torch.float64, device=unit.device))

    @classmethod
    def begin(
        cls,
        family: AbstractMessageFamily,
        prior: LatentPath,
        place: Place,
        features: int | None,
        hidden: int,
    ) -> "PathSite":
        """A new one; `features` is None without an encoder.

        Raises:
            GuideError: for a control without an encoder.
        """
        scale, widths = prior_scale(prior), family.control
        if widths is not None and features is None:
            raise GuideError(
                f"path site '{place.name}': control={tuple(widths)} needs an encoder, sd.GRUEncoder(...): the control "
                "depends on what follows. Without one leave it out."
            )
        shape, points = place.table_shape(prior.batch_shape), prior.event_shape[0]
        start = family.start(prior.event_shape[-1]).to(scale[1])
        if features is None:
            return cls(shape, points, scale, start.expand(*shape, points, -1).clone(), None)
        head, control = Head(features, hidden, len(start)).to(start).begin(start), None
        if widths is not None:
            control = ControlNet(len(scale[1]), prior.chain.noise_dim, features, widths, scale)
        return cls(shape, points, scale, None, head, control)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "PathSite":
        """An empty one with the shapes of a state_dict."""
        head = None
        if "head.0.weight" in state:
            hidden, features = state["head.0.weight"].shape
            head = Head(features, hidden, len(state["head.2.bias"])).to(state["head.0.weight"])
        numbers = None if "numbers" not in state else torch.zeros_like(state["numbers"])
        shape, points = state["seen"].shape, state["around"].shape[-2]
        scale = torch.zeros_like(state["centre"]), torch.zeros_like(state["unit"])
        own = {k.removeprefix("control."): v for k, v in state.items() if k.startswith("control.")}
        return cls(shape, points, scale, numbers, head, ControlNet.of_state(own) if own else None)

    @property
    def plates(self) -> int:
        """The number of batch dimensions that are not particles."""
        return self.seen.dim()

    def signature_of(self, args: tuple[Any, ...], batch_shape: torch.Size) -> Tensor:
        """A checksum per series of what was observed, and when; zero where the data are not a Series."""
        shape = batch_shape[len(batch_shape) - self.plates :]
        out = torch.zeros(shape, dtype=torch.float64, device=self.seen.device)
        batch = series_of(args)
        if batch is None or not shape or shape[-1] != len(batch):
            return out
        return out + series_signature(batch).to(out.device)

    def stored(self, ts: Tensor, place: Place, signature: Tensor) -> Tensor | None:
        """The estimate of the path, if all members of this run are on their own grid with their own data."""
        if not place.fits(self.seen, 0) or ts.shape[-1] > self.grid.shape[-1]:
            return None
        known = self._own(place, signature) & (self._grid(ts, place) == ts.to(self.grid.device)).all(-1)
        around = place.take(self.around, 2)[..., : ts.shape[-1], :].clone()
        if not readable(known):
            return torch.where(known[..., None, None], around, torch.nan)
        return around if bool(known.all()) else None

    def _own(self, place: Place, signature: Tensor) -> Tensor:
        """Which members of this run have their own data, up to rounding."""
        stored = place.take(self.signature, 0)
        return place.take(self.seen, 0) & same(stored, signature)

    def _grid(self, ts: Tensor, place: Place) -> Tensor:
        return place.take(self.grid, 1)[..., : ts.shape[-1]]

    def remember(self, ts: Tensor, around: Tensor, place: Place, signature: Tensor) -> None:
        """Store the path of the members of this run (the grid is kept to the longest seen).

        Raises:
            GuideError: without an encoder, if this run does not fit the tables.
        """
        trouble = self._trouble(ts, place)
        if trouble and self.numbers is not None:
            raise GuideError(trouble)
        if trouble or not (torch.is_grad_enabled() or not bool(place.take(self.seen, 0).all())):
            return
        pad = self.grid.shape[-1] - ts.shape[-1]
        around, ts = around.detach(), ts.to(self.grid.device)
        batch = around.shape[:-2]
        ts = ts.expand(*batch, -1)
        around = torch.cat([around, around[..., -1:, :].expand(*batch, pad, -1)], -2)
        ts = torch.cat([ts, ts[..., -1:].expand(*batch, pad)], -1)
        place.put(self.around, around, 2)
        place.put(self.grid, ts, 1)
        place.put(self.seen, torch.ones(batch, dtype=torch.bool, device=self.seen.device), 0)
        place.put(self.signature, signature.expand(batch), 0)

    def _trouble(self, ts: Tensor, place: Place) -> str:
        if not place.fits(self.seen, 0):
            return (
                f"path site '{place.name}': the guide holds messages for {tuple(self.seen.shape)} members of the "
                f"plates, this run has plates {place.sizes()}. Use encoder=sd.GRUEncoder(...), or fit a new guide."
            )
        points = self.grid.shape[-1]
        if ts.shape[-1] > points:
            return (
                f"path site '{place.name}': the grid has {ts.shape[-1]} times, the guide was made with {points}. Call "
                "the guide once on the whole data before training in mini-batches."
            )
        return ""

    def follow(self, z: Tensor, ts: Tensor, place: Place, rate: float) -> None:
        """Move the running estimate towards sampled paths (*particles, *batch, time, state)."""
        if self._trouble(ts, place):
            return
        stored = place.take(self.around, 2)
        z = z.detach()
        z = z.reshape(-1, *z.shape[z.dim() - stored.dim() :]).mean(0)
        fits = (self._grid(ts, place) == ts.to(self.grid.device)).all() & torch.isfinite(z).all()
        if readable(fits) and not fits:
            return
        points = z.shape[-2]
        moved = stored.clone()
        step = torch.where(fits, rate * (z - stored[..., :points, :]), torch.zeros_like(z))
        moved[..., :points, :] += step
        place.put(self.around, moved, 2)

    def table_numbers(
        self, ts: Tensor, place: Place, signature: Tensor, learning: bool
    ) -> tuple[Tensor, Tensor]:
        """The learned numbers at the times of a grid, and where they exist (not past the last time).

        Raises:
            GuideError: if not learning, and the data are not those that the guide was trained on.
        """
        if self.numbers is None:
            raise GuideError(
                f"path site '{place.name}': this guide was trained with an encoder, and has none now."
            )
        if readable(self.seen) and not bool(self.seen.any()):
            start = self.numbers[(0,) * (self.plates + 1)].expand(ts.shape[-1], -1)
            return start, torch.ones(ts.shape[-1], dtype=torch.bool, device=start.device)
        if not learning:
            self._check_data(place, signature)
        table, stored = place.take(self.numbers, 2), place.take(self.grid, 1)
        points = ts.shape[-1]
        ts = ts.to(stored.device).expand(*stored.shape[:-1], -1)
        known = readable(stored) and points <= stored.shape[-1]
        if known and bool((stored[..., :points] == ts).all()):
            return table[..., :points, :], torch.ones(ts.shape, dtype=torch.bool, device=ts.device)
        at = torch.searchsorted(stored.contiguous(), ts.contiguous()).clamp(max=stored.shape[-1] - 1)
        picked = table.gather(-2, at[..., None].expand(*at.shape, table.shape[-1]))
        return picked, ts <= stored[..., -1:]

    def _check_data(self, place: Place, signature: Tensor) -> None:
        if not place.fits(self.seen, 0):
            raise GuideError(self._trouble(self.grid, place))
        other = ~self._own(place, signature)
        if bool(other.any()):
            where = other.nonzero()[0].tolist()
            raise GuideError(
                f"path site '{place.name}', series {where[-1] if where else 0}: a guide without an encoder knows only "
                "the series that it was trained on, and these are other data. Use encoder=sd.GRUEncoder(...), or fit a "
                "new guide."
            )

    def read(self, encoder: AbstractEncoder, prior: LatentPath, place: Place, run: Run) -> "Reading":
        """What the networks of this site get in a run.

        Raises:
            GuideError: if the data are not a `Series`, or the path is not in the plate over its series.
        """
        batch = series_around(place, run.args)
        encoding, ahead, valid = align(run.encoded(encoder), batch, prior.ts)
        encoding, ahead = encoding.to(self.unit), ahead.to(self.unit)
        dt = torch.nn.functional.pad(prior.ts.diff(dim=-1), (0, 1)).to(ahead).expand(ahead.shape)
        upstream = run.upstream(place)
        rest = [torch.stack([ahead, dt], -1), *[v[..., None, :] for v in upstream]]
        features = beside(encoding, *rest)
        scored = beside(encoding.detach(), *rest) if upstream else features.detach()
        return Reading(features, scored, valid, bool(upstream))

    def encoded_numbers(self, reading: "Reading") -> tuple[Tensor, Tensor]:
        """The numbers (*batch, time, numbers), and the same with only the guide's own parameters detached.

        Raises:
            GuideError: if this site was made without an encoder.
        """
        if self.head is None:
            raise GuideError("This guide was made without an encoder, and has one now. Fit a new guide.")
        numbers = self.head(reading.features)
        if not reading.upstream:
            return numbers, numbers.detach()
        own = {name: p.detach() for name, p in self.head.named_parameters()}
        return numbers, torch.func.functional_call(self.head, own, reading.scored)

    def controlled(self, reading: "Reading | None") -> dict[str, Any]:
        """The arguments of `SDEPath.guided` for the control of this site, where it has one."""
        if self.control is None or reading is None:
            return {}
        ahead = shifted(reading.valid, -1)[..., None].to(self.unit)
        context, scored = (beside(shifted(x, -2), ahead) for x in (reading.features, reading.scored))
        return {"control": self.control, "context": context, "score_context": scored}


@dataclass(frozen=True, eq=False)
class Reading:
    """What a site's networks get: (*batch, time, feature), the same as a score sees it, and where something follows."""

    features: Tensor
    scored: Tensor
    valid: Tensor
    upstream: bool


def shifted(x: Tensor, dim: int) -> Tensor:
    """What every step is led by: what is seen after its start; the last stays.

    Example:
        >>> shifted(torch.tensor([1, 2, 3]), -1)
        tensor([2, 3, 3])
    """
    return torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, x.shape[dim] - 1, 1)], dim)
