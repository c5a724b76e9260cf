"""`fit`: stochastic variational inference from one call."""

from typing import Any

import torch

from stochdyn.errors import FitError
from stochdyn.inference import scopes
from stochdyn.inference.aggressive import Aggressive, Phase
from stochdyn.inference.batches import batches, moved, population, steps_per_pass
from stochdyn.inference.loop import Monitor, Settings, Trainer, train
from stochdyn.inference.multistart import Multistart, search
from stochdyn.inference.objective import ELBO, AbstractObjective, Program
from stochdyn.inference.parameters import modules_of
from stochdyn.inference.result import Fit
from stochdyn.inference.schedule import Constant, Decay, Schedule

_ELBO = ELBO()


def fit(
    model: Program,
    guide: Program,
    data: Any,
    *,
    steps: int = 2000,
    batch_size: int | None = None,
    lr: float | Schedule = 1e-3,
    objective: AbstractObjective = _ELBO,
    kl_weight: float | Schedule = 1.0,
    clip_norm: float | None = 10.0,
    aggressive: Aggressive | None = None,
    multistart: Multistart | None = None,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    validate: Any = None,
    progress: bool = True,
) -> Fit:
    """Trains model and guide, in place, with Adam.

    A step that is not finite (loss, gradient, or a path that diverges) is skipped: nothing changes, and
    `Fit.skipped` counts it. The first Ctrl-C ends the training after the running step and returns the fit so
    far; a second one raises.

    Args:
        model: Any Pyro program, called as `model(data)`: a function with `pyro.param`, an `nn.Module`, a
            method of one. All parameters of modules are trained, registered with Pyro or not.
        guide: Any Pyro program with the same arguments; its parameters may be made at its first call.
        data: A `Series`, or anything that the model takes; a tuple is spread, `model(*data)`.
        steps: Steps to take, skipped ones included.
        batch_size: Rows per step, shuffled; None takes all data at every step. A `Series` scales its plate
            to the population itself; with tensors the model must scale.
        lr: A learning rate, which decays to 1 % over the last third of the steps (`Decay`); or any function
            of the step.
        objective: What to minimise: `ELBO()`, also with another estimator, `IWAE()`, or one's own.
        kl_weight: Weight of log q - log p of the latents against the likelihood: a number or a function of
            the step, e.g. `Linear(0.0, 1.0, 500)`. `Fit.losses` are those of the weighted objective.
        clip_norm: Gradients longer than this many times their recent average length are shortened to it; None
            leaves them.
        aggressive: Train the guide ahead of the model in a first phase; see `Aggressive`. The mutual information
            that ends it is measured on `validate`, or else on the data.
        multistart: Begin at the best of many draws of the prior; see `Multistart`. Of use where a posterior has many
            modes: oscillations, switches.
        seed: Fixes the result, and leaves the random state outside as it was. None draws from that state.
        device: Where to train: moves modules and data. None leaves them.
        validate: Data on which the ELBO is recorded twenty times (`Fit.validation`), in eval mode.
        progress: Whether to show a progress bar.

    Returns:
        The record, with the trained model and guide.

    Raises:
        FitError: An argument is unusable, there is nothing to train, or ten steps in a row were not finite;
            then `error.fit` holds the last good state.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import stochdyn as sd
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> fit = sd.fit(model, guide, torch.tensor([1.0, 2.0, 3.0]), steps=500, lr=0.05, progress=False)
        >>> round(guide.median()["z"].item(), 1)  # exactly 6 / 4
        1.5
    """
    _check(steps, clip_norm, lr=lr, kl_weight=kl_weight)
    if device is not None:
        data, validate = _to_device(device, model, guide, data, validate)
    rate = lr if callable(lr) else Decay(lr, steps)
    weight = kl_weight if callable(kl_weight) else Constant(kl_weight)
    result = Fit(model, guide, population=population(data))
    monitor = None if validate is None else Monitor(validate, every=max(1, steps // 20))
    modules = [module for program in (model, guide) for module in modules_of(program)]
    with scopes.seeded(seed), scopes.mode(modules, train=True):
        order = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        stream = batches(data, batch_size, order)
        settings = Settings(objective, rate, weight, clip_norm)
        if multistart is not None:
            search(multistart, result, settings, stream, progress=progress)
        if result.interrupted:
            return result
        trainer = Trainer(result, settings)
        phase = None if aggressive is None else Phase(aggressive, data if validate is None else validate)
        first = steps_per_pass(data, batch_size)
        train(trainer, stream, steps, monitor=monitor, progress=progress, phase=phase, first_pass=first)
    return result


def _check(steps: int, clip_norm: float | None, **numbers: float | Schedule) -> None:
    if steps < 1:
        raise FitError(f"steps: must be at least 1, got {steps}. The default is 2000.")
    if clip_norm is not None and not clip_norm > 0:
        raise FitError(f"clip_norm: must be positive, got {clip_norm}. None switches clipping off.")
    for name, value in numbers.items():
        if callable(value):
            continue
        if not (0 <= value < float("inf")) or (name == "lr" and value == 0):
            raise FitError(
                f"{name}: must be positive and finite, got {value}. The default is {_DEFAULTS[name]}."
            )


_DEFAULTS = {"lr": 1e-3, "kl_weight": 1.0}


def _to_device(device: torch.device | str, model: Program, guide: Program, *data: Any) -> list[Any]:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FitError(
            f"device: {str(device)!r} cannot be used here ({str(error).splitlines()[0]}). "
            'Pass device="cpu" or None, or install a PyTorch build for this device.'
        ) from error
    for program in (model, guide):
        for module in modules_of(program):
            module.to(device)
    return [moved(part, device) for part in data]
