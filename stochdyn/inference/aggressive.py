"""Training the guide ahead of the model, while that raises the mutual information."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from pyro import poutine

from stochdyn.errors import DivergedError, FitError
from stochdyn.guides.passes import own_randomness
from stochdyn.inference import scopes
from stochdyn.inference.collapse import posterior_collapse
from stochdyn.inference.parameters import Part, guide_parameters, restore_buffers, save_buffers


@dataclass(frozen=True)
class Aggressive:
    """Train the guide to the end before every step of the model, in the first phase of a fit.

    While the phase lasts, a step is: steps of the parameters that the guide has alone, each on a fresh mini-batch,
    until the mean loss of `window` of them is no better than that of the `window` before; then one step of all
    others. It ends when the mutual information between series and local latents has not risen `patience` times in a
    row; then both are trained together. `Fit.step`, `Fit.losses` and the schedules count the steps of the model;
    `Fit.inner` counts those of the guide.

    It helps where a strong likelihood (autoregressive, recurrent) learns to do without the latents before the guide
    has learned to use them.

    Args:
        max_inner: The most steps of the guide per step of the model.
        window: Steps of the guide that are averaged.
        every: Steps of the model between measurements.
        patience: Measurements without a rise that end the phase.
        draws: For a measurement, see `posterior_collapse`.
        shifts: The same.

    Raises:
        FitError: a number is below one, or, while fitting, model or guide has no parameters of its own.

    References:
        He et al., "Lagging inference networks and posterior collapse in variational autoencoders", 2019,
        https://arxiv.org/abs/1901.05534

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import stochdyn as sd
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = torch.nn.Parameter(torch.tensor(0.1))
        ...     def forward(self, y):
        ...         with pyro.plate("rows", len(y)):
        ...             z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...             pyro.sample("y", dist.Normal(self.slope * z, 0.5), obs=y)
        >>> class Guide(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = torch.nn.Parameter(torch.tensor(0.1))
        ...     def forward(self, y):
        ...         with pyro.plate("rows", len(y)):
        ...             pyro.sample("z", dist.Normal(self.slope * y, 0.5))
        >>> y, options = torch.linspace(-2, 2, 20), sd.Aggressive(max_inner=20, every=5)
        >>> fit = sd.fit(Model(), Guide(), y, steps=10, lr=0.1, aggressive=options, progress=False)
        >>> fit.step, fit.inner > 100, [step for step, _ in fit.mutual_information]
        (10, True, [5, 10])
    """

    max_inner: int = 100
    window: int = 10
    every: int = 50
    patience: int = 3
    draws: int = 20
    shifts: int = 100

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise FitError(f"Aggressive: {name} must be at least 1, got {value}.")


class Phase:
    """The aggressive phase of one fit.

    Example:
        >>> Phase(Aggressive(), torch.zeros(3)).active
        True
    """

    def __init__(self, options: Aggressive, data: Any) -> None:
        self.options, self.data = options, data
        self.active = True
        self._parts: tuple[Part, Part] | None = None
        self._best, self._waited = -math.inf, 0

    def advance(self, trainer: Any, stream: Iterator[tuple], stop: scopes.Stop) -> None:
        """The guide's steps, and one of the model's. After Ctrl-C the model's is left out.

        Raises:
            FitError: ten steps in a row were not finite, or there is nothing of one's own to train.
        """
        guide, model = self._split(trainer, args := next(stream))
        self._inner(trainer, guide, args, stream, stop)
        if not stop.requested:
            trainer.take(next(stream), model)

    def _inner(
        self, trainer: Any, part: Part, args: tuple, stream: Iterator[tuple], stop: scopes.Stop
    ) -> None:
        losses: list[float] = []
        before = math.inf
        for _ in range(self.options.max_inner):
            loss = trainer.take(args, part, counts=False)
            losses += [] if loss is None else [loss]
            if len(losses) == self.options.window:
                if fmean(losses) >= before:
                    return
                before, losses = fmean(losses), []
            if stop.requested:
                return
            args = next(stream)

    def _split(self, trainer: Any, args: tuple) -> tuple[Part, Part]:
        """What the guide has alone, and all the rest; anew where parameters have joined."""
        known = frozenset(id(p) for p in trainer.parameters.named().values())
        if self._parts is None or self._parts[0] | self._parts[1] != known:
            own = frozenset(id(p) for p in self._guides_own(trainer, args))
            known |= own
            if not own or own == known:
                whose = "model" if own else "guide"
                raise FitError(
                    f"aggressive: the {whose} has no parameters of its own, so there are no two sides to train in "
                    "turn. Leave `aggressive` out."
                )
            self._parts = own, known - own
        return self._parts

    def _guides_own(self, trainer: Any, args: tuple) -> list[torch.Tensor]:
        fit = trainer.fit
        buffers = save_buffers(trainer.parameters.modules)
        with own_randomness(), torch.no_grad(), poutine.block():
            guide_trace: Any = poutine.trace(fit.guide).get_trace(*args)
            model_trace: Any = poutine.trace(poutine.replay(fit.model, trace=guide_trace)).get_trace(*args)
        restore_buffers(buffers)
        return guide_parameters(fit.model, fit.guide, model_trace, guide_trace)

    def watch(self, trainer: Any, *, last: bool = False) -> None:
        """Measure when it is due, record it, and end the phase when there is no rise."""
        fit, record = trainer.fit, trainer.fit.mutual_information
        due = self.active and fit.step > 0 and fit.step % self.options.every == 0
        if not (due or last) or (record and record[-1][0] == fit.step) or not trainer.worked:
            return
        found = self._measure(trainer)
        record.append((fit.step, found[0]))
        fit.active_units.append((fit.step, found[1]))
        self._waited = 0 if found[0] > self._best else self._waited + 1
        self._best = max(self._best, found[0]) if math.isfinite(found[0]) else self._best
        self.active = self.active and self._waited < self.options.patience

    def _measure(self, trainer: Any) -> tuple[float, dict[str, int]]:
        fit, options = trainer.fit, self.options
        buffers = save_buffers(trainer.parameters.modules)
        try:
            found = posterior_collapse(fit, self.data, draws=options.draws, shifts=options.shifts)
            return found.mutual_information, found.active_units
        except DivergedError:
            return math.nan, {}
        finally:
            restore_buffers(buffers)
