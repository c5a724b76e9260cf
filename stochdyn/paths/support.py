"""The support of a path, and the bijection from an unconstrained vector on to it (NUTS, automatic guides)."""

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

from stochdyn.paths.chain import LOG_2PI, Chain
from stochdyn.paths.checks import lift
from stochdyn.paths.start import RandomStart, bijection


class PathSupport(constraints.Constraint):
    """Finite paths that agree with a known start and stand still in steps of zero length."""

    event_dim = 2

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def check(self, value: Tensor) -> Tensor:
        value = self.chain.aligned(value)
        finite = torch.isfinite(value).all(-1).all(-1)
        return finite & ~self.chain.starts_elsewhere(value) & ~self.chain.moved(value).any(0)


def path_support(chain: Chain) -> constraints.Constraint:
    """The constraint of a path; `biject_to` of it drops every row without a density."""
    return PathSupport(chain)


class PathTransform(Transform):
    """An unconstrained vector (free,) to a path (time, state).

    Full-rank noise: the free numbers are the initial state (unless it is known), unconstrained, and the
    states themselves, so that a density costs one vectorised call. Fewer noises than states: they are the
    noise coordinates, and the log determinant is of the volume that the noise spans.
    A step of zero length has no freedom; the numbers that would be its own get a standard normal density of
    their own (they are drawn and ignored, and 0 in the inverse), which keeps a batch rectangular without flat
    directions.
    """

    bijective = True
    domain = constraints.real_vector

    def __init__(self, chain: Chain, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.chain = chain
        self.tall = chain.noise_dim < chain.state_dim
        self.start_free = chain.state_dim if isinstance(chain.start, RandomStart) else 0
        self.codomain = PathSupport(chain)
        if self.start_free:
            self.start_transform = bijection(chain.start.prior)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PathTransform) and other.chain is self.chain

    def __hash__(self) -> int:
        return id(self.chain)

    def with_cache(self, cache_size: int = 1) -> "PathTransform":
        return self if cache_size == self._cache_size else PathTransform(self.chain, cache_size)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], self.chain.steps + 1, self.chain.state_dim))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-2], self.start_free + self.chain.steps * self.chain.noise_dim))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x[..., self.start_free :].unflatten(-1, (self.chain.steps, self.chain.noise_dim))
        return x[..., : self.start_free], rows.movedim(-2, 0)

    def _call(self, x: Tensor) -> Tensor:
        first, rows = self._parts(x)
        batch = torch.broadcast_shapes(x.shape[:-1], self.chain.batch_shape)
        z0 = self.start_transform(first) if self.start_free else self.chain.start.centre()
        z0 = z0.expand(*batch, self.chain.state_dim)
        return self._simulated(z0, rows) if self.tall else self._filled(z0, rows)

    def _filled(self, z0: Tensor, rows: Tensor) -> Tensor:
        real = self._real(z0.dim() - 1)
        rows = rows.expand(rows.shape[0], *z0.shape)
        states = torch.cat([z0[None], rows])
        if not real.all():
            count = torch.arange(1, real.shape[0] + 1, device=real.device)
            count = count.reshape(-1, *[1] * (real.dim() - 1))
            last = torch.where(real, count, torch.zeros_like(count)).cummax(0)[0]
            rows = torch.gather(states, 0, last[..., None].expand_as(rows))
            states = torch.cat([z0[None], rows])
        return states.movedim(0, -2)

    def _real(self, batch_ndim: int) -> Tensor:
        return lift(self.chain.real[..., None], batch_ndim + 1)[..., 0]

    def _simulated(self, z: Tensor, xi: Tensor) -> Tensor:
        t, dt, context = self.chain.layout(z.dim())
        states = [z]
        for k in range(self.chain.steps):
            a, noise = self.chain.step(t[k], dt[k], None if context is None else context[k], z)
            z = a + noise.apply(xi[k])
            states.append(z)
        return torch.stack(states, -2)

    def _inverse(self, y: Tensor) -> Tensor:
        y = self.chain.aligned(y)
        first = self.start_transform.inv(y[..., 0, :]) if self.start_free else y[..., 0, :0]
        rows = self.chain.steps_of(y)[2] if self.tall else self.chain.split(y)[1]
        real = self._real(y.dim() - 2)[..., None]
        rows = torch.where(real, rows, torch.zeros_like(rows)).movedim(0, -2).flatten(-2)
        return torch.cat([first, rows], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        first, rows = self._parts(x)
        batch = y.shape[:-2]
        total = x.new_zeros(batch)
        if self.start_free:
            ladj = self.start_transform.log_abs_det_jacobian(first, y[..., 0, :])
            total = total + (ladj.sum(-1) if ladj.dim() == first.dim() else ladj)
        real = self._real(len(batch))
        idle = -0.5 * (rows.square() + LOG_2PI).sum(-1)
        volume = self.chain.steps_of(y)[1].logdet() if self.tall else torch.zeros_like(idle)
        return total + torch.where(real, volume, idle).sum(0)


@biject_to.register(PathSupport)
@transform_to.register(PathSupport)
def _path_transform(support: PathSupport) -> Transform:
    return PathTransform(support.chain)
