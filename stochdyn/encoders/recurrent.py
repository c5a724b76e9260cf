"""A recurrent encoder, which reads gaps as a number."""

from torch import Tensor, nn

from stochdyn.encoders.base import AbstractBackwardEncoder, Rows, Transform


class GRUEncoder(AbstractBackwardEncoder):
    """A GRU that runs backwards over the observed times, aware of the gaps between them and of what is missing.

    Each series is read from its own last observed time, so padding changes nothing. The first encoder to try.

    Args:
        obs_dim: number of channels.
        hidden: size of the encoding.
        covariates: number of covariates, static or time-varying; the latter are read at observed times.
        transform: applied to the values first, e.g. `torch.log1p`; they should end up near unit scale.
        time_unit: times are divided by it; a typical gap should end up near 1.

    Raises:
        ShapeError: if a size is below 1, or the batch has another number of channels or covariates.
        TimeError: if `time_unit` is not positive.

    References:
        Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014, https://arxiv.org/abs/1406.1078

    Example:
        >>> import torch
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
        transform: Transform | None = None,
        time_unit: float = 1.0,
    ) -> None:
        super().__init__(obs_dim, hidden, covariates=covariates, transform=transform, time_unit=time_unit)
        self.gru = nn.GRU(self.features + 1, hidden, batch_first=True)

    def encode(self, rows: Rows) -> Tensor:
        return self.gru(rows.stepped)[0]
