"""Poisson processes: the intensity does not depend on the jumps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import FieldError, ShapeError
from stochdyn.paths.points.base import (
    AbstractPointProcess,
    Rows,
    State,
    joint,
    number,
    parameter,
    upper_bound,
    window,
)
from stochdyn.paths.points.marks import Law
from stochdyn.paths.points.occurrences import Occurrences
from stochdyn.paths.points.precision import at_least, first_that_works
from stochdyn.paths.points.quadrature import integrate
from stochdyn.paths.points.simulate import AbstractSampler, Thinning


class PoissonProcess(AbstractPointProcess):
    """A Poisson process: log p = sum log lambda(t_i) - integral of lambda over the window.

    With a number the integral is closed; with `slope` too (log-linear). For any other intensity it is found by
    quadrature to 1e-9, from each jump to the next; a pulse of less than a hundredth of the gap can escape.

    Args:
        intensity: jumps per unit of time: a number, (*batch,), or a callable `(t[, context])` -> shape of t, positive.
            t is (time, *batch): a parameter of batch shape broadcasts as it is.
        t0, t1: the window, numbers or (*batch,).
        slope: s in lambda(t) = intensity exp(s (t - t0)), a number or (*batch,).
        context: (*batch, context_dim), the second argument of a callable, as (time, *batch, context_dim).
        bound: an upper bound of a callable intensity, for `Thinning()`.
        marks: the law of the marks, of event shape () or (mark,).
        max_jumps: rows of samples; None pads to the longest of a draw.
        sampler: by default `Thinning()` where a bound is known, else `Inversion()`.
        tolerance: of the integral over a gap found by quadrature, absolute and relative.

    Shapes:
        batch_shape: broadcast of intensity, slope, window, context, marks; event_shape (max_jumps, 1 + mark).

    Raises:
        FieldError: for an intensity that is negative, not finite, or cannot be called.
        TimeError, DataError, ShapeError: for a value outside the support, naming the series and the jump.
        PaddingError, BoundError: from `sample`.

    Example:
        >>> import pyro, stochdyn as sd
        >>> jumps = sd.Jumps.from_list([[0.2, 0.7], []], t0=0.0, t1=1.0)
        >>> rate = torch.tensor([2.0, 3.0])
        >>> with jumps.plate("series"):
        ...     value = pyro.sample("jumps", sd.PoissonProcess(rate, jumps.t0, jumps.t1), obs=jumps.values)
        >>> sd.PoissonProcess(rate, 0.0, 1.0).log_prob(jumps.values)
        tensor([-0.6137, -3.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        intensity: float | Tensor | Callable[..., Tensor],
        t0: Any,
        t1: Any,
        *,
        slope: float | Tensor | None = None,
        context: Tensor | None = None,
        bound: float | Tensor | None = None,
        marks: Law | None = None,
        max_jumps: int | None = None,
        sampler: AbstractSampler | None = None,
        tolerance: float = 1e-9,
        validate_args: bool | None = None,
    ) -> None:
        check = bool(self._validate_args if validate_args is None else validate_args)
        self.context, self.slope = context, None if slope is None else number(slope)
        if callable(intensity):
            if slope is not None:
                raise FieldError(
                    "PoissonProcess: `slope` goes with a number. Write it into the callable intensity."
                )
            self.dtype, batch = _probe(intensity, window(t0, t1), context)
        else:
            intensity = parameter(
                "intensity", intensity, positive=True, owner="PoissonProcess", validate=check
            )
            batch = joint("PoissonProcess", intensity.shape, () if self.slope is None else self.slope.shape)
        self.rate, self.tolerance = intensity, tolerance
        self.bound = None if bound is None else upper_bound(bound, "PoissonProcess")
        if sampler is None and (self.bound is not None or not callable(intensity)):
            sampler = Thinning()
        super().__init__(
            batch,
            t0,
            t1,
            marks=marks,
            max_jumps=max_jumps,
            sampler=sampler,
            device=None if callable(self.rate) else self.rate.device,
            validate_args=validate_args,
        )

    def _states(self, jumps: Occurrences) -> State:
        return Rows((), jumps.start.dim())

    def _begin(self, now: Tensor) -> State:
        return Rows((), now.dim() - 1)

    def _next(self, state: State, t: Tensor, mark: Tensor, happened: Tensor) -> State:
        return state

    def _rate(self, state: State, t: Tensor) -> Tensor:
        if callable(self.rate):
            return at_least(_call(self.rate, t.to(self.dtype), self.context), t)
        if self.slope is None:
            return self.rate.expand(t.shape)
        return self._log_line(t).exp()

    def _log_rate(self, state: State, jumps: Occurrences) -> Tensor:
        return super()._log_rate(state, jumps) if self.slope is None else self._log_line(jumps.times)

    def _log_line(self, t: Tensor) -> Tensor:
        return self.rate.log() + self.slope * (t - self.t0.to(t))

    def _integral(self, state: State, a: Tensor, b: Tensor) -> Tensor:
        if callable(self.rate):
            return integrate(
                lambda row, t: _call(self.rate, t.to(self.dtype), self.context),
                a,
                b,
                tolerance=self.tolerance,
            )
        if self.slope is None:
            return self.rate * (b - a)
        return growth(self._log_line(a), self.slope, b - a)

    def _bound(self, state: State, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.bound is not None:
            return self.bound.to(now), end
        if callable(self.rate):
            return None
        return torch.maximum(self._rate(state, now), self._rate(state, end)), end


def growth(start: Tensor, rate: Tensor, length: Tensor) -> Tensor:
    """The integral of exp(start + rate s) over s from 0 to length; right also where the rate is 0.

    Example:
        >>> growth(torch.zeros(2), torch.tensor([0.0, 1.0]), torch.tensor(1.0))
        tensor([1.0000, 1.7183])
    """
    # From the higher end down, so that no factor overflows where the other underflows.
    x = rate * length
    fall = -x.abs()
    small = fall > -1e-5
    safe = torch.where(small, -torch.ones_like(x), fall)
    mean = torch.where(small, 1 + fall / 2 + fall.square() / 6, torch.expm1(safe) / safe)
    return length * torch.maximum(start, start + x).exp() * mean


def _call(intensity: Callable[..., Tensor], t: Tensor, context: Tensor | None) -> Tensor:
    if context is None:
        return intensity(t)
    return intensity(t, context.expand(*t.shape, context.shape[-1]))


def _probe(
    intensity: Callable[..., Tensor], ends: tuple[Tensor, Tensor], context: Tensor | None
) -> tuple[torch.dtype, torch.Size]:
    """The dtype it can be called in, and the batch shape of what the intensity closes over."""
    own = () if context is None else context.shape[:-1]
    t = ends[0].expand(joint("PoissonProcess", ends[0].shape, ends[1].shape, own))
    t = t if context is None else t.to(context.device)
    try:
        dtype, out = first_that_works(context, lambda dtype: _call(intensity, t.to(dtype), context))
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise FieldError(
            f"The intensity failed on t of shape {tuple(t.shape)}: {error}. It is called as (t[, context]) with t of "
            "shape (time, *batch), here without times; a parameter of batch shape broadcasts as it is."
        ) from error
    if not isinstance(out, Tensor):
        raise FieldError(f"The intensity must return a tensor of t's shape, got {type(out).__name__}.")
    try:
        return dtype, torch.broadcast_shapes(out.shape, t.shape)
    except RuntimeError as error:
        raise ShapeError(
            f"The intensity returned shape {tuple(out.shape)} for t of shape {tuple(t.shape)}. One number per time."
        ) from error
