"""What times, values and masks must satisfy before they become data; every rule has its own message.

Data come in as lists, NumPy arrays or tensors and go out as tensors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.errors import DataError, DtypeError, ShapeError, TimeError
from stochdyn.shapes import check_shape

_RAGGED_FIX = "Series of different lengths go into Series.from_list([(times_i, values_i), ...])."
_DATES_FIX = "Turn dates into numbers, e.g. days: (t - t[0]) / np.timedelta64(1, 'D')."
# A gap must be this many float spacings long, or fields of `t` cannot tell its ends apart.
_RESOLUTION = 100.0


def as_tensor(name: str, data: Any) -> Tensor:
    """Turn a list, array or tensor of numbers into a tensor.

    Raises:
        ShapeError: if rows differ in length.
        DtypeError: if the entries are text, dates, complex or other objects.

    Example:
        >>> as_tensor("times", [0, 1, 2])
        tensor([0, 1, 2])
    """
    try:
        if isinstance(data, list | tuple) and data and all(isinstance(row, Tensor) for row in data):
            data = torch.stack(list(data))
        array = data if isinstance(data, Tensor) else np.asarray(data)
    except (ValueError, RuntimeError) as error:
        raise ShapeError(f"`{name}` has rows of different lengths. {_RAGGED_FIX}") from error
    kind = ("c" if array.is_complex() else "t") if isinstance(array, Tensor) else array.dtype.kind
    if kind not in "tbiuf":
        fix = _DATES_FIX if kind in "mM" else "Pass real numbers; missing entries go into `mask`."
        raise DtypeError(f"`{name}` must hold real numbers, got dtype {array.dtype}. {fix}")
    if isinstance(array, Tensor):
        return array
    plain = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}[kind]
    return torch.from_numpy(np.array(array, dtype=plain, order="C"))


def as_real(name: str, data: Any) -> Tensor:
    """Turn a list, array or tensor of real numbers into a tensor; booleans are refused.

    Raises:
        DtypeError: if the entries are not real numbers.

    Example:
        >>> as_real("values", [[0.5]])
        tensor([[0.5000]], dtype=torch.float64)
    """
    tensor = as_tensor(name, data)
    if tensor.dtype == torch.bool:
        raise DtypeError(f"`{name}` must hold real numbers, got torch.bool. Convert it, e.g. to float.")
    return tensor


def as_mask(name: str, data: Any) -> Tensor:
    """Turn a mask into a boolean tensor; the integers 0 and 1 stand for False and True.

    Raises:
        DtypeError: if the mask holds anything else.

    Example:
        >>> as_mask("mask", [[1, 0]])
        tensor([[ True, False]])
    """
    mask = as_tensor(name, data)
    fix = "Pass booleans, True = observed."
    if mask.is_floating_point():
        raise DtypeError(f"`{name}` must be bool, got {mask.dtype}. {fix}")
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        other = int(mask[(mask != 0) & (mask != 1)][0])
        raise DtypeError(f"`{name}` must be bool, or 0 and 1, got the value {other}. {fix}")
    return mask.bool()


def value_dtype(values: Any, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which values are kept: the one asked for, a tensor's own, or torch's default.

    Raises:
        DtypeError: if the dtype asked for is not a floating one.

    Example:
        >>> value_dtype(torch.zeros(1, dtype=torch.float64), None)
        torch.float64
    """
    if dtype is not None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise DtypeError(f"`dtype` must be a floating torch dtype, got {dtype}. Use e.g. torch.float64.")
        return dtype
    rows = values if isinstance(values, list | tuple) else [values]
    own = {row.dtype for row in rows if isinstance(row, Tensor) and row.is_floating_point()}
    if len(own) > 1:
        names = ", ".join(sorted(str(d) for d in own))
        raise DtypeError(f"`values` mixes {names}. Convert them to one dtype, or pass dtype=.")
    return own.pop() if own else torch.get_default_dtype()


def check_devices(**tensors: Any) -> torch.device:
    """The one device that all given tensors share; lists and arrays have none and follow.

    Raises:
        DtypeError: if two tensors are on different devices.

    Example:
        >>> check_devices(times=[0.0], values=torch.zeros(1))
        device(type='cpu')
    """
    heads = {
        name: data[0] if isinstance(data, list | tuple) and data else data for name, data in tensors.items()
    }
    found = {name: head.device for name, head in heads.items() if isinstance(head, Tensor)}
    if len(set(found.values())) > 1:
        where = ", ".join(f"`{name}` on {device}" for name, device in found.items())
        raise DtypeError(
            f"All data must be on one device, got {where}. Build on one device, then use .to(device)."
        )
    return next(iter(found.values()), torch.device("cpu"))


def check_names(name: str, given: Sequence[Any] | None, size: int, default: Sequence[Any]) -> Sequence[Any]:
    """Labels of series or channels: as many as there are, none twice.

    Raises:
        ShapeError: if their number differs.
        DataError: if one is there twice.

    Example:
        >>> check_names("channels", ["hare", "lynx"], 2, ())
        ('hare', 'lynx')
    """
    if given is None:
        return default
    labels = (given,) if isinstance(given, str) else tuple(given)
    if len(labels) != size:
        raise ShapeError(f"`{name}` must have {size} names, got {len(labels)}: {labels}. Name every one.")
    if len(set(labels)) != size:
        twice = next(label for label in labels if labels.count(label) > 1)
        raise DataError(f"`{name}` must be unique, got {twice!r} more than once. Rename one.")
    return labels


def check_sizes(times: Tensor, values: Tensor) -> None:
    """Shapes of times (time,) or (series, time) and values (series, time, channel) must agree.

    Raises:
        ShapeError: if they do not.
        DataError: if there is no series, no time or no channel.

    Example:
        >>> check_sizes(torch.zeros(21), torch.zeros(3, 21, 2))
    """
    fix = "A single series of shape (time, channel) becomes `values[None]`." if values.ndim == 2 else ""
    size = check_shape("values", values, ["series", "time", "channel"], fix)
    for dim, count in size.items():
        if count == 0:
            raise DataError(
                f"`values` has 0 along {dim}, shape {tuple(values.shape)}. Pass at least one {dim}."
            )
    wanted = {1: (size["time"],), 2: (size["series"], size["time"])}.get(times.ndim)
    if tuple(times.shape) != wanted:
        raise ShapeError(
            f"`times` must have shape (time,) = ({size['time']},) or (series, time) = ({size['series']}, "
            f"{size['time']}) to go with `values` of shape (series, time, channel) = {tuple(values.shape)}, "
            f"got {tuple(times.shape)}. Give every row of `values` one time."
        )


def real_lengths(times: Tensor, mask: Tensor) -> Tensor:
    """Count the times of each row that are not padding: repeats of the last time, all masked, are.

    Shapes:
        times (series, time), mask (series, time, channel) -> (series,)

    Example:
        >>> mask = torch.tensor([[[True], [False], [False]]])
        >>> real_lengths(torch.tensor([[0.0, 1.0, 1.0]]), mask)
        tensor([2])
    """
    width = times.shape[1]
    repeats = (times == times[:, -1:]).flip(1).long().cumprod(1).sum(1)
    lengths = width - (repeats - 1).clamp_min(0)
    tail = torch.arange(width, device=times.device) >= lengths[:, None]
    used = (tail & mask.any(-1)).any(1)
    return torch.where(used, width, lengths)


def show_time(time: Tensor | float) -> str:
    """A time as its user wrote it, also if it was written in single precision.

    Example:
        >>> show_time(torch.tensor(0.7).double()), show_time(1900.25)
        ('0.7', '1900.25')
    """
    short = f"{float(time):.7g}"
    return short if float(np.float32(short)) == float(time) else f"{float(time):.10g}"


def check_times(times: Tensor, lengths: Tensor, where: Sequence[str]) -> None:
    """The real times of every row must be finite and strictly increasing.

    Args:
        times: (series, time), float64.
        lengths: (series,), the number of real times.
        where: what each row is called in a message.

    Raises:
        TimeError: naming the row, the index and the times.

    Example:
        >>> check_times(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([2]), ["series 0"])
    """
    if not bool(times.isfinite().all()):
        row, k = times.isfinite().logical_not().nonzero()[0].tolist()
        raise TimeError(
            f"{where[row]}, index {k}: time is {times[row, k].item()}. "
            "Every time must be a finite number: drop the reading, or find its time."
        )
    real = torch.arange(1, times.shape[1], device=times.device) < lengths[:, None]
    bad = (times.diff(dim=1) <= 0) & real
    if not bool(bad.any()):
        return
    row, k = bad.nonzero()[0].tolist()
    before, after = times[row, k].item(), times[row, k + 1].item()
    if before == after:
        raise TimeError(
            f"{where[row]}, index {k + 1}: time {show_time(after)} is there twice. "
            "Average the two readings, or put the second one in another channel."
        )
    raise TimeError(
        f"{where[row]}, index {k + 1}: time {show_time(after)} comes after {show_time(before)}. "
        "Times must increase: sort them together with their values, or use Series.from_frame, which sorts."
    )


def check_resolution(times: Tensor, lengths: Tensor, dtype: torch.dtype, where: Sequence[str]) -> None:
    """Refuse times that the values' dtype cannot tell apart, such as Unix seconds in float32.

    The typical (median) gap must be 100 float spacings at every row's largest time. Single close pairs are
    harmless: steps are computed in float64, and only a field's argument `t` is cast.

    Raises:
        TimeError: naming the row, the spacing and the gap.

    Example:
        >>> years = torch.arange(1900.0, 1921.0, dtype=torch.float64)[None]
        >>> check_resolution(years, torch.tensor([21]), torch.float32, ["times"])
    """
    real = torch.arange(1, times.shape[1], device=times.device) < lengths[:, None]
    gaps = times.diff(dim=1)[real]
    if gaps.numel() == 0:
        return
    gap = float(gaps.kthvalue(len(gaps) // 2 + 1).values)
    exponent = torch.frexp(times.abs().amax(1)).exponent
    spacing = torch.finfo(dtype).eps * torch.exp2(exponent.double() - 1)
    bad = spacing * _RESOLUTION > gap
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise TimeError(
            f"{where[row]}: {dtype} numbers near {show_time(times[row].abs().max())} are {spacing[row]:.3g} "
            f"apart, too coarse for gaps of {gap:.3g}. Subtract the first time and divide by a unit "
            "such as 86400 (seconds to days), or pass dtype=torch.float64."
        )


def fill_missing(raw: Tensor, mask: Tensor, dtype: torch.dtype, say: Any) -> Tensor:
    """Cast values, refuse what is not finite where the mask is True, and fill in where it is False.

    The filling is a value that its channel does take (1 where it has none): a likelihood checks and evaluates all
    values before the mask drops some, and 0 is outside the support of a LogNormal.

    Args:
        raw: (series, time, channel), any real dtype.
        mask: (series, time, channel), True = observed.
        dtype: the floating dtype of the result.
        say: (series, time, channel) positions -> what that reading is called in a message.

    Raises:
        DataError: naming the series, the time and the channel.

    Example:
        >>> raw = torch.tensor([[[float("nan")], [2.0]]])
        >>> fill_missing(raw, torch.tensor([[[False], [True]]]), torch.float32, str).flatten()
        tensor([2., 2.])
    """
    values = torch.where(mask, raw, torch.zeros((), dtype=raw.dtype, device=raw.device)).to(dtype)
    bad = ~values.isfinite()
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        got = raw[tuple(first)].item()
        if np.isfinite(got):
            fix = "Rescale the channel, or pass dtype=torch.float64."
            raise DataError(f"{say(*first)}: value {got:g} does not fit in {dtype}. {fix}")
        raise DataError(f"{say(*first)}: value is {got}. Missing values go into `mask`, not into `values`.")
    return torch.where(mask, values, _typical(values, mask))


def _typical(values: Tensor, mask: Tensor) -> Tensor:
    """(channel,) the largest observed value of every channel, 1 where there is none."""
    largest = values.masked_fill(~mask, -float("inf")).flatten(0, 1).amax(0)
    return torch.where(mask.flatten(0, 1).any(0), largest, torch.ones_like(largest))
