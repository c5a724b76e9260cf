"""Features of time for fields that depend on it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.errors import FieldError


class AbstractTimeFeatures(nn.Module, ABC):
    """The contract: `features(t)` for t (..., 1) is (..., size), in the dtype of t.

    Attributes:
        size: how many features.

    Example:
        >>> from stochdyn.fields import AbstractTimeFeatures
        >>> import stochdyn as sd
        >>> class Weekend(AbstractTimeFeatures):
        ...     size = 1
        ...     def forward(self, t):
        ...         return (t % 7 >= 5).to(t.dtype)
        >>> sd.NeuralField(2, time=Weekend())(torch.tensor([5.5]), torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    size: int

    @abstractmethod
    def forward(self, t: Tensor) -> Tensor:
        """The features."""


class FourierTime(AbstractTimeFeatures):
    """Periodic features of time: sin and cos of 2 pi k t / period for k = 1, ..., terms.

    A field of these alone is exactly periodic in t. Fields get t in the state's dtype: in float32, at times of a
    thousand periods, a phase is right to about 1e-4 of a period.

    Args:
        period: one, or several, in the units of the times.
        terms: harmonics of each period.
        learned: whether the periods are learned, from these on. The likelihood has many local maxima in a period: start
            within a fraction 1 / (2 number of periods seen) of it.
        trend: whether t itself is a further feature, beside the periodic ones.

    Shapes:
        t (..., 1) to (..., 2 periods terms [+ 1]).

    Raises:
        FieldError: if a period is not positive, or `terms` below 1.

    Example:
        >>> import stochdyn as sd
        >>> season = sd.FourierTime(period=12.0, terms=3)
        >>> drift = sd.NeuralField(2, hidden=(16,), time=season)
        >>> z = torch.randn(5, 2)
        >>> bool(torch.allclose(drift(torch.tensor([1.0]), z), drift(torch.tensor([13.0]), z), atol=1e-5))
        True
    """

    fixed_period: Tensor
    harmonics: Tensor

    def __init__(
        self, period: float | Sequence[float], terms: int = 3, *, learned: bool = False, trend: bool = False
    ) -> None:
        super().__init__()
        periods = [float(period)] if isinstance(period, int | float) else [float(p) for p in period]
        if not periods or not all(0 < p < math.inf for p in periods) or terms < 1:
            raise FieldError(
                f"FourierTime: periods must be positive and `terms` at least 1, got {period} and {terms}. Periods are "
                "in the units of the times."
            )
        self.trend, self.size = trend, 2 * terms * len(periods) + int(trend)
        self._given = torch.tensor(periods, dtype=torch.float64)
        given = self._given.to(torch.get_default_dtype())
        self.log_period = nn.Parameter(given.log()) if learned else None
        self.register_buffer("fixed_period", given.clone(), persistent=False)
        self.register_buffer("harmonics", torch.arange(1.0, terms + 1), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> "FourierTime":
        super()._apply(*args, **kwargs)
        self.fixed_period.copy_(
            self._given
        )  # a fixed period is exact in whatever dtype the module is moved to
        return self

    @property
    def period(self) -> Tensor:
        """The periods (periods,)."""
        return self.fixed_period if self.log_period is None else self.log_period.exp()

    def forward(self, t: Tensor) -> Tensor:
        # The whole periods are taken off first: a harmonic would magnify their rounding.
        cycles = t / self.period.to(t.dtype)
        cycles = cycles - cycles.detach().floor()
        phase = 2 * math.pi * (cycles[..., None] * self.harmonics.to(t.dtype)).flatten(-2)
        parts = [phase.sin(), phase.cos(), *([t] if self.trend else [])]
        return torch.cat(parts, -1)
