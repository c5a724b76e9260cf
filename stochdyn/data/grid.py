"""`TimeGrid`: cut the gaps between observation times into steps, with every observation time on the grid."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from stochdyn.data.checks import as_real, show_time
from stochdyn.data.covariates import AbstractInterpolation, Carried, context_of
from stochdyn.data.series import Series
from stochdyn.device import readable
from stochdyn.errors import ShapeError, TimeError
from stochdyn.shapes import check_shape

MAX_STEPS = 1_000_000
# Share of a step by which a gap may exceed a whole number of steps, so that 0.3 / 0.1 is three steps.
_ROUNDING = 1e-9


@dataclass(frozen=True, init=False, eq=False, repr=False)
class TimeGrid:
    """The grid on which a path is simulated and scored.

    Each gap between consecutive times is cut into equal steps: into the same number (`substeps`), or into
    steps no longer than `dt`. The observation times themselves are on the grid, bit for bit. Rows that end
    early are padded by repeating the last time: zero-length steps, which carry no density.

    Choose `substeps` to train on: a batch of irregular series is then rectangular and steps are few.
    Choose `dt` where the step must be bounded, e.g. with long gaps and stiff dynamics.

    Shapes:
        times (*batch, time) -> ts (*batch, steps + 1), index (*batch, time)

    Args:
        times: increasing; trailing repeats are padding.
        substeps: steps per gap; 5 where neither is given.
        dt: the longest step, in the unit of the times.
        start: a time, or one per series, at or before the first: the path's initial state is there.
        through: further times that must be on the grid, (time,) or (series, time), e.g. those of doses; inf is none.

    Attributes:
        ts: the grid, float64.
        index: the position on the grid of every time.

    Raises:
        TimeError: naming the times, the step or the number of steps.

    Example:
        >>> import stochdyn as sd
        >>> sd.TimeGrid([0.0, 1.0, 4.0], substeps=2).ts
        tensor([0.0000, 0.5000, 1.0000, 2.5000, 4.0000], dtype=torch.float64)
        >>> sd.TimeGrid([0.0, 1.0, 4.0], dt=1.5).index
        tensor([0, 1, 3])
    """

    ts: Tensor
    index: Tensor
    _stride: int | None

    def __init__(
        self,
        times: Any,
        substeps: int | None = None,
        *,
        dt: float | None = None,
        start: Any = None,
        through: Any = None,
    ) -> None:
        if substeps is not None and dt is not None:
            raise TimeError(
                f"TimeGrid takes substeps or dt, got both: substeps={substeps}, dt={dt}. Drop one."
            )
        if isinstance(times, Series):
            raise ShapeError("TimeGrid takes times, got a Series. Pass `series.times`.")
        knots = as_real("times", times).to(torch.float64)
        check_shape("times", knots, ["*batch", "time"])
        _check_knots(knots)
        knots = knots if start is None else _prepend(knots, as_real("start", start))
        position = None
        if through is not None:
            knots, position = _merge(knots, as_real("through", through))
        if dt is None:
            count = _check_substeps(5 if substeps is None else substeps, knots)
            ts, index = _cut_evenly(knots, count)
        else:
            count = None
            ts, index = _cut_by_length(knots, _count_steps(knots, dt))
        if position is not None:
            index, count = index.gather(-1, position), None
        self.__dict__.update(ts=ts, index=index if start is None else index[..., 1:], _stride=count)

    @property
    def steps(self) -> int:
        """The number of steps, one less than the number of grid times."""
        return self.ts.shape[-1] - 1

    def observed(self, path: Tensor) -> Tensor:
        """The states of a path at the observation times.

        What has a row for each observation time and not for each grid time passes through: `PathELBO` gives the model
        a path at the observation times alone.

        Shapes:
            path (*sample, *batch, steps + 1, state) -> (*sample, *batch, time, state)

        Raises:
            ShapeError: if the path was built on another grid.

        Example:
            >>> import torch
            >>> import stochdyn as sd
            >>> grid = sd.TimeGrid([0.0, 1.0, 4.0], substeps=2)
            >>> grid.observed(grid.ts[:, None]).squeeze(-1)
            tensor([0., 1., 4.], dtype=torch.float64)
        """
        points = path.shape[-2] if path.dim() > 1 else -1
        if points == self.index.shape[-1] != self.ts.shape[-1]:
            return path
        fix = "Build the path on `grid.ts`."
        check_shape("path", path, ["*batch", self.ts.shape[-1], "state"], fix)
        if self._stride is not None:
            offset = self.steps - (self.index.shape[-1] - 1) * self._stride
            return path[..., offset :: self._stride, :]
        if self.index.ndim == 1:
            return path.index_select(-2, self.index)
        return self._gather(path, fix)

    def context(self, batch: Series, interpolation: AbstractInterpolation = Carried()) -> Tensor:  # noqa: B008
        """The covariates of a batch for every step, as the `context` of a path.

        Args:
            batch: the series from whose times the grid was made.
            interpolation: `Carried()`, by which a value acts from its time on, or `LinearInterpolation()`.

        Shapes:
            (series, steps + 1, covariate): row k is used in the step from ts[k] to ts[k + 1]; (series, 1, covariate)
            where they are static.

        Raises:
            DataError: if there are no covariates, or the grid begins before the first.
            ShapeError: if the grid is one of other series.

        Example:
            >>> import torch
            >>> import stochdyn as sd
            >>> batch = sd.Series([0.0, 1.0], torch.zeros(3, 2, 1), covariates=torch.randn(3, 2, 4))
            >>> grid = sd.TimeGrid(batch.times, substeps=5)
            >>> sd.NeuralSDE(2, context_dim=4)(grid.ts, grid.context(batch)).batch_shape
            torch.Size([3])
        """
        return context_of(batch, self.ts, interpolation)

    def _gather(self, path: Tensor, fix: str) -> Tensor:
        try:
            batch = torch.broadcast_shapes(path.shape[:-2], self.index.shape[:-1])
        except RuntimeError:
            wanted = (*self.index.shape[:-1], *path.shape[-2:])
            raise ShapeError(
                f"`path` must have shape (*sample, {wanted}), got {tuple(path.shape)}. {fix}"
            ) from None
        picked = self.index[..., None].expand(*batch, self.index.shape[-1], path.shape[-1])
        return path.expand(*batch, *path.shape[-2:]).gather(-2, picked)

    def __repr__(self) -> str:
        first, last = float(self.ts.min()), float(self.ts.max())
        how = "by dt" if self._stride is None else f"{self._stride} per gap"
        shape = tuple(self.ts.shape)
        return f"TimeGrid({self.steps} steps, {how}, from {first:.10g} to {last:.10g}, ts of shape {shape})"


def _check_knots(times: Tensor) -> None:
    """Fast where all is well: two numbers are read. The rest finds the words."""
    if times.numel() == 0:
        raise TimeError(f"`times` of shape {tuple(times.shape)} holds no time. Pass at least one.")
    if not readable(times):
        return
    if times.shape[-1] > 1:
        low, high = torch.aminmax(times.diff(dim=-1))
        if float(low) > 0 and float(high) < float("inf"):
            return
    rows = times.reshape(-1, times.shape[-1])
    if not bool(rows.isfinite().all()):
        row, k = rows.isfinite().logical_not().nonzero()[0].tolist()
        got = rows[row, k].item()
        raise TimeError(
            f"{_place(times, row)}, index {k}: time is {got}. Every time must be a finite number."
        )
    gaps = rows.diff(dim=-1)
    later = gaps.flip(-1).cumsum(-1).flip(-1) if gaps.numel() else gaps
    bad = (gaps < 0) | ((gaps == 0) & (later > 0))
    if bool(bad.any()):
        row, k = bad.nonzero()[0].tolist()
        before, after = rows[row, k].item(), rows[row, k + 1].item()
        raise TimeError(
            f"{_place(times, row)}, index {k + 1}: time {show_time(after)} comes after {show_time(before)}. "
            "Times must increase (repeats of the last one are padding): sort them, and drop repeats."
        )


def _place(times: Tensor, row: int) -> str:
    return "`times`" if times.ndim == 1 else f"`times` of series {row}"


def _prepend(times: Tensor, start: Tensor) -> Tensor:
    """Put the start before the first time; one start per series makes the grid one per series."""
    start = start.to(times.device, torch.float64)
    try:
        batch = torch.broadcast_shapes(start.shape, times.shape[:-1])
    except RuntimeError:
        batch = torch.Size([0])
    if batch.numel() == 0:
        wanted = tuple(times.shape[:-1]) or "(series,)"
        got = tuple(start.shape)
        raise ShapeError(f"`start` must be a number or have shape {wanted}, got {got}. One per series.")
    times, start = times.expand(*batch, -1), start.expand(batch)
    bad = ~((start <= times[..., 0]) & start.isfinite())
    if readable(bad) and bool(bad.any()):
        got, first = float(start[bad][0]), float(times[..., 0][bad][0])
        raise TimeError(
            f"`start` must be a finite time at or before the first, got {show_time(got)} with first "
            f"time {show_time(first)}. Start the path earlier."
        )
    return torch.cat([start[..., None], times], -1)


def _merge(knots: Tensor, through: Tensor) -> tuple[Tensor, Tensor]:
    """The knots with further times among them, repeats at the end, and the position of each knot."""
    through = through.to(knots.device, torch.float64)
    check_shape("through", through, ["*batch", "time"])
    batch = torch.broadcast_shapes(knots.shape[:-1], through.shape[:-1])
    knots, through = knots.expand(*batch, -1).contiguous(), through.expand(*batch, -1)
    last = knots[..., -1:]
    real = through.isfinite()
    bad = (real & ((through < knots[..., :1]) | (through > last))) | through.isnan()
    if bool(bad.any()):
        got, first = through[bad][0], knots[..., :1].expand(bad.shape)[bad][0]
        raise TimeError(
            f"`through` has time {show_time(got)}, but the grid goes from {show_time(first)}"
            f" to {show_time(last.expand(bad.shape)[bad][0])}. Start it earlier (start=), or leave the time out."
        )
    merged = torch.cat([knots, torch.where(real, through, last)], -1).sort(-1).values
    fresh = torch.cat([torch.ones_like(merged[..., :1], dtype=torch.bool), merged.diff(dim=-1) > 0], -1)
    count = fresh.sum(-1, keepdim=True)
    order = (~fresh).to(torch.int8).argsort(dim=-1, stable=True)
    merged = merged.gather(-1, order)[..., : int(count.max())]
    merged = torch.where(torch.arange(merged.shape[-1], device=merged.device) < count, merged, last)
    return merged, torch.searchsorted(merged.contiguous(), knots)


def _check_substeps(substeps: int, times: Tensor) -> int:
    if isinstance(substeps, bool) or not isinstance(substeps, Integral) or substeps < 1:
        raise TimeError(
            f"`substeps` must be an integer of at least 1, got {substeps!r}. Bound the step with dt=."
        )
    total = substeps * (times.shape[-1] - 1)
    if total > MAX_STEPS:
        raise TimeError(
            f"substeps={substeps} makes {total} steps, more than {MAX_STEPS}. Take fewer substeps."
        )
    return int(substeps)


def _cut_evenly(times: Tensor, substeps: int) -> tuple[Tensor, Tensor]:
    share = torch.arange(substeps, dtype=torch.float64, device=times.device) / substeps
    inner = torch.addcmul(times[..., :-1, None], times.diff(dim=-1)[..., None], share)
    ts = torch.cat([inner.flatten(-2), times[..., -1:]], -1)
    index = torch.arange(0, ts.shape[-1], substeps, device=times.device)
    return ts, index.expand(times.shape)


def _count_steps(times: Tensor, dt: float) -> Tensor:
    """(*batch, time - 1) the number of steps in each gap; none in a gap of length zero."""
    step = float(as_real("dt", dt))
    if not 0 < step < float("inf"):
        raise TimeError(
            f"`dt` must be positive and finite, got {dt}. It is the longest step, in the times' unit."
        )
    gaps = times.diff(dim=-1)
    counts = torch.where(gaps > 0, (gaps / step - _ROUNDING).ceil().clamp_min(1.0), 0.0)
    total = float(counts.sum(-1).max())
    if total > MAX_STEPS:
        raise TimeError(
            f"dt={step:g} makes {total:.3g} steps, more than {MAX_STEPS}; the longest gap is "
            f"{float(gaps.max()):g}. Take a longer dt, or substeps=."
        )
    return counts


def _cut_by_length(times: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.nn.functional.pad(counts.cumsum(-1).long(), (1, 0))
    position = torch.arange(int(index[..., -1].max()) + 1, device=times.device)
    gap = torch.searchsorted(index, position.expand(*index.shape[:-1], -1).contiguous(), right=True) - 1
    length = torch.nn.functional.pad(times.diff(dim=-1), (0, 1)).gather(-1, gap)
    count = torch.nn.functional.pad(counts, (0, 1), value=1.0).gather(-1, gap)
    done = (position - index.gather(-1, gap)) / count
    return times.gather(-1, gap) + length * done, index
