"""Which series an index selects."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.errors import DataError, DtypeError, ShapeError


def positions(index: Any, size: int, device: torch.device) -> slice | Tensor:
    """Turn an int, slice, list, tensor or bool mask into a slice, or a 1-D tensor of positions; never none.

    Raises:
        IndexError: if an int is out of range, which also ends a `for` loop.
        DataError: if nothing is selected.
        ShapeError, DtypeError: if the index cannot be one.

    Example:
        >>> positions(-1, 3, torch.device("cpu"))
        slice(2, 3, None)
    """
    if isinstance(index, slice):
        span = range(*index.indices(size))
        if not span:
            raise DataError(f"The index selects none of {size} series. A batch needs at least one.")
        return index if span.step > 0 else torch.tensor(span, device=device)
    if isinstance(index, tuple):
        raise ShapeError(
            "A Series is indexed by series alone, series[i]. For times and channels take `.values`."
        )
    if not isinstance(index, Tensor | list | np.ndarray | bool | np.bool_) and hasattr(index, "__index__"):
        at = operator.index(index)
        if not -size <= at < size:
            raise IndexError(f"Series {at} of {size}: the index is out of range.")
        return slice(at % size, at % size + 1)
    if not isinstance(index, Tensor):
        array = np.asarray(index)
        if array.dtype.kind not in "biuf":
            raise DtypeError(
                f"An index must be 1-D, integers or bools, got {index!r}. Pass positions of series."
            )
        index = torch.as_tensor(array)
    return _tensor_positions(index.to(device), size)


def _tensor_positions(picked: Tensor, size: int) -> Tensor:
    if picked.dtype == torch.bool:
        if tuple(picked.shape) != (size,):
            raise ShapeError(
                f"A bool index must have shape (series,) = ({size},), got {tuple(picked.shape)}."
            )
        picked = picked.nonzero().squeeze(1)
    if picked.numel() == 0:
        raise DataError(f"The index selects none of {size} series. A batch needs at least one.")
    picked = picked.reshape(1) if picked.ndim == 0 else picked
    if picked.is_floating_point() or picked.is_complex() or picked.ndim != 1:
        got = f"{picked.dtype} of shape {tuple(picked.shape)}"
        raise DtypeError(f"An index must be 1-D, integers or bools, got {got}. Pass positions of series.")
    return picked.long()
