"""Gaps between jumps cut into pieces, every sequence for itself: a batch costs as much as its longest sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.errors import TimeError
from stochdyn.paths.points.occurrences import Occurrences

# Per sequence; more are a step in the wrong units.
_MOST = 1_000_000


@dataclass(frozen=True)
class Pieces(Occurrences):
    """Rows that end in a jump, where one is `real`, or only cut a long gap.

    Example:
        >>> jumps = Occurrences.of(torch.tensor([[0.5]]), torch.tensor(0.0), torch.tensor(2.0))
        >>> pieces = Pieces.cut(jumps, torch.tensor(1.0))
        >>> pieces.edges.tolist(), pieces.real.tolist()
        ([0.0, 0.5, 1.25, 2.0], [True, False])
    """

    @classmethod
    def cut(cls, jumps: Occurrences, step: Tensor) -> "Pieces":
        """Every gap in equal pieces of at most `step`, a number or (*batch,)."""
        edges = jumps.edges
        gaps, ends = (
            edges.diff(dim=0),
            torch.cat([jumps.real, torch.zeros_like(jumps.start, dtype=torch.bool)[None]]),
        )
        number = torch.maximum(torch.ceil(gaps / step * (1 - 1e-9)), ends.to(gaps))
        most = float(number.sum(0).max()) if number.numel() else 1.0
        if most > _MOST:
            raise TimeError(
                f"A step of {float(step.min()):g} cuts a sequence into {most:.0f} pieces. Give a longer `step`, in "
                "the unit of the times."
            )
        number = number.long()
        done = number.cumsum(0)
        batch = gaps.shape[1:]
        row = (
            torch.arange(max(int(most), 1), device=gaps.device)
            .reshape(-1, *[1] * len(batch))
            .expand(-1, *batch)
        )
        gap = torch.searchsorted(
            done.movedim(0, -1).contiguous(), row.movedim(0, -1).contiguous(), right=True
        ).movedim(-1, 0)
        used = gap < len(gaps)
        gap = gap.clamp(max=len(gaps) - 1)
        last = row + 1 == done.gather(0, gap)
        share = (row + 1 - done.gather(0, gap) + number.gather(0, gap)).to(gaps) / number.gather(
            0, gap
        ).clamp(min=1)
        inside = edges.gather(0, gap) + share * gaps.gather(0, gap)
        # The jump's own time at its end: rounding must not move it.
        times = torch.where(last, edges.gather(0, gap + 1), inside)
        times = torch.where(used, times, jumps.end)
        real = ends.gather(0, gap) & last & used
        marks = torch.cat(
            [jumps.marks, torch.zeros_like(jumps.marks.new_zeros(1, *batch, jumps.marks.shape[-1]))]
        )
        wide = gap[..., None].expand(*gap.shape, marks.shape[-1])
        marks = marks.gather(0, wide) * real[..., None]
        if bool(real[-1:].any()):  # a jump at the end of the window, after which there is no piece
            times = torch.cat([times, jumps.end.expand(batch)[None]])
            marks = torch.cat([marks, torch.zeros_like(marks[:1])])
            real = torch.cat([real, torch.zeros_like(real[:1])])
        return cls(times[:-1], marks[:-1], real[:-1], jumps.start, jumps.end)

    def before(self, ts: Tensor) -> Tensor:
        """(time, *batch) how many pieces end strictly before each time, (time, *batch)."""
        ts = ts.to(self.times).expand(len(ts), *self.times.shape[1:])
        own, at = (x.movedim(0, -1).contiguous() for x in (self.times, ts))
        return torch.searchsorted(own, at).movedim(-1, 0)
