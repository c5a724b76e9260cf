"""A jump diffusion's path as one sample site: its jumps are summed out, step by step."""

import math
from dataclasses import dataclass
from functools import cached_property

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.errors import DiffusionError, DivergedError, DtypeError, FieldError, ShapeError
from stochdyn.fields import AbstractDiffusion, Field, as_diffusion, call_field, evaluate
from stochdyn.paths.chain import Chain
from stochdyn.paths.checks import joint_batch, lift
from stochdyn.paths.guided import fitting
from stochdyn.paths.guided_jumps import GuidedJumpPath
from stochdyn.paths.jump_sizes import CompoundPoisson, DoubleExponentialJump, log_poisson
from stochdyn.paths.message import Message
from stochdyn.paths.mixture_message import MixtureMessage, jump_filter
from stochdyn.paths.noise import DiagonalNoise
from stochdyn.paths.sde import SDEPath
from stochdyn.paths.start import as_start
from stochdyn.paths.support import path_support
from stochdyn.solvers import AbstractKernel, EulerMaruyama

TAIL = 1e-13
MOST = 200


class JumpDiffusionPath(dist.TorchDistribution):
    """The path of dz = f dt + g dW + dS, S a compound Poisson process, on a grid: a distribution over trajectories.

    A step is a Poisson mixture: its density sums over how many jumps fall into it, so that jumps are no latents, and
    the path is observed, replayed, or sampled by a guide like one of an `SDEPath`. The sum is exact where intensity,
    drift and diffusion are constant over a step; else it is that of the discretised chain.

        p(z' | z) = sum_n Poisson(n; lambda(t, z) dt) p(a(z) + G xi + Y_1 + ... + Y_n = z')

    Args:
        drift: f, `(t, z[, context])` -> shape of z, without the jumps' own mean.
        diffusion: g, a tensor or callable of z's shape; diagonal noise.
        jumps: `CompoundPoisson(intensity, size)`.
        initial: a distribution with event_shape (state,), or a tensor: a known start, without density.
        ts: the grid (*batch, time), non-decreasing. Steps of zero length have no density.
        solver: the kernel of the diffusion's part.
        context: (*batch, context_dim), or (*batch, time, context_dim): the row at a step's start is used in it.
        max_jumps: the largest number in one step that is summed over; None takes as many as leave less than 1e-13.

    Shapes:
        batch_shape: broadcast of initial, ts, context, fields and jumps. event_shape: (time, state).

    Raises:
        FieldError, DiffusionError, ShapeError, DtypeError, TimeError: at once, as for `SDEPath`; for a matrix
            diffusion; for an intensity that is negative or not finite, or of another shape than (..., 1).
        DivergedError: if a sample leaves the finite numbers, or steps are so long that over 200 jumps fall into one.
        SupportError: if the density is asked of a value that cannot come from this path.

    References:
        Merton, "Option pricing when underlying stock returns are discontinuous", Journal of Financial Economics 1976,
        https://doi.org/10.1016/0304-405X(76)90022-2; Kou, "A jump-diffusion model for option pricing", Management
        Science 2002, https://doi.org/10.1287/mnsc.48.8.1086.166

    Example:
        >>> import torch, stochdyn as sd
        >>> jumps = sd.CompoundPoisson(1.0, sd.NormalJump(-0.1, 0.15))
        >>> log_price = sd.JumpDiffusionPath(lambda t, z: 0.05 + 0 * z, torch.tensor([0.2]), jumps, torch.zeros(1),
        ...                                  torch.linspace(0, 1, 253))
        >>> x = log_price.sample((4,))
        >>> log_price.log_prob(x).shape
        torch.Size([4])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = False

    def __init__(
        self,
        drift: Field,
        diffusion: Field | Tensor | AbstractDiffusion,
        jumps: CompoundPoisson,
        initial: dist.TorchDistribution | Tensor,
        ts: Tensor,
        *,
        solver: AbstractKernel = EulerMaruyama(),  # noqa: B008
        context: Tensor | None = None,
        max_jumps: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(jumps, CompoundPoisson):
            raise FieldError(f"`jumps` must be a CompoundPoisson(intensity, size), got {jumps!r}.")
        if max_jumps is not None and max_jumps < 0:
            raise FieldError(f"`max_jumps` must not be negative, got {max_jumps}.")
        noise = as_diffusion(diffusion)
        if not noise.diagonal:
            raise DiffusionError(
                "JumpDiffusionPath: for diagonal noise. Give the diffusion as a tensor or callable of z's shape."
            )
        validate = bool(self._validate_args if validate_args is None else validate_args)
        chain = Chain(drift, noise, as_start(initial), ts, solver, context, validate=validate)
        self.jumps, self.max_jumps = jumps, max_jumps
        self.chain = self._with_jumps(chain)
        event_shape = torch.Size((chain.steps + 1, chain.state_dim))
        super().__init__(self.chain.batch_shape, event_shape, validate_args=validate_args)

    def _with_jumps(self, chain: Chain) -> Chain:
        """The chain with the batch of the jumps too."""
        size = self.jumps.size
        if isinstance(size, DoubleExponentialJump) and chain.state_dim > 1:
            raise ShapeError(
                f"DoubleExponentialJump: for paths of one state, this one has {chain.state_dim}. Use NormalJump."
            )
        for x in (size.mean, size.variance):
            if x.dim() and x.dtype != chain.dtype:
                raise DtypeError(
                    f"The jumps' sizes are {x.dtype}, the path {chain.dtype}. Convert them with .to({chain.dtype})."
                )
        shape = torch.broadcast_shapes(size.mean.shape, size.variance.shape, (1,))
        if shape[-1] not in (1, chain.state_dim):
            raise ShapeError(
                f"The jumps' sizes have {shape[-1]} states, the path {chain.state_dim}. Give (*batch, state)."
            )
        batch = {"path": chain.batch_shape, "size": shape[:-1]}
        intensity = self.jumps.intensity
        if callable(intensity):
            t, _, context = chain.layout(len(chain.batch_shape) + 1)
            z = chain.start.centre().detach().expand(*chain.batch_shape, chain.state_dim)
            if chain.steps:
                with torch.no_grad():
                    rate = call_field(
                        "intensity", intensity, t[0], z, None if context is None else context[0]
                    )
                if rate.shape[-1:] != (1,):
                    raise FieldError(f"The intensity returned shape {tuple(rate.shape)}, expected (..., 1).")
                batch["intensity"] = rate.shape[:-1]
        else:
            batch["intensity"] = torch.as_tensor(intensity).shape
        found = joint_batch(**batch)
        return chain if found == chain.batch_shape else chain.expand(found)

    @property
    def support(self) -> constraints.Constraint:
        return path_support(self.chain)

    @property
    def ts(self) -> Tensor:
        """The grid (*batch, time), float64."""
        return self.chain.ts

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "JumpDiffusionPath":
        new = object.__new__(JumpDiffusionPath)
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k != "matched"})
        new.chain = self.chain.expand(torch.Size(batch_shape))
        new._batch_shape = torch.Size(batch_shape)
        return new

    def _validate_sample(self, value: Tensor) -> None:
        self.chain.check_value(value)

    @cached_property
    def matched(self) -> SDEPath:
        """An `SDEPath` whose drift and diffusion have the jumps' mean and variance: where a guide looks first."""
        chain, size = self.chain, self.jumps.size
        of = {"mean": size.mean, "power": size.variance + size.mean**2}

        def drift(t: Tensor, z: Tensor, *context: Tensor) -> Tensor:
            f = evaluate("drift", chain.drift, t, z, *context) if context else chain.drift(t, z)
            return f + self.intensity(t, z, *context) * of["mean"].to(z)

        def spread(t: Tensor, z: Tensor, *context: Tensor) -> Tensor:
            g = chain.diffusion(t, z, context[0] if context else None)
            return (g.square() + self.intensity(t, z, *context) * of["power"].to(z)).sqrt()

        made = SDEPath(
            drift, spread, self._initial, self.ts, solver=chain.solver, context=chain.context,
            validate_args=self._validate_args,
        )  # fmt: skip
        return made if made.batch_shape == self.batch_shape else made.expand(self.batch_shape)

    @property
    def _initial(self) -> "dist.TorchDistribution | Tensor":
        start = self.chain.start
        return start.prior if hasattr(start, "prior") else start.centre()  # type: ignore

    def intensity(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Jumps per unit of time at states (..., state): (..., 1)."""
        rate = self.jumps.intensity
        if callable(rate):
            return evaluate("intensity", rate, t, z, context)
        rate = torch.as_tensor(rate, dtype=z.dtype, device=z.device)
        return lift(rate[None], z.dim() - 1)[0][..., None] if rate.dim() else rate[None]

    def counts(self, rate: Tensor, tail: float = TAIL) -> int:
        """The largest number of jumps in a step that counts, for expected numbers `rate`.

        Raises:
            DivergedError: if it is above 200.
        """
        if self.max_jumps is not None:
            return self.max_jumps
        largest = float(rate.detach().max()) if rate.numel() else 0.0
        term = math.exp(-largest) if largest < 700 else 0.0
        n, left = 0, 1.0 - term
        while left > tail and n < MOST:
            n += 1
            term *= largest / n
            left -= term
        if n == MOST or not largest < 100:
            raise DivergedError(
                f"{largest:.3g} jumps are expected in one step of the grid. Use smaller steps, or bound the intensity."
            )
        return n

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        raise NotImplementedError("Draws of a jump diffusion have no gradient; those of its guides do.")

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        chain = self.chain
        z = chain.start.sample(torch.Size(sample_shape))
        z = z.expand(*sample_shape, *self.batch_shape, chain.state_dim)
        t, dt, context = chain.layout(z.dim())
        states, rows = [z], [None] * chain.steps if context is None else context.unbind(0)
        for s, h, row in zip(t.unbind(0), dt.unbind(0), rows, strict=True):
            z = self.move(s, h, z, row)
            states.append(z)
        value = torch.stack(states, -2)
        if self._validate_args:
            chain.check_finite(value)
        return value

    def move(self, t: Tensor, dt: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Draw what one step from z leads to."""
        a, noise = self.chain.step(t, dt, context, z)
        counts = torch.poisson(self._expected(t, dt, z, context).expand(*z.shape[:-1], 1))
        return a + noise.apply(torch.randn_like(z)) + self.jumps.size.sample(counts, z)

    def step_density(
        self, t: Tensor, dt: Tensor, z: Tensor, new: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """The log density of one step from z to new, (..., state)."""
        a, noise = self.chain.step(t, dt, context, z)
        real = (dt > 0)[..., 0]
        scale = noise.safe(real).scale.abs().expand(a.shape)  # type: ignore
        steps = JumpSteps(self, a, scale, self._expected(t, dt, z, context), new, real)
        return torch.logsumexp(steps.log_terms(), 0)

    def _expected(self, t: Tensor, dt: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """Expected jumps in steps, (..., 1)."""
        rate = self.intensity(t, z, context)
        if self._validate_args and not bool((rate >= 0).all() & torch.isfinite(rate).all()):
            bad = rate[~((rate >= 0) & torch.isfinite(rate))][0].item()
            raise FieldError(
                f"The intensity is {bad:g} near time {t.min().item():g}. Bound it from below by zero."
            )
        return rate * dt

    def guided(
        self, message: MixtureMessage, *, score_message: MixtureMessage | None = None
    ) -> GuidedJumpPath:
        """The same path, twisted: what a guide samples.

        Args:
            message: e.g. from `filtered`.
            score_message: see `GuidedJumpPath`.

        Raises:
            GuideError: if the message does not fit.
        """
        return GuidedJumpPath(self, message, score_message, validate_args=self._validate_args)

    def filtered(
        self,
        potential: Message,
        around: Tensor | None = None,
        components: int = 3,
        memory: int | None = None,
    ) -> MixtureMessage:
        """Messages from the backward filter; `around` is the path to linearise around, by default without noise.

        Args:
            potential: the (Gaussian, or locally Gaussian) log likelihood of every state, e.g. `Message.observed`.
            around: (*batch, time, state).
            components: of the mixture; the last one stands for that many jumps or more before the next observation.
            memory: over how many gaps more it is remembered whether there were jumps; each doubles the components. None
                is 0 for one state and 1 for several, of which an observation may not tell all.

        Raises:
            GuideError: if the potential is on another grid.
        """
        fitting(potential, self.chain)
        if around is None:
            chain = self.chain
            shape = (chain.steps + 1, *chain.batch_shape, chain.state_dim)
            around = self.matched.guided().transport(
                torch.zeros(shape, dtype=chain.dtype, device=chain.device)
            )
        return jump_filter(self, potential, around, components, memory)

    def steps(self, value: Tensor) -> "JumpSteps":
        """All steps of a path (..., time, state) at once."""
        chain = self.chain
        value = chain.aligned(value)
        before, after = chain.split(value)
        a, noise, _, real = chain.steps_of(value)
        t, dt, context = chain.layout(before.dim() - 1)
        rate = self._expected(t, dt, before, context)
        if not isinstance(noise, DiagonalNoise):
            raise DiffusionError("JumpDiffusionPath: for diagonal noise.")
        return JumpSteps(self, a, noise.scale.abs().expand(a.shape), rate, after, real)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = self.chain.aligned(value)
        self.chain.check_start(value)
        steps = self.steps(value)
        density = torch.logsumexp(steps.log_terms(), 0)
        density = torch.where(steps.real, density, torch.zeros_like(density))
        return self.chain.start.log_prob(value[..., 0, :]) + density.sum(0)


@dataclass(frozen=True)
class JumpSteps:
    """The steps of one path.

    Args:
        path: whose steps.
        a: (time, *batch, state) means without jumps.
        scale: likewise, of the noise.
        rate: (time, *batch or ones, 1) expected jumps.
        after: the states that they reach.
        real: (time, *batch) False for steps of zero length.
    """

    path: JumpDiffusionPath
    a: Tensor
    scale: Tensor
    rate: Tensor
    after: Tensor
    real: Tensor

    def log_terms(self) -> Tensor:
        """log P(n jumps, new state | old state) for n = 0, 1, ...: (count, time, *batch)."""
        size, x = self.path.jumps.size, self.after - self.a
        shape, terms = self.a.shape[:-1], []
        for n, density in enumerate(size.log_densities(self.path.counts(self.rate), x, self.scale)):
            terms.append((log_poisson(n, self.rate)[..., 0] + density.sum(-1)).expand(shape))
        return torch.stack(terms)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """P(no jump | both states) as its log (time, *batch), and the expected sum of sizes (time, *batch, state)."""
        terms = torch.log_softmax(self.log_terms(), 0)
        size, x, total = self.path.jumps.size, self.after - self.a, torch.zeros_like(self.a)
        for n, log_share in enumerate(terms):
            if n:
                total = total + log_share.exp()[..., None] * size.expected(n, x, self.scale)
        still = ~self.real
        return terms[0].masked_fill(still, 0.0), total.masked_fill(still[..., None], 0.0)
