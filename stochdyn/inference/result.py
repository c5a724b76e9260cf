"""What a fit returns."""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any


@dataclass(repr=False)
class Fit:
    """A trained model and guide, and the record of the training. `fit` makes it.

    Attributes:
        model: The model, trained in place.
        guide: The guide, trained in place.
        losses: The minimised loss (with the KL weight of its step), one per accepted step.
        kl_weights: The KL weight, one per accepted step.
        step: Steps done, skipped ones included.
        skipped: Steps that were not finite and changed nothing.
        interrupted: Whether Ctrl-C ended the training.
        validation: Pairs (step, ELBO per series of the validation data).
        mutual_information: Pairs (step, nats) where `aggressive` was given; see `posterior_collapse`.
        active_units: Pairs (step, active units by site), at the same steps.
        starts: Losses of the finalists where `multistart` was given, the lowest first.
        inner: Steps of the guide alone, skipped ones included.
        seconds: Wall-clock time.
        population: How many series the data stand for, or None where the data do not say.

    Example:
        >>> import stochdyn as sd
        >>> sd.Fit(None, None, losses=[10.0, 6.0], kl_weights=[1.0, 1.0], step=2, population=3)
        Fit: 2 steps in 0.0 s, ELBO -6 (-2 per series)
    """

    model: Any
    guide: Any
    losses: list[float] = field(default_factory=list)
    kl_weights: list[float] = field(default_factory=list)
    step: int = 0
    skipped: int = 0
    interrupted: bool = False
    validation: list[tuple[int, float]] = field(default_factory=list)
    mutual_information: list[tuple[int, float]] = field(default_factory=list)
    active_units: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    inner: int = 0
    seconds: float = 0.0
    population: int | None = None

    @property
    def elbo(self) -> float:
        """The mean ELBO over the last tenth of the accepted steps, for the whole population.

        Where the KL weight changed, only steps of weight 1 count, if there are any; else it is the mean of
        the weighted objective, which is no bound of the evidence. NaN if no step was accepted.
        """
        tail = max(1, len(self.losses) // 10)
        last = list(zip(self.losses, self.kl_weights, strict=True))[-tail:]
        full = [loss for loss, weight in last if weight == 1.0] or [loss for loss, _ in last]
        return -fmean(full) if full else math.nan

    @property
    def elbo_per_series(self) -> float:
        """`elbo` divided by the population; the same as `elbo` where the data have no population."""
        return self.elbo / (self.population or 1)

    def __repr__(self) -> str:
        parts = [f"{self.step} steps in {self.seconds:.1f} s", f"ELBO {self.elbo:.6g}"]
        if self.population:
            parts[-1] += f" ({self.elbo_per_series:.4g} per series)"
        if self.inner:
            parts[0] = f"{self.step} steps ({self.inner} more of the guide) in {self.seconds:.1f} s"
        if self.skipped:
            parts.append(f"{self.skipped} skipped")
        if self.interrupted:
            parts.append("interrupted")
        return "Fit: " + ", ".join(parts)
