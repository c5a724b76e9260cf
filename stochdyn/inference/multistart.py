"""Where a fit begins: many draws of the prior, of which the most promising are trained a little."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from stochdyn.errors import DivergedError, FitError
from stochdyn.guides import AmortizedGuide
from stochdyn.inference import scopes
from stochdyn.inference.loop import Settings, Trainer
from stochdyn.inference.parameters import Parameters, restore_buffers, save_buffers
from stochdyn.inference.result import Fit
from stochdyn.inference.schedule import Constant, value_at


@dataclass(frozen=True)
class Multistart:
    """Begin a fit at the best of many starts.

    A posterior of an oscillating or switching system has modes that no gradient leaves: one period too many between
    two observations. So: draw the latents outside plates `draws` times from the prior (the guide's own start is tried
    too); take the loss at each, with the guide narrow around it; train the `finalists` best ones for `steps` steps
    each; go on from the one whose loss is lowest then. Latents in plates and all networks begin every time where they
    would without it. `Fit.starts` holds the losses of the finalists: several equal lowest ones are a sign that the
    search was long enough.

    Args:
        draws: of the prior, each one run of guide and model without gradients. Starts that diverge are passed over.
        finalists: how many are trained.
        steps: of each finalist, at the rate that the fit begins with.

    Raises:
        FitError: a number is below one, or, while fitting, the guide is not an `AmortizedGuide` with latents outside
            plates, or no start has a finite loss.

    References:
        Raue et al., "Lessons learned from quantitative dynamical modeling in systems biology", 2013,
        https://doi.org/10.1371/journal.pone.0074335

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import stochdyn as sd
        >>> times = torch.linspace(0, 10, 30)
        >>> def model(y):
        ...     period = pyro.sample("period", dist.LogNormal(torch.tensor(1.0), 0.7))
        ...     pyro.sample("y", dist.Normal((6.28318 * times / period).sin(), 0.2).to_event(1), obs=y)
        >>> y = (6.28318 * times / 1.3).sin()
        >>> guide, starts = sd.AmortizedGuide(model), sd.Multistart(draws=100, finalists=4, steps=30)
        >>> fit = sd.fit(model, guide, y, steps=100, lr=0.02, multistart=starts, progress=False)
        >>> round(guide.joint.at().exp().item(), 1), len(fit.starts), fit.starts == sorted(fit.starts)
        (1.3, 4, True)
    """

    draws: int = 100
    finalists: int = 8
    steps: int = 50

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise FitError(f"Multistart: {name} must be at least 1, got {value}.")


def search(
    options: Multistart, fit: Fit, settings: Settings, stream: Iterator[tuple], *, progress: bool
) -> None:
    """Puts model and guide where the best start led, and records the losses in `fit.starts`.

    Example:
        >>> search(Multistart(), Fit(None, None), None, iter(()), progress=False)
        Traceback (most recent call last):
        ...
        stochdyn.errors.FitError: multistart: needs an AmortizedGuide, which says what to draw; this guide is N...
    """
    _check_kind(fit.guide)
    args = next(stream)
    state = _State(fit, args)
    _check_latents(fit.guide)
    total = options.draws + options.finalists * options.steps
    with scopes.interruptible() as stop, tqdm(total=total, disable=not progress, desc="starts") as bar:
        run = _Search(options, fit, replace(settings, kl_weight=Constant(1.0)), stop, bar)
        best: tuple[float, Any] = math.inf, state.first
        for u in run.screen(args)[: options.finalists]:
            state.write(state.first)
            fit.guide.joint.move_to(u)
            loss = run.train(stream)
            if stop.requested:
                break
            fit.starts.append(loss)
            if loss < best[0]:
                best = loss, state.read()
    if fit.starts and not math.isfinite(min(fit.starts)) and not stop.requested:
        raise FitError(
            f"multistart: training diverged from each of {len(fit.starts)} finalists. Use a smaller lr, or a solver "
            "with smaller steps."
        )
    fit.starts.sort()
    state.write(best[1])
    fit.interrupted |= stop.requested


def _check_kind(guide: Any) -> None:
    if not isinstance(guide, AmortizedGuide):
        raise FitError(
            f"multistart: needs an AmortizedGuide, which says what to draw; this guide is {type(guide).__name__}. "
            "Leave `multistart` out, or use sd.AmortizedGuide(model)."
        )


def _check_latents(guide: AmortizedGuide) -> None:
    if guide.joint is None:
        raise FitError(
            "multistart: this guide has no latents outside plates with a joint posterior to draw starts for (they are "
            "in plates, or the family is MeanField()). Leave `multistart` out, or use FullRank() or Flow()."
        )


class _State:
    """All parameters and buffers of model and guide, to be put back."""

    def __init__(self, fit: Fit, args: tuple) -> None:
        self.parameters = Parameters({"model": fit.model, "guide": fit.guide})
        capture = poutine.trace(param_only=True)
        try:
            with torch.no_grad(), poutine.block(), capture:
                drawn = poutine.trace(fit.guide).get_trace(*args)
                poutine.replay(fit.model, trace=drawn)(*args)
        except DivergedError as error:
            # Where it diverges is no place to begin, and no reason not to look for one, if the guide is set up.
            if fit.guide.joint is None:
                raise FitError(f"multistart: the model's first run diverged: {error}") from error
        self.parameters.collect(capture.trace)
        self.first = self.read()

    def read(self) -> Any:
        tensors = [(p, p.detach().clone()) for p in self.parameters.named().values()]
        return tensors, save_buffers(self.parameters.modules)

    @torch.no_grad()
    def write(self, state: Any) -> None:
        for parameter, value in state[0]:
            parameter.copy_(value)
        restore_buffers(state[1])


@dataclass(frozen=True)
class _Search:
    options: Multistart
    fit: Fit
    settings: Settings
    stop: scopes.Stop
    bar: tqdm

    def screen(self, args: tuple) -> list[Tensor]:
        """The starts with a finite loss, the lowest first."""
        guide, found = self.fit.guide, []
        for u in chain([guide.joint.at()], guide.prior_draws(self.options.draws, *args)):
            if self.stop.requested:
                return []
            guide.joint.move_to(u)
            loss = self._loss(args)
            if math.isfinite(loss):
                found.append((loss, u))
            self.bar.update()
        if not found:
            raise FitError(
                f"multistart: none of {self.options.draws} draws of the prior has a finite loss. Narrow the priors, "
                "use a solver with smaller steps, or draw more."
            )
        return [u for _, u in sorted(found, key=lambda pair: pair[0])]

    @torch.no_grad()
    def _loss(self, args: tuple) -> float:
        try:
            with poutine.block():
                return float(self.settings.objective.loss(self.fit.model, self.fit.guide, *args))
        except (DivergedError, torch.linalg.LinAlgError):
            return math.inf

    def train(self, stream: Iterator[tuple]) -> float:
        """The loss over the last fifth of a short training from where the guide is; infinite if it fails."""
        trial = Fit(self.fit.model, self.fit.guide, population=self.fit.population)
        trainer = Trainer(trial, replace(self.settings, lr=Constant(value_at(self.settings.lr, 0, "lr"))))
        try:
            with scopes.validated():
                for args in self._until_stopped(stream):
                    trainer.take(args)
        except FitError:
            return math.inf
        last = trial.losses[-max(1, self.options.steps // 5) :]
        return fmean(last) if last else math.inf

    def _until_stopped(self, stream: Iterator[tuple]) -> Iterator[tuple]:
        for _ in range(self.options.steps):
            if self.stop.requested:
                return
            yield next(stream)
            self.bar.update()
