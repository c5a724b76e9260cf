"""Ordinary differential equations: solved, not sampled."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import DivergedError, FieldError, ShapeError
from stochdyn.fields import Field, call_field, draw_weights
from stochdyn.paths.checks import (
    check_resolution,
    check_times,
    check_unambiguous,
    context_by_time,
    first_bad,
    joint_batch,
    lift,
)
from stochdyn.paths.drifts import in_time
from stochdyn.paths.system import Jump, check_accumulation, check_direct, read_jumps
from stochdyn.solvers import AbstractGradient, AbstractODESolver, Direct, Dopri5
from stochdyn.solvers.gradients import Flow, check_gradient


def odeint(
    field: Field,
    z0: Tensor,
    ts: Tensor,
    *,
    solver: AbstractODESolver = Dopri5(),  # noqa: B008
    gradient: AbstractGradient = Direct(),  # noqa: B008
    context: Tensor | None = None,
    jumps: Sequence[Jump] | None = None,
    return_jumps: bool = False,
    max_jumps: int = 1000,
) -> Any:
    """Solve dz/dt = field(t, z[, context]) from z0 at the first time: the states at all times.

    An ODE has no density: in a Pyro model its solution is a function of the latents, recorded with
    `pyro.deterministic("z", sd.odeint(...), event_dim=2)`. Series may have times of their own.

    Args:
        field: `(t, z[, context])` -> shape of z; units state per time. Write parameters of batch shape as
            theta[..., None] against z.
        z0: the start (*batch, state).
        ts: the times (*batch, time), non-decreasing; gaps of no length (padding) repeat the state.
        solver: `Dopri5()` and `Tsit5()` choose their steps; `RungeKutta4(substeps)`, `Heun`, `Midpoint`, `Euler` take
            every gap in equal pieces; `Verlet(substeps)` for mechanics; `Rosenbrock(substeps)`, `Radau()`, `BDF()` for
            stiff systems.
        gradient: `Direct()`, `Checkpointed()` or `Adjoint()`.
        context: (*batch, context_dim), or (*batch, time, context_dim): the row at a gap's start is used in it.
        jumps: `Trigger`s (where a condition on the state crosses zero), `Schedule`s (at known times) and `Doses`; each
            series jumps at its own times, which are found to the solver's own error. A path has the state after the
            jump at the time of one. With solvers of fixed steps, `Dopri5()` or `Tsit5()`, and `Direct()`.
        return_jumps: whether the jumps of the triggers are returned too.
        max_jumps: of one series; more are an error.

    Shapes:
        (*batch, time, state), the batch being the broadcast of z0, ts, context and of what field, conditions and jump
        maps return; with `return_jumps` this and a `TriggeredJumps`.

    Raises:
        ShapeError, TimeError, FieldError, DtypeError: if the parts do not fit together, from one call of the field.
        DivergedError: naming series and first bad time, if the solution leaves the finite numbers or the solver
            gives up.
        PaddingError: if there are more than `max_jumps`.
        JumpError: if jumps accumulate (Zeno) and `return_jumps` is False, naming series and time; else it is a field of
            the `TriggeredJumps`, and the path stands still from there.

    References:
        Chen, Rubanova, Bettencourt & Duvenaud, "Neural ordinary differential equations", 2018,
        https://arxiv.org/abs/1806.07366

    Example:
        >>> import torch, stochdyn as sd
        >>> rate = torch.tensor([0.5, 1.0, 2.0])  # one per series
        >>> z = sd.odeint(lambda t, z: -rate[..., None] * z, torch.ones(1), torch.tensor([0.0, 0.5, 2.0]))
        >>> z.shape, bool((z[:, -1, 0] - (-2 * rate).exp()).abs().max() < 1e-5)
        (torch.Size([3, 3, 1]), True)
    """
    _check_kinds(z0, solver, gradient)
    field = draw_weights(field)
    validate = bool(
        torch.distributions.Distribution._validate_args
    )  # as for paths: off in the steps of a fit
    given = ts.dtype if isinstance(ts, Tensor) else torch.float64
    ts = check_times(ts, validate)
    if validate:
        check_resolution(ts, given, z0.dtype)
    base = joint_batch(z0=z0.shape[:-1], ts=ts.shape[:-1])
    by_time = _by_time(context, ts.shape[-1], base)
    first = None if by_time is None else by_time[0]
    base = base if first is None else joint_batch(z0_and_ts=base, context=first.shape[:-1])
    times = ts.to(z0.device).movedim(-1, 0)[..., None]
    batch = _probe(field, z0.expand(*base, z0.shape[-1]), lift(times, len(base) + 1)[0].to(z0.dtype), first)
    if context is not None and by_time is not None and by_time.shape[0] > 1 and context.dim() == 2:
        check_unambiguous(context, ts.shape[-1], batch)
    system = None
    if jumps is not None or return_jumps:
        check_direct(gradient)
        at = (lift(times, len(batch) + 1)[0].to(z0.dtype), z0.expand(*batch, z0.shape[-1]), first)
        system, batch = read_jumps(jumps or (), at, ts, max_jumps, given)
    if by_time is not None:
        by_time = lift(in_time(by_time, ts.shape[-1] - 1), len(batch) + 1)
    start = z0.expand(*batch, z0.shape[-1])
    flow = Flow(field, by_time, start, lift(times, len(batch) + 1), solver)
    found = None
    if system is None:
        states = gradient.solve(flow).movedim(0, -2)
    else:
        states, found = system.solve(flow)
    bad = first_bad(states, ts, batch) if validate else None
    if bad is not None:
        raise DivergedError(f"{bad} Bound the field, use a smaller step (substeps), or start nearer.")
    if found is not None and not return_jumps:
        check_accumulation(found)
    return (states, found) if return_jumps else states


def _check_kinds(z0: object, solver: object, gradient: object) -> None:
    if not isinstance(z0, Tensor) or z0.dim() < 1 or not z0.is_floating_point():
        got = f"{z0.dtype} {tuple(z0.shape)}" if isinstance(z0, Tensor) else type(z0).__name__
        raise ShapeError(f"odeint: `z0` must be a floating tensor (*batch, state), got {got}.")
    if torch.distributions.Distribution._validate_args and not torch.isfinite(z0).all():
        raise DivergedError("odeint: `z0` is not finite. A solution starts at finite numbers.")
    if not isinstance(solver, AbstractODESolver):
        raise FieldError(
            f"odeint: `solver` must be an ODE solver, e.g. sd.Dopri5() or sd.RungeKutta4(substeps=4), got {solver!r}. "
            "Stochastic equations are integrated by sd.sdeint, or are paths."
        )
    check_gradient("odeint", gradient)


def _by_time(context: Tensor | None, points: int, base: torch.Size) -> Tensor | None:
    """The context (time or 1, *batch, context_dim); of three dimensions or more one is time, if it can be."""
    if not isinstance(context, Tensor) or context.dim() < 3 or context.shape[-2] not in (points, 1):
        return context_by_time(context, points, base)
    if context.shape[:-1] == base and context.shape[-2] > 1:
        raise ShapeError(
            f"`context` of shape {tuple(context.shape)} may be (*batch, context_dim) or (*batch, time, context_dim): "
            f"there are {points} of both. Write a static one as context[..., None, :]."
        )
    return context.movedim(-2, 0)


def _probe(field: Field, z: Tensor, t: Tensor, context: Tensor | None) -> torch.Size:
    with torch.no_grad():
        f = call_field("field", field, t, z, context)
    if f.shape[-1] not in (z.shape[-1], 1):
        raise FieldError(
            f"The field returned shape {tuple(f.shape)} for z of shape {tuple(z.shape)}, expected (..., state="
            f"{z.shape[-1]})."
        )
    return joint_batch(z0_ts_and_context=z.shape[:-1], field=f.shape[:-1])
