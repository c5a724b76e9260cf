"""What came of steps: whether each was finite, decided on the device, and read by the host a block at a time."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.errors import DivergedError


@dataclass(frozen=True)
class Step:
    """One step, as the host knows it before its numbers are read."""

    number: int
    weight: float
    counts: bool


@dataclass(frozen=True)
class Outcome:
    """A step with its numbers: the loss, and the squared norm of the gradient."""

    step: Step
    loss: float
    square: float

    @property
    def error(self) -> DivergedError | None:
        """Why the step was not taken, if it was not."""
        for name, value in (("loss", self.loss), ("norm of the gradient", self.square)):
            if not math.isfinite(value):
                return DivergedError(f"step {self.step.number}: the {name} is not finite.")
        return None


class Outcomes:
    """Numbers of steps that wait on the device to be read together.

    Args:
        block: how many steps are read at a time.

    Example:
        >>> outcomes = Outcomes(block=2)
        >>> for k in range(2):
        ...     outcomes.add(Step(k, 1.0, True), torch.tensor(0.5), torch.tensor(1.0))
        >>> outcomes.due, [outcome.loss for outcome in outcomes.read()], outcomes.due
        (True, [0.5, 0.5], False)
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self._steps: list[Step] = []
        self._numbers: list[Tensor] = []

    @property
    def due(self) -> bool:
        """Whether a block is full."""
        return len(self._steps) >= self.block

    def add(self, step: Step, loss: Tensor, square: Tensor) -> None:
        """Keep the numbers of a step."""
        self._steps.append(step)
        self._numbers.append(torch.stack([loss.detach(), square.to(loss)]))

    def read(self) -> list[Outcome]:
        """All that are kept, by one transfer, which waits for the device; none are kept afterwards."""
        if not self._steps:
            return []
        steps, numbers = self._steps, torch.stack(self._numbers).tolist()
        self._steps, self._numbers = [], []
        return [Outcome(step, *pair) for step, pair in zip(steps, numbers, strict=True)]


class Clip:
    """The longest gradient to accept: a multiple of the recent average length.

    A fixed length would bias the result: gradients of a sum over series grow with the number of series, and
    what is clipped at every step no longer averages to zero at the optimum.

    Example:
        >>> clip = Clip(10.0)
        >>> clip.limit()
        inf
        >>> clip.record(3.0)
        >>> clip.limit()
        30.0
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._typical: float | Tensor | None = None

    def limit(self) -> float | Tensor:
        if not self._factor or self._typical is None:
            return math.inf
        if isinstance(self._typical, Tensor):
            return torch.nan_to_num(self._factor * self._typical, nan=math.inf)
        return self._factor * self._typical if self._typical else math.inf

    def record(self, length: float) -> None:
        """The length of an accepted gradient, clipped."""
        typical = self._typical
        self._typical = length if typical is None else 0.95 * typical + 0.05 * length

    def record_if(self, accepted: Tensor, length: Tensor) -> None:
        """The same on the device, where only it knows whether the step is accepted."""
        before = torch.full_like(length, math.nan) if self._typical is None else self._typical
        before = before if isinstance(before, Tensor) else torch.full_like(length, before)
        mean = torch.where(before.isnan(), length, 0.95 * before + 0.05 * length)
        self._typical = torch.where(accepted, mean, before)
