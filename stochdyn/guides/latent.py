"""The posterior of a latent that is not a path: a normal in unconstrained space."""

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from stochdyn.guides.splines import Warp

Normalise = Callable[[Tensor], tuple[Tensor, Tensor]]
LOG_2PI = math.log(2 * math.pi)


class LatentNormal(dist.TorchDistribution):
    """A normal with a lower-triangular factor in the flattened unconstrained space of a latent.

    Args:
        loc: (*batch, size).
        factor: (*batch, size) standard deviations, or (*batch, size, size) lower triangular.
        transform: unconstrained space to the latent's support.
        shapes: the event shape of the latent, and of its unconstrained space.
        score: (loc, factor) as `score_parts` sees them: the guide's own parameters detached, latents sampled before
            attached.
        warp: splines between the noise and a standard normal; None where the noise is one.

    Example:
        >>> from torch.distributions import biject_to, constraints
        >>> q = LatentNormal(torch.zeros(3, 1), torch.ones(3, 1), biject_to(constraints.positive),
        ...                  (torch.Size(), torch.Size()), (torch.zeros(3, 1), torch.ones(3, 1)))
        >>> q.rsample().shape, bool((q.rsample() > 0).all())
        (torch.Size([3]), True)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        factor: Tensor,
        transform: Transform,
        shapes: tuple[torch.Size, torch.Size],
        score: tuple[Tensor, Tensor],
        warp: Warp | None = None,
    ) -> None:
        self.loc, self.factor, self.transform, self.score = loc, factor, transform, score
        self.diagonal = factor.dim() == loc.dim() and factor.shape == loc.shape
        self.free_shape = shapes[1]
        self.warp = None if warp is None else warp.expand(loc.shape[:-1])
        super().__init__(loc.shape[:-1], shapes[0], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(
            self.transform.codomain, len(self.event_shape) - self.transform.codomain.event_dim
        )

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "LatentNormal":
        batch, size = torch.Size(batch_shape), self.loc.shape[-1:]

        def grow(loc: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
            tail = size if self.diagonal else size + size
            return loc.expand(batch + size), factor.expand(batch + tail)

        shapes = self.event_shape, self.free_shape
        return LatentNormal(
            *grow(self.loc, self.factor), self.transform, shapes, grow(*self.score), self.warp
        )

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.loc.shape
        eps = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        eps = eps if self.warp is None else self.warp.noise(eps)
        u = self.loc + (self.factor * eps if self.diagonal else (self.factor @ eps[..., None])[..., 0])
        return self.transform(u.reshape(shape[:-1] + self.free_shape))

    def free(self, value: Tensor) -> Tensor:
        """A value in the flattened unconstrained space: (*batch, size)."""
        u = self.transform.inv(value)
        return u.reshape(u.shape[: u.dim() - len(self.free_shape)] + self.loc.shape[-1:])

    def log_prob(self, value: Tensor) -> Tensor:
        return self._score(value, self.loc, self.factor, None if self.warp is None else self.warp.normal)

    def score_parts(self, value: Tensor) -> ScoreParts:
        entropy_term = self._score(value, *self.score, None if self.warp is None else self.warp.scored)
        return ScoreParts(entropy_term, 0, entropy_term)

    def _score(self, value: Tensor, loc: Tensor, factor: Tensor, warp: Normalise | None) -> Tensor:
        u = self.transform.inv(value)
        batch = u.shape[: u.dim() - len(self.free_shape)]
        ladj = self.transform.log_abs_det_jacobian(u, value)
        ladj = ladj.reshape(*batch, -1).sum(-1)
        r = u.reshape(batch + loc.shape[-1:]) - loc
        if self.diagonal:
            w, scale = r / factor, factor
        else:
            w = torch.linalg.solve_triangular(factor, r[..., None], upper=False)[..., 0]
            scale = factor.diagonal(dim1=-2, dim2=-1)
        if warp is not None:
            w, bend = warp(w)
            ladj = ladj - bend.sum(-1)
        return -0.5 * (w.square().sum(-1) + w.shape[-1] * LOG_2PI) - scale.log().sum(-1) - ladj
