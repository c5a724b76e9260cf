"""The contract of an encoder, how encoders read a `Series`, and `align`, which brings an encoding to a grid."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.data import AbstractPopulation, Series
from stochdyn.device import readable
from stochdyn.errors import ShapeError, TimeError

Transform = Callable[[Tensor], Tensor]


class AbstractEncoder(nn.Module, ABC):
    """The contract: `encoder(batch) -> (series, time, hidden)`; entry k may use what was observed from time k on.

    `stochdyn.testing.check_encoder` holds an encoder to it. `AbstractBackwardEncoder` keeps most of it for you.

    Example:
        >>> import stochdyn as sd
        >>> class LastValue(sd.AbstractEncoder):
        ...     hidden = 1
        ...     def forward(self, batch):
        ...         return batch.values.mean(-1, keepdim=True)
        >>> LastValue()(sd.datasets.lynx_hare()).shape
        torch.Size([1, 21, 1])
    """

    hidden: int

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """Encode a batch; one of `Jumps` is read by its `as_series()`."""


@dataclass(frozen=True)
class Rows:
    """The observed times of every series, the last one first; whatever follows a series' own rows is unused.

    Attributes:
        inputs: (series, row, 2 channel + covariate) values (zero where missing, the limit where censored), the mask
            (-1 where censored), covariates.
        gap: (series, row) the time to the next observed time, zero for the last, in time units.
        elapsed: (series, row) the time to the last observed one.
    """

    inputs: Tensor
    gap: Tensor
    elapsed: Tensor

    @property
    def stepped(self) -> Tensor:
        """(series, row, feature) the inputs with the gap as a further one."""
        return torch.cat([self.inputs, self.gap[..., None]], -1)


class AbstractBackwardEncoder(AbstractEncoder):
    """An encoder that goes through the observed times backwards; a subclass writes `encode`.

    Times at which nothing was observed (padding, times added for a forecast) are left out: they change no other
    entry, and have the entry of the next observed time, or zeros where none follows. A censored value comes in as its
    limit, with -1 in place of 1 in the mask.

    Args:
        obs_dim: number of channels.
        hidden: size of the encoding.
        covariates: number of covariates, static or time-varying; the latter are read at observed times.
        transform: applied to the values first, e.g. `torch.log1p`; they should end up near unit scale.
        time_unit: times are divided by it; a typical gap should end up near 1.

    Raises:
        ShapeError: if a size is below 1, or the batch has another number of channels or covariates.
        TimeError: if `time_unit` is not positive.

    Example:
        >>> import stochdyn as sd
        >>> class Mean(AbstractBackwardEncoder):
        ...     def __init__(self):
        ...         super().__init__(obs_dim=1, hidden=4)
        ...         self.net = sd.MLP(3, 4)
        ...     def encode(self, rows):
        ...         count = torch.arange(1.0, 1 + rows.gap.shape[1])
        ...         return self.net(rows.stepped).cumsum(1) / count[:, None]
        >>> Mean()(sd.Series([0.0, 1.0, 2.0], torch.randn(4, 3, 1))).shape
        torch.Size([4, 3, 4])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int,
        *,
        covariates: int = 0,
        transform: Transform | None = None,
        time_unit: float = 1.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if min(obs_dim, hidden) < 1 or covariates < 0:
            got = f"obs_dim={obs_dim}, hidden={hidden}, covariates={covariates}"
            raise ShapeError(f"{name}: channels and hidden must be at least 1, covariates 0. Got {got}.")
        if not 0 < time_unit < float("inf"):
            raise TimeError(f"{name}: `time_unit` must be positive, got {time_unit}. Give a typical gap.")
        self.obs_dim, self.hidden, self.covariates = obs_dim, hidden, covariates
        self.transform, self.time_unit = transform, time_unit

    @property
    def features(self) -> int:
        """The number of inputs of a row."""
        return 2 * self.obs_dim + self.covariates

    @abstractmethod
    def encode(self, rows: Rows) -> Tensor:
        """(series, row, hidden); row r may use rows 0 to r, which were observed later or now."""

    def forward(self, batch: AbstractPopulation) -> Tensor:
        return self._encode(batch.as_series())

    def _encode(self, batch: Series) -> Tensor:
        self._check(batch)
        inputs, times = self._inputs(batch), batch.times.expand(len(batch), -1)
        seen = batch.mask.any(-1)
        if readable(seen) and bool(seen.all()):
            return self.encode(self._rows(inputs.flip(1), times.flip(1), None)).flip(1)
        order, at = _backwards(seen)
        real = order >= 0
        order = order.clamp(min=0)
        x = inputs.gather(1, order[..., None].expand(*order.shape, inputs.shape[-1]))
        out = self.encode(self._rows(x, times.gather(1, order), real))
        picked = out.gather(1, at.clamp(min=0)[..., None].expand(*at.shape, out.shape[-1]))
        return torch.where(at[..., None] >= 0, picked, torch.zeros_like(picked))

    def _rows(self, inputs: Tensor, times: Tensor, real: Tensor | None) -> Rows:
        elapsed = (times[:, :1] - times) / self.time_unit
        gap = torch.nn.functional.pad(elapsed.diff(dim=1), (1, 0))
        if real is not None:
            gap, elapsed = (torch.where(real, x, torch.zeros_like(x)) for x in (gap, elapsed))
        return Rows(inputs, gap.to(inputs.dtype), elapsed.to(inputs.dtype))

    def _inputs(self, batch: Series) -> Tensor:
        dtype = next(self.parameters()).dtype
        values = batch.values if self.transform is None else self.transform(batch.values)
        seen = batch.mask.to(dtype)
        seen = seen if batch.low is None else torch.where(batch.censored, -seen, seen)
        parts = [torch.where(batch.mask, values, torch.zeros_like(values)).to(dtype), seen]
        if self.covariates and batch.covariates is not None:
            given = batch.covariates.to(dtype)
            parts.append(given if given.dim() == 3 else given[:, None].expand(-1, values.shape[1], -1))
        return torch.cat(parts, -1)

    def _check(self, batch: Series) -> None:
        name, channels = type(self).__name__, batch.values.shape[-1]
        if channels != self.obs_dim:
            raise ShapeError(
                f"{name} was made for {self.obs_dim} channels, the batch has {channels} {tuple(batch.channels)}. "
                f"Set obs_dim={channels}."
            )
        given = 0 if batch.covariates is None else batch.covariates.shape[-1]
        if self.covariates and given != self.covariates:
            raise ShapeError(
                f"{name} was made for {self.covariates} covariates, the batch has {given or 'none'}. "
                f"Set covariates={given}."
            )


def _backwards(seen: Tensor) -> tuple[Tensor, Tensor]:
    """(series, row) the positions of what was observed, from the last to the first, -1 after; and (series, time)
    each time's row, that of the next observed time, -1 where none follows."""
    position = torch.arange(seen.shape[1], device=seen.device).expand_as(seen)
    order = torch.where(seen, position, torch.full_like(position, -1)).sort(1, descending=True).values
    following = seen.flip(1).cumsum(1).flip(1)
    rows = max(int(following[:, 0].max()), 1) if readable(following) else seen.shape[1]
    return order[:, :rows], following - 1


def align(encoding: Tensor, batch: Series, ts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every grid time the encoding at the next observation, the time to it, and whether there is one.

    Args:
        encoding: (series, time, hidden) at observation times.
        batch: the series.
        ts: the grid (time,) or (series, time).

    Returns:
        (series, grid, hidden), (series, grid), (series, grid) bool.

    Example:
        >>> import stochdyn as sd
        >>> batch = sd.Series([0.0, 1.0], torch.zeros(1, 2, 1), mask=torch.tensor([[[True], [False]]]))
        >>> align(torch.zeros(1, 2, 4), batch, torch.tensor([0.0, 0.5, 1.0]).double())[2]
        tensor([[ True, False, False]])
    """
    points = batch.values.shape[1]
    times = batch.times.expand(len(batch), -1).contiguous()
    ts = ts.to(times.device).expand(len(batch), -1).contiguous()
    position = torch.arange(points, device=times.device).expand(len(batch), -1)
    seen = torch.where(batch.mask.any(-1), position, torch.full_like(position, points))
    following = seen.flip(-1).cummin(-1).values.flip(-1)
    following = torch.cat([following, torch.full_like(following[:, :1], points)], -1)
    nearest = following.gather(-1, torch.searchsorted(times, ts))
    valid = nearest < points
    index = nearest.clamp(max=points - 1)
    ahead = (times.gather(-1, index) - ts).clamp(min=0).to(encoding.dtype)
    picked = encoding.gather(1, index[..., None].expand(*index.shape, encoding.shape[-1]))
    return picked, torch.where(valid, ahead, torch.zeros_like(ahead)), valid
