"""A normalising flow over all latents outside plates, sampled site by site: each conditional on those before it.

The flow is triangular: number k of the flattened latents depends on those before it only. So the conditional of a
site given the sites before it has a closed-form density, whatever the values of those are: drawn, replayed or given.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from stochdyn.errors import GuideError
from stochdyn.guides.latent import LOG_2PI
from stochdyn.guides.sites import Arrangement, Start, free_shape, lower_factor
from stochdyn.guides.splines import spline_layer, univariate


@dataclass(frozen=True)
class Flow:
    """A neural spline flow over all latents outside plates; inside plates as with `FullRank`.

    For posteriors that are curved or skewed. It costs more per step than `FullRank`, and starts where that does.

    Args:
        transforms: autoregressive spline transformations in a row.
        hidden: widths of the layers of their networks.
        bins: pieces of each spline.
        init_scale: initial standard deviations, as a share of the prior's.

    References:
        Durkan et al., "Neural spline flows", 2019, https://arxiv.org/abs/1906.04032; Papamakarios et al., "Masked
        autoregressive flow for density estimation", 2017, https://arxiv.org/abs/1705.07057

    Example:
        >>> import stochdyn as sd
        >>> sd.Flow(hidden=(64, 64))
        Flow(transforms=3, hidden=(64, 64), bins=8, init_scale=0.1)
    """

    transforms: int = 3
    hidden: tuple[int, ...] = (32, 32)
    bins: int = 8
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        if self.transforms < 1 or self.bins < 2 or not self.hidden:
            raise GuideError(
                f"Flow: transforms must be at least 1, bins at least 2, hidden not empty; got {self}."
            )


class JointFlow(nn.Module):
    """u = centre + unit (loc + L w), with w a spline flow of a standard normal; all maps are triangular."""

    centre: Tensor
    unit: Tensor

    def __init__(self, scale: tuple[Tensor, Tensor], factor: tuple[Tensor, Tensor], family: Flow) -> None:
        super().__init__()
        (centre, unit), (log_scale, lower) = scale, factor
        self.register_buffer("centre", centre)
        self.register_buffer("unit", unit)
        self.loc = nn.Parameter(torch.zeros_like(centre))
        self.log_scale, self.lower = nn.Parameter(log_scale), nn.Parameter(lower)
        self.layers = nn.ModuleList(
            spline_layer(len(centre), family.hidden, family.bins).to(centre) for _ in range(family.transforms)
        )
        self.arrangement = Arrangement(len(centre))

    @classmethod
    def begin(cls, starts: Mapping[str, Start], family: Flow) -> "JointFlow":
        """From the priors: a narrow normal."""
        centre = torch.cat([s.loc for s in starts.values()])
        unit = torch.cat([s.scale for s in starts.values()])
        log_scale = torch.full_like(centre, math.log(family.init_scale))
        return cls((centre, unit), (log_scale, centre.new_zeros(len(centre), len(centre))), family)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], family: Flow) -> "JointFlow":
        """An empty one with the shapes of a state_dict."""
        zeros = {name: torch.zeros_like(state[name]) for name in ("centre", "unit", "log_scale", "lower")}
        return cls((zeros["centre"], zeros["unit"]), (zeros["log_scale"], zeros["lower"]), family)

    def arrange(self, sizes: Mapping[str, int]) -> None:
        """Lay the sites out, in the order of the model."""
        self.arrangement.arrange(sizes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where every site stands."""
        return self.arrangement.slices

    def at(self) -> Tensor:
        """Where its normal stands, in unconstrained space: (size,)."""
        return (self.centre + self.unit * self.loc).detach()

    @torch.no_grad()
    def move_to(self, u: Tensor) -> None:
        """Stand elsewhere, as wide as before."""
        self.loc.copy_((u - self.centre) / self.unit)

    def history(self) -> "Drawn":
        """What one run of a guide records."""
        return Drawn()

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Unconstrained values (*batch, size) to a standard normal's, and log |dz_k / du_k| for each of them."""
        L = self._factor()
        w = torch.linalg.solve_triangular(
            L, ((u - self.centre) / self.unit - self.loc)[..., None], upper=False
        )
        w, ladj = w[..., 0], -self.log_scale - self.unit.log()
        for layer in self.layers:
            w, more = univariate(layer, w).call_and_ladj(w)
            ladj = ladj + more
        return w, ladj

    def inverse(self, z: Tensor) -> Tensor:
        """A standard normal's values (*batch, size) to unconstrained ones."""
        for layer in reversed(self.layers):
            z = layer().inv(z)
        return self.centre + self.unit * (self.loc + (self._factor() @ z[..., None])[..., 0])

    def _factor(self) -> Tensor:
        return lower_factor(self.log_scale.exp(), self.lower)

    def frozen(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` with the parameters detached."""
        own = {name: p.detach() for name, p in self.named_parameters()}
        return torch.func.functional_call(self, own, (u,))

    def posterior(self, name: str, prior: dist.TorchDistribution, before: "Drawn") -> "LatentFlow":
        """The conditional posterior of one site."""
        part = self.arrangement.part(name, before.count)
        return LatentFlow(
            self, part, before, biject_to(prior.support), (prior.event_shape, free_shape(prior))
        )

    def median(self, name: str, prior: dist.TorchDistribution) -> Tensor:
        """The image of zero, without history."""
        with torch.no_grad():
            u = self.inverse(torch.zeros_like(self.centre))[self.slices[name]]
        return biject_to(prior.support)(u.reshape(free_shape(prior)))


class Drawn:
    """The unconstrained values of the joint sites so far in one run, and the joint draw that they come from."""

    def __init__(self) -> None:
        self.values = torch.empty(0)
        self.joint: Tensor | None = None

    @property
    def count(self) -> int:
        """How many numbers are recorded."""
        return self.values.shape[-1]

    def add(self, q: "LatentFlow", value: Tensor) -> None:
        """Record a sampled (or replayed) value."""
        u = q.free(value)
        own = value is q.drawn and (self.joint is not None or self.count == 0)
        self.joint = q.joint if own else None
        if self.count == 0:
            self.values = u
        else:
            batch = torch.broadcast_shapes(self.values.shape[:-1], u.shape[:-1])
            self.values = torch.cat([self.values.expand(*batch, -1), u.expand(*batch, -1)], -1)


class LatentFlow(dist.TorchDistribution):
    """The conditional of one site of a `JointFlow` given those before it.

    Args:
        flow: the joint flow.
        part: where the site stands in it.
        before: the sites before.
        transform: unconstrained space to the latent's support.
        shapes: the event shape of the latent, and of its unconstrained space.
        batch: the batch shape, by default that of the sites before.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        flow: JointFlow,
        part: slice,
        before: Drawn,
        transform: Transform,
        shapes: tuple[torch.Size, torch.Size],
        batch: torch.Size | None = None,
    ) -> None:
        self.flow, self.part, self.before, self.transform = flow, part, before, transform
        self.known, self.plan = before.values, before.joint
        self.free_shape = shapes[1]
        self.joint: Tensor | None = None
        self.drawn: Tensor | None = None
        batch = self.known.shape[:-1] if batch is None else batch
        super().__init__(batch, shapes[0], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(
            self.transform.codomain, len(self.event_shape) - self.transform.codomain.event_dim
        )

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "LatentFlow":
        shapes = self.event_shape, self.free_shape
        return LatentFlow(self.flow, self.part, self.before, self.transform, shapes, torch.Size(batch_shape))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape
        joint = self.plan if self.plan is not None and self.plan.shape[:-1] == shape else self._draw(shape)
        u = joint[..., self.part]
        value = self.transform(u.reshape(shape + self.free_shape))
        self.joint, self.drawn = joint, value
        return value

    def _draw(self, shape: torch.Size) -> Tensor:
        """The whole of the flow given the sites before; the sites after this one may use the same draw."""
        z = torch.randn(
            shape + self.flow.centre.shape, dtype=self.flow.centre.dtype, device=self.flow.centre.device
        )
        start = self.part.start
        if start:
            known = self.flow(self._padded(self.known))[0][..., :start]
            z = torch.cat([known.expand(*shape, start), z[..., start:]], -1)
        return self.flow.inverse(z)

    def free(self, value: Tensor) -> Tensor:
        """A value in the flattened unconstrained space: (*batch, size)."""
        u = self.transform.inv(value)
        size = self.part.stop - self.part.start
        return u.reshape(*u.shape[: u.dim() - len(self.free_shape)], size)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._score(value, self.flow)

    def score_parts(self, value: Tensor) -> ScoreParts:
        entropy_term = self._score(value, self.flow.frozen)
        return ScoreParts(entropy_term, 0, entropy_term)

    def _score(self, value: Tensor, flow: Any) -> Tensor:
        u = self.free(value)
        if self.part.start:
            batch = torch.broadcast_shapes(self.known.shape[:-1], u.shape[:-1])
            u = torch.cat([self.known.expand(*batch, -1), u.expand(*batch, -1)], -1)
        z, ladj = (x[..., self.part] for x in flow(self._padded(u)))
        free = self.transform.inv(value)
        outward = self.transform.log_abs_det_jacobian(free, value)
        outward = outward.reshape(*free.shape[: free.dim() - len(self.free_shape)], -1).sum(-1)
        return (ladj - 0.5 * (z.square() + LOG_2PI)).sum(-1) - outward

    def _padded(self, u: Tensor) -> Tensor:
        """Anything after the numbers at hand: the ones before do not depend on it."""
        rest = self.flow.centre[u.shape[-1] :]
        return torch.cat([u, rest.expand(*u.shape[:-1], len(rest))], -1)
