"""Poisson processes whose log intensity is known on a grid: read off a path, say."""

from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import FieldError, ShapeError, TimeError
from stochdyn.paths.points.base import AbstractPointProcess, Rows, State, joint
from stochdyn.paths.points.marks import Law
from stochdyn.paths.points.occurrences import Occurrences
from stochdyn.paths.points.poisson import growth
from stochdyn.paths.points.simulate import AbstractSampler, Thinning
from stochdyn.paths.points.support import member


class CoxProcess(AbstractPointProcess):
    """A Poisson process given a path: the log intensity has a value at every grid time and is linear in between.

    log p = sum log lambda(t_i) - integral of lambda, both in closed form: a piece from l to l' that takes time h brings
    h (e^l' - e^l) / (l' - l). With `log_intensity = a + b * z[..., 0]` and z a sampled path it says that jumps, or the
    visits at which a series is observed, come more often where the state is high. Between grid times the path itself
    is replaced by a line: where it matters take shorter steps, and grid times also in long gaps (`TimeGrid(through=)`).
    The grid of a series ends at its last time: one without a reading takes it to the end of the window.

    Args:
        log_intensity: (*batch, time) its logarithm at the grid times.
        ts: (time,) or (*batch, time) the grid; the window starts at its first time. Repeats of the last are padding.
        t1: the end of the window, a number or (*batch,), by default the last time of the grid. Where the model also
            forecasts the grid goes on after it.
        marks: the law of the marks, of event shape () or (mark,).
        max_jumps: rows of samples; None pads to the longest of a draw.
        sampler: by default `Thinning()`.

    Shapes:
        batch_shape: broadcast of log_intensity, ts and marks; event_shape (max_jumps, 1 + mark).

    Raises:
        ShapeError: if log_intensity and ts have different numbers of times.
        FieldError: if log_intensity is not finite, naming the series and the time.
        TimeError: for a grid that does not increase, or ends before t1, or a value outside the window.
        PaddingError: from `sample`.

    References:
        Cox, "Some statistical methods connected with series of events", JRSS B 1955,
        https://doi.org/10.1111/j.2517-6161.1955.tb00188.x
        Diggle, Menezes & Su, "Geostatistical inference under preferential sampling", JRSS C 2010,
        https://doi.org/10.1111/j.1467-9876.2009.00701.x

    Example:
        >>> import stochdyn as sd
        >>> z = sd.SDEPath(lambda t, z: -z, torch.tensor([1.0]), torch.zeros(1), torch.linspace(0, 4, 41)).rsample((3,))
        >>> process = sd.CoxProcess(0.5 + z[..., 0], torch.linspace(0, 4, 41), max_jumps=60)
        >>> process.log_prob(process.sample()).shape
        torch.Size([3])
    """

    def __init__(
        self,
        log_intensity: Tensor,
        ts: Any,
        *,
        t1: Any = None,
        marks: Law | None = None,
        max_jumps: int | None = None,
        sampler: AbstractSampler | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(log_intensity, Tensor):
            raise ShapeError(
                f"CoxProcess: `log_intensity` must be a tensor (*batch, time), got {type(log_intensity).__name__}."
            )
        self.ts = torch.as_tensor(ts, device=log_intensity.device).double()
        check = bool(self._validate_args if validate_args is None else validate_args)
        batch = _check(log_intensity, self.ts, check)
        # Times need their digits, whatever the precision of the path.
        self.log_intensity = log_intensity.double()
        length = self.ts.diff(dim=-1)
        rise = self.log_intensity.diff(dim=-1)
        self.slope = torch.where(length > 0, rise / torch.where(length > 0, length, 1.0), 0.0)
        pieces = growth(self.log_intensity[..., :-1], self.slope, length)
        self.cumulative = torch.nn.functional.pad(pieces.cumsum(-1), (1, 0))
        super().__init__(
            batch,
            self.ts[..., 0],
            self.ts[..., -1] if t1 is None else _end(t1, self.ts),
            marks=marks,
            max_jumps=max_jumps,
            sampler=sampler or Thinning(),
            validate_args=validate_args,
        )

    def _states(self, jumps: Occurrences) -> State:
        return Rows((), jumps.start.dim())

    def _begin(self, now: Tensor) -> State:
        return Rows((), now.dim() - 1)

    def _next(self, state: State, t: Tensor, mark: Tensor, happened: Tensor) -> State:
        return state

    def _rate(self, state: State, t: Tensor) -> Tensor:
        return self._log_line(t).exp()

    def _log_rate(self, state: State, jumps: Occurrences) -> Tensor:
        return self._log_line(jumps.times)

    def _integral(self, state: State, a: Tensor, b: Tensor) -> Tensor:
        return self._until_time(b) - self._until_time(a)

    def _bound(self, state: State, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor] | None:
        piece = self._piece(now)
        until, level = (_read(x, piece + 1) for x in (self.ts, self.log_intensity))
        return torch.maximum(self._log_line(now), level).exp(), torch.minimum(until, end)

    def _log_line(self, t: Tensor) -> Tensor:
        piece = self._piece(t)
        start, level, slope = (_read(x, piece) for x in (self.ts, self.log_intensity, self.slope))
        return level + slope * (t - start)

    def _until_time(self, t: Tensor) -> Tensor:
        """The integral from the start of the window to t (row, *batch)."""
        piece = self._piece(t)
        start, level, slope = (_read(x, piece) for x in (self.ts, self.log_intensity, self.slope))
        return _read(self.cumulative, piece) + growth(level, slope, t - start)

    def _piece(self, t: Tensor) -> Tensor:
        """(row, *batch) in which piece of the line each time lies."""
        inner = self.ts[..., 1:-1].expand(*t.shape[1:], -1).contiguous()
        at = t.double().movedim(0, -1).contiguous()
        return torch.searchsorted(inner, at, right=True).movedim(-1, 0)


def _end(t1: Any, ts: Tensor) -> Tensor:
    end = torch.as_tensor(t1, device=ts.device).double()
    joint("CoxProcess", end.shape, ts.shape[:-1])
    late = end > ts[..., -1]
    if bool(late.any()):
        given, last = (float(x.expand(late.shape)[late][0]) for x in (end, ts[..., -1]))
        raise TimeError(
            f"CoxProcess, {member(late.nonzero()[0].tolist())}: the window ends at t1 = {given:.6g}, the grid at "
            f"{last:.6g}. Let the series end in a time without a reading at t1."
        )
    return end


def _read(values: Tensor, piece: Tensor) -> Tensor:
    """Of (*batch, time) the entries (row, *batch)."""
    last = values.expand(*piece.shape[1:], -1)
    return last.gather(-1, piece.movedim(0, -1)).movedim(-1, 0)


def _check(log_intensity: Tensor, ts: Tensor, validate: bool) -> torch.Size:
    if (
        log_intensity.dim() == 0
        or ts.dim() == 0
        or ts.shape[-1] != log_intensity.shape[-1]
        or ts.shape[-1] < 2
    ):
        raise ShapeError(
            f"CoxProcess: `log_intensity` has shape {tuple(log_intensity.shape)} and `ts` {tuple(ts.shape)}. Both end "
            "in the grid times, two or more: take z[..., 0] of a path on `grid.ts`."
        )
    batch = joint("CoxProcess", log_intensity.shape[:-1], ts.shape[:-1])
    if not validate:
        return batch
    backwards = ~(ts.diff(dim=-1) >= 0)
    if bool(backwards.any()):
        *where, k = backwards.nonzero()[0].tolist()
        raise TimeError(
            f"CoxProcess, {member(where)}: `ts` does not increase after time {float(ts[(*where, k)]):.6g}. Sort it."
        )
    bad = ~torch.isfinite(log_intensity)
    if bool(bad.any()):
        *where, k = bad.nonzero()[0].tolist()
        time = float(ts.expand(*batch, -1)[(*[0] * (len(batch) - len(where)), *where, k)])
        raise FieldError(
            f"CoxProcess, {member(where)}, time {time:.6g}: `log_intensity` is "
            f"{float(log_intensity[(*where, k)]):.6g}. It must be finite: take its logarithm, or bound the path."
        )
    return batch
