"""Whether training had settled: the drift of the last losses against their noise."""

from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 60  # losses; below, a third of them is too short to tell a drift from noise
_BLOCKS = 10


@dataclass(frozen=True)
class Settling:
    """What the last third of the losses does.

    Attributes:
        drift: by how much the loss still falls over that third, in nats; negative where it rises.
        error: its standard error.
        noise: the spread of single losses around their trend.
        steps: how many losses the third has.
        series: how many the data stand for.

    Example:
        >>> Settling(drift=5.0, error=0.1, noise=2.0, steps=600).ratio
        2.5
    """

    drift: float
    error: float
    noise: float
    steps: int
    series: int = 1

    @property
    def ratio(self) -> float:
        """The drift in units of the noise, or of 1 nat, or of 0.1 nats per series, whichever is largest; 0 where it is
        not significant."""
        unit = max(self.noise, 1.0, 0.1 * self.series)
        return 0.0 if abs(self.drift) < 3 * self.error else abs(self.drift) / unit


def settling(losses: Any, kl_weights: Any = (), series: int | None = None) -> Settling | str:
    """Measure the drift of the last third by medians of ten blocks; or say why that tells nothing.

    Where the learning rate decays, which is the default over just that third, a fit slows down also far from its
    optimum: a drift shows that training had not ended, none does not show that it had.

    Example:
        >>> import numpy as np
        >>> round(settling(np.linspace(100.0, 0.0, 300)).drift)
        33
        >>> settling([1.0, 2.0])
        'the fit has 2 losses, and a drift shows from 60 on'
    """
    trace = np.asarray(losses, dtype=float)
    if len(trace) < FEWEST:
        return f"the fit has {len(trace)} losses, and a drift shows from {FEWEST} on"
    steps = len(trace) // 3
    weights = np.asarray(kl_weights, dtype=float)[-steps:]
    if len(weights) and np.ptp(weights) > 0:
        return "the KL weight changed over the last third of training, so its losses do not compare"
    tail = trace[-steps:]
    blocks = np.array([np.median(block) for block in np.array_split(tail, _BLOCKS)])
    at = (np.arange(_BLOCKS) + 0.5) / _BLOCKS - 0.5
    slope = (at * blocks).sum() / (at**2).sum()
    rest = blocks - blocks.mean() - slope * at
    error = np.sqrt((rest**2).sum() / (_BLOCKS - 2) / (at**2).sum())
    around = tail - np.median(tail) - slope * np.linspace(-0.5, 0.5, steps)
    noise = 1.4826 * np.median(np.abs(around - np.median(around)))
    return Settling(-float(slope), float(error), float(noise), steps, series or 1)
