"""The steps that a search kept, once more with gradients: by start, parameters and the times of the jumps."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stochdyn.errors import JumpError
from stochdyn.paths.hybrid import (
    CLIFF,
    CROSSING,
    DUE,
    EVERY,
    ONCE,
    OUTPUT,
    Hybrid,
    Plan,
    TriggeredJumps,
    gather_jumps,
)
from stochdyn.paths.trigger import slope_along


@dataclass
class Now:
    """Where all series are."""

    t: Tensor
    z: Tensor
    f: Tensor
    k: Tensor
    q: Tensor
    context: Tensor | None


def replay(problem: Hybrid, plan: Plan) -> tuple[Tensor, TriggeredJumps]:
    """The same states and jumps as the plan's, with their gradients.

    The time of a jump is g(t, z(t)) = 0 solved by Newton's method twice in the graph, from the time found: derivatives
    up to the second order are those of the implicit function. The steps' lengths are constants, but for those that end
    at a time of the path or at a jump.

    Raises:
        JumpError: if a condition has no slope where it crosses.

    Example:
        >>> import stochdyn as sd
        >>> rate = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        >>> half = sd.Trigger(lambda t, z: z[..., 0] - 0.5)
        >>> _, jumps = sd.odeint(lambda t, z: -rate * z, torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 5.0]),
        ...                      jumps=[half], return_jumps=True)
        >>> jumps.times[0].backward(); rate.grad  # the half-life is log 2 / rate
        tensor([-2.7726], dtype=torch.float64)
    """
    _check_slopes(problem, plan)
    plan = align(plan)
    k = torch.zeros_like(plan.ended)
    context = problem.row(k)
    t = problem.targets[0]
    f = problem.bound(context)(t.to(problem.z.dtype)[..., None], problem.z)
    now = Now(t, problem.z, f, k, k, context)
    states, times = [now.z], []
    for h, kind, fired in zip(plan.h, plan.kind, plan.fired, strict=True):
        _step(problem, now, h, kind, fired)
        states.append(now.z)
        times.append(now.t)
    index = plan.after[..., None].expand(*plan.after.shape, problem.z.shape[-1])
    path = torch.stack(states).gather(0, index)
    when = torch.stack(times) if times else plan.h
    return path, gather_jumps(when, torch.where(plan.kind >= CROSSING, plan.fired, -1), plan.ended)


def align(plan: Plan) -> Plan:
    """The same steps, laid out so that jumps of many series fall together: series wait at theirs for others.

    Example:
        >>> kind = torch.tensor([[3, 0], [1, 3], [-1, 1]])  # jumps in the first step, in the second
        >>> h, fired, none = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        >>> align(Plan(h, None, torch.tensor([[0, 0], [2, 3]]), h, kind, fired, none)).kind
        tensor([[ 3,  0],
                [ 1, -1],
                [-1,  3],
                [-1,  1]])
    """
    steps = len(plan.kind)
    pad = torch.cat([plan.kind, torch.full_like(plan.kind[:1], -1)]) if steps else plan.kind
    at, rows = torch.zeros_like(plan.ended), []
    while steps:
        kind = pad.gather(0, at[None])[0]
        live, jump = kind >= 0, kind >= CROSSING
        if not bool(live.any()):
            break
        together = len(rows) % EVERY == 0 or not bool((live & ~jump).any())
        go = live if together else live & ~jump
        rows.append(torch.where(go, at, steps))
        at = at + go
    if not rows:
        return plan
    which = torch.stack(rows)
    end = torch.zeros_like(which[:1])
    order = (which == steps).to(torch.int8).argsort(dim=0, stable=True)
    slot = torch.cat([end, order + 1])  # after how many passes each number of steps is done
    h = torch.cat([plan.h, torch.zeros_like(plan.h[:1])])
    fired = torch.cat([plan.fired, torch.zeros_like(plan.fired[:1])])
    return replace(
        plan, h=h.gather(0, which), kind=pad.gather(0, which), fired=fired.gather(0, which),
        after=slot.gather(0, plan.after),
    )  # fmt: skip


def _check_slopes(problem: Hybrid, plan: Plan) -> None:
    steps = (plan.kind == CLIFF).nonzero()
    if not len(steps):
        return
    step, *series = steps[0].tolist()
    which = int(plan.fired[(step, *series)])
    where = series[0] if len(series) == 1 else tuple(series) or 0
    raise JumpError(
        f"series {where}, trigger {which}: the condition has no slope where it crosses zero, so the time of the jump "
        "has no gradient. Make it cross smoothly (a distance, not a sign), or solve under torch.no_grad()."
    )


def _step(problem: Hybrid, now: Now, h: Tensor, kind: Tensor, fired: Tensor) -> None:
    live, due, out = kind >= 0, kind == DUE, kind == OUTPUT
    dtype = now.z.dtype
    end = torch.where(out, problem.target(now.k), now.t + h)
    end = torch.where(due, problem.calendar.at(now.q), end) if bool(due.any()) else end
    length = torch.where(live, end - now.t, 0.0).to(dtype)[..., None]
    drift = problem.bound(now.context)
    z, f, _ = problem.stepper.step(drift, now.t.to(dtype)[..., None], length, now.z, now.f)
    crossing, jumped = kind == CROSSING, (kind == CROSSING) | (kind == ONCE)
    if bool(crossing.any()):
        end, z = _land(problem, now, (end, z, f), crossing, fired)
    if bool(jumped.any()):
        which = torch.where(jumped, fired, -1)
        z = problem.conditions.jump(which, end.to(dtype)[..., None], z, now.context)
    if bool(due.any()):
        z = problem.calendar.jump(now.q, due, end.to(dtype)[..., None], z)
    now.t, now.z = torch.where(live, end, now.t), torch.where(live[..., None], z, now.z)
    now.f = torch.where(live[..., None], f, now.f)
    now.k, now.q = now.k + out, now.q + due
    turned = problem.varying and bool(out.any())
    if turned:
        now.context = problem.row(now.k)
    if turned or bool((jumped | due).any()):
        now.f = problem.bound(now.context)(now.t.to(dtype)[..., None], now.z)


def _land(
    problem: Hybrid, now: Now, reached: tuple[Tensor, Tensor, Tensor], crossing: Tensor, fired: Tensor
) -> tuple[Tensor, Tensor]:
    """Time and state of the crossings, from the step that ended close by."""
    end, z, f = reached
    t, drift, which = end.to(z.dtype)[..., None], problem.bound(now.context), fired.clamp_min(0)[..., None]
    with torch.no_grad():
        _, bend = slope_along(drift, t.detach(), z.detach(), f.detach())
    g, slope = problem.conditions.along(t, z, f, now.context)
    on = crossing[..., None]
    slope = torch.where(on, slope.gather(-1, which), 1.0)
    first = -torch.where(on, g.gather(-1, which), 0.0) / slope
    close = z + f * first + 0.5 * bend * first.square()
    rest = problem.conditions(t + first, close, now.context).gather(-1, which)
    shift = first - torch.where(on, rest, 0.0) / slope
    state = z + f * shift + 0.5 * bend * shift.square()
    return end + shift[..., 0].to(end.dtype), torch.where(on, state, z)
