"""Drawing jumps: thinning under a checked bound, and inversion of the compensator."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import BoundError, FieldError, PaddingError
from stochdyn.paths.points.support import member

# A sequence that nobody gave a limit ends in an error here, not in full memory.
_LIMIT = 20_000


class AbstractSampler(ABC):
    """How the next jump is drawn: `Thinning` or `Inversion`.

    Example:
        >>> import stochdyn as sd
        >>> isinstance(sd.Thinning(), AbstractSampler)
        True
    """

    @abstractmethod
    def step(self, process: Any, state: Any, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """A later time (1, *batch) up to which all is decided, and where a jump happened at it."""


@dataclass(frozen=True)
class Thinning(AbstractSampler):
    """Proposals of a constant rate, kept with probability intensity / bound. Exact if the bound is one.

    The bound is checked at every proposal, and a given one at every jump and at the end of the window. Take it where a
    tight bound is known (`Hawkes`: always); `Inversion` needs none.

    Args:
        slack: by which part of the bound the intensity may exceed it, for rounding.

    Raises:
        BoundError: from `sample`, naming the series, the time, the intensity and the bound.

    References:
        Ogata, "On Lewis' simulation method for point processes", 1981, https://doi.org/10.1109/TIT.1981.1056305

    Example:
        >>> import stochdyn as sd
        >>> sd.Hawkes(0.5, 0.8, 1.6, 0.0, 4.0, max_jumps=50, sampler=sd.Thinning()).sample().shape
        torch.Size([50, 1])
    """

    slack: float = 1e-6

    def step(self, process: Any, state: Any, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """See `AbstractSampler`."""
        end = process._until(state, now, end)
        given = process._bound(state, now, end)
        if given is None:
            raise FieldError(
                f"{type(process).__name__} knows no bound of its intensity, which Thinning() needs. Give `bound`, or "
                "sample by sd.Inversion()."
            )
        bound, until = (x.expand(now.shape) for x in given)
        if process.bound is not None:
            # A bound far too low makes hardly a proposal at which it could be noticed.
            for edge in (now, until):
                self._check(process._rate(state, edge).expand(now.shape), bound, edge, active=now < end)
        t = now + torch.empty_like(now).exponential_() / bound.to(now)
        late = ~(t <= until)
        t = torch.where(late, until, torch.maximum(t, torch.nextafter(now, end)))
        rate = process._rate(state, t).expand(now.shape)
        self._check(rate, bound, t, active=(now < end) & ~late)
        return t, (torch.rand_like(now) * bound < rate) & ~late

    def _check(self, rate: Tensor, bound: Tensor, t: Tensor, active: Tensor) -> None:
        over = active & ~((rate <= bound * (1 + self.slack)) & torch.isfinite(bound))
        if bool(over.any()):
            where = tuple(over.nonzero()[0].tolist())
            limit = float(bound[where])
            relation = "above its bound" if math.isfinite(limit) else "and its bound is"
            raise BoundError(
                f"{member(list(where[1:]))}, time {float(t[where]):.6g}: the intensity is {float(rate[where]):.6g}, "
                f"{relation} {limit:.6g}, so thinning would draw from another law. Give a larger "
                "`bound`, or sample by sd.Inversion()."
            )


@dataclass(frozen=True)
class Inversion(AbstractSampler):
    """The next jump is where the compensator has grown by a draw from Exp(1), found by a bracketed Newton's method.

    Args:
        tolerance: of the compensator.
        reach: how far a step looks ahead, in expected jumps at the intensity of now.

    Raises:
        FieldError: from `sample`, if the intensity is negative or not finite.

    References:
        Daley & Vere-Jones, "An introduction to the theory of point processes", volume 1, 2003, section 7.4,
        https://doi.org/10.1007/b97277

    Example:
        >>> import stochdyn as sd
        >>> process = sd.PoissonProcess(lambda t: 2 + torch.sin(t), 0.0, 10.0, max_jumps=60, sampler=sd.Inversion())
        >>> process.sample((3,)).shape
        torch.Size([3, 60, 1])
    """

    tolerance: float = 1e-10
    reach: float = 4.0

    def step(self, process: Any, state: Any, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """See `AbstractSampler`. A draw that is not used up within reach is forgotten, as Exp(1) allows."""
        end = process._until(state, now, end)
        rate = process._rate(state, now).expand(now.shape).to(now)
        self._check(rate, now)
        high = torch.minimum(end, now + self.reach / rate.clamp_min(torch.finfo(now.dtype).tiny))
        target = torch.empty_like(now).exponential_()
        total = process._integral(state, now, high).expand(now.shape)
        happened = (target < total) & (now < end)
        if not bool(happened.any()):
            return high, happened
        t = self._solve(process, state, now, high, torch.where(happened, target, 0.5 * total))
        t = torch.where(happened, torch.maximum(t, torch.nextafter(now, end)), high)
        return t, happened

    def _solve(self, process: Any, state: Any, start: Tensor, high: Tensor, target: Tensor) -> Tensor:
        low, t, base, last = start, start, start, torch.zeros_like(target)
        t = 0.5 * (start + high)
        for _ in range(100):
            # Integrals go from the last point on: short ones cost few evaluations.
            last = last + process._integral(state, base, t)
            base, miss = t, last - target
            if bool((miss.abs() <= self.tolerance * (1 + target)).all()):
                break
            low, high = torch.where(miss < 0, t, low), torch.where(miss < 0, high, t)
            step = t - miss / process._rate(state, t)
            t = torch.where((step > low) & (step < high), step, 0.5 * (low + high))
        return t

    def _check(self, rate: Tensor, now: Tensor) -> None:
        bad = ~((rate >= 0) & torch.isfinite(rate))
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            raise FieldError(
                f"{member(list(where[1:]))}, time {float(now[where]):.6g}: the intensity is {float(rate[where]):.6g}. "
                "It must be finite and not negative: end it in softplus or exp."
            )


def simulate(process: Any, shape: torch.Size, sampler: AbstractSampler) -> Tensor:
    """Draw sequences, all of a batch together.

    Args:
        process: the point process.
        shape: (*sample, *batch).
        sampler: how the next jump is drawn.

    Returns:
        (*shape, max_jumps, 1 + mark), padded with inf.

    Raises:
        PaddingError: naming the series, if it has more jumps than `max_jumps`.

    Example:
        >>> import stochdyn as sd
        >>> simulate(sd.PoissonProcess(1.0, 0.0, 2.0, max_jumps=20), torch.Size((3,)), sd.Inversion()).shape
        torch.Size([3, 20, 1])
    """
    start, end = (t.expand(shape)[None].contiguous() for t in (process.t0, process.t1))
    now, state, drawn = start, process._begin(start), []
    count = torch.zeros(shape, dtype=torch.long, device=start.device)
    while bool((now < end).any()):
        t, happened = sampler.step(process, state, now, end)
        happened = happened & (now < end)
        if bool(happened.any()):
            mark = process._draw_mark(state, t)
            state = process._next(state, t, mark, happened)
            drawn.append((torch.where(happened, t, torch.full_like(t, float("inf"))), mark))
            count = count + happened[0]
            _check_room(process, count, t)
        state, now = process._onward(state, t), t
    return _padded(process, drawn, shape, start)


def _check_room(process: Any, count: Tensor, t: Tensor) -> None:
    most = process.max_jumps if process.max_jumps is not None else _LIMIT
    over = count > most
    if bool(over.any()):
        where = over.nonzero()[0].tolist()
        raise PaddingError(
            f"{member(where)}: the draw has more than max_jumps={most} jumps by time {float(t[(0, *where)]):.6g}. "
            "Raise max_jumps (the mean number plus some standard deviations); a process that explodes needs other "
            "parameters."
        )


def _padded(process: Any, drawn: list[tuple[Tensor, Tensor]], shape: torch.Size, like: Tensor) -> Tensor:
    width = process.event_shape[-1]
    if drawn:
        times = torch.cat([t for t, _ in drawn])
        times, order = times.sort(0)
        marks = torch.cat([m for _, m in drawn])
        marks = marks.gather(0, order[..., None].expand(marks.shape))
        marks = marks.masked_fill((times == float("inf"))[..., None], 0.0)
        value = torch.cat([times[..., None], marks], -1).movedim(0, -2)
        used = int((times != float("inf")).reshape(len(times), -1).any(1).sum())
    else:
        value, used = like.new_zeros(*shape, 0, width), 0
    rows = used if process.max_jumps is None else process.max_jumps
    out = like.new_zeros(*shape, rows, width)
    out[..., 0] = float("inf")
    out[..., :used, :] = value[..., :used, :]
    return out
