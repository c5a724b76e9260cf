"""A state that flows between observations and jumps at them: the one loop of the model and of the encoder."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.device import readable
from stochdyn.errors import DivergedError, FieldError, TimeError
from stochdyn.fields import AbstractLinearFlow, AbstractMemoryFlow, Memory
from stochdyn.solvers import AbstractODESolver

Predict = Callable[[Tensor, Memory], Any]
State = tuple[Tensor, Memory]
MAX_PIECES = 10_000


@dataclass(frozen=True)
class Readings:
    """The rows between which a state flows, in the order in which it meets them.

    Attributes:
        times: (series, row) float64, non-decreasing.
        values: (series, row, channel), 0 where missing.
        mask: likewise, 1 where exact, -1 where censored, 0 where missing.
        context: (series, row, context) or None; that of a row acts in the jump at it and the flow after it.
    """

    times: Tensor
    values: Tensor
    mask: Tensor
    context: Tensor | None = None

    def at(self, k: int) -> tuple[Tensor, ...]:
        """Values, mask and context of a row."""
        return tuple(x[:, k] for x in (self.values, self.mask, self.context) if x is not None)

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Readings":
        """The same function of each tensor; times come as (series, row, 1)."""
        context = None if self.context is None else change(self.context)
        times = change(self.times[..., None])[..., 0]
        return Readings(times, change(self.values), change(self.mask), context)


@dataclass(frozen=True)
class Trail:
    """States and memories just before and just after each row, all (series, row, ...)."""

    before: Tensor
    after: Tensor
    memory_before: Memory
    memory_after: Memory


@dataclass(frozen=True)
class ObservationJumps:
    """What a state does.

    Args:
        flow: `(t, h[, context])`, an `AbstractMemoryFlow`, or an `AbstractLinearFlow`.
        jump: `(t, h, y, mask, seen[, context])`.
        solver: of the flow, over one gap.
        dt: the longest piece of a gap that the solver takes at once; None for whole gaps.
        longest: a gap that none exceeds, for where numbers may not be looked at.
        ids: gives the labels of the series, for errors.

    Raises:
        DivergedError: if a state leaves the finite numbers, naming the series and the time.
        FieldError: if a flow or a jump returns another shape.
        TimeError: for a gap of too many pieces.

    Example:
        >>> import stochdyn as sd
        >>> decay = ObservationJumps(lambda t, h: -h, lambda t, h, y, mask, seen: h + y, sd.RungeKutta4(8))
        >>> rows = Readings(torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, 1), torch.ones(1, 2, 1))
        >>> decay.run(torch.zeros(1, 1), rows).before.flatten()
        tensor([0.0000, 0.3679])
    """

    flow: Any
    jump: Any
    solver: AbstractODESolver
    dt: float | None = None
    longest: float = 0.0
    ids: Callable[[], Sequence[Any]] = tuple

    def between(
        self,
        t: Tensor,
        dt: Tensor,
        h: Tensor,
        memory: Memory,
        context: Tensor | None = None,
        *,
        longest: float | None = None,
        who: Tensor | None = None,
    ) -> State:
        """State and memory a time dt after t, both (*batch, 1) in float64, without a jump.

        `longest` is the longest dt; `who` the position of the series of each row, by default all, again and again.
        """
        more = () if context is None else (context,)
        if isinstance(self.flow, AbstractLinearFlow):
            decay, shift = self.flow.over(t.to(h.dtype), dt.to(h.dtype), *more)
            return decay * h + _of_state("shift", shift, h), memory.later(dt.to(h.dtype))

        def slope(since: Tensor, h: Tensor) -> Tensor:
            now = t.to(h.dtype) + since
            known = (memory.later(since),) if isinstance(self.flow, AbstractMemoryFlow) else ()
            return _of_state("dh/dt", self.flow(now, h, *known, *more), h)

        start = h
        for ends in self._pieces(dt, longest):
            h = self.solver.solve(slope, h, ends)[-1]
        self._check_finite(
            start, h, who, lambda at: f"in the gap of {float(dt[at]):g} after time {float(t[at]):g}"
        )
        return h, memory.later(dt.to(h.dtype))

    def _pieces(self, dt: Tensor, longest: float | None) -> Iterator[Tensor]:
        """The ends (2, *batch, 1) of pieces no longer than `self.dt`; there are as many as the longest gap needs."""
        if self.dt is None:
            yield torch.stack([torch.zeros_like(dt), dt])
            return
        if longest is None:
            longest = float(dt.max()) if readable(dt) else self.longest
        pieces = max(math.ceil(longest / self.dt - 1e-9), 1) if math.isfinite(longest) else 1
        if pieces > MAX_PIECES:
            raise TimeError(
                f"A gap of {longest:g} would be cut into {pieces} pieces of at most dt={self.dt:g}. Measure time in a "
                "unit in which a typical gap is near 1, or take a longer dt."
            )
        for k in range(pieces):
            last = math.inf if k + 1 == pieces else (k + 1) * self.dt
            yield torch.stack([dt.clamp(max=k * self.dt), dt.clamp(max=last)])

    def to_row(
        self, rows: Readings, k: int, h: Tensor, memory: Memory, longest: float | None = None
    ) -> State:
        """State and memory just before a row, from those just after the row before; `longest` is the longest gap."""
        times, context = rows.times[..., None], None if rows.context is None else rows.context[:, k - 1]
        return self.between(
            times[:, k - 1], times[:, k] - times[:, k - 1], h, memory, context, longest=longest
        )

    def jumped(
        self, t: Tensor, h: Tensor, memory: Memory, reading: tuple[Tensor, ...], predict: Any
    ) -> State:
        """State and memory after a reading (y, mask[, context]) at t; unchanged where nothing was observed."""
        y, mask, *more = reading
        seen = None if predict is None else predict(h, memory)
        after = self.jump(t.to(h.dtype), h, y, mask, seen, *more)
        if after.shape != h.shape:
            raise FieldError(
                f"The jump returned shape {tuple(after.shape)} for h of shape {tuple(h.shape)}. It is called as (t, h, "
                "y, mask, seen[, context]) and returns the new h."
            )
        observed = (mask != 0).any(-1, keepdim=True)
        after = torch.where(observed, after, h)
        self._check_finite(h, after, None, lambda at: f"in the jump at time {float(t[at]):g}")
        return after, memory.updated(y, mask)

    def _check_finite(
        self, start: Tensor, h: Tensor, who: Tensor | None, where: Callable[[tuple[int, ...]], str]
    ) -> None:
        if not torch.distributions.Distribution._validate_args or not readable(h):
            return
        bad = ~h.isfinite().all(-1) & start.isfinite().all(-1)
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            row, ids = at[0] if who is None else int(who[at[0]]), self.ids()
            series = f"series {ids[row % len(ids)]}: the" if ids else "The"
            raise DivergedError(
                f"{series} state leaves the finite numbers {where(at)}. Bound flow and jump, bound the step by dt=, "
                "take more substeps, or measure time so that gaps are near 1."
            )

    def run(self, h: Tensor, rows: Readings, predict: Predict | None = None) -> Trail:
        """Through all rows, from h (series, hidden) just before the first one."""
        state = (h, Memory.empty(h, rows.values.shape[-1]))
        gaps = rows.times.diff(dim=1).amax(0) if self.dt is not None else None
        if gaps is not None:  # looked at once: an accelerator is waited for at every look
            gaps = gaps.tolist() if readable(gaps) else [self.longest] * len(gaps)
        before, after = [], []
        for k in range(rows.times.shape[1]):
            state = self.to_row(rows, k, *state, gaps[k - 1] if gaps else None) if k else state
            before.append(state)
            state = self.jumped(rows.times[:, k, None], *state, rows.at(k), predict)
            after.append(state)
        (first, known), (last, learned) = _stacked(before), _stacked(after)
        return Trail(first, last, known, learned)


def _of_state(what: str, found: Tensor, h: Tensor) -> Tensor:
    """What a flow returned, unless it would only broadcast against h."""
    if found.shape[-1:] != h.shape[-1:]:
        raise FieldError(
            f"The flow returned {what} of shape {tuple(found.shape)} for h of shape {tuple(h.shape)}. Its last size "
            "must be that of h: make the flow for the same hidden."
        )
    return found


def _stacked(rows: list[State]) -> State:
    states, (memory, *others) = [h for h, _ in rows], [m for _, m in rows]
    return torch.stack(states, 1), memory.apply(lambda *parts: torch.stack(parts, 1), *others)
