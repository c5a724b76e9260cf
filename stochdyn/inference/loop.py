"""The training loop: steps that either improve the parameters or change nothing."""

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from stochdyn.device import without_waiting
from stochdyn.errors import DivergedError, FitError
from stochdyn.inference import scopes
from stochdyn.inference.aggressive import Phase
from stochdyn.inference.batches import arguments, population
from stochdyn.inference.breakdown import breakdown
from stochdyn.inference.objective import AbstractObjective, weighted
from stochdyn.inference.outcomes import Clip, Outcomes, Step
from stochdyn.inference.parameters import (
    Buffers,
    Parameters,
    Part,
    restore_buffers,
    restore_buffers_where,
    save_buffers,
)
from stochdyn.inference.result import Fit
from stochdyn.inference.schedule import Schedule, value_at

PATIENCE = 10
VALIDATED_STEPS = 10
BLOCK = 50
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


class Trainer:
    """Takes one step at a time and writes the record into a `Fit`.

    A step whose loss or gradient is not finite, or in which a path diverges, leaves parameters and buffers
    as they were and is counted. Ten in a row end the training.

    With a `block` of more than one, for an accelerator, the host does not wait for a step: the device decides whether
    the step is taken, and losses are read a block at a time (`settle` reads what there is). Ten steps that were not
    finite are then noticed at most a block late.

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
        self._args: tuple = ()
        self._waiting = Outcomes(block=1)
        self._clips: dict[Part | None, Clip] = {}
        self._complete = False
        self._failures = 0

    def take(self, args: tuple, part: Part | None = None, *, counts: bool = True) -> float | None:
        """One step, and its loss; None where it was not finite, or is not read yet.

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
        step, loss, self._args = Step(self.fit.step, weight, counts), None, args
        try:
            if self.block > 1:
                self._queue(args, step, part, buffers)
            else:
                loss = self._attempt(args, weight, part)
        except BaseException as error:
            restore_buffers(buffers)
            self.parameters.clear_gradients()
            if not self._is_numeric(error):
                raise
            self._count(counts)
            self.settle()
            self._skip(error, step)
        else:
            self._count(counts)
            if loss is not None:
                self._accept(step, loss)
            if self._waiting.due:
                self.settle()
        return loss

    @property
    def block(self) -> int:
        """How many steps are read at a time."""
        return self._waiting.block

    def read_every(self, block: int) -> None:
        """Read losses after so many steps, one by one where parameters are on no accelerator that can do without."""
        self._waiting.block = block if self.parameters.accelerated else 1

    def settle(self) -> None:
        """Read what is not read yet.

        Raises:
            FitError: The tenth step in a row was not finite.
        """
        for outcome in self._waiting.read():
            if outcome.error is None:
                self._accept(outcome.step, outcome.loss)
            else:
                self._skip(outcome.error, outcome.step)

    def _accept(self, step: Step, loss: float) -> None:
        self.worked, self._failures = True, 0
        if step.counts:
            self.fit.losses.append(loss)
            self.fit.kl_weights.append(step.weight)

    def _count(self, counts: bool) -> None:
        self.fit.step += counts
        self.fit.inner += not counts

    def _gradient(self, args: tuple, weight: float, part: Part | None) -> Tensor:
        self.parameters.clear_gradients()
        loss = self._loss(args, weight)
        loss.backward()
        if part is not None:
            self.parameters.keep(part)
        return loss.detach()

    def _queue(self, args: tuple, step: Step, part: Part | None, buffers: Buffers) -> None:
        """A step that the device takes if it is finite; the host does not wait."""
        lr = value_at(self.settings.lr, step.number, "lr")
        loss = self._gradient(args, step.weight, part)
        clip = self._clips.setdefault(part, Clip(self.settings.clip_norm))
        limit = clip.limit()
        norm = self.parameters.clip(limit)
        accepted = torch.isfinite(loss) & torch.isfinite(norm * norm)
        clip.record_if(accepted, norm.clamp(max=limit))
        self.parameters.update(lr, skip=~accepted)
        restore_buffers_where(~accepted, buffers)
        self._waiting.add(step, loss, norm * norm)

    def _attempt(self, args: tuple, weight: float, part: Part | None) -> float:
        lr = value_at(self.settings.lr, self.fit.step, "lr")
        loss = self._gradient(args, weight, part)
        clip = self._clips.setdefault(part, Clip(self.settings.clip_norm))
        limit = clip.limit()
        norm = self.parameters.clip(limit)
        # Adam squares gradients, so the square must be finite; one transfer tells both.
        value, square = torch.stack([loss, (norm * norm).to(loss)]).tolist()
        if not math.isfinite(value):
            raise DivergedError(f"step {self.fit.step}: the loss is not finite.")
        if not math.isfinite(square):
            raise DivergedError(f"step {self.fit.step}: the norm of the gradient is not finite.")
        clip.record(min(float(limit), math.sqrt(square)))
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

    def _skip(self, error: BaseException, step: Step) -> None:
        self.fit.skipped += 1
        self._failures += 1
        if self._failures < PATIENCE:
            return
        objective = self.objective or self.settings.objective
        last = (
            f"the last finite loss was {self.fit.losses[-1]:.6g}" if self.fit.losses else "no loss was finite"
        )
        with without_waiting(False):
            why = breakdown(self.parameters, objective, self.fit.model, self.fit.guide, self._args)
        raise FitError(
            f"step {step.number}: {PATIENCE} steps in a row were not finite; {last}. The last one: {error}\n{why}",
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
        looking = torch.no_grad(), scopes.seeded(0), without_waiting(False)
        with ExitStack() as stack:
            for scope in (*looking, scopes.mode(trainer.parameters.modules, train=False)):
                stack.enter_context(scope)
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
    first_pass: int = 1,
) -> None:
    """Runs the steps, until the end or the first Ctrl-C.

    On an accelerator the host looks at the numbers of the first steps, and at least of the `first_pass` steps in which
    all data are met once. From then on it does not wait for the device within a step.

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
            looked = min(steps, max(VALIDATED_STEPS, first_pass))
            with scopes.unvalidated():
                _advance(trainer, stream, looked, bar, stop, phase=phase, watchers=watchers)
            with scopes.unvalidated(), without_waiting():
                _advance(trainer, stream, steps, bar, stop, phase=phase, watchers=watchers, block=BLOCK)
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
    block: int = 1,
) -> None:
    try:
        while trainer.fit.step < last and not stop.requested:
            before, ahead = trainer.fit.step, phase is not None and phase.active
            trainer.read_every(1 if ahead else block)
            if ahead:
                phase.advance(trainer, stream, stop)
            else:
                trainer.take(next(stream))
            if trainer.fit.step == before:
                return  # Ctrl-C between steps of the guide
            for watch in watchers:
                watch(trainer)
            bar.advance()
    finally:
        trainer.read_every(1)
        trainer.settle()


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
