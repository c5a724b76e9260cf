"""An encoder of dilated convolutions over the observations."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from stochdyn.encoders.base import AbstractBackwardEncoder, Rows, Transform
from stochdyn.errors import ShapeError


class ConvEncoder(AbstractBackwardEncoder):
    """Dilated one-sided convolutions over the observed times, and the mean of what they give from each time on.

    Layer l looks at `kernel` observed times, 2^l apart, none of them earlier than its own; gaps and mask are channels.
    So entry k sees exactly where they lie the next 1 + (kernel - 1)(2^layers - 1) observed times (22 by default;
    `receptive_field`), and all later ones through a running mean. It has no loop over time.

    Args:
        obs_dim: number of channels.
        hidden: size of the encoding.
        layers: number of convolutions.
        kernel: observed times that one convolution reads.
        covariates: number of covariates, static or time-varying; the latter are read at observed times.
        transform: applied to the values first, e.g. `torch.log1p`; they should end up near unit scale.
        time_unit: times are divided by it; a typical gap should end up near 1.

    Raises:
        ShapeError: if a size is below 1, or the batch has another number of channels or covariates.
        TimeError: if `time_unit` is not positive.

    References:
        Bai, Kolter & Koltun, "An empirical evaluation of generic convolutional and recurrent networks for sequence
        modeling", 2018, https://arxiv.org/abs/1803.01271

    Example:
        >>> import stochdyn as sd
        >>> batch = sd.Series([0.0, 1.0, 2.0], torch.randn(4, 3, 2))
        >>> sd.ConvEncoder(obs_dim=2, hidden=16)(batch).shape
        torch.Size([4, 3, 16])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int = 64,
        *,
        layers: int = 3,
        kernel: int = 4,
        covariates: int = 0,
        transform: Transform | None = None,
        time_unit: float = 1.0,
    ) -> None:
        super().__init__(obs_dim, hidden, covariates=covariates, transform=transform, time_unit=time_unit)
        if min(layers, kernel) < 1:
            raise ShapeError(f"ConvEncoder: layers and kernel must be at least 1, got {layers} and {kernel}.")
        widths = [self.features + 1, *[hidden] * layers]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, kernel, dilation=2**depth) for depth, (a, b) in enumerate(pairwise(widths))
        )
        self.merge = nn.Linear(2 * hidden, hidden)
        self.receptive_field = 1 + (kernel - 1) * (2**layers - 1)

    def encode(self, rows: Rows) -> Tensor:
        x = rows.stepped.mT
        for depth, convolution in enumerate(self.convolutions):
            reach = (convolution.kernel_size[0] - 1) * 2**depth
            y = nn.functional.silu(convolution(nn.functional.pad(x, (reach, 0))))
            x = y if depth == 0 else x + y
        number = torch.arange(1, 1 + x.shape[-1], dtype=x.dtype, device=x.device)
        return self.merge(torch.cat([x, x.cumsum(-1) / number], 1).mT)
