"""Covariates as inputs of a path: from the times at which they were given to the steps of a grid."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn.data.checks import as_real, show_time
from stochdyn.data.ragged import extended_ends, knots_of, merge_times, take_times
from stochdyn.device import readable
from stochdyn.errors import DataError, ShapeError

if TYPE_CHECKING:
    from stochdyn.data.series import Series


@dataclass(frozen=True)
class Given:
    """Covariates that vary in time, and where each was given.

    Attributes:
        times: (series or 1, time), padding repeats the last.
        values: (series, time, covariate).
        knots: the same, True where a value was given; elsewhere it was carried there.
        names: gives what each series is called in a message.
    """

    times: Tensor
    values: Tensor
    knots: Tensor
    names: Callable[[], tuple[Any, ...]]

    def around(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        """(series, k, covariate) the positions of the last knot at or before `ts` (series or 1, k), and of the next.

        The number of times stands for a next one that is not there.

        Raises:
            DataError: if there is no value yet at one of the times.
        """
        size, points, width = self.values.shape
        times, ts = self.times.expand(size, -1).contiguous(), ts.to(self.times.device).expand(size, -1)
        position = torch.arange(points, device=times.device)[:, None].expand(points, width)
        last = torch.where(self.knots, position, -1).cummax(1).values
        following = torch.where(self.knots, position, points).flip(1).cummin(1).values.flip(1)
        following = torch.cat([following, torch.full_like(following[:, :1], points)], 1)
        at = torch.searchsorted(times, ts.contiguous(), right=True)
        before = take_times(last, (at - 1).clamp_min(0)).masked_fill(at[..., None] == 0, -1)
        if readable(before) and bool((before < 0).any()):
            i, k, c = (before < 0).nonzero()[0].tolist()
            series = self.names()[i]
            raise DataError(
                f"series {series}, covariate {c}: the grid needs a value at time {show_time(ts[i, k])}, before "
                "the first was given. A later value must not act there: give one at the start, e.g. "
                "series.with_covariates(given, before=0.0)."
            )
        return before, take_times(following, at)

    def read(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Times and values at positions (series, k, covariate)."""
        times = self.times.expand(len(self.values), -1)[..., None].expand(self.values.shape)
        return times.gather(1, position), self.values.gather(1, position)


class AbstractInterpolation(ABC):
    """How covariates vary between the times at which they were given: `Carried()`, `LinearInterpolation()`, your own.

    Example:
        >>> import torch, stochdyn as sd
        >>> class Nearest(sd.AbstractInterpolation):
        ...     def steps(self, given, ts):
        ...         before, after = given.around(ts)
        ...         after = torch.where(after == given.values.shape[1], before, after)
        ...         (start, low), (end, high) = given.read(before), given.read(after)
        ...         return torch.where(ts[..., None] - start < end - ts[..., None], low, high)
        >>> batch = sd.Series([0.0, 2.0], torch.zeros(1, 2, 1), covariates=torch.tensor([[[5.0], [7.0]]]))
        >>> sd.TimeGrid(batch.times, substeps=4).context(batch, Nearest()).flatten()
        tensor([5., 5., 7., 7., 7.])
    """

    @abstractmethod
    def steps(self, given: Given, ts: Tensor) -> Tensor:
        """What every step of a grid gets, (series, time, covariate): row k for the step from ts[k] to ts[k + 1]."""


@dataclass(frozen=True)
class Carried(AbstractInterpolation):
    """The last value carried forward: a step function that jumps at the times given.

    A value acts from its time on, never before. Exact where these times are on the grid, as those of a `Series` are;
    a solver then keeps its order, since every step has one value.

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series([0.0, 2.0], torch.zeros(1, 2, 1), covariates=torch.tensor([[[5.0], [7.0]]]))
        >>> sd.TimeGrid(batch.times, substeps=2).context(batch, sd.Carried()).flatten()
        tensor([5., 5., 7.])
    """

    def steps(self, given: Given, ts: Tensor) -> Tensor:
        return given.read(given.around(ts)[0])[1]


@dataclass(frozen=True)
class LinearInterpolation(AbstractInterpolation):
    """Straight lines between the times given, constant after the last; a step gets the value at its middle.

    For inputs that were measured (temperature), not for those that were set (doses): it knows the next value before its
    time, so do not forecast with it across times given. A step sees one value, its mean: order 1 with Euler steps and 2
    with Heun's, as without an input; Runge-Kutta steps fall to order 2.

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series([0.0, 2.0], torch.zeros(1, 2, 1), covariates=torch.tensor([[[5.0], [7.0]]]))
        >>> sd.TimeGrid(batch.times, substeps=2).context(batch, sd.LinearInterpolation()).flatten()
        tensor([5.5000, 6.5000, 7.0000])
    """

    def steps(self, given: Given, ts: Tensor) -> Tensor:
        middle = torch.cat([0.5 * (ts[..., :-1] + ts[..., 1:]), ts[..., -1:]], -1)
        before, after = given.around(middle)
        none = after == given.values.shape[1]
        start, low = given.read(before)
        end, high = given.read(torch.where(none, before, after))
        length = (end - start).masked_fill(none, 1.0)
        share = ((middle.to(start.device)[..., None] - start) / length).masked_fill(none, 0.0)
        return torch.lerp(low, high, share.to(low.dtype))


def context_of(batch: "Series", ts: Tensor, interpolation: AbstractInterpolation) -> Tensor:
    """The covariates of a batch for every step of a grid; see `TimeGrid.context`.

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series([0.0, 1.0], torch.zeros(3, 2, 1), covariates=torch.zeros(3, 4))
        >>> context_of(batch, batch.times, sd.Carried()).shape
        torch.Size([3, 1, 4])
    """
    if not isinstance(interpolation, AbstractInterpolation):
        raise DataError(
            f"`interpolation` must be Carried() or LinearInterpolation(), got {interpolation!r}. It is an object."
        )
    if batch.covariates is None:
        raise DataError("The batch has no covariates. Give them to Series(..., covariates=...).")
    if batch.covariates.ndim == 2:
        return batch.covariates[:, None]
    if ts.ndim > 2 or (ts.ndim == 2 and len(ts) not in (1, len(batch))):
        raise ShapeError(
            f"The grid has times of shape {tuple(ts.shape)}, the batch {len(batch)} series. Build it from batch.times."
        )
    return interpolation.steps(given_in(batch), ts.reshape(-1, ts.shape[-1]))


def given_in(batch: "Series") -> Given:
    """The covariates of a batch that vary in time.

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series([0.0, 2.0], torch.zeros(1, 2, 1), covariates=torch.tensor([[[5.0], [7.0]]]))
        >>> given_in(batch.extend([1.0])).knots.flatten()
        tensor([ True, False,  True])
    """
    times = batch.times.reshape(-1, batch.times.shape[-1])
    return Given(times, batch.covariates, knots_of(batch), lambda: batch.ids)


def attach(series: "Series", given: "Series", before: Any) -> dict[str, Any]:
    """The fields of `series` that change when covariates with times of their own are merged in.

    Example:
        >>> import stochdyn as sd
        >>> data, doses = sd.Series([0.0, 2.0], [[[1.0], [2.0]]]), sd.Series([1.0], [[[9.0]]])
        >>> attach(data, doses, 0.0)["covariates"].flatten()
        tensor([0., 9., 9.])
    """
    given = _matched(series, given)
    width = given.values.shape[1]
    padding = torch.arange(width, device=given.times.device) >= given.lengths[:, None]
    extra = given.times.expand(len(series), -1).masked_fill(padding, float("inf"))
    shared = series.times.ndim == 1 and given.times.ndim == 1
    times, source, total = merge_times(series.times.expand(len(series), -1), series.lengths, extra)
    blank = series.values[:, :1].expand(-1, width, -1)
    unseen = torch.zeros_like(blank, dtype=torch.bool)
    known = Given(times, *_at(times, total, given, before, series), lambda: series.ids)
    return {
        "times": times[0] if shared else times,
        "values": take_times(torch.cat([series.values, blank], 1), source),
        "mask": take_times(torch.cat([series.mask, unseen], 1), source),
        **extended_ends(series, blank, source),
        "lengths": total,
        "covariates": known.read(known.around(times)[0])[1],
        "_knots": known.knots,
    }


def _matched(series: "Series", given: "Series") -> "Series":
    """The covariates' series in the order of the data's, by their ids."""
    place = {label: k for k, label in enumerate(given.ids)}
    missing = [label for label in series.ids if label not in place]
    if missing:
        raise DataError(
            f"with_covariates: series {missing[0]} is not among those of the covariates, {len(given)} with ids "
            f"{given.ids[:5]}. Give one for each, with the same ids; a series without any may have one masked time."
        )
    return given[[place[label] for label in series.ids]].to(series.values.device, series.values.dtype)


def _at(
    times: Tensor, total: Tensor, given: "Series", before: Any, series: "Series"
) -> tuple[Tensor, Tensor]:
    """Values and knots at the merged times; where no value was given by the first time, `before` is given there."""
    size, points = times.shape
    own = given.times.expand(size, -1).contiguous()
    found = torch.searchsorted(own, times.contiguous()).clamp_max(own.shape[1] - 1)
    same = (own.gather(1, found) == times) & (torch.arange(points, device=times.device) < total[:, None])
    knots = take_times(given.mask, found) & same[..., None]
    values = take_times(given.values, found)
    if before is not None:
        start = as_real("before", before).to(values.device, values.dtype)
        if start.ndim > 1 or (start.ndim == 1 and len(start) != values.shape[-1]):
            raise ShapeError(
                f"`before` must be a number, or one for each of {values.shape[-1]} covariates, got {start.tolist()}."
            )
        first = torch.arange(points, device=times.device)[:, None] == 0
        values = torch.where(first & ~knots, start, values)
        knots = knots | first
    return values, knots
