"""An encoder that reads a series as a set of observations."""

import torch
from torch import Tensor

from stochdyn.encoders.base import AbstractBackwardEncoder, Rows, Transform
from stochdyn.fields import MLP


class SetEncoder(AbstractBackwardEncoder):
    """Embeds every observed time, pools the embeddings from each time on, and decodes the pool.

    Entry k is decode(mean of e_j, log of their number n, time to the last one) over all observed j from k on, where
    e_j = embed(values, mask, covariates, time to the last one) at j. The mean and the number give the sum, which exact
    posteriors of shared parameters need. The order within the pool does not count. It has no sense of neighbourhood:
    for parameters, or short series; to smooth a long path take another encoder.

    Args:
        obs_dim: number of channels.
        hidden: size of the encoding.
        width: of the embedding and of all hidden layers, by default `hidden`.
        covariates: number of covariates, static or time-varying; the latter are read at observed times.
        transform: applied to the values first, e.g. `torch.log1p`; they should end up near unit scale.
        time_unit: times are divided by it; here a typical length of a series should end up near 1.

    Raises:
        ShapeError: if a size is below 1, or the batch has another number of channels or covariates.
        TimeError: if `time_unit` is not positive.

    References:
        Garnelo et al., "Conditional neural processes", 2018, https://arxiv.org/abs/1807.01613;
        Zaheer et al., "Deep sets", 2017, https://arxiv.org/abs/1703.06114

    Example:
        >>> import stochdyn as sd
        >>> batch = sd.Series([0.0, 1.0, 2.0], torch.randn(4, 3, 2))
        >>> sd.SetEncoder(obs_dim=2, hidden=16)(batch).shape
        torch.Size([4, 3, 16])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int = 64,
        *,
        width: int | None = None,
        covariates: int = 0,
        transform: Transform | None = None,
        time_unit: float = 1.0,
    ) -> None:
        super().__init__(obs_dim, hidden, covariates=covariates, transform=transform, time_unit=time_unit)
        width = width or hidden
        self.embed = MLP(self.features + 1, width, (width, width))
        self.decode = MLP(width + 2, hidden, (width,))

    def encode(self, rows: Rows) -> Tensor:
        elapsed = rows.elapsed[..., None]
        pooled = self.embed(torch.cat([rows.inputs, elapsed], -1)).cumsum(1)
        number = torch.arange(1, 1 + elapsed.shape[1], dtype=pooled.dtype, device=pooled.device)[:, None]
        parts = [pooled / number, number.log().expand_as(elapsed), elapsed]
        return self.decode(torch.cat(parts, -1))
