"""One-step-ahead predictions as a distribution whose draws go on from what they drew."""

from collections.abc import Callable
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.likelihoods import log_at_least, log_at_most


class OneStepAhead(dist.TorchDistribution):
    """Densities are those of each value given the values before it; draws are made one after the other.

    Args:
        seen: the distribution of every value given those observed before, over scalars (series, time, channel).
        draw: `draw(n)` gives (n, series, time, channel).

    Example:
        >>> fn = OneStepAhead(dist.Normal(torch.zeros(4, 3, 2), 1.0), lambda n: torch.ones(n, 4, 3, 2))
        >>> fn.expand((7, 4, 3, 2)).sample().shape
        torch.Size([7, 4, 3, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, seen: Any, draw: Callable[[int], Tensor], validate_args: bool | None = None) -> None:
        self.seen, self.draw = seen, draw
        super().__init__(seen.batch_shape, validate_args=False)
        self._validate_args = seen._validate_args if validate_args is None else validate_args

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Of the values."""
        return self.seen.support

    @property
    def mean(self) -> Tensor:
        """Given what was observed before."""
        return self.seen.mean

    @property
    def variance(self) -> Tensor:
        """Given what was observed before."""
        return self.seen.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> "OneStepAhead":
        return OneStepAhead(self.seen.expand(torch.Size(batch_shape)), self.draw, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.seen.log_prob(value)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.draw(prod(shape[:-3])).reshape(shape)


@log_at_most.register(OneStepAhead)
def _(fn: OneStepAhead, x: Tensor) -> Tensor:
    return log_at_most(fn.seen, x)


@log_at_least.register(OneStepAhead)
def _(fn: OneStepAhead, x: Tensor) -> Tensor:
    return log_at_least(fn.seen, x)
