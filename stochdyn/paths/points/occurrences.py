"""Jumps as the densities see them: time-major, unused rows at the end of the window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.data.jump_checks import unused


@dataclass(frozen=True)
class Occurrences:
    """The jumps of a batch of sequences.

    Attributes:
        times: (jump, *batch), `end` where there is none.
        marks: (jump, *batch, mark).
        real: (jump, *batch) bool.
        start, end: (*batch,) the window.

    Example:
        >>> value = torch.tensor([[0.5], [float("inf")]])
        >>> jumps = Occurrences.of(value, torch.tensor(0.0), torch.tensor(1.0))
        >>> jumps.times.tolist(), jumps.edges.tolist()
        ([0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """

    times: Tensor
    marks: Tensor
    real: Tensor
    start: Tensor
    end: Tensor

    @classmethod
    def of(cls, value: Tensor, start: Tensor, end: Tensor) -> "Occurrences":
        """From the padded tensor (*batch, jump, 1 + mark)."""
        batch = torch.broadcast_shapes(value.shape[:-2], start.shape, end.shape)
        rows = value.expand(*batch, *value.shape[-2:]).movedim(-2, 0)
        times = rows[..., 0]
        start, end = start.to(rows).expand(batch), end.to(rows).expand(batch)
        free = unused(times)
        return cls(torch.where(free, end, times), rows[..., 1:], ~free, start, end)

    @property
    def edges(self) -> Tensor:
        """(jump + 2, *batch) the window's start, the jumps, its end: the ends of the gaps."""
        return torch.cat([self.start[None], self.times, self.end[None]])

    def before(self, ts: Tensor) -> Tensor:
        """(time, *batch) how many jumps came strictly before each time, (time, *batch)."""
        own = torch.where(self.real, self.times, torch.full_like(self.times, float("inf")))
        ts = ts.to(own).expand(len(ts), *own.shape[1:])
        return torch.searchsorted(own.movedim(0, -1).contiguous(), ts.movedim(0, -1).contiguous()).movedim(
            -1, 0
        )
