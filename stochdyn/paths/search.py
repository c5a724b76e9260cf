"""Finding the jumps of every series: its steps, the times at which its conditions cross zero, and its states."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import DivergedError, PaddingError
from stochdyn.paths.checks import short
from stochdyn.paths.hybrid import CLIFF, CROSSING, DUE, EVERY, FREE, ONCE, OUTPUT, Hybrid, Plan, gather_jumps
from stochdyn.solvers.pairs import FixedStepper

# Jumps closer than this share of the path's length, so many of them in a row, accumulate.
_ACCUMULATED = 1e-8
_IN_A_ROW = 8
# A touch of the surface is looked for where the interpolant comes down to this share of the ends.
_DIP = 0.1


@dataclass
class Trial:
    """A step that was tried, of its own length for each series."""

    h: Tensor
    closing: Tensor
    due: Tensor
    z: Tensor
    f: Tensor
    g: Tensor
    slope: Tensor
    error: Tensor | None


@dataclass
class Bracket:
    """Where a step is known to cross: between lo, where no trigger has, and hi, where those in `which` have.

    `low` and `high` are the conditions there.
    """

    on: Tensor
    lo: Tensor
    hi: Tensor
    h: Tensor
    low: Tensor
    high: Tensor
    which: Tensor
    tries: Tensor

    def enter(self, rows: Tensor, hi: Tensor, low: Tensor, high: Tensor, which: Tensor) -> None:
        """Series that have crossed within a step begin to look for where."""
        self.lo, self.hi = torch.where(rows, 0.0, self.lo), torch.where(rows, hi, self.hi)
        self.low, self.high = (
            torch.where(rows[..., None], low, self.low),
            torch.where(rows[..., None], high, self.high),
        )
        self.which = torch.where(rows[..., None], which, self.which)
        self.tries = torch.where(rows, 0, self.tries)
        self.on = self.on | rows

    def shrink(self, h: Tensor, g: Tensor, slope: Tensor, crossed: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a trial of length h: how far on the crossing is, and which trigger's.

        By the parabola through the trial's value and slope and the value at the other end, which is exact for a flight.
        """
        over = crossed.any(-1)
        other = torch.where(over, self.lo, self.hi)[..., None].to(g.dtype) - h[..., None].to(g.dtype)
        far = torch.where(over[..., None], self.low, self.high) - g - slope * other
        bend = torch.where(other == 0, 0.0, far / torch.where(other == 0, 1.0, other).square())
        root = (slope.square() - 4 * bend * g).sqrt()  # NaN where the parabola has no zero
        steep = slope + torch.copysign(torch.where(root.isnan(), slope.abs(), root), slope)
        ahead = (-2 * g / torch.where(steep == 0, torch.nan, steep)).double()
        mine = torch.where(over[..., None], crossed, self.which)
        shift, fired = torch.where(mine & ahead.isfinite(), ahead, torch.inf).min(-1)
        up, down = self.on & over, self.on & ~over
        self.hi, self.lo = torch.where(up, h, self.hi), torch.where(down, h, self.lo)
        self.high, self.low = (
            torch.where(up[..., None], g, self.high),
            torch.where(down[..., None], g, self.low),
        )
        self.which = torch.where(up[..., None], crossed, self.which)
        return shift, fired


@dataclass
class Log:
    """What is kept of the search, one entry for each pass through its loop."""

    h: list[Tensor] = field(default_factory=list)
    kind: list[Tensor] = field(default_factory=list)
    fired: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)


class Search:
    """All series at once, each at its own time: a pass of the loop is one step of the solver for every one of them.

    A series steps until a condition has crossed zero at the end of a step; from then on its steps start at the same
    state and have the lengths that a safeguarded Newton iteration on the solver's own step asks for, until one ends at
    the crossing. The times are then as exact as the solver, not as an interpolant. Gradients come from `replay`.

    Args:
        problem: what is solved.
    """

    def __init__(self, problem: Hybrid) -> None:
        self.problem, z = problem, problem.z.detach()
        batch, device, conditions = z.shape[:-1], z.device, len(problem.conditions.triggers)
        self.directions = problem.directions
        self.z, self.t = z.contiguous(), problem.targets[0].detach().clone()
        zeros = torch.zeros(batch, dtype=torch.float64, device=device)
        no, count = torch.zeros(batch, dtype=torch.bool, device=device), zeros.long()
        self.k, self.q, self.kept, self.jumps, self.stalled, self.near = (count.clone() for _ in range(6))
        self.done, self.ended = no.clone(), count.clone()
        self.last, self.cap = self.t.clone(), torch.full_like(zeros, torch.inf)
        self.pending = count - 1
        none = torch.zeros(*batch, conditions, dtype=torch.bool, device=device)
        low = z.new_zeros(none.shape)
        self.bracket = Bracket(
            no.clone(), zeros.clone(), zeros.clone(), zeros.clone(), low, low, none, count.clone()
        )
        self.points = (len(problem.targets) - 1) // problem.stride + 1
        self.states = z.new_zeros(self.points + 1, *z.shape)
        self.after = count.new_zeros(self.points + 1, *batch)
        self.log, self.passes = Log(), 0
        self.context = problem.row(self.k)
        self.side = (-self.directions).expand(*batch, conditions).clone()
        self.scale = z.abs().amax(-1, keepdim=True).expand(none.shape).clone() / 16
        self.look()
        self.settle(~self.done, self.pending)
        self.h = self.first()

    def run(self) -> Plan:
        """Search to the end."""
        while not bool(self.done.all()):
            self.advance()
        open_ = torch.arange(self.points, device=self.z.device).reshape(-1, *[1] * self.k.dim())
        open_ = open_ * self.problem.stride >= self.k
        states = torch.where(open_[..., None], self.z, self.states[:-1])
        after = torch.where(open_, self.kept, self.after[:-1])
        h, kind, fired, times = (torch.stack(x) for x in vars(self.log).values())
        jumps = gather_jumps(times, torch.where(kind >= CROSSING, fired, -1), self.ended)
        kept = (kind < 0).to(torch.int8).argsort(dim=0, stable=True)[: int(self.kept.max())]
        h, kind, fired = (x.gather(0, kept) for x in (h, kind, fired))
        return Plan(states, jumps, after, h, kind, fired, self.ended)

    def look(self) -> None:
        """The field and the conditions at the state."""
        t = self.t.to(self.z.dtype)[..., None]
        self.f = self.problem.bound(self.context)(t, self.z)
        self.g, self.slope = self.problem.conditions.along(t, self.z, self.f, self.context)

    def first(self) -> Tensor:
        """The first step to try (Hairer, Norsett & Wanner, II.4, its first guess)."""
        if isinstance(self.problem.stepper, FixedStepper):
            return torch.full_like(self.t, torch.inf)
        size, rate = (x.square().mean(-1).sqrt().double() for x in (self.z, self.f))
        guess = 0.01 * size / torch.where(rate > 0, rate, 1.0)
        return torch.where((size > 1e-5) & (rate > 1e-5), guess, 1e-3 * self.problem.span.clamp_min(1e-300))

    def advance(self) -> None:
        """One pass: one step of every series that is not done."""
        trial = self.attempt()
        bracket, active = self.bracket, ~self.done
        crossed = self.crossed(trial.g)
        free = active & ~bracket.on & (self.pending < 0)
        bad = self.too_coarse(trial, free)
        dip, where = self.dips(trial, free & ~bad & ~crossed.any(-1))
        fine = free & ~bad & ~dip
        bracket.enter(fine & crossed.any(-1), trial.h, self.g, trial.g, crossed)
        found, shift, fired, smooth = self.narrow(trial, crossed)
        plain, landed = fine & ~crossed.any(-1), found | (active & (self.pending >= 0))
        fired = torch.where(self.pending >= 0, self.pending, fired)
        self.cap = torch.where(dip, where, torch.where(plain | landed, torch.inf, self.cap))
        self.write(trial, plain, landed, fired, smooth)
        self.stall(landed | (plain & trial.closing))
        self.move(trial, plain)
        if bool(landed.any()):
            self.land(trial, landed, shift, fired, smooth)
        due = plain & trial.closing & trial.due
        if bool(due.any()):
            t = self.t.to(self.z.dtype)[..., None]
            moved = self.problem.calendar.jump(self.q, due, t, self.z)
            self.check_jump("schedule", due, self.t, self.z, moved, self.problem.calendar.of(self.q))
            self.z, self.q = moved, self.q + due
        out = plain & trial.closing & ~trial.due
        self.output(out)
        self.refresh(landed | due, out, torch.where(landed, fired, -1))

    def attempt(self) -> Trial:
        """A step of every series, of its own length."""
        problem, bracket = self.problem, self.bracket
        due, target = problem.calendar.at(self.q), problem.target(self.k)
        room = torch.minimum(due, target) - self.t
        h = torch.minimum(torch.minimum(self.h, self.cap), room)
        closing = (h >= room) & ~bracket.on
        still = self.done | (self.pending >= 0)
        h = torch.where(still, 0.0, torch.where(bracket.on, bracket.h, h))
        dtype = self.z.dtype
        t, step = self.t.to(dtype)[..., None], h.to(dtype)[..., None]
        z, f, error = problem.stepper.step(problem.bound(self.context), t, step, self.z, self.f)
        g, slope = problem.conditions.along(t + step, z, f, self.context)
        return Trial(h, closing & ~still, due <= target, z, f, g, slope, error)

    def crossed(self, g: Tensor) -> Tensor:
        """(*batch, trigger) which have crossed, in their direction, since the state."""
        wanted = (self.directions == 0) | (self.directions == -self.side)
        return ((self.side * g < 0) | ((g == 0) & (self.g != 0) & (self.side != 0))) & wanted

    def too_coarse(self, trial: Trial, free: Tensor) -> Tensor:
        """Which steps have too large an error; the next length of all."""
        if trial.error is None:
            self.h = torch.full_like(self.h, torch.inf)
            return torch.zeros_like(free)
        error = trial.error.double()
        bad = free & ~(error <= 1)
        factor = torch.nan_to_num(0.9 * error.clamp_min(1e-10) ** -0.2, 0.2).clamp(0.2, 5.0)
        new = trial.h * factor
        grown = torch.where(trial.closing | (self.cap < torch.inf), torch.maximum(new, self.h), new)
        self.h = torch.where(bad, new, torch.where(free, grown, self.h))
        small = bad & (new <= 4 * torch.finfo(torch.float64).eps * self.t.abs())
        if bool(small.any()):
            raise self.lost(small, "the step became too small to go on")
        return bad

    def dips(self, trial: Trial, free: Tensor) -> tuple[Tensor, Tensor]:
        """Which steps may have crossed twice, by the cubic through values and slopes at their ends; and where."""
        none = torch.zeros_like(free)
        if not self.directions.numel():
            return none, trial.h
        side = self.side
        turning = (side * self.slope < 0) & (side * trial.slope > 0) & free[..., None]
        if not bool(turning.any()):
            return none, trial.h
        h, start, end = trial.h[..., None].to(self.z.dtype), side * self.g, side * trial.g
        down, up = side * self.slope * h, side * trial.slope * h
        bend, twist = 3 * (end - start) - 2 * down - up, 2 * (start - end) + down + up
        root = (bend.square() - 3 * twist * down).clamp_min(0).sqrt()
        share = -down / torch.where(bend + root > 0, bend + root, 1.0)
        lowest = start + share * (down + share * (bend + share * twist))
        inside = (share > 1e-3) & (share < 1 - 1e-3) & (bend + root > 0)
        wanted = (self.directions == 0) | (self.directions == -side)
        deep = lowest < _DIP * torch.minimum(start, end)
        seen = turning & (start > 0) & (end > 0) & inside & wanted & deep
        share = torch.where(seen, share, 1.0).amin(-1)
        return seen.any(-1) & (self.cap == torch.inf), trial.h * share

    def narrow(self, trial: Trial, crossed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Narrow all brackets: which have closed, how far on the crossing is, whose it is, whether it has a slope."""
        b, h = self.bracket, trial.h
        if not bool(b.on.any()):
            zero = torch.zeros_like(h)
            return torch.zeros_like(b.on), zero, torch.zeros_like(self.k), torch.zeros_like(b.on)
        over = crossed.any(-1)
        shift, fired = b.shrink(h, trial.g, trial.slope, crossed)
        rounding = 4 * torch.finfo(torch.float64).eps * self.t.abs()
        near = 0.1 * torch.finfo(self.z.dtype).eps ** 0.5 * h + rounding
        straight = (trial.g.abs() <= 2 * near[..., None] * trial.slope.abs()).gather(-1, fired[..., None])[
            ..., 0
        ]
        smooth = b.on & (shift.abs() <= near) & straight
        closed = b.on & (b.hi - b.lo <= 64 * torch.finfo(self.z.dtype).eps * b.hi + rounding)
        found = smooth | (closed & over)
        self.passes += 1
        if self.passes % EVERY and not bool((found | self.done).all()):
            waiting, found = found, torch.zeros_like(found)
        else:
            waiting = torch.zeros_like(found)
        fired = torch.where(smooth, fired, b.which.to(torch.int8).argmax(-1))
        b.tries = b.tries + b.on
        newton = h + shift
        inside = (newton > b.lo) & (newton < b.hi) & (b.tries % 4 != 3)
        trial_next = torch.where(closed, b.hi, torch.where(inside, newton, 0.5 * (b.lo + b.hi)))
        b.h = torch.where(waiting, h, trial_next)
        b.on = b.on & ~found
        return found, torch.where(smooth, shift, 0.0), fired, smooth

    def write(self, trial: Trial, plain: Tensor, landed: Tensor, fired: Tensor, smooth: Tensor) -> None:
        """Keep what a replay needs."""
        closed = torch.where(trial.closing, torch.where(trial.due, DUE, OUTPUT), FREE)
        jumped = torch.where(self.pending >= 0, ONCE, torch.where(smooth, CROSSING, CLIFF))
        kind = torch.where(landed, jumped, torch.where(plain, closed, -1))
        self.log.h.append(trial.h)
        self.log.kind.append(kind)
        self.log.fired.append(fired)
        self.kept = self.kept + (plain | landed)

    def move(self, trial: Trial, plain: Tensor) -> None:
        """Go on to the ends of the steps that are fine."""
        target = torch.minimum(self.problem.calendar.at(self.q), self.problem.target(self.k))
        self.t = torch.where(plain, torch.where(trial.closing, target, self.t + trial.h), self.t)
        row = plain[..., None]
        self.z, self.f = torch.where(row, trial.z, self.z), torch.where(row, trial.f, self.f)
        self.g, self.slope = torch.where(row, trial.g, self.g), torch.where(row, trial.slope, self.slope)
        self.side = torch.where(row & (trial.g != 0), trial.g.sign(), self.side)
        self.scale = torch.where(row, torch.maximum(self.scale, trial.g.abs()), self.scale)
        undefined = plain & self.g.isnan().any(-1) & self.z.isfinite().all(-1)
        if bool(undefined.any()):
            where, time, state = self.place(undefined)
            which = int(self.g.isnan().any(tuple(range(self.g.dim() - 1))).nonzero()[0])
            raise DivergedError(
                f"series {where}, time {time:g}, trigger {which}: the condition is NaN; the state was {state}. It must "
                "be a number on both sides of the surface."
            )

    def land(self, trial: Trial, landed: Tensor, shift: Tensor, fired: Tensor, smooth: Tensor) -> None:
        """Jump."""
        once = self.pending >= 0
        shift = torch.where(once, 0.0, shift)
        # Where the condition itself jumps its value there, 0 or either side's, says nothing: it has crossed.
        mine = torch.arange(self.directions.numel(), device=fired.device) == fired[..., None]
        self.side = torch.where(mine & (landed & ~smooth & ~once)[..., None], -self.side, self.side)
        at = self.t + trial.h + shift
        z = trial.z + trial.f * shift[..., None].to(self.z.dtype)
        which = torch.where(landed, fired, -1)
        moved = self.problem.conditions.jump(which, at.to(z.dtype)[..., None], z, self.context)
        self.check_jump("trigger", landed, at, z, moved, which)
        self.t, self.z = torch.where(landed, at, self.t), torch.where(landed[..., None], moved, self.z)
        gap = self.t - self.last
        if trial.error is not None:  # the next flight may well be as long as the last
            self.h = torch.where(landed & (gap > 0), torch.minimum(self.h, gap), self.h)
        self.last = torch.where(landed, self.t, self.last)
        close = landed & (gap <= _ACCUMULATED * self.problem.span)
        self.near = torch.where(landed, torch.where(close, self.near + 1, 0), self.near)
        self.jumps = self.jumps + landed
        if bool((self.jumps > self.problem.max_jumps).any()):
            raise self.crowded()
        last_ones = [trigger.terminal for trigger in self.problem.conditions.triggers]
        terminal = torch.tensor(last_ones, device=z.device)[which.clamp_min(0)] & landed
        infinite = self.near >= _IN_A_ROW + 2 * len(last_ones)
        self.ended = torch.where(terminal, 1, torch.where(infinite & ~terminal & landed, 2, self.ended))
        self.done = self.done | (self.ended > 0)

    def check_jump(
        self, kind: str, rows: Tensor, at: Tensor, z: Tensor, moved: Tensor, which: Tensor
    ) -> None:
        """Refuse jumps from finite states to others, while validating."""
        if not torch.distributions.Distribution._validate_args:
            return
        bad = rows & z.isfinite().all(-1) & ~moved.isfinite().all(-1)
        if bool(bad.any()):
            where, _, _ = self.place(bad)
            index = tuple(bad.nonzero()[0].tolist())
            raise DivergedError(
                f"series {where}, time {at[index].item():g}, {kind} {int(which[index])}: the jump map returned "
                f"{short(moved[index])} for the state {short(z[index])}. It must return finite numbers."
            )

    def output(self, out: Tensor) -> None:
        """Write the states of the series that are at a time of the path."""
        on = out & (self.k % self.problem.stride == 0)
        if bool(on.any()):
            index = torch.where(on, self.k // self.problem.stride, self.points)[None]
            self.states.scatter_(0, index[..., None].expand(1, *self.z.shape), self.z[None])
            self.after.scatter_(0, index, self.kept[None])
        self.k = self.k + out
        self.done = self.done | (self.k >= len(self.problem.targets))

    def refresh(self, jumped: Tensor, out: Tensor, fired: Tensor) -> None:
        """What a jump, or a new row of the context, has changed."""
        self.log.times.append(self.t)
        self.pending = torch.where(jumped, -1, self.pending)
        turned = self.problem.varying and bool(out.any())
        if turned:
            self.context = self.problem.row(self.k)
        if turned or bool(jumped.any()):
            self.look()
            self.settle(jumped & ~self.done, fired)

    def settle(self, rows: Tensor, fired: Tensor) -> None:
        """On which side of every surface a new state is; who is on one and leaves it forwards fires at once."""
        if not self.directions.numel():
            return
        eps = torch.finfo(self.z.dtype).eps
        rounding = 64 * eps * self.scale + 4 * eps * (self.slope * self.t[..., None].to(self.z.dtype)).abs()
        on = self.g.abs() <= rounding
        wanted = (self.directions == 0) | (self.directions == -self.side)
        mine = torch.arange(self.directions.numel(), device=self.z.device) == fired[..., None]
        fires = on & (self.side * self.slope < 0) & wanted & ~mine & rows[..., None]
        side = torch.where(on, torch.where(self.slope == 0, self.side, self.slope.sign()), self.g.sign())
        self.side = torch.where(rows[..., None] & ~fires, side, self.side)
        first = fires.to(torch.int8).argmax(-1)
        self.pending = torch.where(fires.any(-1), first, self.pending)

    def stall(self, reached: Tensor) -> None:
        """Give up where nothing is reached in many steps."""
        self.stalled = torch.where(reached, 0, self.stalled + 1)
        slow = (self.stalled > self.problem.max_steps) & ~self.done
        if bool(slow.any()):
            raise self.lost(slow, f"more than {self.problem.max_steps} steps between two times")

    def lost(self, rows: Tensor, why: str) -> DivergedError:
        where, time, state = self.place(rows)
        return DivergedError(
            f"series {where}, time {time:g}: {why}; the state was {state}. If the field explodes, bound it; if a "
            "condition or the field jumps in time, put that time on the grid; else loosen rtol and atol, or take fixed "
            "steps."
        )

    def crowded(self) -> PaddingError:
        where, time, _ = self.place(self.jumps > self.problem.max_jumps)
        return PaddingError(
            f"series {where}, time {time:g}: more than max_jumps={self.problem.max_jumps} jumps. Raise max_jumps, or "
            "make the jump map leave the surface."
        )

    def place(self, rows: Tensor) -> tuple[Any, float, list[float]]:
        """The first of some series: its position, its time, its state."""
        index = tuple(rows.nonzero()[0].tolist())
        where = index[0] if len(index) == 1 else index or 0
        return where, self.t[index].item(), short(self.z[index])


@torch.no_grad()
def search(problem: Hybrid) -> Plan:
    """Find all steps and jumps.

    Raises:
        DivergedError: if a series does not get on; naming it, and the time.
        PaddingError: if a series has more jumps than allowed.

    Example:
        >>> import stochdyn as sd
        >>> from stochdyn.paths.schedule import calendar
        >>> from stochdyn.paths.trigger import Conditions, Trigger
        >>> from stochdyn.solvers.pairs import stepper
        >>> ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> conditions = Conditions((Trigger(lambda t, z: z[..., 0] - 2.0, lambda t, z: z - 1.0),), (True,))
        >>> problem = Hybrid(lambda t, z: z, conditions, calendar([], ts, torch.Size()), None, torch.ones(1), ts, 1,
        ...                  stepper(sd.Dopri5()), 10, 100)
        >>> search(problem).jumps.times
        tensor([0.6931], dtype=torch.float64)
    """
    return Search(problem).run()
