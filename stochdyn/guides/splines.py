"""Monotone splines whose shape a network reads from a context; both kinds of flows are made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution


def spline_layer(size: int, hidden: Sequence[int], bins: int, context: int = 0) -> nn.Module:
    """One autoregressive layer that begins as the identity; outside of [-5, 5] it stays the identity.

    Args:
        size: how many numbers it transforms.
        hidden: widths of its network, which reads the numbers before, and the context.
        bins: pieces of each spline.
        context: size of the context, 0 for none.

    Example:
        >>> layer = spline_layer(2, (8,), 4, context=3)
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(layer(torch.randn(5, 3))(x), x, atol=1e-6)
        True
    """
    validating = Distribution._validate_args
    try:
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform  # sets torch's validation off
        from zuko.transforms import MonotonicRQSTransform
    finally:
        Distribution.set_default_validate_args(validating)
    reads = size > 1 or context > 0
    network = {"hidden_features": tuple(hidden), "activation": nn.ELU} if reads else {}
    layer = MaskedAutoregressiveTransform(
        size,
        context,
        univariate=partial(MonotonicRQSTransform, slope=1e-3),
        shapes=[(bins,), (bins,), (bins - 1,)],
        **network,
    )
    with torch.no_grad():
        for parameter in layer.hyper[-1].parameters() if reads else layer.parameters():
            parameter.zero_()
    return layer


def univariate(layer: nn.Module, w: Tensor, context: Tensor | None = None) -> Any:
    """The splines of a layer at a value, one for each number."""
    transform = layer(context)
    return (transform.meta(w) if hasattr(transform, "meta") else transform).base


class ConditionalSplines(nn.Module):
    """w (*batch, size) to z, normal, by layers that read a context (*batch, context).

    Example:
        >>> splines, w = ConditionalSplines(2, (8,), 4, 1, 3), torch.randn(5, 2)
        >>> z, ladj = splines(w, torch.randn(5, 3))
        >>> z.shape, ladj.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(self, size: int, hidden: Sequence[int], bins: int, transforms: int, context: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(spline_layer(size, hidden, bins, context) for _ in range(transforms))

    def forward(self, w: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z, and log |dz_k / dw_k| for each number."""
        ladj = torch.zeros_like(w)
        for layer in self.layers:
            w, more = univariate(layer, w, context).call_and_ladj(w)
            ladj = ladj + more
        return w, ladj

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        """w of z."""
        for layer in reversed(self.layers):
            z = layer(context).inv(z)
        return z


@dataclass(frozen=True)
class Warp:
    """Splines at a context (*batch, context); `score` is the context as `score_parts` sees it.

    It holds the parameters as they were when it was made, also whether they were to have gradients: densities are asked
    for later, when that may have changed.
    """

    splines: ConditionalSplines
    parameters: dict[str, Tensor]
    context: Tensor
    score: Tensor

    @classmethod
    def of(cls, splines: ConditionalSplines, context: Tensor, score: Tensor) -> "Warp":
        """With the parameters of now."""
        own = {n: p if p.requires_grad else p.detach() for n, p in splines.named_parameters()}
        return cls(splines, own, context, score)

    def expand(self, batch: torch.Size) -> "Warp":
        """For another batch shape."""
        context, score = (x.expand(*batch, x.shape[-1]) for x in (self.context, self.score))
        return Warp(self.splines, self.parameters, context, score)

    def noise(self, z: Tensor) -> Tensor:
        """w of a normal z."""
        return self.splines.inverse(z, self.context)

    def normal(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """z of w, and log |dz_k / dw_k|."""
        return torch.func.functional_call(self.splines, self.parameters, (w, self.context))

    def scored(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the guide's own parameters detached."""
        detached = {name: p.detach() for name, p in self.parameters.items()}
        return torch.func.functional_call(self.splines, detached, (w, self.score))
