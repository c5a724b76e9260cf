"""What a guide stores and learns for one path site."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stochdyn.data import Series
from stochdyn.errors import GuideError
from stochdyn.guides.messages import AbstractMessageFamily
from stochdyn.guides.plates import Place


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


class PathSite(nn.Module):
    """Tables (per member of the plates and grid time) and, with an encoder, the head.

    Buffers: `grid` the times of every member, `around` the running estimate of its path, `seen` which members have
    one, `signature` a checksum of their data (a guide without an encoder knows only what it was trained on),
    `unit` the prior's spread of every state.
    """

    grid: Tensor
    around: Tensor
    seen: Tensor
    signature: Tensor
    unit: Tensor

    def __init__(self, shape: torch.Size, points: int, unit: Tensor, numbers: Tensor | None, head: Head | None) -> None:
        super().__init__()
        self.numbers = None if numbers is None else nn.Parameter(numbers)
        self.head = head
        state = len(unit)
        self.register_buffer("unit", unit)
        self.register_buffer("grid", torch.full((*shape, points), torch.nan, dtype=torch.float64, device=unit.device))
        self.register_buffer("around", unit.new_zeros(*shape, points, state))
        self.register_buffer("seen", torch.zeros(shape, dtype=torch.bool, device=unit.device))
        self.register_buffer("signature", torch.zeros(shape, dtype=torch.float64, device=unit.device))

    @classmethod
    def begin(
        cls, family: AbstractMessageFamily, shape: torch.Size, points: int, unit: Tensor, features: int | None, hidden: int
    ) -> "PathSite":
        """A new one; `features` is None without an encoder."""
        start = family.start(len(unit)).to(unit)
        if features is None:
            return cls(shape, points, unit, start.expand(*shape, points, -1).clone(), None)
        return cls(shape, points, unit, None, Head(features, hidden, len(start)).to(unit).begin(start))

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "PathSite":
        """An empty one with the shapes of a state_dict."""
        head = None
        if "head.0.weight" in state:
            hidden, features = state["head.0.weight"].shape
            head = Head(features, hidden, len(state["head.2.bias"])).to(state["head.0.weight"])
        numbers = None if "numbers" not in state else torch.zeros_like(state["numbers"])
        shape, points = state["seen"].shape, state["around"].shape[-2]
        return cls(shape, points, torch.zeros_like(state["unit"]), numbers, head)

    def known(self, ts: Tensor, place: Place, signature: Tensor) -> Tensor:
        """Which members (*batch) are on their own grid, with their own data."""
        same = place.take(self.seen, 0) & (place.take(self.signature, 0) == signature)
        stored = place.take(self.grid, 1)
        if ts.shape[-1] > stored.shape[-1]:
            return torch.zeros_like(same)
        return same & (stored[..., : ts.shape[-1]] == ts).all(-1)

    def remember(self, ts: Tensor, around: Tensor, place: Place, signature: Tensor) -> None:
        """Store the path of the members of this run (the grid is kept to the longest seen)."""
        points = self.grid.shape[-1]
        if ts.shape[-1] > points:
            raise GuideError(
                f"site '{place.name}': the grid has {ts.shape[-1]} times, the guide was made with {points}. Call the "
                "guide once on the whole data before training in mini-batches."
            )
        pad = points - ts.shape[-1]
        around, ts = around.detach(), ts.to(self.grid.device)
        batch = around.shape[:-2]
        ts = ts.expand(*batch, -1)
        if pad:
            around = torch.cat([around, around[..., -1:, :].expand(*batch, pad, -1)], -2)
            ts = torch.cat([ts, ts[..., -1:].expand(*batch, pad)], -1)
        place.put(self.around, around, 2)
        place.put(self.grid, ts, 1)
        place.put(self.seen, torch.ones(batch, dtype=torch.bool, device=self.seen.device), 0)
        place.put(self.signature, signature.expand(batch), 0)

    def follow(self, z: Tensor, place: Place, rate: float) -> None:
        """Move the running estimate towards sampled paths (*particles, *batch, time, state)."""
        stored = place.take(self.around, 2)
        z = z.detach()
        z = z.reshape(-1, *z.shape[z.dim() - stored.dim() :]).mean(0)
        if torch.isfinite(z).all():
            points = z.shape[-2]
            moved = stored.clone()
            moved[..., :points, :] += rate * (z - stored[..., :points, :])
            place.put(self.around, moved, 2)

    def table_numbers(self, ts: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """The learned numbers at the times of a grid, and where they exist (not past the last time)."""
        table, stored = place.take(self.numbers, 2), place.take(self.grid, 1)
        points = ts.shape[-1]
        ts = ts.to(stored.device).expand(*stored.shape[:-1], -1)
        if points <= stored.shape[-1] and bool((stored[..., :points] == ts).all()):
            return table[..., :points, :], torch.ones(ts.shape, dtype=torch.bool, device=ts.device)
        at = torch.searchsorted(stored.contiguous(), ts.contiguous()).clamp(max=stored.shape[-1] - 1)
        picked = table.gather(-2, at[..., None].expand(*at.shape, table.shape[-1]))
        return picked, ts <= stored[..., -1:]


def signature_of(batch: object, shape: torch.Size, device: torch.device) -> Tensor:
    """A checksum per series of what was observed; zero where the data are not a Series."""
    out = torch.zeros(shape, dtype=torch.float64, device=device)
    if not isinstance(batch, Series) or not shape or shape[-1] != len(batch):
        return out
    weight = torch.arange(1, batch.values[0].numel() + 1, dtype=torch.float64, device=device)
    flat = (batch.values.double() + 1.0) * batch.mask
    seen = batch.mask.flatten(1)
    rank = seen.cumsum(1).clamp(min=1) - 1
    return out + (flat.flatten(1).to(device) * weight[rank.to(device)] * seen.to(device)).sum(-1)
