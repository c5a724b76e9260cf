"""Smoothing, imputation and forecasts from a fit."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.data import Series
from stochdyn.errors import DataError, GuideError, StochdynError
from stochdyn.inference.draws import Draws, at_times, check_follows, draw, evaluating, pair, replicated
from stochdyn.paths import AbstractPointProcess, JumpDiffusionPath, SDEPath


@dataclass(frozen=True)
class Prediction:
    """Posterior predictive draws at the times of the data and at the further times asked for.

    Attributes:
        data: the series, with the further times as missing.
        observations: (draw, series, time, channel) draws of what would be observed, also where something was.
        states: (draw, series, time, state) the smoothed or forecast states at the same times, of the first
            path that has them on its grid, or the first `pyro.deterministic` of shape (series, time, state) at
            them; None without either.
        latents: every latent and `pyro.deterministic` by name, (draw, *plates, *event); paths on their whole
            grid.
        grids: the grid of every path by name.

    Example:
        >>> import stochdyn as sd
        >>> sd.Prediction(sd.datasets.lynx_hare(), torch.zeros(10, 1, 21, 2), None, {}, {}).channels
        ('hare', 'lynx')
    """

    data: Series
    observations: Tensor
    states: Tensor | None
    latents: dict[str, Tensor]
    grids: dict[str, Tensor]

    @property
    def times(self) -> Tensor:
        """The times of `observations`: (time,) or (series, time)."""
        return self.data.times

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""
        return tuple(self.data.channels)

    @property
    def last_observed(self) -> Tensor:
        """(series,) the last time at which anything was observed; later times are forecasts."""
        return self.data.last_observed

    def quantile(self, q: float) -> Tensor:
        """A quantile of the observations, between draws interpolated: (series, time, channel).

        Raises:
            DataError: if `q` is not between 0 and 1.
        """
        if not 0 <= q <= 1:
            raise DataError(f"quantile({q}): a probability is between 0 and 1.")
        # torch.quantile refuses more than 2^24 numbers.
        ordered = self.observations.sort(0).values
        ordered = ordered if ordered.is_floating_point() else ordered.double()
        at = q * (len(ordered) - 1)
        low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
        return low if at == math.floor(at) else torch.lerp(low, high, at - math.floor(at))


def predict(fit: Any, data: Any, ts: Any = None, draws: int = 100, *, seed: int | None = 0) -> Prediction:
    """Draw from the posterior predictive: smoothing at the data's times, forecasts past them.

    The model is called with the series extended by `ts` as missing observations, so it must build its
    `TimeGrid` from the batch. Nothing past the last observation informs the path: it runs on from there by
    itself.

    Args:
        fit: what `sd.fit` returned, or (model, guide).
        data: the series; with an encoder, others than those trained on too. `Jumps` have `observations` of as many
            rows as their draws need, padded with inf.
        ts: further times (k,), for all series; None for the data's own.
        draws: how many.
        seed: of the draws; None uses the current random state.

    Raises:
        GuideError: if the model's path does not follow the batch's times, or the model observes no (series,
            time, channel).
        FitError: if `draws` is below 1.

    Example:
        >>> import pyro, pyro.distributions as dist, stochdyn as sd
        >>> def model(batch):
        ...     grid = sd.TimeGrid(batch.times)
        ...     with batch.plate("series"):
        ...         z = pyro.sample("z", sd.SDEPath(lambda t, z: -z, torch.tensor([0.3]),
        ...                                         dist.Normal(torch.zeros(1), 1.0).to_event(1), grid.ts))
        ...         seen = dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2)
        ...         pyro.sample("y", seen, obs=batch.values)
        >>> data = sd.Series([0.0, 1.0], torch.randn(3, 2, 1))
        >>> guide = sd.AmortizedGuide(model)
        >>> fit = sd.fit(model, guide, data, steps=1, progress=False)
        >>> sd.predict(fit, data, ts=[1.5, 2.0], draws=20).observations.shape
        torch.Size([20, 3, 4, 1])
    """
    model, guide = pair(fit)
    extended = data if ts is None else data.extend(ts)
    with evaluating(model, guide, seed=seed):
        found = draw(fit, data, draws) if ts is None else _drawn(fit, extended, draws)
        check_follows(found, extended)
        if ts is not None:
            _check_latent(found)
        observations = _replicate(found, extended)
    latents = {n: s.value for n, s in found.latents.items()} | {
        n: v for n, (v, _) in found.deterministic.items()
    }
    grids = {n: s.fn.ts for n, s in found.paths.items()}
    return Prediction(extended, observations, _states(found, extended), latents, grids)


def _drawn(fit: Any, data: Series, draws: int) -> Draws:
    try:
        return draw(fit, data, draws)
    except StochdynError:
        raise
    except (RuntimeError, ValueError) as error:
        raise GuideError(
            f"The model failed on the series extended to time {float(data.times.max()):g}: {error}. A grid "
            "closed over from outside does not follow the batch: build it inside the model, grid = "
            "sd.TimeGrid(batch.times)."
        ) from error


def _check_latent(found: Draws) -> None:
    """A path that is itself observed would be drawn anew from its start, whatever the data were."""
    for name, site in found.observed.items():
        if isinstance(site.fn, SDEPath | JumpDiffusionPath):
            raise GuideError(
                f"predict: site '{name}' is a path that is observed itself, so a forecast of the model would not go on "
                "from the data. Make the path latent and observe it with a small noise, or sample a path that starts "
                "at the last value."
            )


def _replicate(found: Draws, data: Series) -> Tensor:
    """Draw the observed site of shape (series, time, channel) again; its series may lie in nested plates."""
    wanted = data.values.shape
    for site in found.replicable.values():
        shape = site.value.shape[1:]
        if isinstance(site.fn, AbstractPointProcess) and shape == wanted:
            return replicated(site)
        if shape == wanted[1:] and wanted[0] == 1:
            return replicated(site).reshape(found.size, *wanted)
        if len(shape) >= 3 and shape[-2:] == wanted[-2:] and shape[:-2].numel() == wanted[0]:
            return replicated(site).reshape(found.size, *wanted)
    shapes = {name: tuple(site.value.shape[1:]) for name, site in found.observed.items()}
    raise GuideError(
        f"The model observes {shapes}, none of the batch's shape (series, time, channel) = {tuple(wanted)}. "
        "Observe batch.values in one site, .to_event(2) inside batch.plate(...)."
    )


def _states(found: Draws, data: Series) -> Tensor | None:
    for site in found.paths.values():
        states = at_times(site.value, site.fn.ts, data.times)
        if states is not None:
            batch = states.shape[1:-2]
            lead = (len(data),) if batch.numel() in (1, len(data)) else batch
            states = states.reshape(found.size, -1, *states.shape[-2:])
            return states.expand(-1, lead[0], -1, -1) if len(lead) == 1 else states
    wanted = (len(data), data.times.shape[-1])
    for value, _ in found.deterministic.values():
        if value.dim() == 4 and tuple(value.shape[1:3]) == wanted:
            return value
    return None
