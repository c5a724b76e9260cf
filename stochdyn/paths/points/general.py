"""The general point process: an intensity that depends on the jumps before in any way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.errors import FieldError
from stochdyn.paths.points.base import AbstractPointProcess, State, joint, upper_bound, window
from stochdyn.paths.points.marks import Law, draw_marks, mark_dim, mark_log_prob
from stochdyn.paths.points.occurrences import Occurrences
from stochdyn.paths.points.precision import at_least, first_that_works
from stochdyn.paths.points.quadrature import POINTS, integrate
from stochdyn.paths.points.simulate import AbstractSampler, Thinning
from stochdyn.paths.points.support import check_marks

# Numbers that one vectorised call of an intensity may hold.
_MEMORY = 4_000_000
_ROOM = 4


@dataclass(frozen=True)
class History:
    """What happened before the times t, as an intensity sees it.

    Attributes:
        t: (row, *batch) the times.
        number: (row, *batch) how many jumps came before each, as integers; `count` has them in t's dtype.
        start: (*batch,) the start of the window.
        times: (jump, *batch) all jumps; those of a row are the first `number`.
        marks: (jump, *batch, mark).

    Example:
        >>> one, none = torch.tensor([1]), torch.zeros(1, 0)
        >>> history = History(torch.ones(1), one, torch.tensor(0.0), torch.tensor([0.4]), none)
        >>> history.since, history.sum(lambda lag: torch.exp(-lag))
        (tensor([0.6000]), tensor([0.5488]))
    """

    t: Tensor
    number: Tensor
    start: Tensor
    times: Tensor
    marks: Tensor

    def to(self, dtype: torch.dtype) -> "History":
        """The same with all times and marks in another dtype."""
        t, start, times, marks = (x.to(dtype) for x in (self.t, self.start, self.times, self.marks))
        return History(t, self.number, start, times, marks)

    @property
    def count(self) -> Tensor:
        """(row, *batch) how many jumps came before each time."""
        return self.number.to(self.t)

    @property
    def since(self) -> Tensor:
        """(row, *batch) the time since the last jump, or since the start of the window."""
        edges = torch.cat([self.start.expand(self.times.shape[1:])[None], self.times])
        return self.t - edges.gather(0, self.number.expand(self.t.shape))

    @property
    def past(self) -> Tensor:
        """(jump, row, *batch) which jumps came before."""
        number = torch.arange(len(self.times), device=self.times.device)
        return number.reshape(-1, *[1] * self.t.dim()) < self.number

    def sum(self, kernel: Callable[..., Tensor], *, marks: bool = False) -> Tensor:
        """(row, *batch) the sum of kernel(lag) or, with `marks`, of kernel(lag, mark) over the jumps before.

        Args:
            kernel: of lag (jump, row, *batch), the time since each jump, and of mark (jump, row, *batch, mark).
            marks: whether the kernel takes the marks.
        """
        if len(self.times) == 0:
            return torch.zeros_like(self.t)
        past = self.past
        lag = torch.where(past, self.t - self.times[:, None], torch.zeros_like(self.t))
        given = (lag, self.marks[:, None].expand(*lag.shape, -1)) if marks else (lag,)
        out = kernel(*given)
        return torch.where(past, out, torch.zeros_like(out)).sum(0)


@dataclass(frozen=True)
class _Past:
    """The state: all jumps, and how many of them each row knows."""

    jumps: Occurrences
    count: Tensor

    def take(self, index: Tensor) -> "_Past":
        if index.dim() == 1:
            return replace(self, count=self.count[index])
        return replace(self, count=self.count.gather(0, index))

    def at(self, t: Tensor) -> History:
        return History(t, self.count.expand(t.shape), self.jumps.start, self.jumps.times, self.jumps.marks)


class PointProcess(AbstractPointProcess):
    """The point process with a given conditional intensity, and given marks; the integral by quadrature.

    The integral is found between every two jumps to 1e-9, so kernels should be smooth. A pulse far narrower than its
    gap can escape, unless it comes right after a jump. The cost is quadratic in the number of jumps; `Hawkes` and its
    kin are linear.

    Args:
        intensity: `(t, history[, context])` -> shape of t, positive: jumps per unit of time, of all marks together. t
            is (row, *batch), so that a parameter of batch shape broadcasts as it is; see `History` for what it can ask.
        t0, t1: the window, numbers or (*batch,).
        marks: the law of a mark, of event shape () or (mark,), or `(t, history[, context])` -> such a law.
        context: (*batch, context_dim), passed on as (row, *batch, context_dim).
        bound: for `Thinning()`: an upper bound of the intensity, or `(t, history[, context])` -> one that holds from t
            to the next jump.
        max_jumps: rows of samples; None pads to the longest of a draw.
        sampler: by default `Thinning()` where a bound is given, else `Inversion()`.
        tolerance: of the integral over a gap found by quadrature, absolute and relative.

    Shapes:
        batch_shape: broadcast of what the intensity returns, of window, context and marks; event_shape (max_jumps,
        1 + mark).

    Raises:
        FieldError: for an intensity that is negative, not finite or cannot be called, or a gap without accuracy.
        TimeError, DataError, ShapeError: for a value outside the support, naming the series and the jump.
        PaddingError, BoundError: from `sample`.

    References:
        Daley & Vere-Jones, "An introduction to the theory of point processes", volume 1, 2003, chapter 7,
        https://doi.org/10.1007/b97277

    Example:
        >>> import stochdyn as sd
        >>> def inhibited(t, history):
        ...     return torch.nn.functional.softplus(1 - history.sum(lambda lag: 2 * torch.exp(-lag)))
        >>> process = sd.PointProcess(inhibited, 0.0, 10.0, bound=1.32, max_jumps=50)
        >>> process.log_prob(process.sample((3,))).shape
        torch.Size([3])
    """

    def __init__(
        self,
        intensity: Callable[..., Tensor],
        t0: Any,
        t1: Any,
        *,
        marks: Law | Callable[..., Law] | None = None,
        context: Tensor | None = None,
        bound: float | Tensor | Callable[..., Tensor] | None = None,
        max_jumps: int | None = None,
        sampler: AbstractSampler | None = None,
        tolerance: float = 1e-9,
        validate_args: bool | None = None,
    ) -> None:
        if not callable(intensity):
            raise FieldError(
                f"PointProcess: `intensity` must be callable as (t, history[, context]), got "
                f"{type(intensity).__name__}. A constant one is sd.PoissonProcess."
            )
        self.field, self.context = intensity, context
        fixed_bound = bound is not None and not callable(bound)
        self.bound = upper_bound(bound, "PointProcess") if fixed_bound else bound
        self.tolerance = tolerance
        self.mark_field = None if marks is None or hasattr(marks, "log_prob") else marks
        ends = window(t0, t1)
        own = () if context is None else context.shape[:-1]
        fixed = marks if self.mark_field is None else None
        wide = joint("PointProcess", ends[0].shape, ends[1].shape, own)
        self.dtype, (batch, self._first_law) = self._probe(wide, ends[0], fixed)
        sampler = sampler or (Thinning() if bound is not None else None)
        super().__init__(
            batch, t0, t1, marks=fixed, max_jumps=max_jumps, sampler=sampler, validate_args=validate_args
        )

    def _probe(self, batch: torch.Size, t0: Tensor, marks: Law | None) -> Any:
        # Room on the left for the batch of what the fields close over; a jump that nobody knows, so that kernels run.
        t = t0.expand(batch).reshape(1, *[1] * _ROOM, *batch)
        try:
            return first_that_works(self.context, lambda dtype: self._attempt(t.to(dtype), batch, marks))
        except (RuntimeError, TypeError, IndexError, AttributeError) as error:
            raise FieldError(
                f"The intensity or the marks failed on t of shape {tuple(t.shape)}: {error}. They are called as (t, "
                "history[, context]) with t of shape (row, *batch); a parameter of batch shape broadcasts as it is."
            ) from error

    def _attempt(self, t: Tensor, batch: torch.Size, marks: Law | None) -> tuple[torch.Size, Law | None]:
        none = History(t, torch.zeros_like(t).long(), t[0], t[:0], t.new_zeros(0, *t.shape[1:], 0))
        self.dtype = t.dtype
        first = marks if self.mark_field is None else self._call(self.mark_field, none)
        none = replace(none, times=t, marks=t.new_zeros(*t.shape, mark_dim(first)))
        shape = torch.broadcast_shapes(self._call(self.field, none).shape, t.shape)[1:]
        law = marks if self.mark_field is None else self._call(self.mark_field, none)
        shape = shape if law is None else torch.broadcast_shapes((1, *shape), law.batch_shape)[1:]
        while len(shape) > len(batch) and shape[0] == 1:
            shape = shape[1:]
        return shape, law

    def _call(self, field: Callable[..., Any], history: History) -> Any:
        history = history.to(self.dtype)
        if self.context is None:
            return field(history.t, history)
        return field(history.t, history, self.context.expand(*history.t.shape, self.context.shape[-1]))

    def _mark_dim(self) -> int:
        return mark_dim(self._first_law)

    def _mark_support(self) -> constraints.Constraint | None:
        support = None if self._first_law is None else self._first_law.support
        if self.mark_field is None or support is None or constraints.is_dependent(support):
            return support
        # Bounds of a law that is called anew for every jump are checked with it.
        probe = torch.zeros([1] * support.event_dim)
        return None if support.check(probe).dim() else support

    def _states(self, jumps: Occurrences) -> State:
        number = torch.arange(len(jumps.times) + 1, device=jumps.times.device)
        count = number.reshape(-1, *[1] * jumps.start.dim()).expand(-1, *jumps.start.shape)
        known = torch.cat([torch.zeros_like(count[:1]), jumps.real.cumsum(0)])
        return _Past(jumps, torch.minimum(count, known))

    def _begin(self, now: Tensor) -> State:
        start = now[0]
        marks = now.new_zeros(0, *start.shape, self._mark_dim())
        none = Occurrences(now[:0], marks, now[:0] > 0, start, start)
        return _Past(none, torch.zeros_like(now).long())

    def _next(self, state: State, t: Tensor, mark: Tensor, happened: Tensor) -> State:
        jumps, count = state.jumps, state.count
        if int(count.max()) >= len(jumps.times):
            jumps = _grown(jumps)
        times = torch.where(happened, t, jumps.times.gather(0, count))
        wide = count[..., None].expand(*count.shape, jumps.marks.shape[-1])
        marks = torch.where(happened[..., None], mark, jumps.marks.gather(0, wide))
        jumps = replace(
            jumps, times=jumps.times.scatter(0, count, times), marks=jumps.marks.scatter(0, wide, marks)
        )
        return _Past(jumps, count + happened)

    def _rate(self, state: State, t: Tensor) -> Tensor:
        return at_least(self._call(self.field, state.at(t)), t)

    def _integral(self, state: State, a: Tensor, b: Tensor) -> Tensor:
        points = POINTS * max(len(state.jumps.times), 1) * max(a[0].numel(), 1)
        chunk = max(1, _MEMORY // points)
        return integrate(
            lambda row, t: self._call(self.field, state.take(row).at(t)),
            a,
            b,
            tolerance=self.tolerance,
            chunk=chunk,
        )

    def _bound(self, state: State, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.bound is None:
            return None
        if callable(self.bound):
            return self._call(self.bound, state.at(now)), end
        return self.bound.to(now), end

    def _log_density(self, state: State, jumps: Occurrences) -> Tensor:
        out = super()._log_density(state, jumps)
        if self.mark_field is None:
            return out
        law = self._call(self.mark_field, state.at(jumps.times))
        if self._validate_args and not constraints.is_dependent(law.support):
            check_marks(law.support, jumps)
        return out + mark_log_prob(law, jumps.marks, jumps.real)

    def _draw_mark(self, state: State, t: Tensor) -> Tensor:
        law = self.marks if self.mark_field is None else self._call(self.mark_field, state.at(t))
        return draw_marks(law, t.shape, t)


def _grown(jumps: Occurrences) -> Occurrences:
    more = max(len(jumps.times), 16)
    end = jumps.times.new_full((more, *jumps.start.shape), float("inf"))
    marks = jumps.marks.new_zeros(more, *jumps.marks.shape[1:])
    return replace(
        jumps,
        times=torch.cat([jumps.times, end]),
        marks=torch.cat([jumps.marks, marks]),
        real=torch.isfinite(torch.cat([jumps.times, end])),
    )
