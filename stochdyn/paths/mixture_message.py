"""Messages that are mixtures of Gaussians, for paths that jump, and the backward filter that makes them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.device import readable
from stochdyn.errors import GuideError
from stochdyn.paths.checks import lift
from stochdyn.paths.components import NOTHING, before, merged
from stochdyn.paths.jump_sizes import log_poisson
from stochdyn.paths.message import Message, linearise
from stochdyn.paths.noise import matvec

if TYPE_CHECKING:
    from stochdyn.paths.jump_diffusion import JumpDiffusionPath

FILTER_TAIL = 1e-7


@dataclass(frozen=True, eq=False)
class MixtureMessage:
    """A factor sum_c exp(w_c + h_c'z - z'J_c z / 2) on every state of a path.

    From `jump_filter`, component c stands for c jumps until the next observation, the last one of C for that many or
    more; with a memory, components C to 2 C - 1 for the same where the gap after that observation has jumps too.

    Args:
        log_weight: w, (*batch, time, component).
        information: h, (*batch, time, component, state); units 1/state.
        precision: J, (*batch, time, component, state, state).

    Example:
        >>> import torch
        >>> m = MixtureMessage(torch.zeros(5, 2), torch.zeros(5, 2, 1), torch.ones(5, 2, 1, 1))
        >>> m.log_value(torch.zeros(5, 1)).shape
        torch.Size([5])
    """

    log_weight: Tensor
    information: Tensor
    precision: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, information and precision."""
        return self.log_weight, self.information, self.precision

    def log_value(self, z: Tensor) -> Tensor:
        """Its logarithm at states (*batch, time, state)."""
        z = z.to(self.precision)[..., None, :]
        return torch.logsumexp(
            self.log_weight + (z * (self.information - 0.5 * matvec(self.precision, z))).sum(-1), -1
        )

    def masked(self, valid: Tensor) -> "MixtureMessage":
        """No message where valid (*batch, time) is False."""
        made = []
        for k, x in enumerate(self.parts):
            keep = valid.reshape(*valid.shape, *[1] * (k + 1))
            made.append(torch.where(keep, x, torch.zeros_like(x)))
        return MixtureMessage(*made)

    def detach(self) -> "MixtureMessage":
        """The same numbers without their history."""
        return MixtureMessage(*(x.detach() for x in self.parts))

    def time_major(self) -> "MixtureMessage":
        """Time moved to the front."""
        return MixtureMessage(*(x.movedim(-2 - k, 0) for k, x in enumerate(self.parts)))

    def lifted(self, ndim: int) -> "MixtureMessage":
        """Of a time-major message: batch dimensions inserted for states of `ndim` dimensions."""
        return MixtureMessage(*(lift(x, ndim + k) for k, x in enumerate(self.parts)))

    def __getitem__(self, k: "int | slice") -> "MixtureMessage":
        return MixtureMessage(*(x[k] for x in self.parts))

    @property
    def batch_shape(self) -> torch.Size:
        """The batch of a message that is not time-major."""
        return torch.broadcast_shapes(*(x.shape[: -2 - k] for k, x in enumerate(self.parts)))


def jump_filter(
    path: "JumpDiffusionPath",
    potential: Message,
    around: Tensor,
    components: int = 3,
    memory: int | None = None,
) -> MixtureMessage:
    """The backward filter of a linearised jump diffusion.

    Between observations a component holds exactly what follows so many jumps, where drift, diffusion and intensity are
    those of a Brownian motion; else those that jumped at different times are merged by their moments. At an observation
    all are merged that `memory` does not tell apart, after its factor: they differ little there when it says more than
    what follows. It is made in double precision, whatever the path's: weights are values at zero, and states may be far
    from there.

    Args:
        path: the prior.
        potential: the (Gaussian, or locally Gaussian) log likelihood of every state.
        around: the path (*batch, time, state) to linearise around, and at which intensities are read.
        components: how many; the last one counts that many jumps or more.
        memory: each gap doubles the components. None is 0 for one state and 1 for several.

    Raises:
        GuideError: for fewer than two components, or a negative memory.
    """
    chain = path.chain
    memory = int(chain.state_dim > 1) if memory is None else memory
    if not isinstance(memory, int) or memory < 0:
        raise GuideError(f"`memory` is a number of gaps between observations, got {memory}.")
    if not isinstance(components, int) or components < 2:
        raise GuideError(f"A message of a jump diffusion needs at least two components, got {components}.")
    linear = linearise(chain, around)
    states = chain.split(around.detach())[0]
    t, dt, context = chain.layout(states.dim() - 1)
    rate = path.intensity(t, states, context).double() * dt
    ndim = max(states.dim() - 1, potential.information.dim() - 1)
    Q = linear.Q.diagonal(dim1=-2, dim2=-1)
    F, b, Q = (lift(x.double(), ndim + k) for k, x in ((1, linear.F), (0, linear.b), (0, Q)))
    rate = lift(rate, ndim)
    most = max(path.counts(rate, FILTER_TAIL), 1)
    *parts, jumps = counted(path, b, Q, rate, most)
    steps = _Steps(F, *parts, jumps)
    h, J = potential.information.double().movedim(-2, 0), potential.full().double().movedim(-3, 0)
    return _backward(steps, lift(h, ndim), lift(J, ndim + 1), _Layout(components, memory))


def counted(
    path: "JumpDiffusionPath", a: Tensor, variance: Tensor, rate: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A step's normal components: means and standard deviations (..., n, state), the logarithms of their probabilities
    (..., n), and how many jumps each stands for."""
    means, variances, logs, jumps = [], [], [], []
    for count in range(most + 1):
        log_share, mean, own = (x.to(a) for x in path.jumps.size.normals(count))
        means.append(a[..., None, :] + mean)
        variances.append(variance[..., None, :] + own)
        logs.append(log_poisson(count, rate) + log_share)
        jumps += [count] * log_share.shape[-1]
    floor = torch.finfo(a.dtype).tiny  # a root of zero has no gradient
    d = _together(variances, -2).clamp(min=floor).sqrt()
    return _together(means, -2), d, _together(logs, -1).clamp(min=NOTHING), jumps


def _together(parts: list[Tensor], dim: int) -> Tensor:
    """Along a dimension, what is left of it broadcast."""
    batch = torch.broadcast_shapes(*(x.shape[:dim] for x in parts))
    return torch.cat([x.expand(*batch, *x.shape[dim:]) for x in parts], dim)


@dataclass(frozen=True)
class _Layout:
    """Which components there are: (kept, count), flattened.

    `count` is the number of jumps until the next observation, the last one that many or more; `kept` has a bit for each
    of the `memory` gaps after that, whether there are jumps in it, the nearest gap's the lowest.
    """

    counts: int
    memory: int

    @property
    def kept(self) -> int:
        return 2**self.memory

    def within_a_gap(self, pairs: list[tuple[int, int]]) -> list[list[int]]:
        """The groups of (jumps in a step, component after it) that become one component before it."""
        groups: list[list[int]] = [[] for _ in range(self.kept * self.counts)]
        for position, (jumps, component) in enumerate(pairs):
            kept, count = divmod(component, self.counts)
            groups[kept * self.counts + min(jumps + count, self.counts - 1)].append(position)
        return groups

    def at_an_observation(self) -> list[list[int]]:
        """The groups of components after an observation that become one before it: no jumps until it."""
        groups: list[list[int]] = [[] for _ in range(self.kept * self.counts)]
        for component in range(self.kept * self.counts):
            kept, count = divmod(component, self.counts)
            kept = (2 * kept + (count > 0)) % self.kept
            groups[kept * self.counts].append(component)
        return groups


@dataclass(frozen=True)
class _Steps:
    """z' = F z + m_n + noise of standard deviations d_n with probability exp(log_prior_n), time-major."""

    F: Tensor
    m: Tensor
    d: Tensor
    log_prior: Tensor
    jumps: list[int]


def _backward(steps: _Steps, h: Tensor, J: Tensor, layout: _Layout) -> MixtureMessage:
    size, count = h.shape[-1], layout.kept * layout.counts
    batch = torch.broadcast_shapes(
        h.shape[1:-1], J.shape[1:-2], steps.F.shape[1:-2], steps.m.shape[1:-2], steps.log_prior.shape[1:-1]
    )
    weight = torch.full((*batch, count), NOTHING, dtype=h.dtype, device=h.device)
    weight[..., 0] = 0.0
    flat = weight.new_zeros(*batch, count, size), weight.new_zeros(*batch, count, size, size)
    now = _seen(MixtureMessage(weight, *flat), h[-1], J[-1], layout)
    out = [now]
    for k in range(len(h) - 2, -1, -1):
        passed = before(steps.F[k], steps.m[k], steps.d[k], steps.log_prior[k], now)
        now = _seen(_by_count(passed, steps.jumps, layout), h[k], J[k], layout)
        out.append(now)
    out.reverse()
    parts = zip(*(m.parts for m in out), strict=True)
    return MixtureMessage(*(torch.stack(x, -2 - k) for k, x in enumerate(parts)))


def _grouped(parts: tuple[Tensor, Tensor, Tensor], groups: list[list[int]]) -> MixtureMessage:
    """Merge the components of each group; an empty one weighs nothing."""
    w, h, J = parts
    made = []
    for own in groups:
        if own:
            made.append(merged(w[..., own], h[..., own, :], J[..., own, :, :]))
        else:
            made.append(
                (
                    torch.full_like(w[..., 0], NOTHING),
                    *(torch.zeros_like(x) for x in (h[..., 0, :], J[..., 0, :, :])),
                )
            )
    return MixtureMessage(*(torch.stack(x, -1 - k) for k, x in enumerate(zip(*made, strict=True))))


def _by_count(passed: tuple[Tensor, Tensor, Tensor], jumps: list[int], layout: _Layout) -> MixtureMessage:
    """Merge components (n now, c later) that stand for as many jumps."""
    components = passed[0].shape[-1]
    w, h, J = (x.flatten(-2 - k, -1 - k) for k, x in enumerate(passed))
    pairs = [(i, j) for i in jumps for j in range(components)]
    return _grouped((w, h, J), layout.within_a_gap(pairs))


def _seen(message: MixtureMessage, h: Tensor, J: Tensor, layout: _Layout) -> MixtureMessage:
    """At an observation: its factor, and those components merged that are told apart no longer."""
    here = (J.diagonal(dim1=-2, dim2=-1) > 0).any(-1)
    if readable(here) and not bool(here.any()):
        return message
    parts = message.log_weight, message.information + h[..., None, :], message.precision + J[..., None, :, :]
    after = _grouped(parts, layout.at_an_observation())
    made = []
    for k, (new, own) in enumerate(zip(after.parts, message.parts, strict=True)):
        made.append(torch.where(here.reshape(*here.shape, *[1] * (k + 1)), new, own))
    return MixtureMessage(*made)
