"""In which dtype a given intensity can be called, and what comes back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_that_works(
    context: Tensor | None, attempt: Callable[[torch.dtype], Any]
) -> tuple[torch.dtype, Any]:
    """The dtype in which a field can be called, and what it returned: that of its context, else float64 or the default.

    Raises:
        RuntimeError, TypeError, IndexError, AttributeError: what it raised where none works.

    Example:
        >>> first_that_works(None, lambda dtype: torch.nn.Linear(1, 1)(torch.zeros(1, dtype=dtype)).shape)
        (torch.float32, torch.Size([1]))
    """
    either = (torch.float64, torch.get_default_dtype()) if context is None else (context.dtype,)
    failures: list[Exception] = []
    for dtype in either:
        try:
            return dtype, attempt(dtype)
        except (RuntimeError, TypeError, IndexError, AttributeError) as error:
            failures.append(error)
    raise next((error for error in failures if "dtype" not in str(error)), failures[0])


def at_least(value: Tensor, t: Tensor) -> Tensor:
    """What a field returned in the dtype of t, or its own if that is finer.

    Example:
        >>> at_least(torch.ones(1), torch.ones(1).double()).dtype
        torch.float64
    """
    return value.to(torch.promote_types(value.dtype, t.dtype))
