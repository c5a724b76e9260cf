"""Integrators of ordinary differential equations: what a solver promises, and the loop of the one-step methods."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stochdyn.errors import TimeError

Drift = Callable[[Tensor, Tensor], Tensor]


class AbstractODESolver(ABC):
    """Solves dz/dt = f(t, z) from the first of some times to the others.

    Attributes:
        differentiable: whether gradients pass through its operations; without, `Adjoint` gives them.
        any_system: whether it solves any system; without, not the adjoint equation's one long vector.
    """

    differentiable: ClassVar[bool] = True
    any_system: ClassVar[bool] = True

    @abstractmethod
    def solve(self, field: Drift, z: Tensor, times: Tensor, parts: Sequence[int] = ()) -> Tensor:
        """The states (time, *batch, state) at all times.

        Args:
            field: called as (t, z), t of shape (..., 1) in the dtype of z.
            z: the state (*batch, state) at the first time.
            times: (time, ..., 1) float64, the middle broadcast against the batch; non-decreasing.
            parts: sizes of the pieces of a vector z whose errors are controlled apart, where that is done at all.
        """


@dataclass(frozen=True)
class AbstractMean(AbstractODESolver):
    """A one-step method: integrates by itself, and serves as the mean of a `GaussianStep`.

    Args:
        substeps: into how many equal pieces a step is cut.
    """

    substeps: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.substeps, int) or isinstance(self.substeps, bool) or self.substeps < 1:
            raise TimeError(
                f"{type(self).__name__}: `substeps` must be an integer of at least 1, got {self.substeps!r}."
            )

    @abstractmethod
    def once(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        """The state after one piece of length dt from z at t."""

    def mean(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        """The state after one step of length dt from z at t, in `substeps` pieces."""
        h = dt / self.substeps
        for k in range(self.substeps):
            z = self.once(drift, t + k * h if k else t, h, z)
        return z

    def solve(self, field: Drift, z: Tensor, times: Tensor, parts: Sequence[int] = ()) -> Tensor:
        steps = times.diff(dim=0).to(z.dtype)
        states = [z]
        for t, dt in zip(times.to(z.dtype).unbind(0), steps.unbind(0), strict=False):
            states.append(self.mean(field, t, dt, states[-1]))
        return torch.stack(states)

    def fine(self, times: Tensor) -> Tensor:
        """The times of all pieces."""
        share = torch.arange(self.substeps, dtype=times.dtype, device=times.device) / self.substeps
        share = share.reshape(1, -1, *[1] * (times.dim() - 1))
        inner = times[:-1, None] + share * times.diff(dim=0)[:, None]
        return torch.cat([inner.flatten(0, 1), times[-1:]])
