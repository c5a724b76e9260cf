"""Encoders: a `Series` to one vector per observation time, (series, time, hidden)."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stochdyn.data import Series
from stochdyn.errors import ShapeError


class AbstractEncoder(nn.Module, ABC):
    """The contract: `encoder(batch) -> (series, time, hidden)`; entry k may use what was observed from time k on.

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
    def forward(self, batch: Series) -> Tensor:
        """Encode a batch."""


class GRUEncoder(AbstractEncoder):
    """A GRU that runs backwards over the observations, aware of the gaps between them and of what is missing.

    Each series is read from its own last time, so padding changes nothing.

    Args:
        obs_dim: number of channels.
        hidden: size of the encoding.
        covariates: number of covariates, static or time-varying.
        transform: applied to the values first, e.g. `torch.log1p`; they should end up near unit scale.

    Raises:
        ShapeError: if the batch has another number of channels or covariates.

    References:
        Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014, https://arxiv.org/abs/1406.1078

    Example:
        >>> import stochdyn as sd
        >>> batch = sd.Series([0.0, 1.0, 2.0], torch.randn(4, 3, 2))
        >>> sd.GRUEncoder(obs_dim=2, hidden=16)(batch).shape
        torch.Size([4, 3, 16])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int = 64,
        *,
        covariates: int = 0,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.obs_dim, self.hidden, self.covariates, self.transform = obs_dim, hidden, covariates, transform
        self.gru = nn.GRU(2 * obs_dim + 1 + covariates, hidden, batch_first=True)

    def forward(self, batch: Series) -> Tensor:
        x = self._inputs(batch)
        order = _reversal(batch)[..., None]
        backwards = x.gather(1, order.expand_as(x))
        out, _ = self.gru(backwards)
        return out.gather(1, order.expand_as(out))

    def _inputs(self, batch: Series) -> Tensor:
        if batch.values.shape[-1] != self.obs_dim:
            raise ShapeError(
                f"GRUEncoder was made for {self.obs_dim} channels, the batch has {batch.values.shape[-1]} "
                f"{tuple(batch.channels)}. Set obs_dim={batch.values.shape[-1]}."
            )
        dtype = self.gru.weight_ih_l0.dtype
        values = batch.values if self.transform is None else self.transform(batch.values)
        seen = batch.mask.to(dtype)
        times = batch.times.expand(len(batch), -1)
        gaps = torch.nn.functional.pad(times.diff(dim=-1), (0, 1)).to(dtype)[..., None]
        parts = [torch.where(batch.mask, values, torch.zeros_like(values)).to(dtype), seen, gaps]
        if self.covariates:
            parts.append(self._covariates(batch, dtype))
        return torch.cat(parts, -1)

    def _covariates(self, batch: Series, dtype: torch.dtype) -> Tensor:
        given = batch.covariates
        if given is None or given.shape[-1] != self.covariates:
            got = "none" if given is None else str(given.shape[-1])
            raise ShapeError(f"GRUEncoder was made for {self.covariates} covariates, the batch has {got}.")
        given = given if given.dim() == 3 else given[:, None, :].expand(-1, batch.values.shape[1], -1)
        return given.to(dtype)


def _reversal(batch: Series) -> Tensor:
    """Per series, the positions from its last time to its first, padding after; its own inverse."""
    points = batch.values.shape[1]
    k = torch.arange(points, device=batch.values.device).expand(len(batch), -1)
    length = batch.lengths.to(k.device)[:, None]
    return torch.where(k < length, length - 1 - k, k)


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
