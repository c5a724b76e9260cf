"""Jumps at known times: interventions, doses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.errors import FieldError, ShapeError, TimeError
from stochdyn.fields import Field, evaluate
from stochdyn.paths.checks import joint_batch
from stochdyn.paths.trigger import check_map


@dataclass(frozen=True, eq=False)
class Schedule:
    """At known times the state jumps to `jump_map(t, z)`, or to `jump_map(t, z, amount)`.

    A path has the state after the jump at the time of one. Times may be latent: the gradient by them is exact, whatever
    the grid. Doses have a table of their own, `Doses`.

    Shapes:
        times (*batch, jump), amounts (*batch, jump, amount); the batch broadcasts against that of the path.

    Args:
        times: non-decreasing; unused ones come last and are inf.
        jump_map: `(t, z[, amount])` -> shape of z.
        amounts: what each jump is given, if anything.

    Raises:
        TimeError: if times are unsorted or NaN, by position.
        ShapeError, FieldError: if the parts are of other kinds.

    Example:
        >>> import torch, stochdyn as sd
        >>> harvest = sd.Schedule(torch.tensor([1.0, 2.0]), lambda t, z: 0.5 * z)
        >>> sd.odeint(lambda t, z: z, torch.ones(1), torch.tensor([0.0, 1.0, 3.0]), jumps=[harvest])[:, 0]
        tensor([1.0000, 1.3591, 5.0214])
    """

    times: Tensor
    jump_map: Field
    amounts: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.times, Tensor) or self.times.dim() < 1 or not self.times.is_floating_point():
            got = tuple(self.times.shape) if isinstance(self.times, Tensor) else type(self.times).__name__
            raise ShapeError(f"Schedule: `times` must be a floating tensor (*batch, jump), got {got}.")
        if not callable(self.jump_map):
            raise FieldError(
                f"Schedule: `jump_map` must be callable as (t, z[, amount]), got {type(self.jump_map).__name__}."
            )
        _check_amounts(self.amounts, self.times)
        later = self.times[..., 1:].detach() >= self.times[..., :-1].detach()
        if not bool(later.all()) or bool(self.times.detach().isnan().any()):
            bad = torch.cat([torch.ones_like(self.times[..., :1], dtype=torch.bool), later], -1)
            *series, k = (~bad | self.times.detach().isnan()).nonzero()[0].tolist()
            raise TimeError(
                f"Schedule: series {series[0] if len(series) == 1 else tuple(series) or 0}, jump {k}: time "
                f"{self.times[(*series, k)].item():g} is not at or after the one before. Sort the times."
            )


def _check_amounts(amounts: object, times: Tensor) -> None:
    """Refuse amounts that are not those of the times."""
    if amounts is None:
        return
    wanted = f"Schedule: `amounts` must be a floating tensor (*batch, jump={times.shape[-1]}, amount)"
    if not isinstance(amounts, Tensor) or not amounts.is_floating_point():
        got = amounts.dtype if isinstance(amounts, Tensor) else type(amounts).__name__
        raise ShapeError(f"{wanted}, got {got}.")
    if amounts.dim() < 2 or amounts.shape[-2] != times.shape[-1]:
        raise ShapeError(f"{wanted}, got {tuple(amounts.shape)}.")
    joint_batch(schedule_times=times.shape[:-1], schedule_amounts=amounts.shape[:-2])


@dataclass(frozen=True)
class Calendar:
    """The jumps of several schedules in order.

    Args:
        schedules: with amounts of every batch dimension.
        times: (jump + 1, *batch) float64; the last is inf.
        source: (jump + 1, *batch) which schedule a jump is of; `row` which of its jumps.
    """

    schedules: tuple[Schedule, ...]
    times: Tensor
    source: Tensor
    row: Tensor

    def at(self, due: Tensor) -> Tensor:
        """(*batch,) the time of the jump that is due."""
        return self.times.gather(0, due[None])[0]

    def of(self, due: Tensor) -> Tensor:
        """(*batch,) the schedule of the jump that is due."""
        return self.source.gather(0, due[None])[0]

    def jump(self, due: Tensor, now: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """The states after the jumps due, where `now` (*batch,) says so."""
        source, row, after = self.of(due), self.row.gather(0, due[None])[0], z
        for k, schedule in enumerate(self.schedules):
            mine = now & (source == k)
            if not bool(mine.any()):
                continue
            given = None
            if schedule.amounts is not None:
                amounts = schedule.amounts
                amounts = amounts.expand(*z.shape[:-1], *amounts.shape[-2:])
                index = torch.where(mine, row, 0)[..., None, None].expand(*z.shape[:-1], 1, amounts.shape[-1])
                given = amounts.gather(-2, index)[..., 0, :]
            moved = evaluate(f"jump map of schedule {k}", schedule.jump_map, t, z.clone(), given)
            after = torch.where(mine[..., None], moved, after)
        return after


def read_schedules(
    schedules: Sequence[Schedule], t: Tensor, z: Tensor
) -> tuple[list[Tensor], list[torch.Size]]:
    """Try each jump map once: what they returned, and the batch shapes of times and amounts.

    Raises:
        FieldError, DtypeError: naming the schedule, by its position.

    Example:
        >>> turns = Schedule(torch.ones(3, 2), lambda t, z: -z)
        >>> found, batches = read_schedules([turns], torch.zeros(1), torch.ones(1))
        >>> batches
        [torch.Size([3])]
    """
    found, batches = [], []
    for k, schedule in enumerate(schedules):
        given = schedule.amounts
        if given is not None and given.shape[-2] == 0:
            continue
        row = None if given is None else given[..., 0, :]
        start = z if row is None else z.expand(*torch.broadcast_shapes(z.shape[:-1], row.shape[:-1]), -1)
        found.append(check_map(f"jump map of schedule {k}", schedule.jump_map, t, start, row))
        batches.append(schedule.times.shape[:-1])
    return found, batches


def calendar(schedules: Sequence[Schedule], ts: Tensor, batch: torch.Size) -> Calendar:
    """All jumps in order.

    Args:
        schedules: the schedules.
        ts: (*batch or fewer, time) float64.
        batch: the joint batch.

    Example:
        >>> two = [Schedule(torch.tensor([1.0, 3.0]), lambda t, z: -z), Schedule(torch.tensor([2.0]), lambda t, z: z)]
        >>> calendar(two, torch.tensor([0.0, 5.0]), torch.Size()).source.tolist()
        [0, 1, 0, 0]
    """
    device = ts.device
    times = [s.times.to(device, torch.float64).expand(*batch, s.times.shape[-1]) for s in schedules]
    end = torch.full((*batch, 1), torch.inf, dtype=torch.float64, device=device)
    source = [torch.full(x.shape, k, dtype=torch.long, device=device) for k, x in enumerate(times)]
    row = [torch.arange(x.shape[-1], device=device).expand(x.shape) for x in times]
    zero = torch.zeros_like(end, dtype=torch.long)
    joint = torch.cat([*times, end], -1)
    order = joint.detach().argsort(dim=-1, stable=True)
    parts = (joint, torch.cat([*source, zero], -1), torch.cat([*row, zero], -1))
    return Calendar(tuple(schedules), *[x.gather(-1, order).movedim(-1, 0) for x in parts])


def on_grid(times: Tensor, ts: Tensor, dtype: torch.dtype) -> Tensor:
    """Times that are one of the grid's in the dtype in which that was given are moved there; their gradients stay.

    Args:
        times: (*batch, jump), sorted, and so is what returns.
        ts: (*batch, time) float64.
        dtype: in which the grid was given.

    Example:
        >>> ts = torch.tensor([0.0, 0.7])
        >>> on_grid(torch.tensor([0.7, 0.8], dtype=torch.float64), ts.double(), ts.dtype).tolist()
        [0.699999988079071, 0.8]
    """
    if dtype == torch.float64 or times.dtype != torch.float64:
        return times
    ts = ts.detach().to(times.device, torch.float64)
    close = times.detach().to(dtype).double()
    hit = (close[..., :, None] == ts[..., None, :]).any(-1)
    return times + torch.where(hit, close - times.detach(), 0.0)


def check_window(name: str, times: Tensor, ts: Tensor) -> None:
    """Refuse jumps before the first or after the last time of a path: they would be left out without a word.

    Args:
        name: what the times belong to.
        times: (*batch, jump); inf is no jump.
        ts: (*batch, time).

    Raises:
        TimeError: naming series, jump, and the window.

    Example:
        >>> check_window("doses", torch.tensor([0.5]), torch.tensor([0.0, 1.0]))
    """
    times, ts = times.detach().to(ts.device, torch.float64), ts.detach()
    real = times.isfinite()
    early, late = real & (times < ts[..., :1]), real & (times > ts[..., -1:])
    bad = early | late
    if not bool(bad.any()):
        return
    *series, k = bad.nonzero()[0].tolist()
    first, last = (x.expand(bad.shape)[(*series, k)].item() for x in (ts[..., :1], ts[..., -1:]))
    where = series[0] if len(series) == 1 else tuple(series) or 0
    got = times.expand(bad.shape)[(*series, k)].item()
    raise TimeError(
        f"{name}: series {where}, jump {k}: time {got:g} is {'before' if got < first else 'after'} the path, which "
        f"goes from {first:g} to {last:g}. Begin the path earlier (TimeGrid(..., start=...)), or leave the jump out "
        "(doses.until(time))."
    )
