"""A posterior path given by its marginals: what simulation-free inference needs, without a solver."""

from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from stochdyn.device import cholesky, inverse, solve
from stochdyn.errors import DiffusionError, GuideError
from stochdyn.fields import AbstractDiffusion, ElementwiseField, evaluate
from stochdyn.paths.chain import Chain
from stochdyn.paths.checks import lift
from stochdyn.paths.drifts import block_length
from stochdyn.paths.guided import GuidedPath
from stochdyn.paths.message import Message
from stochdyn.paths.noise import AbstractNoise, DiagonalNoise, matvec
from stochdyn.paths.sde import SDEPath
from stochdyn.paths.start import KnownStart, RandomStart

_DENSER = 0.9


@dataclass(frozen=True, eq=False)
class Knots:
    """The parameters of the marginals: at the knots, and for every gap between two of them.

    The joint normal of the two ends of a gap has the covariances S0, S1 of its knots and C = L0 K L1' between them, K =
    `coupling` with a spectral norm below 1.

    Shapes:
        times (*batch, knot), non-decreasing, a repeat is padding; loc (*batch, knot, state); scale_tril (*batch, knot,
        state, state); slopes (*batch, gap, 2, state): of the mean, at the left and at the right end; coupling (*batch,
        gap, state, state).
    """

    times: Tensor
    loc: Tensor
    scale_tril: Tensor
    slopes: Tensor
    coupling: Tensor


@dataclass(frozen=True, eq=False)
class Bridge:
    """The marginals of all gaps, time-major (gap, *batch, ...), with the reference diffusion of each."""

    start: Tensor
    length: Tensor
    loc: tuple[Tensor, Tensor]
    slopes: tuple[Tensor, Tensor]
    S0: Tensor
    S1: Tensor
    C: Tensor
    reference: Tensor

    def time(self, w: Tensor) -> Tensor:
        """The time at a fraction w of every gap, float64."""
        return self.start + w.double() * self.length.double()

    def at(self, gap: Tensor) -> "Bridge":
        """The gaps with indices (row, *batch)."""

        def pick(x: Tensor) -> Tensor:
            tail = x.shape[gap.dim() :]
            return x.gather(0, gap.reshape(*gap.shape, *[1] * len(tail)).expand(*gap.shape, *tail))

        return self._each(pick)

    def repeat(self, times: int) -> "Bridge":
        """Every gap so many times, one block of gaps after the other."""
        return self if times == 1 else self._each(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))

    def split(self, size: int) -> "list[Bridge]":
        """Blocks of so many gaps."""
        return [self._each(lambda x, k=k: x[k : k + size]) for k in range(0, self.length.shape[0], size)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Bridge":
        (m0, m1), (v0, v1) = self.loc, self.slopes
        rest = [change(x) for x in (self.S0, self.S1, self.C, self.reference)]
        ends = (change(m0), change(m1)), (change(v0), change(v1))
        return Bridge(change(self.start), change(self.length), *ends, *rest)

    def mean(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The cubic through both ends with their slopes, and its derivative in time; w is (gap, *batch, 1)."""
        (m0, m1), (v0, v1), D = self.loc, self.slopes, self.length
        rise = m1 - m0
        a, b = D * v0 - rise, rise - D * v1
        m = m0 + w * rise + w * (1 - w) * ((1 - w) * a + w * b)
        velocity = rise + (1 - 2 * w) * ((1 - w) * a + w * b) + w * (1 - w) * (b - a)
        return m, velocity / torch.where(D > 0, D, torch.ones_like(D))

    def covariance(self, w: Tensor) -> Tensor:
        """Of w0 z0 + w z1 plus a Brownian bridge."""
        w, D = w[..., None], self.length[..., None]
        ends = (1 - w).square() * self.S0 + w.square() * self.S1
        return ends + w * (1 - w) * (self.C + self.C.mT + D * self.reference)

    def pull(self, w: Tensor) -> Tensor:
        """A S of the drift m' + A (z - m) that has these marginals under the reference diffusion."""
        w, D = w[..., None], self.length[..., None]
        safe = torch.where(D > 0, D, torch.ones_like(D))
        return ((1 - w) * (self.C.mT - self.S0) + w * (self.S1 - self.C)) / safe - w * self.reference


class MarginalPath(dist.TorchDistribution):
    """A posterior of a path by its marginals at any time, without steps: of use with `PathELBO` only.

    Between two knots z_t is (1 - w) z0 + w z1 + a Brownian bridge, with ends that are jointly normal, and a mean that
    is cubic with slopes of its own at either end of every gap: it has the kinks that observations make. The drift of
    the SDE with these marginals and the prior's diffusion is in closed form,

        h = m' + A (z - m) + (gg' - Q) grad log q / 2 + div(gg') / 2,

    Q the reference diffusion of the gap (the prior's gg' at its middle) and A the drift of the bridge's Markovian
    projection. The divergence from the prior is an integral over time of E |g^-1 (f - h)|^2 / 2, estimated at random
    times; it bounds the evidence of the continuous-time model, so never rank it against bounds on a grid.

    A value is the states at `observed` times, drawn independently: only marginals matter for the bound.

    Args:
        prior: the path of the model: its fields, start and grid. Noise of full rank; a normal or a known start.
        knots: the parameters. The first knot is at the grid's first time.
        observed: (*batch, time) indices of the knots that the value holds.

    Raises:
        DiffusionError: if there are fewer noises than states.
        GuideError: if the start is neither known nor normal.

    References:
        Bartosh, Vetrov & Naesseth, "SDE Matching: scalable and simulation-free training of latent stochastic
        differential equations", 2025, https://arxiv.org/abs/2502.02472; Course & Nair, "Amortized reparametrization",
        2023, https://arxiv.org/abs/2312.10550

    Example:
        >>> import stochdyn as sd
        >>> from stochdyn.paths.marginal import Knots
        >>> prior = sd.SDEPath(lambda t, z: -z, torch.tensor([0.5]), torch.zeros(1), torch.linspace(0, 1, 11))
        >>> knots = Knots(torch.tensor([0.0, 1.0]), torch.zeros(2, 1), torch.zeros(2, 1, 1) + 0.3,
        ...               torch.zeros(1, 2, 1), torch.zeros(1, 1, 1))
        >>> sd.MarginalPath(prior, knots, torch.tensor([1])).path_kl().shape
        torch.Size([])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, prior: SDEPath, knots: Knots, observed: Tensor) -> None:
        chain = prior.chain
        _check(chain)
        self.prior, self.knots, self.observed = prior, knots, observed
        batch = torch.broadcast_shapes(chain.batch_shape, knots.loc.shape[:-2])
        if batch != chain.batch_shape:
            self.prior = prior.expand(batch)
        event = torch.Size((observed.shape[-1], chain.state_dim))
        self._bridge: Bridge | None = None
        super().__init__(batch, event, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, 2)

    @property
    def chain(self) -> Chain:
        """The prior's chain."""
        return self.prior.chain

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "MarginalPath":
        return MarginalPath(self.prior.expand(torch.Size(batch_shape)), self.knots, self.observed)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        loc, L = self._loc, self._scale_tril
        shape = torch.Size(sample_shape) + self.batch_shape + loc.shape[-2:]
        z = loc + matvec(L, torch.randn(shape, dtype=loc.dtype, device=loc.device))
        index = self.observed[..., None].expand(*shape[:-2], *self.event_shape)
        return z.gather(-2, index)

    def log_prob(self, value: Tensor) -> Tensor:
        raise GuideError(
            "A MarginalPath has no density on a grid: train it with objective=sd.PathELBO(). For draws, importance "
            "weights and evidence the guide gives a GuidedPath with the same marginals; run it without PathELBO."
        )

    @property
    def _loc(self) -> Tensor:
        """Of the knots; at a known start the start itself."""
        loc = self.knots.loc.expand(*self.batch_shape, *self.knots.loc.shape[-2:])
        if not isinstance(self.chain.start, KnownStart):
            return loc
        return torch.cat([self.chain.start.value[..., None, :], loc[..., 1:, :]], -2)

    @property
    def _scale_tril(self) -> Tensor:
        """Of the knots; a known start has none."""
        L = self.knots.scale_tril
        if not isinstance(self.chain.start, KnownStart):
            return L
        first = torch.zeros_like(L[..., :1, :, :])
        return torch.cat([first, L[..., 1:, :, :]], -3)

    # Between the knots.

    def bridge(self) -> Bridge:
        """The marginals of all gaps, and their reference diffusions."""
        if self._bridge is None:
            self._bridge = self._make_bridge()
        return self._bridge

    def _make_bridge(self) -> Bridge:
        knots, batch = self.knots, self.batch_shape
        loc, times = _front(self._loc, 1, batch), _front(knots.times.to(self.chain.device), 0, batch)
        L, K = _front(self._scale_tril, 2, batch), _front(knots.coupling, 2, batch)
        slopes = _front(knots.slopes, 2, batch)
        S, C = L @ L.mT, L[:-1] @ K @ L[1:].mT
        start, length = times[:-1, ..., None], times.diff(dim=0)[..., None].to(loc.dtype)
        ends = (loc[:-1], loc[1:]), (slopes[..., 0, :], slopes[..., 1, :]), S[:-1], S[1:], C
        bare = Bridge(start, length, *ends, torch.zeros_like(C))
        half = torch.full_like(length, 0.5)
        # Where the noise depends on the state any reference makes a posterior, so it needs no gradient; a constant one
        # is the prior's own.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.chain.diffusion.constant):
            size = block_length(loc)
            parts = zip(bare.time(half).split(size), bare.mean(half)[0].split(size), strict=True)
            reference = torch.cat([self._noise(t, m).covariance() for t, m in parts])
        return Bridge(start, length, *ends, reference)

    def _context(self, t: Tensor) -> Tensor | None:
        """The prior's context at times (gap, *batch, 1): the row of the step that the time is in."""
        ndim = len(self.batch_shape) + 1
        context = None if self.chain._context is None else lift(self.chain._context, ndim)
        if context is None or context.shape[0] == 1:
            return context
        context = context.expand(-1, *self.batch_shape, -1)
        grid = self.chain.ts.to(t.device).expand(*self.batch_shape, -1).contiguous()
        at = t[..., 0].movedim(0, -1).contiguous()
        index = (torch.searchsorted(grid, at, right=True) - 1).clamp(min=0).movedim(-1, 0)[..., None]
        return context.gather(0, index.expand(*index.shape[:-1], context.shape[-1]))

    def _noise(self, t: Tensor, z: Tensor) -> AbstractNoise:
        """The diffusion as the noise of a step of unit length."""
        g = self.chain.diffusion(t.to(z.dtype), z, self._context(t))
        tail = g.shape[-1:] if self.chain.diffusion.diagonal else g.shape[-2:]
        return self.chain.noise_of(g.expand(*z.shape[:-1], *tail))

    def _drift(self, t: Tensor, z: Tensor) -> Tensor:
        return evaluate("drift", self.chain.drift, t.to(z.dtype), z, self._context(t)).expand(z.shape)

    def drift_at(self, bridge: Bridge, w: Tensor, z: Tensor) -> Tensor:
        """The posterior's drift h at a fraction w of every gap, and states z there."""
        solved = (inverse(bridge.covariance(w)) @ (z - bridge.mean(w)[0])[..., None])[..., 0]
        return self._posterior_drift(bridge, w, solved, *self._noise_and_divergence(bridge.time(w), z))

    def _posterior_drift(
        self, bridge: Bridge, w: Tensor, solved: Tensor, noise: AbstractNoise, divergence: Tensor | None
    ) -> Tensor:
        """h where S^-1 (z - m) is `solved`, g is `noise`, and gg' has this divergence."""
        h = bridge.mean(w)[1] + matvec(bridge.pull(w), solved)
        if not self.chain.diffusion.constant:
            h = h - 0.5 * (noise.apply(noise.pull(solved)) - matvec(bridge.reference, solved))
        return h if divergence is None else h + 0.5 * divergence

    def _noise_and_divergence(self, t: Tensor, z: Tensor) -> tuple[AbstractNoise, Tensor | None]:
        """g, and the divergence of gg', sum_j d(gg')_ij / dz_j; None where g does not depend on the state."""
        if self.chain.diffusion.constant:
            return self._noise(t, z), None
        field = self.chain.diffusion.field
        if isinstance(field, ElementwiseField) and field.closed_slope:
            g, slope = field.with_slope(t.to(z.dtype), z)
            return DiagonalNoise(g), 2 * g * slope
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x = z if z.requires_grad else z.detach().requires_grad_()
            noise = self._noise(t, x)
            divergence = _divergence(noise, x, self.chain.diffusion)
        return noise, divergence if differentiable or divergence is None else divergence.detach()

    def path_kl(self, times: int = 1) -> Tensor:
        """An unbiased estimate of the divergence from the prior, (*batch): of the start, plus an integral over time.

        In every gap the times are evenly spaced up to one random shift, and denser near the ends.

        Args:
            times: random times per gap. With a few of them the noise falls faster than by averaging.
        """
        bridge = self.bridge()
        shift = torch.rand_like(bridge.length)
        u = torch.cat([(k + shift) / times for k in range(times)])
        turn, tiny = 2 * torch.pi * u, torch.finfo(u.dtype).eps
        w, weight = (
            (u - _DENSER * turn.sin() / (2 * torch.pi)).clamp(tiny, 1 - tiny),
            1 - _DENSER * turn.cos(),
        )
        many = bridge.repeat(times)
        size = block_length(many.loc[0])
        rate = torch.cat(
            [self._rate(part, x) for part, x in zip(many.split(size), w.split(size), strict=True)]
        )
        return self._kl_start() + ((many.length * weight)[..., 0] * rate).sum(0) / times

    def _rate(self, bridge: Bridge, w: Tensor) -> Tensor:
        """An unbiased estimate of E |g^-1 (f - h)|^2 / 2 at a time in every gap; 0 in gaps of length zero."""
        still = (bridge.length <= 0)[..., 0]
        S = bridge.covariance(w)
        unit = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        L = cholesky(torch.where(still[..., None, None], unit, S))
        eps = torch.randn(L.shape[:-1], dtype=S.dtype, device=S.device)
        z = bridge.mean(w)[0] + matvec(L, eps)
        noise, divergence = self._noise_and_divergence(bridge.time(w), z)
        if divergence is None:
            rate = self._rate_of_pairs(bridge, w, L, eps, noise)
        else:
            solved = torch.linalg.solve_triangular(L.mT, eps[..., None], upper=True)[..., 0]
            h = self._posterior_drift(bridge, w, solved, noise, divergence)
            rate = 0.5 * noise.solve(self._drift(bridge.time(w), z) - h).square().sum(-1)
        return torch.where(still, torch.zeros_like(rate), rate)

    def _rate_of_pairs(
        self, bridge: Bridge, w: Tensor, L: Tensor, eps: Tensor, noise: AbstractNoise
    ) -> Tensor:
        """The same at m + L eps and m - L eps, for noise that does not depend on the state.

        h = m' + A (z - m) then, and E |g^-1 A (z - m)|^2 is in closed form: it is what varies most in a short gap.
        """
        (m, velocity), t, pull = bridge.mean(w), bridge.time(w), bridge.pull(w)
        if not self.chain.diffusion.constant:
            pull = pull - 0.5 * (noise.covariance() - bridge.reference)
        AL = torch.linalg.solve_triangular(L, pull.mT, upper=False).mT
        shift, own = matvec(L, eps), noise.solve(matvec(AL, eps))
        ahead, behind = self._drift(torch.cat([t, t]), torch.cat([m + shift, m - shift])).chunk(2)
        ahead, behind = noise.solve(ahead - velocity), noise.solve(behind - velocity)
        squares = 0.25 * (ahead.square() + behind.square()) - 0.5 * (ahead - behind) * own
        return squares.sum(-1) + 0.5 * solve(noise.factor(), AL).square().sum((-1, -2))

    def _kl_start(self) -> Tensor:
        start = self.chain.start
        if not isinstance(start, RandomStart):
            return self.knots.loc.new_zeros(self.batch_shape)
        loc, L = self.knots.loc[..., 0, :], self.knots.scale_tril[..., 0, :, :]
        q = dist.MultivariateNormal(loc, scale_tril=L, validate_args=False)
        tril = cholesky(start.noise.covariance())
        p = dist.MultivariateNormal(start.loc, scale_tril=tril, validate_args=False)
        return kl_divergence(q, p).expand(self.batch_shape)

    # On a grid.

    def guided(self) -> GuidedPath:
        """The prior's path on its grid, guided by messages that give it these marginals: for draws and densities.

        J = (gg')^-1 (F - A) with F the Jacobian of the prior's drift at the mean, clipped to be positive
        semi-definite; at every grid time from its left, so the message at an observation contains it.
        """
        return self.prior.guided(self._message())

    def _message(self) -> Message:
        chain, batch, knots = self.chain, self.batch_shape, self.knots.times.to(self.chain.device)
        grid = chain.ts.to(chain.device).expand(*batch, -1)
        knots = knots.expand(*batch, -1)
        gap = (torch.searchsorted(knots.contiguous(), grid.contiguous()) - 1).clamp(0, knots.shape[-1] - 2)
        part = self.bridge().at(gap.movedim(-1, 0))
        t = _front(grid, 0, batch)[..., None]
        w = ((t - part.start) / part.length.double().clamp(min=1e-300)).clamp(1e-6, 1.0).to(part.length.dtype)
        m, S = part.mean(w)[0], part.covariance(w)
        f, F = self._linearised(t, m)
        D = self._noise(t, m).covariance()
        pull = part.pull(w) - 0.5 * (D - part.reference)
        J = solve(D, F - solve(S, pull.mT).mT)
        J = _clipped(0.5 * (J + J.mT))
        gradient = solve(D, (self.drift_at(part, w, m) - f)[..., None])[..., 0]
        ahead = (t <= _front(knots, 0, batch)[-1:, ..., None])[..., 0]
        J = torch.where(ahead[..., None, None], J, torch.zeros_like(J))
        h = torch.where(ahead[..., None], gradient + matvec(J, m), torch.zeros_like(m))
        J0, h0 = self._first_message()
        J, h = torch.cat([J0[None], J[1:]]), torch.cat([h0[None], h[1:]])
        return Message(h.movedim(0, -2), J.movedim(0, -3))

    def _linearised(self, t: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """The prior's drift at the mean, and its Jacobian there."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            z = m if m.requires_grad else m.detach().requires_grad_()
            f = self._drift(t, z)
            rows = [_grad(f[..., d].sum(), z) for d in range(z.shape[-1])]
            F = torch.stack([torch.zeros_like(z) if row is None else row for row in rows], -2)
        return (f, F) if differentiable else (f.detach(), F.detach())

    def _first_message(self) -> tuple[Tensor, Tensor]:
        start, n = self.chain.start, self.chain.state_dim
        loc = self.knots.loc[..., 0, :].expand(*self.batch_shape, n)
        if not isinstance(start, RandomStart):
            return loc.new_zeros(*self.batch_shape, n, n), torch.zeros_like(loc)
        P = inverse(start.noise.covariance())
        L = self.knots.scale_tril[..., 0, :, :]
        Q = inverse(L @ L.mT)
        J = _clipped(Q - P).expand(*self.batch_shape, n, n)
        # The centre is kept also where the precision had to be clipped.
        return J, matvec(J + P, loc) - matvec(P, start.loc)


def _check(chain: Chain) -> None:
    if chain.noise_dim < chain.state_dim:
        raise DiffusionError(
            f"MarginalPath: {chain.noise_dim} noises for {chain.state_dim} states. Marginals that are free in every "
            "state cannot come from noise on some of them (on the velocity only, say): the divergence would be "
            "infinite. Use messages, e.g. FreeMessage()."
        )
    start = chain.start
    if isinstance(start, RandomStart) and not (start.gaussian and start.transform is None):
        raise GuideError(
            f"MarginalPath: the start is {type(start.prior).__name__}, and the marginals are normal. Use a normal or a "
            "known start, or messages, e.g. FreeMessage()."
        )


def _front(x: Tensor, tail: int, batch: torch.Size) -> Tensor:
    """(*batch, knot, ...) with `tail` last dimensions to (knot, *batch, ...)."""
    x = x.movedim(-tail - 1, 0)
    missing = len(batch) - (x.dim() - 1 - tail)
    x = x.reshape(x.shape[0], *[1] * missing, *x.shape[1:])
    return x.expand(x.shape[0], *batch, *x.shape[x.dim() - tail :])


def _grad(value: Tensor, z: Tensor) -> Tensor | None:
    """None where the value does not depend on z."""
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, z, create_graph=True, allow_unused=True)[0]


def _divergence(noise: AbstractNoise, z: Tensor, diffusion: AbstractDiffusion) -> Tensor | None:
    size = range(z.shape[-1])
    if isinstance(noise, DiagonalNoise):
        square = noise.scale.square()
        if getattr(diffusion.field, "elementwise", False):
            return _grad(square.sum(), z)
        rows = [[(_grad(square[..., i].sum(), z), i)] for i in size]
    else:
        D = noise.covariance()
        rows = [[(_grad(D[..., i, j].sum(), z), j) for j in size] for i in size]
    if all(grad is None for row in rows for grad, _ in row):
        return None
    zero = z.new_zeros(z.shape[:-1])
    return torch.stack([sum((g[..., j] for g, j in row if g is not None), zero) for row in rows], -1)


def _clipped(J: Tensor) -> Tensor:
    """The nearest positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(J)
    return vectors @ (values.clamp(min=0)[..., None] * vectors.mT)
