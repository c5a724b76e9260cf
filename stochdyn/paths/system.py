"""What `odeint` does where there are jumps: read them, solve, and find the gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stochdyn.data.doses import Doses
from stochdyn.errors import FieldError, JumpError, PaddingError, ShapeError
from stochdyn.paths.checks import joint_batch
from stochdyn.paths.dosing import as_schedule, has_infusions, on_state, with_rates
from stochdyn.paths.hybrid import Hybrid, TriggeredJumps
from stochdyn.paths.replay import replay
from stochdyn.paths.schedule import Schedule, calendar, check_window, on_grid, read_schedules
from stochdyn.paths.search import search
from stochdyn.paths.trigger import Conditions, Trigger, read_triggers
from stochdyn.solvers import AbstractGradient, Direct, Verlet
from stochdyn.solvers.gradients import Flow
from stochdyn.solvers.integrator import AbstractMean, AbstractODESolver
from stochdyn.solvers.pairs import stepper

Jump = Trigger | Schedule | Doses


@dataclass(frozen=True)
class System:
    """Triggers and schedules that were read.

    Args:
        conditions: of the triggers.
        schedules: the jumps at known times.
        max_jumps: of one series.
        attached: whether conditions, jump maps or times need a gradient.
        infusions: whether the state has the rates of infusions beside it.
    """

    conditions: Conditions
    schedules: tuple[Schedule, ...]
    max_jumps: int
    attached: bool
    infusions: bool

    def solve(self, flow: Flow) -> tuple[Tensor, TriggeredJumps]:
        """The path (*batch, time, state) and the jumps."""
        problem = self.problem(flow)
        plan = search(problem)
        if torch.is_grad_enabled() and (self.attached or self.needs_gradient(flow)):
            states, jumps = replay(problem, plan)
        else:
            states, jumps = plan.states, plan.jumps
        return states[..., : flow.z.shape[-1]].movedim(0, -2), jumps

    def problem(self, flow: Flow) -> Hybrid:
        """What is to be searched."""
        batch, solver = flow.z.shape[:-1], flow.solver
        times = flow.times[..., 0].expand(-1, *batch)
        stride = solver.substeps if isinstance(solver, AbstractMean) else 1
        targets = solver.fine(times) if isinstance(solver, AbstractMean) else times
        field, z = flow.field, flow.z
        if self.infusions:
            _check_halves(solver)
            field, z = with_rates(field, z.shape[-1]), torch.cat([z, torch.zeros_like(z)], -1)
        known = calendar(self.schedules, times.movedim(0, -1), batch)
        return Hybrid(
            field, self.conditions, known, flow.context, z, targets, stride, stepper(solver),
            self.max_jumps, _most_steps(solver),
        )  # fmt: skip

    def needs_gradient(self, flow: Flow) -> bool:
        """Whether the flow itself needs one."""
        given = [flow.z, flow.times] + ([] if flow.context is None else [flow.context])
        if any(x.requires_grad for x in given):
            return True
        return flow.bound()(flow.times[0].to(flow.z.dtype), flow.z).requires_grad


def _most_steps(solver: AbstractODESolver) -> int:
    return getattr(solver, "max_steps", 10_000)


def read_jumps(
    jumps: Sequence[Jump],
    at: tuple[Tensor, Tensor, Tensor | None],
    ts: Tensor,
    max_jumps: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[System, torch.Size]:
    """Try triggers and schedules once.

    Args:
        jumps: in any order.
        at: the first time, the start and the first row of the context.
        ts: (*batch, time).
        max_jumps: of one series.
        dtype: in which `ts` was given: a jump at one of them in that dtype is at it.

    Returns:
        The system, and the joint batch.

    Raises:
        FieldError: if one of them is something else.
        ShapeError: if a schedule or doses are of other series.
        PaddingError: if `max_jumps` is not positive.

    Example:
        >>> at = torch.zeros(1), torch.ones(2), None
        >>> _, batch = read_jumps([Schedule(torch.ones(3, 1), lambda t, z: -z)], at, torch.tensor([0.0, 2.0]), 10)
        >>> batch
        torch.Size([3])
    """
    if isinstance(max_jumps, bool) or not isinstance(max_jumps, int) or max_jumps < 1:
        raise PaddingError(f"odeint: `max_jumps` must be an integer of at least 1, got {max_jumps!r}.")
    if isinstance(jumps, Jump) or not isinstance(jumps, Sequence):
        raise FieldError(
            f"odeint: `jumps` must be a list of sd.Trigger, sd.Schedule or sd.Doses, got {type(jumps).__name__}."
        )
    for k, jump in enumerate(jumps):
        if not isinstance(jump, Jump):
            raise FieldError(
                f"odeint: `jumps[{k}]` must be an sd.Trigger, an sd.Schedule or sd.Doses, got {type(jump).__name__}."
            )
        if not isinstance(jump, Trigger):
            _check_series(k, jump, at[1].shape[:-1])
            check_window(f"jumps[{k}]", on_grid(jump.times, ts, dtype), ts)
    t, z, context = at
    infusions = any(has_infusions(jump) for jump in jumps if isinstance(jump, Doses))
    width = z.shape[-1]
    z = torch.cat([z, torch.zeros_like(z)], -1) if infusions else z
    given = [
        as_schedule(jump, z[..., :width], infusions)
        if isinstance(jump, Doses)
        else on_state(jump, width)
        if infusions
        else jump
        for jump in jumps
    ]
    triggers = [jump for jump in given if isinstance(jump, Trigger)]
    schedules = [replace(s, times=on_grid(s.times, ts, dtype)) for s in given if isinstance(s, Schedule)]
    conditions, found = read_triggers(triggers, t, z, context)
    moved, batches = read_schedules(schedules, t, z)
    shapes = {f"jump_{k}": x.shape[:-1] for k, x in enumerate(found + moved)}
    shapes |= {f"schedule_{k}": shape for k, shape in enumerate(batches)}
    joint = joint_batch(z0_ts_context_and_field=z.shape[:-1], **shapes)
    tensors = [x for s in schedules for x in (s.times, s.amounts) if x is not None]
    attached = any(x.requires_grad for x in [*found, *moved, *tensors])
    return System(conditions, tuple(schedules), max_jumps, attached, infusions), joint


def _check_series(k: int, jump: Schedule | Doses, batch: torch.Size) -> None:
    """Refuse jumps of another number of series than the path's."""
    if isinstance(jump, Doses):
        given = {"times": jump.times.shape[:-1]}
        given |= {f"lag_{i}": x.shape for i, (_, x) in enumerate(jump.lag)}
        given |= {f"bioavailability_{i}": x.shape for i, (_, x) in enumerate(jump.bioavailability)}
    else:
        given = {"times": jump.times.shape[:-1]}
        given |= {} if jump.amounts is None else {"amounts": jump.amounts.shape[:-2]}
    try:
        torch.broadcast_shapes(batch, *given.values())
    except RuntimeError as error:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in given.items())
        raise ShapeError(
            f"odeint: `jumps[{k}]` is of other series than the path: batch shapes {listed}, the path's is "
            f"{tuple(batch)}. Give one list for each series, or one for all; a mini-batch's doses are "
            "doses[batch.index]."
        ) from error


def _check_halves(solver: AbstractODESolver) -> None:
    if isinstance(solver, Verlet):
        raise FieldError(
            "odeint: infusions add their rates to the field, positions' too, which Verlet does not see. Use another "
            "solver."
        )


def check_direct(gradient: AbstractGradient) -> None:
    """Refuse the gradients that cannot see jumps.

    Raises:
        FieldError: for all but `Direct()`.

    Example:
        >>> check_direct(Direct())
    """
    if not isinstance(gradient, Direct):
        raise FieldError(
            f"odeint: with jumps the gradient is that of gradient=sd.Direct(), not of {type(gradient).__name__}: the "
            "steps that were kept are run again with gradients."
        )


def check_accumulation(jumps: TriggeredJumps) -> None:
    """Refuse jumps that accumulate.

    Raises:
        JumpError: naming the series and the time.

    Example:
        >>> none = torch.tensor([torch.inf])
        >>> check_accumulation(TriggeredJumps(torch.zeros(1, 0, 2), torch.zeros(1), none, none))
    """
    bad = jumps.accumulated.isfinite()
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        where = index[0] if len(index) == 1 else index or 0
        raise JumpError(
            f"series {where}: its jumps accumulate at time {jumps.accumulated[index].item():.10g}, after "
            f"{int(jumps.counts[index])} of them (Zeno). Ask for return_jumps=True, which gives this time as "
            "jumps.accumulated and a path that stands still from there, or stop the series by a terminal trigger."
        )
