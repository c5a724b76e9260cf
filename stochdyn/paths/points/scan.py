"""A linear recursion in a logarithmic number of vectorised steps."""

import torch
from torch import Tensor


def linear_scan(decay: Tensor, rise: Tensor) -> Tensor:
    """x_k = decay_k x_{k-1} + rise_k along the first dimension, with x_{-1} = 0.

    By doubling: stable for decays of at most 1, as products of them only shrink.

    Shapes:
        decay, rise (step, ...) of one shape -> the same

    Example:
        >>> linear_scan(torch.full((3,), 0.5), torch.ones(3))
        tensor([1.0000, 1.5000, 1.7500])
    """
    reach = 1
    while reach < len(rise):
        rise = torch.cat([rise[:reach], rise[reach:] + decay[reach:] * rise[:-reach]])
        decay = torch.cat([decay[:reach], decay[reach:] * decay[:-reach]])
        reach *= 2
    return rise
