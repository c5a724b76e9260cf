"""Hybrid systems: a flow, and jumps that each series makes at times of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.fields import Field, evaluate
from stochdyn.paths.schedule import Calendar
from stochdyn.paths.trigger import Conditions
from stochdyn.solvers.integrator import Drift
from stochdyn.solvers.pairs import AbstractStepper


@dataclass(frozen=True, eq=False)
class TriggeredJumps:
    """The jumps that triggers fired, series by series, in order.

    Shapes:
        values (*batch, max_jumps, 2), times, triggers (*batch, max_jumps), counts, stopped, accumulated (*batch,)

    Attributes:
        values: time and trigger of each jump; unused rows have time inf.
        counts: the number of jumps.
        stopped: the time at which a terminal trigger ended the series, inf where none did.
        accumulated: the time at which infinitely many jumps accumulate (Zeno), inf where they do not. The path keeps
            its state from the last jump before it on.

    Example:
        >>> import torch, stochdyn as sd
        >>> once = sd.Trigger(lambda t, z: z[..., 0] - 2.0, terminal=True)
        >>> ts = torch.tensor([0.0, 1.0])
        >>> z, jumps = sd.odeint(lambda t, z: z, torch.ones(1), ts, jumps=[once], return_jumps=True)
        >>> jumps.times, jumps.triggers, jumps.stopped, z[-1]
        (tensor([0.6931], dtype=torch.float64), tensor([0]), tensor(0.6931, dtype=torch.float64), tensor([2.]))
    """

    values: Tensor
    counts: Tensor
    stopped: Tensor
    accumulated: Tensor

    @property
    def times(self) -> Tensor:
        """The times, inf where a row is unused."""
        return self.values[..., 0]

    @property
    def triggers(self) -> Tensor:
        """The position in `jumps` of the trigger that fired, among the triggers; 0 where a row is unused."""
        return self.values[..., 1].long()


@dataclass(frozen=True)
class Hybrid:
    """What is solved.

    Args:
        field: `(t, z[, context])`.
        conditions: those of the triggers.
        calendar: the jumps at known times.
        context: (gap, *batch, context_dim), (1, ...) for all gaps, or None.
        z: (*batch, state).
        targets: (target, *batch) float64, where steps end; every `stride`-th is a time of the path.
        stride: 1, or the substeps of a method of fixed steps.
        stepper: what steps.
        max_jumps, max_steps: the most jumps of a series, and steps between two times or jumps.
    """

    field: Field
    conditions: Conditions
    calendar: Calendar
    context: Tensor | None
    z: Tensor
    targets: Tensor
    stride: int
    stepper: AbstractStepper
    max_jumps: int
    max_steps: int

    @property
    def span(self) -> Tensor:
        """(*batch,) how long the path is."""
        return self.targets[-1] - self.targets[0]

    @property
    def directions(self) -> Tensor:
        """(trigger,)."""
        directions = [trigger.direction for trigger in self.conditions.triggers]
        return torch.tensor(directions, dtype=self.z.dtype, device=self.z.device)

    @property
    def varying(self) -> bool:
        """Whether the context differs between gaps."""
        return self.context is not None and self.context.shape[0] > 1

    def target(self, k: Tensor) -> Tensor:
        """(*batch,) the k-th target, the last one beyond."""
        return self.targets.gather(0, k.clamp_max(len(self.targets) - 1)[None])[0]

    def row(self, k: Tensor) -> Tensor | None:
        """The context before the k-th target."""
        if self.context is None or self.context.shape[0] == 1:
            return None if self.context is None else self.context[0]
        gap = ((k - 1).clamp_min(0) // self.stride).clamp_max(self.context.shape[0] - 1)
        shape = (*gap.shape, self.context.shape[-1])
        context = self.context.expand(self.context.shape[0], *shape)
        return context.gather(0, gap[None, ..., None].expand(1, *shape))[0]

    def bound(self, context: Tensor | None) -> Drift:
        """The field with its context."""
        return lambda t, z: evaluate("field", self.field, t, z, context).expand(z.shape)


@dataclass(frozen=True)
class Plan:
    """What a search found: the steps that were kept, and the solution.

    Attributes:
        states: (time, *batch, state).
        jumps: the jumps.
        after: (time, *batch) after how many steps each state of the path stands.
        h: (step, *batch) float64, the lengths of the steps.
        kind: (step, *batch) 0 within, 1 to a target, 2 to a jump at a known time, 3 to a crossing, 4 at once, 5 to a
            crossing where the condition has no slope, -1 none: the series has no more steps.
        fired: (step, *batch) the trigger.
        ended: (*batch,) 0, 1 by a terminal trigger, 2 by accumulation.
    """

    states: Tensor
    jumps: TriggeredJumps
    after: Tensor
    h: Tensor
    kind: Tensor
    fired: Tensor
    ended: Tensor


# Jumps cost more than steps: series that are at theirs wait for others, so many passes at most.
EVERY = 3
FREE, OUTPUT, DUE, CROSSING, ONCE, CLIFF = range(6)


def gather_jumps(times: Tensor, fired: Tensor, ended: Tensor) -> TriggeredJumps:
    """From times and triggers (step, *batch), trigger -1 where nothing jumped, to what the user gets.

    Example:
        >>> times, fired = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0], [-1], [1]])
        >>> gather_jumps(times, fired, torch.zeros(1)).values
        tensor([[[1., 0.],
                 [4., 1.]]])
    """
    hit = fired >= 0
    counts = hit.sum(0)
    rows = int(counts.max()) if counts.numel() and len(fired) else 0
    order = (~hit).to(torch.int8).argsort(dim=0, stable=True)[:rows]
    used = torch.arange(rows, device=fired.device).reshape(-1, *[1] * (fired.dim() - 1)) < counts
    found = times.gather(0, order)
    when = torch.where(used, found, torch.inf)
    which = torch.where(used, fired.gather(0, order), 0).to(when.dtype)
    infinite = torch.full(counts.shape, torch.inf, dtype=when.dtype, device=when.device)
    stopped, accumulated = infinite, infinite
    if rows:
        last = found.gather(0, (counts - 1).clamp_min(0)[None])[0]
        stopped = torch.where(ended == 1, last, infinite)
        accumulated = torch.where(ended == 2, limit(found, counts), infinite)
    values = torch.stack([when, which], -1).movedim(0, -2)
    return TriggeredJumps(values, counts, stopped, accumulated)


def limit(times: Tensor, counts: Tensor) -> Tensor:
    """Where the times (jump, *batch) accumulate if the gaps go on to shrink as the last two do.

    Example:
        >>> times = torch.tensor([0.0, 1.0, 1.5, 1.75])
        >>> limit(times, torch.tensor(4))
        tensor(2.)
    """
    last, middle, first = (times.gather(0, (counts - k).clamp_min(0)[None])[0] for k in (1, 2, 3))
    gap, before = last - middle, middle - first
    shrinking = (gap > 0) & (gap < before)
    rest = gap.square() / torch.where(shrinking, before - gap, 1.0)
    return last + torch.where(shrinking, rest, 0.0)
