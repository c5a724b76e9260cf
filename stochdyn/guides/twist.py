"""A latent's prior times a Gaussian message, in the coordinates where the prior is Gaussian."""

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution, biject_to
from torch.distributions.transforms import ComposeTransform, Transform

from stochdyn.device import cholesky
from stochdyn.guides.latent import LatentNormal
from stochdyn.guides.sites import free_shape
from stochdyn.guides.splines import Warp
from stochdyn.paths.noise import FullTwist, matvec


@dataclass(frozen=True)
class NaturalMessage:
    """The factor exp(h'u - u'Ju/2); `information` (*batch, size), `precision` (*batch, size, size)."""

    information: Tensor
    precision: Tensor

    def pooled(self, group: Tensor, groups: int) -> "NaturalMessage":
        """The product of the messages of every group's members, which are at dimension -2 of `information`."""
        h, J = self.information, self.precision
        return NaturalMessage(
            h.new_zeros(*h.shape[:-2], groups, h.shape[-1]).index_add(-2, group, h),
            J.new_zeros(*J.shape[:-3], groups, *J.shape[-2:]).index_add(-3, group, J),
        )

    def moved(self, dim: int) -> "NaturalMessage":
        """With the members at another plate's dimension (negative, counted over the batch)."""
        h, J = self.information, self.precision
        return NaturalMessage(moved(h, dim, 1), moved(J, dim, 2))


@dataclass(frozen=True)
class GaussianBase:
    """u ~ N(loc, G G') in flattened coordinates, with the transform to the latent.

    `factor` is (*batch, size) standard deviations or (*batch, size, size); `own` tells whether that is the prior.
    """

    loc: Tensor
    factor: Tensor
    transform: Transform
    own: bool

    @property
    def diagonal(self) -> bool:
        """Whether the factor holds standard deviations."""
        return self.factor.shape == self.loc.shape


def coordinates(prior: dist.TorchDistribution) -> Transform:
    """From the coordinates of a latent's messages to the latent."""
    core, transforms = _unwrapped(prior)
    return biject_to(prior.support) if core is None else ComposeTransform(transforms)


def gaussian_base(prior: dist.TorchDistribution, centre: Tensor, unit: Tensor) -> GaussianBase:
    """The prior's own Gaussian, where it is a (transformed) normal; else a fixed one, as wide as the prior.

    Args:
        prior: the prior of the latent.
        centre: (size,) median of the prior in unconstrained space, for a prior that is not Gaussian there.
        unit: (size,) its spread.
    """
    core, transforms = _unwrapped(prior)
    batch = prior.batch_shape
    if core is None:
        shape = batch + centre.shape
        return GaussianBase(centre.expand(shape), unit.expand(shape), biject_to(prior.support), False)
    transform, flat = ComposeTransform(transforms), (*batch, -1)
    loc = core.loc.expand(core.batch_shape + core.event_shape).reshape(flat)
    if isinstance(core, torch.distributions.Normal):
        return GaussianBase(loc, core.scale.reshape(flat), transform, True)
    tril = core.scale_tril.expand(*core.batch_shape, *core.scale_tril.shape[-2:])
    return GaussianBase(loc, tril.reshape(*batch, *tril.shape[-2:]), transform, True)


def twisted(
    prior: dist.TorchDistribution,
    base: GaussianBase,
    message: NaturalMessage,
    score: NaturalMessage,
    warp: Warp | None = None,
) -> LatentNormal:
    """q = base x message, renormalised, over the latent.

    Args:
        prior: the prior of the latent.
        base: its Gaussian base.
        message: the message.
        score: the same with the guide's own parameters detached, as `score_parts` sees it.
        warp: splines on its noise.
    """
    loc, factor = _product(base, message)
    shapes = prior.event_shape, free_shape(prior) if not base.own else _inner_shape(prior, base.transform)
    q = LatentNormal(loc, factor, base.transform, shapes, _product(base, score), warp)
    batch = torch.broadcast_shapes(prior.batch_shape, q.batch_shape)
    return q if batch == q.batch_shape else q.expand(batch)


def _product(base: GaussianBase, message: NaturalMessage) -> tuple[Tensor, Tensor]:
    """Mean and a lower-triangular factor of the covariance (standard deviations for a single number)."""
    a, G, h, J = base.loc, base.factor, message.information, message.precision
    if a.shape[-1] == 1:
        g = G if base.diagonal else G[..., 0]
        p = 1 + g.square() * J[..., 0]
        return (a + g.square() * h) / p, g.abs() / p.sqrt()
    G = torch.diag_embed(G) if base.diagonal else G
    congruence = G.mT @ J @ G
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    twist = FullTwist(cholesky(congruence + eye))
    loc = a + matvec(G, twist.smooth(matvec(G.mT, h - matvec(J, a))))
    W = torch.linalg.solve_triangular(twist.C, G.mT.expand(congruence.shape), upper=False)
    return loc, cholesky(W.mT @ W)


def _unwrapped(prior: Distribution) -> tuple[Distribution | None, list[Transform]]:
    """The normal under a prior and the transforms on it, in order; None where there is none to twist exactly."""
    transforms: list[Transform] = []
    core: Distribution = prior
    while True:
        if isinstance(core, Independent):
            core = core.base_dist
        elif isinstance(core, TransformedDistribution):
            transforms = list(core.transforms) + transforms
            core = core.base_dist
        else:
            break
    same = (core.batch_shape + core.event_shape).numel() == (prior.batch_shape + prior.event_shape).numel()
    usable = same and all(t.bijective for t in transforms)
    if usable and isinstance(core, torch.distributions.Normal):
        return core, transforms
    full = torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal
    if usable and isinstance(core, full) and core.event_shape.numel() == prior.event_shape.numel():
        return core, transforms
    return None, []


def _inner_shape(prior: dist.TorchDistribution, transform: Transform) -> torch.Size:
    shape = transform.inverse_shape(prior.batch_shape + prior.event_shape)
    return torch.Size(shape[len(prior.batch_shape) :])


def moved(x: Tensor, dim: int, tail: int) -> Tensor:
    """With the last batch dimension at a plate's (negative); `tail` dimensions are not of the batch."""
    while x.dim() - tail < -dim:
        x = x[None]
    return x.transpose(-1 - tail, dim - tail)
