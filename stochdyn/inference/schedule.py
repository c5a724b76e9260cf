"""Numbers that change with the step: learning rates and KL weights."""

import math
from dataclasses import dataclass
from typing import Protocol

from stochdyn.errors import FitError


class Schedule(Protocol):
    """Any callable from the step (0, 1, 2, ...) to a number.

    Example:
        >>> from stochdyn.inference import Schedule
        >>> cycle: Schedule = lambda step: min(1.0, (step % 500) / 250)  # a cyclical KL weight
        >>> cycle(125)
        0.5
    """

    def __call__(self, step: int, /) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value at every step.

    Example:
        >>> import stochdyn as sd
        >>> sd.Constant(0.01)(500)
        0.01
    """

    value: float

    def __call__(self, step: int, /) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to `end` over `steps` steps, then `end`: a warm-up.

    Example:
        >>> import stochdyn as sd
        >>> warm_up = sd.Linear(0.0, 1.0, steps=100)
        >>> warm_up(0), warm_up(25), warm_up(100), warm_up(5000)
        (0.0, 0.25, 1.0, 1.0)
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise FitError(f"Linear: steps must be at least 1, got {self.steps}. Use Constant({self.end}).")

    def __call__(self, step: int, /) -> float:
        done = min(1.0, step / self.steps)
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Cyclical:
    """A warm-up again and again: in every period from 0 to 1, then 1; a KL weight against collapse.

    Args:
        period: Steps of one cycle. Let the last cycle end with the training.
        rise: The fraction of a period that rises.

    References:
        Fu et al., "Cyclical annealing schedule: a simple approach to mitigating KL vanishing", 2019,
        https://arxiv.org/abs/1903.10145

    Example:
        >>> import stochdyn as sd
        >>> weight = sd.Cyclical(period=100)
        >>> [weight(step) for step in (0, 25, 50, 99, 100, 125)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    """

    period: int
    rise: float = 0.5

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 < self.rise <= 1:
            raise FitError(
                f"Cyclical: needs period >= 1 and 0 < rise <= 1, got period={self.period}, rise={self.rise}. "
                "The default is rise=0.5."
            )

    def __call__(self, step: int, /) -> float:
        return min(1.0, step % self.period / (self.rise * self.period))


@dataclass(frozen=True)
class Decay:
    """Constant, then an exponential decay to `final * value`: what a plain number for `lr` stands for.

    Args:
        value: The value up to the step `start * steps`.
        steps: At this step and later the value is `final * value`.
        final: The last value as a fraction of the first.
        start: The fraction of the steps before the decay. The default decays over the last third.

    Example:
        >>> import stochdyn as sd
        >>> lr = sd.Decay(0.01, steps=3000)
        >>> [round(lr(step), 6) for step in (0, 2000, 2500, 3000)]
        [0.01, 0.01, 0.001, 0.0001]
    """

    value: float
    steps: int
    final: float = 0.01
    start: float = 2 / 3

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.final > 0 and 0 <= self.start < 1):
            raise FitError(
                f"Decay: needs steps >= 1, final > 0 and 0 <= start < 1, got steps={self.steps}, "
                f"final={self.final}, start={self.start}. The defaults are final=0.01, start=2/3."
            )

    def __call__(self, step: int, /) -> float:
        progress = (step / self.steps - self.start) / (1 - self.start)
        return self.value * self.final ** min(1.0, max(0.0, progress))


def value_at(schedule: Schedule, step: int, name: str) -> float:
    """The schedule's value, refused where it is negative or not finite.

    Example:
        >>> value_at(Constant(0.5), 3, "lr")
        0.5
    """
    value = float(schedule(step))
    if not math.isfinite(value) or value < 0:
        raise FitError(
            f"{name} at step {step}: a schedule must return finite numbers >= 0, got {value}. "
            f"Check {schedule!r}."
        )
    return value
