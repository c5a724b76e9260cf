"""Messages that are mixtures of Gaussians, for paths that jump, and the backward filter that makes them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.errors import GuideError
from stochdyn.paths.checks import lift
from stochdyn.paths.jump_sizes import log_poisson
from stochdyn.paths.message import Message, linearise

if TYPE_CHECKING:
    from stochdyn.paths.jump_diffusion import JumpDiffusionPath

FILTER_TAIL = 1e-7
# The log weight of what does not happen: finite, so that gradients are.
NOTHING = -1e4


@dataclass(frozen=True, eq=False)
class MixtureMessage:
    """A factor sum_c exp(w_c + h_c z - J_c z^2 / 2) on every state of a path of one state.

    Component c stands for c jumps until the next observation, the last one for that many or more.

    Args:
        log_weight, information, precision: w, h and J, (*batch, time, component).

    Example:
        >>> import torch
        >>> m = MixtureMessage(torch.zeros(5, 2), torch.zeros(5, 2), torch.ones(5, 2))
        >>> m.log_value(torch.zeros(5, 1)).shape
        torch.Size([5])
    """

    log_weight: Tensor
    information: Tensor
    precision: Tensor

    def log_value(self, z: Tensor) -> Tensor:
        """Its logarithm at states (*batch, time, 1)."""
        return torch.logsumexp(self.log_weight + z * (self.information - 0.5 * self.precision * z), -1)

    def masked(self, valid: Tensor) -> "MixtureMessage":
        """No message where valid (*batch, time) is False."""
        keep = valid[..., None]
        parts = (
            torch.where(keep, x, torch.zeros_like(x))
            for x in (self.log_weight, self.information, self.precision)
        )
        return MixtureMessage(*parts)

    def detach(self) -> "MixtureMessage":
        """The same numbers without their history."""
        return MixtureMessage(self.log_weight.detach(), self.information.detach(), self.precision.detach())

    def time_major(self) -> "MixtureMessage":
        """Time moved to the front."""
        return MixtureMessage(
            *(x.movedim(-2, 0) for x in (self.log_weight, self.information, self.precision))
        )

    def lifted(self, ndim: int) -> "MixtureMessage":
        """Of a time-major message: batch dimensions inserted for states of `ndim` dimensions."""
        return MixtureMessage(*(lift(x, ndim) for x in (self.log_weight, self.information, self.precision)))

    def __getitem__(self, k: "int | slice") -> "MixtureMessage":
        return MixtureMessage(self.log_weight[k], self.information[k], self.precision[k])

    @property
    def batch_shape(self) -> torch.Size:
        """The batch of a message that is not time-major."""
        return torch.broadcast_shapes(
            self.log_weight.shape[:-2], self.information.shape[:-2], self.precision.shape[:-2]
        )


@dataclass(frozen=True)
class Products:
    """Normal components N(m_n, v_n) times message components: log integrals, means and variances, (..., n, c)."""

    log_weight: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, log_prior: Tensor, m: Tensor, v: Tensor, message: MixtureMessage) -> "Products":
        """log_prior, m, v (..., n) with a message's components (..., c)."""
        w, h, J = (x[..., None, :] for x in (message.log_weight, message.information, message.precision))
        m, v = m[..., None], v[..., None]
        wider = 1 + v * J
        log_integral = (m * (h - 0.5 * J * m) + 0.5 * v * h.square()) / wider - 0.5 * wider.log()
        return cls(log_prior[..., None] + w + log_integral, (m + v * h) / wider, v / wider)

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, means and standard deviations, (..., n c)."""
        return self.log_weight.flatten(-2), self.mean.flatten(-2), self.variance.flatten(-2).sqrt()


def check_guidable(path: "JumpDiffusionPath") -> None:
    """Refuse a jump diffusion whose steps times messages would be no mixtures of normals.

    Raises:
        GuideError: for several states, or sizes that are not normal.
    """
    if path.chain.state_dim != 1 or not path.jumps.size.gaussian:
        raise GuideError(
            "Guides of jump diffusions need one state and normal jumps: NormalJump(loc, scale). Others can be observed "
            "paths, or sampled by NUTS."
        )


def jump_filter(
    path: "JumpDiffusionPath", potential: Message, around: Tensor, components: int = 3
) -> MixtureMessage:
    """The backward filter of a linearised jump diffusion of one state.

    Between observations a component holds exactly what follows so many jumps, where drift, diffusion and intensity are
    those of a Brownian motion; else those that jumped at different times are merged by their moments. At an observation
    all are merged, after its factor: they differ little there when it says more than what follows.

    Args:
        path: the prior, of one state and with normal jumps.
        potential: the (Gaussian, or locally Gaussian) log likelihood of every state.
        around: the path (*batch, time, 1) to linearise around, and at which intensities are read.
        components: how many; the last one counts that many jumps or more.

    Raises:
        GuideError: for another path, or fewer than two components.
    """
    check_guidable(path)
    chain, size = path.chain, path.jumps.size
    if components < 2:
        raise GuideError(f"A message of a jump diffusion needs at least two components, got {components}.")
    linear = linearise(chain, around)
    before = chain.split(around.detach())[0]
    t, dt, context = chain.layout(before.dim() - 1)
    rate = path.intensity(t, before, context) * dt
    ndim = max(before.dim() - 1, potential.information.dim() - 1)
    F, b, Q = (lift(x, ndim) for x in (linear.F[..., 0], linear.b, linear.Q[..., 0]))
    most = max(path.counts(rate, FILTER_TAIL), 1)
    counts = torch.arange(most + 1, dtype=Q.dtype, device=Q.device)
    mean, variance = size.mean.to(Q), size.variance.to(Q)
    log_prior = torch.cat([log_poisson(n, rate) for n in range(most + 1)], -1).clamp(min=NOTHING)
    steps = _Steps(F, b + counts * mean, Q + counts * variance, lift(log_prior, ndim))
    h, J = potential.information.movedim(-2, 0), potential.full()[..., 0].movedim(-2, 0)
    return _backward(steps, lift(h, ndim), lift(J, ndim), components)


@dataclass(frozen=True)
class _Steps:
    """z' = F z + m_n + noise of variance v_n with probability exp(log_prior_n), time-major, last dimension n."""

    F: Tensor
    m: Tensor
    v: Tensor
    log_prior: Tensor


def _backward(steps: _Steps, h: Tensor, J: Tensor, components: int) -> MixtureMessage:
    batch = torch.broadcast_shapes(h.shape[1:-1], *(x.shape[1:-1] for x in vars(steps).values()))
    alone = torch.full((*batch, components), NOTHING, dtype=h.dtype, device=h.device)
    alone[..., 0] = 0.0
    now, out = (
        _seen(MixtureMessage(alone, torch.zeros_like(alone), torch.zeros_like(alone)), h[-1], J[-1]),
        [],
    )
    out.append(now)
    for k in range(len(h) - 2, -1, -1):
        passed = _through(now, steps.F[k], steps.m[k], steps.v[k], steps.log_prior[k])
        now = _seen(_by_count(passed, components), h[k], J[k])
        out.append(now)
    out.reverse()
    stacked = (
        torch.stack([getattr(m, name) for m in out], -2)
        for name in ("log_weight", "information", "precision")
    )
    return MixtureMessage(*stacked)


def _through(after: MixtureMessage, F: Tensor, m: Tensor, v: Tensor, log_prior: Tensor) -> MixtureMessage:
    """The message before a step, components (..., n, c)."""
    w, h, J = (x[..., None, :] for x in (after.log_weight, after.information, after.precision))
    m, v, F = m[..., None], v[..., None], F[..., None]
    wider = 1 + v * J
    log_integral = (m * (h - 0.5 * J * m) + 0.5 * v * h.square()) / wider - 0.5 * wider.log()
    return MixtureMessage(
        log_prior[..., None] + w + log_integral, F * (h - J * m) / wider, F.square() * J / wider
    )


def _by_count(passed: MixtureMessage, components: int) -> MixtureMessage:
    """Merge components (n now, c later) that stand for as many jumps."""
    n, c = passed.log_weight.shape[-2:]
    total = [min(i + j, components - 1) for i in range(n) for j in range(c)]
    parts = [x.flatten(-2) for x in (passed.log_weight, passed.information, passed.precision)]
    merged = [
        _merged(*(x[..., [i for i, t in enumerate(total) if t == k]] for x in parts))
        for k in range(components)
    ]
    return MixtureMessage(*(torch.stack(x, -1) for x in zip(*merged, strict=True)))


def _seen(message: MixtureMessage, h: Tensor, J: Tensor) -> MixtureMessage:
    """At an observation: its factor, and all components merged into the first."""
    here = (J > 0).expand(*message.log_weight.shape[:-1], 1)
    after = MixtureMessage(message.log_weight, message.information + h, message.precision + J)
    w, hm, Jm = (x[..., None] for x in _merged(after.log_weight, after.information, after.precision))
    none = torch.full_like(message.log_weight[..., 1:], NOTHING)
    rest = [none, *[x.expand(none.shape) for x in (hm, Jm)]]
    one = [torch.cat([first, other], -1) for first, other in zip((w, hm, Jm), rest, strict=True)]
    kept = (message.log_weight, message.information, message.precision)
    return MixtureMessage(*(torch.where(here, a, b) for a, b in zip(one, kept, strict=True)))


def _merged(w: Tensor, h: Tensor, J: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Gaussian with mass, mean and variance of a mixture (..., component); flat ones add up."""
    if w.shape[-1] == 1:
        return w[..., 0], h[..., 0], J[..., 0]
    flat = ~(J > 0)
    safe = torch.where(flat, torch.ones_like(J), J)
    mean = torch.where(flat, torch.zeros_like(h), h) / safe
    mass = w + torch.where(flat, torch.zeros_like(J), 0.5 * (h * mean - safe.log()))
    total = torch.logsumexp(mass, -1)
    share = (mass - total[..., None]).exp()
    centre = (share * mean).sum(-1)
    variance = (share * (1 / safe + (mean - centre[..., None]).square())).sum(-1)
    precision = torch.where(flat.all(-1), torch.zeros_like(variance), 1 / variance)
    information = precision * centre
    back = torch.where(
        flat.all(-1), torch.zeros_like(variance), 0.5 * (information * centre + variance.log())
    )
    return total - back, information, precision
