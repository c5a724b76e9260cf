"""Censored values: limits of quantification and intervals become the two ends between which the truth lies."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.data.checks import as_real
from stochdyn.errors import DataError, ShapeError

Say = Callable[[int, int, int], str]
Ends = tuple[Tensor, Tensor]


def read_limits(
    raw: Tensor, mask: Tensor, limits: dict[str, Any], dtype: torch.dtype, say: Say
) -> Ends | None:
    """The ends `low` and `high` of every entry, -inf and inf where it is exact; None where all are.

    Args:
        raw: (series, time, channel), as the user gave them.
        mask: True = observed.
        limits: `lower`, `upper` and `between`, as for `Series`.
        dtype: of the values; limits are compared in it, so that a value recorded as the limit is at the limit.
        say: what a reading is called in a message.

    Raises:
        ShapeError: if a limit fits neither the channels nor the values.
        DataError: if limits contradict each other, or are NaN.

    Example:
        >>> raw = torch.tensor([[[0.1], [3.0]]])
        >>> low, high = read_limits(raw, raw > 0, {"lower": 0.5}, torch.float32, str)
        >>> low.flatten().tolist(), high.flatten().tolist()
        ([-inf, -inf], [0.5, inf])
    """
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if not given:
        return None
    lower = _spread("lower", given.get("lower", -torch.inf), raw, dtype)
    upper = _spread("upper", given.get("upper", torch.inf), raw, dtype)
    _refuse_where(lower.isnan() | upper.isnan(), say, "a limit is NaN. Write -inf or inf where there is none")
    _refuse_where(
        lower >= upper,
        say,
        "`lower` is not below `upper`. A value would be censored on both sides",
        lower,
        upper,
    )
    values = raw.to(dtype)
    left, right = mask & (values <= lower), mask & (values >= upper)
    low = torch.where(right, upper, torch.full_like(upper, -torch.inf))
    high = torch.where(left, lower, torch.full_like(lower, torch.inf))
    if "between" in given:
        low, high = _within(given["between"], (low, high), mask, say)
    censored = low.isfinite() | high.isfinite()
    return (low, high) if bool(censored.any()) else None


def place(values: Tensor, ends: Ends | None) -> Tensor:
    """What stands for a censored value: its limit, or the middle of its interval.

    Example:
        >>> place(torch.zeros(2), (torch.tensor([-torch.inf, 1.0]), torch.tensor([torch.inf, 2.0])))
        tensor([0.0000, 1.5000])
    """
    if ends is None:
        return values
    low, high = ends
    below, above = high.isfinite(), low.isfinite()
    one = torch.where(below, high, low)
    limit = torch.where(below & above, 0.5 * low + 0.5 * high, one)
    return torch.where(below | above, limit, values)


def exact(mask: Tensor, ends: Ends | None) -> Tensor:
    """Where a value was observed and is not censored.

    Example:
        >>> exact(torch.tensor([True, True]), (torch.tensor([-torch.inf, 1.0]), torch.tensor([torch.inf, 2.0])))
        tensor([ True, False])
    """
    return mask if ends is None else mask & ~(ends[0].isfinite() | ends[1].isfinite())


def frame_limits(
    column: Callable[[str], np.ndarray], limits: dict[str, Any], width: int, order: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Limits by names of columns of a data frame, NaN where there is none, as lists of (time_i, channel).

    Args:
        column: name to numbers.
        limits: `lower`, `upper` and `between`; each a number or a column, for all channels or one for each.
        width: the number of channels.
        order: the rows of every series.

    Raises:
        ShapeError: if there are not as many as channels.

    Example:
        >>> frame = {"loq": np.array([0.5, np.nan])}
        >>> frame_limits(frame.__getitem__, {"lower": "loq"}, 1, [np.array([0, 1])])["lower"][0].tolist()
        [[0.5], [-inf]]
    """
    rows = sum(len(o) for o in order)

    def read(name: str, limit: Any, missing: float) -> list[np.ndarray]:
        each = list(limit) if isinstance(limit, list | tuple) else [limit] * width
        if len(each) != width:
            raise ShapeError(
                f"`{name}` has {len(each)} entries for {width} channels. Give one for each, or one."
            )
        columns = [
            column(one) if isinstance(one, str) else np.full(rows, missing if one is None else one)
            for one in each
        ]
        table = np.stack(columns, 1)
        table = np.where(np.isnan(table), missing, table)
        return [table[o] for o in order]

    out: dict[str, Any] = {}
    for name, missing in (("lower", -np.inf), ("upper", np.inf)):
        if limits.get(name) is not None:
            out[name] = read(name, limits[name], missing)
    if limits.get("between") is not None:
        out["between"] = tuple(read("between", end, np.nan) for end in _pair(limits["between"]))
    return out


def _pair(between: Any) -> tuple[Any, Any]:
    if not isinstance(between, list | tuple) or len(between) != 2:
        raise ShapeError(
            f"`between` must be a pair (low, high), got {type(between).__name__}. Give the two ends, NaN where a "
            "value is exact."
        )
    return between[0], between[1]


def _spread(name: str, limit: Any, raw: Tensor, dtype: torch.dtype) -> Tensor:
    read = as_real(name, limit).to(raw.device, dtype)
    fits = read.ndim in (0, 1, 3) and all(
        size in (1, full) for size, full in zip(read.shape[::-1], raw.shape[::-1], strict=False)
    )
    if not fits:
        raise ShapeError(
            f"`{name}` must be a number, (channel,) = ({raw.shape[-1]},) or (series, time, channel) = "
            f"{tuple(raw.shape)}, got {tuple(read.shape)}. One limit for each series is (series, 1, 1)."
        )
    return read.expand(raw.shape)


def _within(between: Any, ends: Ends, mask: Tensor, say: Say) -> Ends:
    low, high = (_spread("between", end, ends[0], ends[0].dtype) for end in _pair(between))
    given = mask & ~(low.isnan() & high.isnan())
    _refuse_where(given & (low.isnan() | high.isnan()), say, "one end of `between` is NaN. Write -inf or inf")
    _refuse_where(
        given & (low >= high), say, "`between` is empty. An exact value has NaN for both ends", low, high
    )
    _refuse_where(given & low.isinf() & high.isinf(), say, "`between` says nothing. Set its mask to False")
    return torch.where(given, low, ends[0]), torch.where(given, high, ends[1])


def _refuse_where(bad: Tensor, say: Say, rule: str, *ends: Tensor) -> None:
    if not bool(bad.any()):
        return
    first = bad.nonzero()[0].tolist()
    what, fix = rule.split(". ", 1)
    got = f" (got {' and '.join(f'{float(end[tuple(first)]):g}' for end in ends)})" if ends else ""
    raise DataError(f"{say(*first)}: {what}{got}. {fix}.")
