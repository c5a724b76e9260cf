"""Rows of different lengths: padding, merging further times in, reading long data frames.

Padding repeats a row's last real time; a grid then has zero-length steps there, which carry no density.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stochdyn.data.censoring import frame_limits
from stochdyn.data.checks import as_mask, as_real, check_devices
from stochdyn.data.groups import constant_labels
from stochdyn.errors import DataError, DtypeError, ShapeError, TimeError
from stochdyn.shapes import check_shape


def repeat_last(padded: Tensor, lengths: Tensor) -> Tensor:
    """Overwrite the padding of each row by its last real entry.

    Shapes:
        padded (series, time, *rest), lengths (series,)

    Example:
        >>> repeat_last(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([2]))
        tensor([[1., 2., 2.]])
    """
    steps = torch.arange(padded.shape[1], device=padded.device)
    source = torch.minimum(steps, lengths[:, None] - 1)
    return take_times(padded, source)


def take_times(rows: Tensor, source: Tensor) -> Tensor:
    """Pick times row by row: `out[i, k] = rows[i, source[i, k]]`.

    Shapes:
        rows (series, time, *rest), source (series, new_time)

    Example:
        >>> take_times(torch.tensor([[5.0, 6.0]]), torch.tensor([[1, 1, 0]]))
        tensor([[6., 6., 5.]])
    """
    picked = source.reshape(*source.shape, *[1] * (rows.ndim - 2)).expand(*source.shape, *rows.shape[2:])
    return rows.gather(1, picked)


def stack_rows(rows: Sequence[Any], where: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pad [(times_i, values_i[, mask_i]), ...] to the longest row.

    Returns:
        times (series, time), values (series, time, channel), mask (series, time, channel), lengths (series,).

    Raises:
        ShapeError: if an entry is not a pair or triple, or its sizes disagree.
        DataError: if there is no series, or one without times.

    Example:
        >>> rows = [([0, 1], [[1.0], [2.0]]), ([5], [[3.0]])]
        >>> times, *_, lengths = stack_rows(rows, ["series 0", "series 1"])
        >>> times.tolist(), lengths.tolist()
        ([[0.0, 1.0], [5.0, 5.0]], [2, 1])
    """
    if len(rows) == 0:
        raise DataError("There is no series in the list. Pass at least one (times, values).")
    triples = [_read_row(row, place) for row, place in zip(rows, where, strict=True)]
    channels = triples[0][1].shape[1]
    for (_, values, _), place in zip(triples, where, strict=True):
        check_shape(
            f"values of {place}", values, ["time", channels], "All series must have the same channels."
        )
    times, values, mask = (list(column) for column in zip(*triples, strict=True))
    check_devices(**{f"values of {place}": v for place, v in zip(where, values, strict=True)})
    lengths = torch.tensor([len(t) for t in times], device=values[0].device)
    common = values[0].dtype if len({v.dtype for v in values}) == 1 else torch.float64
    padded = pad_sequence([v.to(common) for v in values], batch_first=True)
    observed = pad_sequence(mask, batch_first=True)
    return repeat_last(pad_sequence(times, batch_first=True), lengths), padded, observed, lengths


def _read_row(row: Any, place: str) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(row, list | tuple) or len(row) not in (2, 3):
        raise ShapeError(
            f"{place} must be (times, values) or (times, values, mask), got {type(row).__name__}."
        )
    device = check_devices(**dict(zip((f"times of {place}", f"values of {place}"), row, strict=False)))
    times = as_real(f"times of {place}", row[0]).to(device, torch.float64)
    values = as_real(f"values of {place}", row[1]).to(device)
    size = check_shape(f"times of {place}", times, ["time"])["time"]
    if size == 0:
        raise DataError(f"{place} has no times. Leave it out, or give it one masked time.")
    fix = (
        "One channel of shape (time,) becomes `values[:, None]`."
        if values.ndim == 1
        else "Give every row a time."
    )
    check_shape(f"values of {place}", values, [size, "channel"], fix)
    if len(row) == 2 or row[2] is None:
        return times, values, torch.ones(values.shape, dtype=torch.bool, device=device)
    mask = as_mask(f"mask of {place}", row[2]).to(device)
    mask = mask[:, None].expand_as(values) if tuple(mask.shape) == (size,) else mask
    check_shape(f"mask of {place}", mask, list(values.shape), "One entry per value, or per time.")
    return times, values, mask


def stack_covariates(covariates: Any, lengths: Tensor, name: str = "covariates") -> Any:
    """Pad a list of (time_i, covariate) arrays by their last row; anything else passes through.

    Raises:
        ShapeError: if one has another number of times or of covariates.

    Example:
        >>> stack_covariates([[[1.0], [2.0]], [[3.0]]], torch.tensor([2, 1])).squeeze(-1)
        tensor([[1., 2.],
                [3., 3.]], dtype=torch.float64)
    """
    if not isinstance(covariates, list | tuple) or len(covariates) != len(lengths):
        return covariates
    rows = [as_real(f"{name} of series {i}", row) for i, row in enumerate(covariates)]
    if rows[0].ndim != 2:
        return covariates
    for i, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        check_shape(
            f"{name} of series {i}", row, [length, rows[0].shape[1]], "One row per time of the series."
        )
    return repeat_last(pad_sequence(rows, batch_first=True), lengths.to(rows[0].device))


def pad_limits(limits: dict[str, Any], lengths: Tensor) -> dict[str, Any]:
    """Lists of (time_i, channel) limits of censoring, padded to (series, time, channel); all else passes through.

    Example:
        >>> pad_limits({"lower": [[[1.0], [2.0]], [[3.0]]]}, torch.tensor([2, 1]))["lower"].shape
        torch.Size([2, 2, 1])
    """

    def padded(name: str, limit: Any) -> Any:
        if name == "between" and isinstance(limit, list | tuple) and len(limit) == 2:
            return tuple(stack_covariates(end, lengths, name) for end in limit)
        return stack_covariates(limit, lengths, name)

    return {name: padded(name, limit) for name, limit in limits.items()}


def merge_times(times: Tensor, lengths: Tensor, extra: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge further times into every row, in order; a time that a row has already is not added again.

    Shapes:
        times (series, time), lengths (series,), extra (k,) ->
        merged (series, new_time), source (series, new_time), lengths (series,)

    Returns:
        The merged times, the position each had in [the row's times, extra], and the numbers of real times.

    Example:
        >>> merge_times(torch.tensor([[0.0, 2.0]]), torch.tensor([2]), torch.tensor([1.0, 2.0]))
        (tensor([[0., 1., 2.]]), tensor([[0, 2, 1]]), tensor([3]))
    """
    rows, width = times.shape
    padding = torch.arange(width, device=times.device) >= lengths[:, None]
    old = times.masked_fill(padding, float("inf"))
    extra = extra.expand(rows, -1).contiguous()
    known = old.gather(1, torch.searchsorted(old, extra).clamp_max(width - 1)) == extra
    merged, source = torch.cat([old, extra.masked_fill(known, float("inf"))], 1).sort(1)
    total = merged.isfinite().sum(1)
    keep = int(total.max())
    return repeat_last(merged[:, :keep], total), source[:, :keep], total


def carry_forward(covariates: Tensor | None, rows: Tensor, lengths: Tensor, times: Tensor) -> Tensor | None:
    """Covariates at merged times: the last value known by then, before the first time the first one.

    Static ones pass through.

    Shapes:
        covariates (series, time, covariate), rows (series or 1, time), lengths (series or 1,),
        times (series or 1, new_time) -> (series, new_time, covariate)

    Example:
        >>> rows, times = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.5, 1.0]])
        >>> carry_forward(torch.tensor([[[5.0], [6.0]]]), rows, torch.tensor([2]), times).flatten()
        tensor([5., 5., 6.])
    """
    if covariates is None or covariates.ndim == 2:
        return covariates
    before = torch.searchsorted(rows.contiguous(), times.contiguous(), right=True) - 1
    before = torch.minimum(before.clamp_min(0), lengths[:, None] - 1)
    return take_times(covariates, before.expand(len(covariates), -1))


def knots_of(batch: Any) -> Tensor:
    """(series, time, covariate) where a value was given: by default at all real times.

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series([0.0, 2.0], torch.zeros(1, 2, 1), covariates=torch.zeros(1, 2, 3))
        >>> knots_of(batch).shape, bool(knots_of(batch).all())
        (torch.Size([1, 2, 3]), True)
    """
    if batch._knots is not None:
        return batch._knots
    real = torch.arange(batch.values.shape[1], device=batch.index.device) < batch.lengths[:, None]
    return real[..., None].expand(batch.covariates.shape)


def extend_knots(batch: Any, source: Tensor, count: int) -> Tensor | None:
    """The knots after `count` further times were merged in; none of these is one.

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series([0.0, 2.0], torch.zeros(1, 2, 1), covariates=torch.zeros(1, 2, 1))
        >>> extend_knots(batch, torch.tensor([[0, 2, 1]]), 1).flatten()
        tensor([ True, False,  True])
    """
    if batch.covariates is None or batch.covariates.ndim == 2:
        return None
    knots = knots_of(batch)
    return take_times(torch.cat([knots, torch.zeros_like(knots[:, :1]).expand(-1, count, -1)], 1), source)


def _read_extra(ts: Any, device: torch.device) -> Tensor:
    extra = as_real("ts", ts).to(device, torch.float64)
    check_shape("ts", extra, ["time"], "The further times are shared by all series.")
    if not bool(extra.isfinite().all()):
        k = int(extra.isfinite().logical_not().nonzero()[0])
        raise TimeError(f"`ts`, index {k}: time is {extra[k].item()}. Every time must be a finite number.")
    return extra.unique()


def extend_rows(series: Any, ts: Any) -> dict[str, Any]:
    """The fields of a `Series` that change when unobserved times are merged in.

    Example:
        >>> import stochdyn as sd
        >>> extend_rows(sd.Series([0.0, 1.0], [[[1.0], [2.0]]]), [3.0])["values"].flatten()
        tensor([1., 2., 1.])
    """
    extra = _read_extra(ts, series.times.device)
    shared = series.times.ndim == 1
    rows, lengths = (series.times[None], series.lengths[:1]) if shared else (series.times, series.lengths)
    times, source, total = merge_times(rows, lengths, extra)
    source = source.expand(len(series), -1)
    # The first value stands in: observed or not, it is one that the likelihood can evaluate.
    blank = series.values[:, :1].expand(-1, len(extra), -1)
    return {
        "times": times[0] if shared else times,
        "values": take_times(torch.cat([series.values, blank], 1), source),
        "mask": take_times(torch.cat([series.mask, torch.zeros_like(blank, dtype=torch.bool)], 1), source),
        **extended_ends(series, blank, source),
        "lengths": total.expand(len(series)),
        "covariates": carry_forward(series.covariates, rows, lengths, times),
        "_knots": extend_knots(series, source, len(extra)),
    }


def extended_ends(series: Any, blank: Tensor, source: Tensor) -> dict[str, Tensor]:
    """The ends of censored values at merged times, none at the new ones.

    Args:
        series: a `Series`.
        blank: (series, k, channel), of the size of what is new.
        source: where each merged time comes from, see `merge_times`.
    """
    if series.low is None:
        return {}
    ends = {"low": (series.low, -torch.inf), "high": (series.high, torch.inf)}
    return {
        name: take_times(torch.cat([end, torch.full_like(blank, nothing)], 1), source)
        for name, (end, nothing) in ends.items()
    }


def read_frame(
    frame: Any,
    time: str,
    values: str | Sequence[str],
    series: str | None,
    covariates: str | Sequence[str],
    groups: str | Sequence[str] = (),
    *,
    limits: dict[str, Any] | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """Read a long pandas frame into rows (times, values, mask), and channels, ids, covariates and groups.

    NaN in a values column is what a data frame means by missing: the mask is False there.

    Raises:
        DataError: if a column is missing or not numeric, or a series has two labels of one grouping.

    Example:
        >>> import pandas
        >>> frame = pandas.DataFrame({"day": [1, 0], "mood": [None, 2.0]})
        >>> rows, options = read_frame(frame, "day", "mood", None, ())
        >>> rows[0][0].tolist(), rows[0][2].tolist(), options["channels"]
        ([0.0, 1.0], [[True], [False]], ['mood'])
    """
    names = [values] if isinstance(values, str) else list(values)
    inputs = [covariates] if isinstance(covariates, str) else list(covariates)
    if len(frame) == 0 or not names:
        raise DataError(f"There is no {'row' if names else 'column'} to read. Pass at least one.")
    times = _column(frame, time)
    readings = np.stack([_column(frame, name) for name in names], 1)
    extras = np.stack([_column(frame, name) for name in inputs], 1) if inputs else None
    labels = [0] * len(frame) if series is None else _find(frame, series).tolist()
    members_of: dict[Any, list[int]] = {}
    for position, label in enumerate(labels):
        if label is None or label != label:
            raise DataError(
                f"Row {position} has no series: column {series!r} is missing there. Fill or drop it."
            )
        members_of.setdefault(label, []).append(position)
    order = [np.asarray(members)[times[members].argsort(kind="stable")] for members in members_of.values()]
    ends = frame_limits(lambda name: _column(frame, name), limits or {}, len(names), order)
    inside = (
        [~np.isnan(a) | ~np.isnan(b) for a, b in zip(*ends["between"], strict=True)]
        if "between" in ends
        else [False] * len(order)
    )
    rows = [(times[o], readings[o], ~np.isnan(readings[o]) | i) for o, i in zip(order, inside, strict=True)]
    covariates_of = None if extras is None else [extras[o] for o in order]
    where = [f"series {label}" for label in members_of]
    return rows, ends | {
        "channels": [str(name) for name in names],
        "ids": tuple(members_of),
        "covariates": covariates_of,
        "groups": {
            name: constant_labels(name, [_find(frame, name).iloc[o].tolist() for o in order], where)
            for name in ([groups] if isinstance(groups, str) else groups)
        },
    }


def _find(frame: Any, name: str) -> Any:
    present = list(frame.columns)
    if present.count(name) != 1:
        trouble = "is not in" if name not in present else "is there more than once in"
        raise DataError(f"Column {name!r} {trouble} the data frame. It has: {', '.join(map(repr, present))}.")
    return frame[name]


def _column(frame: Any, name: str) -> np.ndarray:
    column = _find(frame, name)
    kind = column.dtype.kind
    if kind in "mM":
        raise DtypeError(
            f"Column {name!r} holds dates ({column.dtype}). Turn them into numbers, e.g. days: "
            f"frame[{name!r}] = (frame[{name!r}] - frame[{name!r}].min()) / pandas.Timedelta('1D')."
        )
    if kind not in "iuf":
        raise DataError(
            f"Column {name!r} must be numeric, got {column.dtype}. Convert it, e.g. pandas.to_numeric."
        )
    return column.to_numpy(dtype="float64", na_value=float("nan"))
