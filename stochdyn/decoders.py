"""Decoders: from the states at the observation times to the distribution of what is observed."""

from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from stochdyn.errors import ShapeError


class AbstractDecoder(nn.Module, ABC):
    """The contract: `decoder(z)` for states (..., time, state) is a distribution over scalars (..., time, channel).

    Example:
        >>> from stochdyn.decoders import AbstractDecoder
        >>> class Counts(AbstractDecoder):
        ...     def forward(self, z):
        ...         return dist.Poisson(z.exp())
        >>> Counts()(torch.zeros(5, 3, 2)).batch_shape
        torch.Size([5, 3, 2])
    """

    @abstractmethod
    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """The distribution of every channel at every time."""


class NormalDecoder(AbstractDecoder):
    """Normal observations: y = net(z) + scale * noise, one scale per channel.

    Args:
        net: (..., state) to (..., channel): a linear map, an `MLP`, or `torch.nn.Identity()`.
        obs_dim: number of channels.
        scale: of the noise: its initial value where it is learned. In the units of the data.
        learned: whether the scale is learned.

    Raises:
        ShapeError: if the scale is not positive, or the net returns another number of channels.

    Example:
        >>> import stochdyn as sd
        >>> decoder = sd.NormalDecoder(torch.nn.Linear(4, 3), obs_dim=3, scale=0.1)
        >>> decoder(torch.randn(8, 20, 4)).batch_shape
        torch.Size([8, 20, 3])
    """

    def __init__(self, net: nn.Module, obs_dim: int, *, scale: float = 0.1, learned: bool = True) -> None:
        super().__init__()
        if not scale > 0:
            raise ShapeError(f"NormalDecoder: `scale` must be positive, got {scale}.")
        self.net, self.obs_dim = net, obs_dim
        log_scale = torch.full((obs_dim,), scale).log()
        self.log_scale: Tensor
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, z: Tensor) -> dist.Normal:
        loc = self.net(z)
        if loc.shape[-1] != self.obs_dim:
            raise ShapeError(
                f"The decoder's net returned {loc.shape[-1]} channels for obs_dim={self.obs_dim}. Change its last "
                "layer or obs_dim."
            )
        return dist.Normal(loc, self.log_scale.exp())
