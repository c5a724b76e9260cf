"""Whether a likelihood can produce the data, entry by entry, said where it cannot."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.errors import DataError, ShapeError

Say = Callable[[int, int, int], str]


def check_support(fn: Any, values: Tensor, exact: Tensor, say: Say) -> None:
    """Refuse exact values outside the support of a likelihood.

    Args:
        fn: a distribution over scalars whose batch shape ends in (series, time, channel), or broadcasts to it.
        values: (series, time, channel).
        exact: where they are observed and not censored.
        say: what a reading is called in a message.

    Raises:
        ShapeError: if `fn` is no distribution over scalars.
        DataError: naming the series, the time and the channel, what was got and what is taken.

    Example:
        >>> check_support(torch.distributions.Poisson(torch.ones(1)), torch.ones(1, 1, 1), torch.ones(1, 1, 1) > 0, str)
    """
    if fn.event_shape:
        raise ShapeError(
            f"The likelihood must be over scalars (series, time, channel), got event_shape {tuple(fn.event_shape)}. "
            "`observe` masks it and calls .to_event(2) itself: pass it without."
        )
    try:
        support = fn.support
    except NotImplementedError:  # a distribution of the user's own may leave it out
        return
    if constraints.is_dependent(support):
        return
    inside = support.check(values)
    inside = inside.expand(torch.broadcast_shapes(inside.shape, values.shape))
    inside = inside.reshape(-1, *values.shape).all(0)
    bad = exact & ~inside
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        raise DataError(
            f"{say(*first)}: value is {float(values[tuple(first)]):g}, and {type(fn).__name__} takes "
            f"{_words(support)}. Correct the value, mask it, or choose another decoder."
        )


def _words(support: Any) -> str:
    if isinstance(support, type(constraints.boolean)):
        return "0 and 1"
    if isinstance(support, constraints.integer_interval):
        last = torch.as_tensor(support.upper_bound).amin()
        return f"classes 0, 1, ... {int(last)}"
    if support is constraints.nonnegative_integer:
        return "counts 0, 1, 2, ..."
    if support is constraints.positive:
        return "positive numbers"
    return f"values in {support}"
