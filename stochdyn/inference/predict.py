"""Smoothing, imputation and forecasts from a fit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.data import Series
from stochdyn.errors import GuideError, StochdynError
from stochdyn.inference.draws import Draws, check_follows, draw, evaluating, pair


@dataclass(frozen=True)
class Prediction:
    """Posterior predictive draws at the times of the data and at the further times asked for.

    Attributes:
        data: the series, with the further times as missing.
        observations: (draw, series, time, channel) draws of what would be observed, also where something was.
        states: (draw, series, time, state) the smoothed or forecast states at the same times, of the first path.
        latents: every latent by name, (draw, *plates, *event); paths on their whole grid.
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
        """A quantile of the observations: (series, time, channel)."""
        return self.observations.quantile(q, 0)


def predict(fit: Any, data: Series, ts: Any = None, draws: int = 100, *, seed: int | None = 0) -> Prediction:
    """Draw from the posterior predictive: smoothing at the data's times, forecasts past them.

    The model is called with the series extended by `ts` as missing observations, so it must build its `TimeGrid` from
    the batch. Nothing past the last observation informs the path: it runs on from there by itself.

    Args:
        fit: what `sd.fit` returned, or (model, guide).
        data: the series; with an encoder, others than those trained on too.
        ts: further times (k,), for all series; None for the data's own.
        draws: how many.
        seed: of the draws; None uses the current random state.

    Raises:
        GuideError: if the model's path does not follow the batch's times, or the model observes no (series, time,
            channel).

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
        found = _drawn(fit, extended, draws)
        check_follows(found, extended)
        observations = _replicate(model, found, extended)
    states = _states(found, extended)
    grids = {n: s.fn.ts for n, s in found.latents.items() if hasattr(s.fn, "ts")}
    return Prediction(extended, observations, states, {n: s.value for n, s in found.latents.items()}, grids)


def _drawn(fit: Any, data: Series, draws: int) -> Draws:
    try:
        return draw(fit, data, draws)
    except StochdynError:
        raise
    except (RuntimeError, ValueError) as error:
        raise GuideError(
            f"The model failed on the series extended to time {float(data.times.max()):g}: {error}. A grid closed over "
            "from outside does not follow the batch: build it inside the model, grid = sd.TimeGrid(batch.times)."
        ) from error


def _replicate(model: Any, found: Draws, data: Series) -> Tensor:
    """Draw the observed site of shape (series, time, channel) again."""
    for site in found.observed.values():
        if tuple(site.value.shape[-3:]) == tuple(data.values.shape):
            value = site.fn.sample()
            return value.expand(found.size, *value.shape[1:]).reshape(found.size, *data.values.shape)
    shapes = {name: tuple(site.value.shape[1:]) for name, site in found.observed.items()}
    raise GuideError(
        f"The model observes {shapes}, none of the batch's shape (series, time, channel) = "
        f"{tuple(data.values.shape)}. Observe batch.values in one site, .to_event(2) inside batch.plate(...)."
    )


def _states(found: Draws, data: Series) -> Tensor | None:
    for site in found.latents.values():
        if hasattr(site.fn, "ts"):
            return at_times(site.value, site.fn.ts, data.times)
    return None


def at_times(path: Tensor, ts: Tensor, times: Tensor) -> Tensor:
    """A path (draw, *batch, grid, state) at times that are on its grid: (draw, *batch, time, state)."""
    if ts.dim() == 1 and times.dim() == 1:
        return path.index_select(-2, torch.searchsorted(ts, times).to(path.device))
    shape = torch.broadcast_shapes(ts.shape[:-1], times.shape[:-1])
    index = torch.searchsorted(ts.expand(*shape, -1).contiguous(), times.expand(*shape, -1).contiguous())
    index = index.to(path.device)[..., None].expand(*path.shape[:-2], index.shape[-1], path.shape[-1])
    return path.gather(-2, index)
