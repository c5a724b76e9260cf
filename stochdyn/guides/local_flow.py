"""A flow for the latents of a series or of a group: the twisted normal, bent as the data of the series say."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stochdyn.errors import GuideError
from stochdyn.guides.splines import ConditionalSplines, Warp
from stochdyn.guides.twist import moved


@dataclass(frozen=True)
class LocalFlow:
    """A latent in a plate whose amortised posterior is skewed or heavy-tailed: a value of `amortize=`.

    Its posterior is the prior times a Gaussian message, as for a plate's bare name, seen through monotone splines that
    read the encoding of the series and the latents sampled before: u = loc + factor w, z = splines(w; data), z normal.
    The splines begin as the identity, so training starts where it starts without them. Outside of five standard
    deviations of the twisted normal the tails are that normal's. The numbers of a latent that has several depend on
    each other, and latents of one series on those sampled before; the density is exact.

    Args:
        plate: over the series, or over groups of them.
        transforms: autoregressive spline transformations in a row.
        hidden: widths of the layers of their networks.
        bins: pieces of each spline.

    Raises:
        GuideError: for sizes that make no spline, or a plate that is no name.

    References:
        Durkan et al., "Neural spline flows", 2019, https://arxiv.org/abs/1906.04032; Rezende & Mohamed, "Variational
        inference with normalizing flows", 2015, https://arxiv.org/abs/1505.05770

    Example:
        >>> import pyro, pyro.distributions as dist, torch, stochdyn as sd
        >>> def model(batch):
        ...     with batch.plate("series"):
        ...         rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.5))
        ...         batch.observe("jumps", sd.PoissonProcess(rate, batch.t0, batch.t1))
        >>> jumps = sd.Jumps.from_list([[0.4, 1.1], []], t0=0.0, t1=[4.0, 3.0], dtype=torch.float32)
        >>> guide = sd.AmortizedGuide(model, sd.SetEncoder(1, 8), amortize={"rate": sd.LocalFlow("series")})
        >>> guide(jumps)["rate"].shape
        torch.Size([2])
    """

    plate: str
    transforms: int = 1
    hidden: tuple[int, ...] = (32, 32)
    bins: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.plate, str):
            raise GuideError(
                f"LocalFlow: `plate` must be the name of a plate, got {self.plate!r}. Write "
                "amortize={'rate': sd.LocalFlow('series')}."
            )
        if self.transforms < 1 or self.bins < 2 or not self.hidden:
            raise GuideError(
                f"LocalFlow: transforms must be at least 1, bins at least 2, hidden not empty; got {self}."
            )


class SiteFlow(nn.Module):
    """The splines of one latent, and what they read: features of a member, or the mean over those of a group.

    Args:
        features: size of encoding and upstream latents together.
        size: of the latent in unconstrained space.
        family: the sizes.
    """

    def __init__(self, features: int, size: int, family: LocalFlow) -> None:
        super().__init__()
        width = family.hidden[0]
        self.read = nn.Linear(features, width)
        self.splines = ConditionalSplines(size, family.hidden, family.bins, family.transforms, width + 1)

    def contexts(self, x: Tensor, x_score: Tensor) -> tuple[Tensor, Tensor]:
        """(..., rows, context) of every member, and the same with only the guide's own parameters detached."""
        own = {name: p.detach() for name, p in self.read.named_parameters()}
        read = torch.func.functional_call(self.read, own, (x_score,))
        return _alone(torch.tanh(self.read(x))), _alone(torch.tanh(read))

    def warp(self, contexts: tuple[Tensor, Tensor], dim: int) -> Warp:
        """With the members at a plate's dimension (negative, counted over the batch)."""
        context, score = (moved(c, dim, 1) for c in contexts)
        return Warp.of(self.splines, context, score)


def of_groups(context: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mean over the members of every group, and the logarithm of their number.

    Example:
        >>> of_groups(torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]), torch.tensor([0, 0, 1]), 2)
        tensor([[2.0000, 0.6931],
                [5.0000, 0.0000]])
    """
    ones = torch.ones(group.shape, dtype=context.dtype, device=context.device)
    number = (
        context.new_zeros(groups).index_add(0, group, ones).clamp(min=1)
    )  # bincount would wait for the device
    total = context.new_zeros(*context.shape[:-2], groups, context.shape[-1]).index_add(-2, group, context)
    return torch.cat(
        [total[..., :-1] / number[:, None], number.log()[:, None].expand(total[..., -1:].shape)], -1
    )


def _alone(features: Tensor) -> Tensor:
    return torch.nn.functional.pad(features, (0, 1))
