"""The shape legend, and the one function that checks against it.

::

    ts       (*batch, time)                   strictly increasing where real; a shared grid is (time,)
    path     (*sample, *batch, time, state)   time is dim -2; the initial state is path[..., 0, :] at ts[..., 0]
    context  (*batch, time, context_dim)      or (*batch, context_dim) where static
    values   (*batch, time, channel)          mask likewise, True = observed; NaN never lives inside the package
    jumps    (*batch, max_jumps, 1 + mark)    time first; unused rows come last and have time = inf

Fields are called time-major: `z` is (*batch, state) while simulating and (time, *batch, state) while scoring;
`t` always has as many dimensions as `z` and a last one of size 1, so it broadcasts against `z` in both.
Intensities have no state: their `t` is (row, *batch), and so is what they return.
"""

from collections.abc import Sequence

from torch import Tensor

from stochdyn.errors import ShapeError


def check_shape(name: str, tensor: Tensor, dims: Sequence[str | int], fix: str = "") -> dict[str, int]:
    """Check the trailing dimensions of a tensor and return their sizes by name.

    Args:
        name: what the tensor is called where the user sees it.
        tensor: any tensor.
        dims: one entry per trailing dimension: a name (any size) or a number (exactly that size); a leading
            "*batch" allows further dimensions on the left.
        fix: a sentence that tells the user what to do.

    Returns:
        The size of each named dimension.

    Raises:
        ShapeError: if the number of dimensions or a given size differs.

    Example:
        >>> import torch
        >>> check_shape("values", torch.zeros(3, 21, 2), ["*batch", "time", "channel"])
        {'time': 21, 'channel': 2}
    """
    wanted = list(dims)
    open_left = bool(wanted) and str(wanted[0]).startswith("*")
    wanted = wanted[1:] if open_left else wanted
    shape = tuple(tensor.shape)
    legend = "(" + ", ".join(str(d) for d in dims) + ")"
    enough = len(shape) >= len(wanted) if open_left else len(shape) == len(wanted)
    trailing = shape[len(shape) - len(wanted) :]
    if not enough or any(isinstance(d, int) and d != n for d, n in zip(wanted, trailing, strict=True)):
        raise ShapeError(f"`{name}` must have shape {legend}, got {shape}. {fix}".rstrip())
    return {d: n for d, n in zip(wanted, trailing, strict=True) if isinstance(d, str)}
