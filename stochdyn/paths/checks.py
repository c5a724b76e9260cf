"""What a path checks when it is built: times, context and batch shapes."""

import torch
from torch import Tensor

from stochdyn.errors import ShapeError, TimeError


def check_times(ts: Tensor, validate: bool) -> Tensor:
    """The grid in float64.

    Raises:
        TimeError: if it is no tensor, is empty, goes back, or (while validating) is not finite.
    """
    if not isinstance(ts, Tensor):
        raise TimeError(
            f"`ts` must be a tensor (*batch, time), got {type(ts).__name__}. Use TimeGrid(...).ts."
        )
    if ts.dim() < 1 or ts.numel() < 1:
        raise TimeError(
            f"`ts` must have shape (*batch, time) with at least one time, got {tuple(ts.shape)}. Use "
            "TimeGrid."
        )
    ts = ts.double()
    if not validate:
        return ts
    if not torch.isfinite(ts).all():
        where = (~torch.isfinite(ts)).nonzero()[0].tolist()
        raise TimeError(
            f"`ts` is {ts[tuple(where)].item()} at {_position(where)}. Times must be finite numbers."
        )
    down = ts.diff(dim=-1) < 0
    if down.any():
        where = down.nonzero()[0].tolist()
        where[-1] += 1
        before, after = ts[(*where[:-1], where[-1] - 1)].item(), ts[tuple(where)].item()
        raise TimeError(
            f"`ts` goes back from {before:g} to {after:g} at {_position(where)}. Sort the times; TimeGrid "
            "makes a grid from observation times."
        )
    return ts


def _position(where: list[int]) -> str:
    series = f"series {where[0] if len(where) == 2 else tuple(where[:-1])}, " if len(where) > 1 else ""
    return f"{series}position {where[-1]}"


def check_resolution(ts: Tensor, *dtypes: torch.dtype) -> None:
    """Refuse times that the dtypes they were given in, or are used in, cannot tell apart.

    Raises:
        TimeError: naming the largest time, the smallest step and the spacing of the dtype.
    """
    gaps = ts.diff(dim=-1)
    if not (gaps > 0).any():
        return
    coarse = max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)
    largest, smallest = ts.abs().max().item(), gaps[gaps > 0].min().item()
    spacing = torch.finfo(coarse).eps * largest
    if spacing > smallest / 100:
        raise TimeError(
            f"Times up to {largest:g} with steps down to {smallest:g} cannot be told apart in {coarse} "
            f"(spacing {spacing:.1g}). Subtract the first time and choose a unit in which a step is near 1 "
            "(Unix seconds: divide by 86400 for days), or use float64."
        )


def context_by_time(context: Tensor | None, points: int, base: torch.Size) -> Tensor | None:
    """Context time-major: (time or 1, *batch, context_dim).

    Raises:
        ShapeError: if it has no dimension, or may be static as well as by time.
    """
    if context is None:
        return None
    if not isinstance(context, Tensor) or context.dim() < 1:
        got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ShapeError(
            "`context` must be a tensor of shape (*batch, context_dim) or (*batch, time, context_dim), got "
            f"{got}. Write a number as torch.tensor([c])."
        )
    if context.dim() >= 2 and context.shape[-2] == points:
        if context.dim() <= len(base) + 1:
            check_unambiguous(context, points, base)
        return context.movedim(-2, 0)
    if context.dim() > len(base) + 1 and context.shape[-2] == 1:
        return context.movedim(-2, 0)
    return context[None]


def check_unambiguous(context: Tensor, points: int, batch: torch.Size) -> None:
    """Refuse a context that was read as by time, where the batch has as many members as there are times.

    Raises:
        ShapeError: with both ways to write it.
    """
    if batch and batch[-1] == points:
        raise ShapeError(
            f"`context` of shape {tuple(context.shape)} may be (time, context_dim) or (batch, context_dim): "
            f"there are {points} of both. Write a static one as context[..., None, :], one by time with a "
            "batch dimension of 1 before time."
        )


def joint_batch(**batches: torch.Size) -> torch.Size:
    """The broadcast of named batch shapes.

    Raises:
        ShapeError: naming all of them.
    """
    try:
        return torch.broadcast_shapes(*batches.values())
    except RuntimeError as error:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in batches.items())
        raise ShapeError(
            f"The batch shapes do not broadcast: {listed}. A plate's size must be the last batch dimension "
            "of each, or 1, or missing."
        ) from error


def lift(x: Tensor, ndim: int) -> Tensor:
    """Insert batch dimensions after time, so that a slice at one time has `ndim` dimensions."""
    missing = ndim + 1 - x.dim()
    return x.reshape(x.shape[0], *[1] * missing, *x.shape[1:]) if missing > 0 else x


def place(k: int, index: list[int], ts: Tensor, batch_shape: torch.Size) -> str:
    """Where the grid position k of a path with index (*sample, *batch) is, in the user's words."""
    own = index[len(index) - len(batch_shape) :] if batch_shape else []
    series = str(own[0] if len(own) == 1 else tuple(own)) if own else "0"
    batch = ts.dim() - 1
    row = (
        [i if n > 1 else 0 for i, n in zip(index[len(index) - batch :], ts.shape, strict=False)]
        if batch
        else []
    )
    return f"series {series}, time {ts[(*row, k)].item():g} (step {k})"


def first_bad(value: Tensor, ts: Tensor, batch_shape: torch.Size) -> str | None:
    """What to say of the first entry of a path (*sample, *batch, time, state) that is not finite; None if all are."""
    if torch.isfinite(value).all():
        return None
    bad = (~torch.isfinite(value).all(-1)).movedim(-1, 0)
    k, *index = bad.nonzero()[0].tolist()
    last = value[(*index, max(k - 1, 0))]
    return f"{place(k, index, ts, batch_shape)}: the path is not finite; the last state was {short(last)}."


def short(z: Tensor) -> list[float]:
    """The first entries of a state, rounded for a message."""
    return [round(x, 4) for x in z.flatten()[:8].tolist()]
