"""The training loop: steps that either improve the parameters or change nothing."""

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from tqdm.auto import tqdm

from stochdyn.errors import DivergedError, FitError
from stochdyn.inference import scopes
from stochdyn.inference.aggressive import Phase
from stochdyn.inference.batches import arguments, population
from stochdyn.inference.diagnosis import diagnose
from stochdyn.inference.objective import AbstractObjective, weighted
from stochdyn.inference.parameters import Parameters, Part, restore_buffers, save_buffers
from stochdyn.inference.result import Fit
from stochdyn.inference.schedule import Schedule, value_at

PATIENCE = 10
VALIDATED_STEPS = 10
_NUMERIC = re.compile(r"\b(nan|inf|infinite|non-finite|not finite|invalid values|within the support)\b", re.I)


@dataclass(frozen=True)
class Settings:
    """How to train.

    Example:
        >>> from stochdyn.inference import Constant, ELBO
        >>> Settings(ELBO(), lr=Constant(0.01), kl_weight=Constant(1.0)).clip_norm
        10.0
    """

    objective: AbstractObjective
    lr: Schedule
    kl_weight: Schedule
    clip_norm: float | None = 10.0


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
        self._typical: float | None = None

    def limit(self) -> float:
        return self._factor * self._typical if self._factor and self._typical else math.inf

    def record(self, length: float) -> None:
        self._typical = length if self._typical is None else 0.95 * self._typical + 0.05 * length


class Trainer:
    """Takes one step at a time and writes the record into a `Fit`.

    A step whose loss or gradient is not finite, or in which a path diverges, leaves parameters and buffers
    as they were and is counted. Ten in a row end the training.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from stochdyn.inference import Constant, ELBO
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.loc = torch.nn.Parameter(torch.tensor(0.0))
        ...     def forward(self, y):
        ...         pyro.sample("y", dist.Normal(self.loc, 1.0), obs=y)
        >>> fit = Fit(Model(), lambda y: None)
        >>> trainer = Trainer(fit, Settings(ELBO(), lr=Constant(0.5), kl_weight=Constant(1.0)))
        >>> _ = trainer.take((torch.tensor(2.0),))
        >>> fit.step, round(fit.model.loc.item(), 3)
        (1, 0.5)
    """

    def __init__(self, fit: Fit, settings: Settings) -> None:
        self.fit = fit
        self.settings = settings
        self.objective: AbstractObjective | None = None
        self.parameters = Parameters({"model": fit.model, "guide": fit.guide})
        self.parameters.collect()
        self.worked = False
        self._clips: dict[Part | None, Clip] = {}
        self._complete = False
        self._failures = 0

    def take(self, args: tuple, part: Part | None = None, *, counts: bool = True) -> float | None:
        """One step, and its loss; None where it was not finite.

        Args:
            args: of model and guide.
            part: the parameters to move; None for all.
            counts: whether it is a step of the fit, or one in between.

        Raises:
            FitError: The tenth step in a row was not finite, or there is nothing to train.
        """
        buffers = save_buffers(self.parameters.modules)
        weight = value_at(self.settings.kl_weight, self.fit.step, "kl_weight")
        self.settings.objective.check_weight(weight)
        loss = None
        try:
            loss = self._attempt(args, weight, part)
        except BaseException as error:
            restore_buffers(buffers)
            self.parameters.clear_gradients()
            if not self._is_numeric(error):
                raise
            self._skip(args, error, counts)
        else:
            self.worked, self._failures = True, 0
            if counts:
                self.fit.losses.append(loss)
                self.fit.kl_weights.append(weight)
        self._count(counts)
        return loss

    def _count(self, counts: bool) -> None:
        self.fit.step += counts
        self.fit.inner += not counts

    def _attempt(self, args: tuple, weight: float, part: Part | None) -> float:
        lr = value_at(self.settings.lr, self.fit.step, "lr")
        self.parameters.clear_gradients()
        loss = self._loss(args, weight)
        loss.backward()
        if part is not None:
            self.parameters.keep(part)
        clip = self._clips.setdefault(part, Clip(self.settings.clip_norm))
        limit = clip.limit()
        norm = self.parameters.clip(limit)
        # Adam squares gradients, so the square must be finite; one transfer tells both.
        value, square = torch.stack([loss.detach(), (norm * norm).to(loss)]).tolist()
        if not math.isfinite(value):
            raise DivergedError(f"step {self.fit.step}: the loss is not finite.")
        if not math.isfinite(square):
            raise DivergedError(f"step {self.fit.step}: the norm of the gradient is not finite.")
        clip.record(min(limit, math.sqrt(square)))
        self.parameters.update(lr)
        return value

    def _loss(self, args: tuple, weight: float) -> torch.Tensor:
        model = weighted(self.fit.model, weight)
        guide = weighted(self.fit.guide, weight, guide=True)
        with pyro.poutine.trace(param_only=True) as capture:
            try:
                if self.objective is None:
                    self.objective = self.settings.objective.prepared(model, guide, *args)
                loss = self.objective.loss(model, guide, *args)
            finally:
                # Also after an error: a parameter that is not finite is the better message.
                self.parameters.collect(capture.trace)
        if not self._complete:
            self.parameters.check_complete(loss)
            self._complete = True
        return loss

    def _is_numeric(self, error: BaseException) -> bool:
        if isinstance(error, DivergedError):
            return True
        if not self.worked:
            return False  # a program that never worked: its own error says more
        if isinstance(error, torch.linalg.LinAlgError):
            return True
        return isinstance(error, ValueError) and bool(_NUMERIC.search(str(error)))

    def _skip(self, args: tuple, error: BaseException, counts: bool) -> None:
        self.fit.skipped += 1
        self._failures += 1
        if self._failures < PATIENCE:
            return
        objective = self.objective or self.settings.objective
        last = (
            f"the last finite loss was {self.fit.losses[-1]:.6g}" if self.fit.losses else "no loss was finite"
        )
        step = self.fit.step
        self._count(counts)
        raise FitError(
            f"step {step}: {PATIENCE} steps in a row were not finite; {last}. "
            f"The last one: {error}\n"
            + diagnose(self.parameters, objective, self.fit.model, self.fit.guide, args),
            fit=self.fit,
        ) from error


class Monitor:
    """Evaluates the ELBO on other data every so often, without touching the training.

    Args:
        data: What to evaluate, whole.
        every: Steps between evaluations.

    Example:
        >>> import torch
        >>> Monitor(torch.zeros(3), every=100).every
        100
    """

    def __init__(self, data: Any, every: int) -> None:
        self.args = arguments(data)
        self.population = population(data) or 1
        self.every = every

    def __call__(self, trainer: Trainer) -> None:
        """Appends (step, ELBO per series) to the record when it is due."""
        fit, objective = trainer.fit, trainer.objective
        if fit.step % self.every or objective is None:
            return
        buffers = save_buffers(trainer.parameters.modules)
        # The same draws each time, so that differences are due to the parameters.
        with torch.no_grad(), scopes.seeded(0), scopes.mode(trainer.parameters.modules, train=False):
            try:
                loss = float(objective.loss(fit.model, fit.guide, *self.args))
            except DivergedError:
                loss = math.nan
        restore_buffers(buffers)
        fit.validation.append((fit.step, -loss / self.population))


def train(
    trainer: Trainer,
    stream: Iterator[tuple],
    steps: int,
    *,
    monitor: Monitor | None,
    progress: bool,
    phase: Phase | None = None,
) -> None:
    """Runs the steps, until the end or the first Ctrl-C.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from itertools import repeat
        >>> from stochdyn.inference import Constant, ELBO
        >>> def model(y):
        ...     loc = pyro.param("doc_loc", torch.tensor(0.0))
        ...     pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> trainer = Trainer(Fit(model, lambda y: None), Settings(ELBO(), Constant(0.1), Constant(1.0)))
        >>> train(trainer, repeat((torch.tensor(0.0),)), 5, monitor=None, progress=False)
        >>> trainer.fit.step
        5
    """
    fit, started = trainer.fit, time.perf_counter()
    watchers = [watch for watch in (monitor, phase and phase.watch) if watch is not None]
    with scopes.interruptible() as stop, _Bar(steps, fit, progress) as bar:
        try:
            with scopes.validated():
                _advance(
                    trainer, stream, min(steps, VALIDATED_STEPS), bar, stop, phase=phase, watchers=watchers
                )
            with scopes.unvalidated():
                _advance(trainer, stream, steps, bar, stop, phase=phase, watchers=watchers)
            if phase is not None and not stop.requested:
                phase.watch(trainer, last=True)
        except KeyboardInterrupt:
            if stop.requested:
                raise
            fit.interrupted = True
        finally:
            trainer.parameters.clear_gradients()
            fit.seconds += time.perf_counter() - started
    fit.interrupted |= stop.requested and fit.step < steps


def _advance(
    trainer: Trainer,
    stream: Iterator[tuple],
    last: int,
    bar: "_Bar",
    stop: scopes.Stop,
    *,
    phase: Phase | None,
    watchers: list[Callable[[Trainer], None]],
) -> None:
    while trainer.fit.step < last and not stop.requested:
        before = trainer.fit.step
        if phase is not None and phase.active:
            phase.advance(trainer, stream, stop)
        else:
            trainer.take(next(stream))
        if trainer.fit.step == before:
            return  # Ctrl-C between steps of the guide
        for watch in watchers:
            watch(trainer)
        bar.advance()


class _Bar:
    """A progress bar with the smoothed ELBO per series."""

    def __init__(self, steps: int, fit: Fit, progress: bool) -> None:
        self._bar = tqdm(total=steps, disable=not progress, unit="step")
        self._fit = fit
        self._smooth: float | None = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def advance(self) -> None:
        if self._bar.disable:
            return
        fit = self._fit
        if fit.losses:
            elbo = -fit.losses[-1] / (fit.population or 1)
            self._smooth = elbo if self._smooth is None else 0.95 * self._smooth + 0.05 * elbo
            shown = {"elbo": f"{self._smooth:.4g}"}
            if fit.skipped:
                shown["skipped"] = str(fit.skipped)
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
