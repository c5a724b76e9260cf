"""From checked tensors to the fields of a `Series`: all rules applied in one order."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stochdyn.data.censoring import exact, place, read_limits
from stochdyn.data.checks import (
    as_real,
    check_names,
    check_resolution,
    check_sizes,
    check_times,
    fill_missing,
    real_lengths,
    show_time,
    value_dtype,
)
from stochdyn.data.groups import read_groups
from stochdyn.data.ragged import pad_limits, repeat_last, stack_covariates, stack_rows
from stochdyn.errors import DataError
from stochdyn.shapes import check_shape


def assemble(
    times: Tensor,
    raw: Tensor,
    mask: Tensor | None,
    *,
    channels: Sequence[str] | None,
    ids: Sequence[Any] | None,
    covariates: Any,
    dtype: torch.dtype,
    groups: Mapping[str, Any] | None = None,
    limits: dict[str, Any] | None = None,
    lengths: Tensor | None = None,
) -> dict[str, Any]:
    """Check everything and return the fields of a `Series` that is a whole population.

    Args:
        times: (time,) or (series, time), float64.
        raw: (series, time, channel), as the user gave them.
        mask: (series, time), (series, time, channel) or None.
        channels: names or None.
        ids: labels or None.
        covariates: anything array-like, or None.
        dtype: the dtype of values and covariates.
        groups: labels of the series by the name of a grouping, or None.
        limits: `lower`, `upper` and `between` of censored values, or None.
        lengths: (series,) where known, else read off the padding.

    Example:
        >>> fields = assemble(torch.arange(2.0), torch.ones(1, 2, 1), None, channels=None, ids=None,
        ...     covariates=None, dtype=torch.float32)
        >>> fields["population"], fields["channels"]
        (1, ('0',))
    """
    check_sizes(times, raw)
    size, _, width = raw.shape
    names = tuple(check_names("channels", channels, width, tuple(map(str, range(width)))))
    labels = check_names("ids", ids, size, range(size))
    mask = _full_mask(mask, raw)
    rows, where = name_rows(times, labels)
    if lengths is None:
        lengths = raw.new_full((size,), times.shape[-1], dtype=torch.long)
        lengths = lengths if times.ndim == 1 else real_lengths(times, mask)
    check_times(rows, lengths[: len(rows)], where)
    check_resolution(rows, lengths[: len(rows)], dtype, where)
    say = name_reading(times, labels, names)
    ends = read_limits(raw, mask, limits or {}, dtype, say)
    low, high = ends or (None, None)
    return {
        "times": times,
        "values": place(fill_missing(raw, exact(mask, ends), dtype, say), ends),
        "mask": mask,
        "low": low,
        "high": high,
        "lengths": lengths,
        "channels": names,
        "covariates": _read_covariates(covariates, rows, lengths, dtype),
        "index": torch.arange(size, device=raw.device),
        "population": size,
        "_ids": labels,
        "_groups": read_groups(groups, size, raw.device),
        "_whole": True,
        "_knots": None,
    }


def assemble_rows(
    rows: Sequence[Any], *, ids: Sequence[Any] | None, covariates: Any, **options: Any
) -> dict[str, Any]:
    """The same from [(times_i, values_i[, mask_i]), ...]; times that all rows share are kept once.

    Example:
        >>> rows = [([0.0, 1.0], [[1.0], [2.0]]), ([0.0, 1.0], [[3.0], [4.0]])]
        >>> assemble_rows(rows, ids=None, covariates=None, channels=None, dtype=None)["times"]
        tensor([0., 1.], dtype=torch.float64)
    """
    labels = check_names("ids", ids, len(rows), range(len(rows)))
    own = [row[1] for row in rows if isinstance(row, list | tuple) and len(row) > 1]
    options["dtype"] = value_dtype(own, options["dtype"])
    times, values, mask, lengths = stack_rows(rows, [f"series {label}" for label in labels])
    shared = bool((lengths == lengths[0]).all() and (times == times[0]).all())
    padded = stack_covariates(covariates, lengths)
    options["limits"] = pad_limits(options.get("limits") or {}, lengths)
    kept = times[0] if shared else times
    return assemble(kept, values, mask, lengths=lengths, ids=ids, covariates=padded, **options)


def name_rows(times: Tensor, labels: Sequence[Any]) -> tuple[Tensor, list[str]]:
    """Times as rows, and what each row is called in a message.

    Example:
        >>> name_rows(torch.zeros(2, 1), ["a", "b"])[1]
        ['series a', 'series b']
    """
    if times.ndim == 1:
        return times[None], ["times"]
    return times, [f"series {label}" for label in labels]


def name_reading(
    times: Tensor, labels: Sequence[Any], channels: Sequence[str]
) -> Callable[[int, int, int], str]:
    """What a reading is called in a message, by its position.

    Example:
        >>> name_reading(torch.tensor([0.0, 0.5]), ["a"], ["hare"])(0, 1, 0)
        'series a, time 0.5, channel hare'
    """

    def say(series: int, step: int, channel: int) -> str:
        time = times[step] if times.ndim == 1 else times[series, step]
        return f"series {labels[series]}, time {show_time(time)}, channel {channels[channel]}"

    return say


def _full_mask(mask: Tensor | None, raw: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(raw.shape, dtype=torch.bool, device=raw.device)
    fix = "It may also be (series, time), for all channels at once. True = observed."
    if mask.ndim == 2:
        check_shape("mask", mask, list(raw.shape[:2]), fix)
        mask = mask[..., None]
        return mask.expand(raw.shape).contiguous()
    check_shape("mask", mask, list(raw.shape), fix)
    return mask.clone()


def _read_covariates(covariates: Any, rows: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor | None:
    if covariates is None:
        return None
    read = as_real("covariates", covariates).to(lengths.device, dtype, copy=True)
    size, steps = len(lengths), rows.shape[1]
    dims = [size, "covariate"] if read.ndim == 2 else [size, steps, "covariate"]
    check_shape(
        "covariates", read, dims, "Pass (series, covariate) or (series, time, covariate), first the series."
    )
    read = read if read.ndim == 2 else repeat_last(read, lengths)
    if not bool(read.isfinite().all()):
        first = read.isfinite().logical_not().nonzero()[0].tolist()
        raise DataError(
            f"`covariates` at {tuple(first)} is {read[tuple(first)].item()}. "
            "Covariates are known inputs: fill the hole, or make it a masked channel."
        )
    return read
