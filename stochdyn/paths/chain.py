"""The discretised Markov chain that every path shares: fields, start and grid, laid out time-major."""

import copy
import math

import torch
from torch import Tensor, nn

from stochdyn.device import readable
from stochdyn.errors import DiffusionError, DivergedError, DtypeError, FieldError, ShapeError, SupportError
from stochdyn.fields import (
    AbstractDiffusion,
    Field,
    call_field,
    check_diffusion,
    draw_weights,
    evaluate,
    probe,
)
from stochdyn.paths.checks import (
    check_resolution,
    check_times,
    check_unambiguous,
    context_by_time,
    first_bad,
    joint_batch,
    lift,
    place,
    short,
)
from stochdyn.paths.drifts import BoundDrift, Drifts, in_time
from stochdyn.paths.noise import AbstractNoise, DiagonalNoise, MatrixNoise
from stochdyn.paths.start import AbstractStart, KnownStart
from stochdyn.solvers import AbstractKernel, as_kernel

LOG_2PI = math.log(2 * math.pi)

Known = tuple[Tensor | None, AbstractNoise]


class Chain:
    """z[0] from the start, then `steps` Gaussian steps.

    Attributes:
        batch_shape: broadcast of start, times, context and fields (found by calling the fields once).
        state_dim, noise_dim, steps: sizes; more noises than states count as many as the states.
        real: (time, *ones or batch) bool; False for zero-length steps, which have no density.
    """

    batch_shape: torch.Size
    noise_dim: int
    start: AbstractStart

    def __init__(
        self,
        drift: Field,
        diffusion: AbstractDiffusion,
        start: AbstractStart,
        ts: Tensor,
        solver: AbstractKernel,
        context: Tensor | None,
        *,
        validate: bool = True,
    ) -> None:
        # Called after the model has returned, random weights would be drawn anew at each access.
        shared: dict[int, nn.Module] = {}
        self.drift, self.diffusion = draw_weights(drift, memo=shared), draw_weights(diffusion, memo=shared)
        self.solver = as_kernel(solver)
        self.context, self.validate = context, validate
        self.own_context: Tensor | None = None
        self._own_context: Tensor | None = None
        self.ts = check_times(ts, validate)
        self.steps, self.state_dim = self.ts.shape[-1] - 1, start.state_dim
        centre = start.centre()
        self.dtype, self.device = centre.dtype, centre.device
        if validate:
            check_resolution(self.ts, ts.dtype, self.dtype)
        times = self.ts.to(self.device).movedim(-1, 0)[..., None]
        self._t, self._dt = times.to(self.dtype), times.diff(dim=0).to(self.dtype)
        self.real = (self._dt > 0)[..., 0]
        base = joint_batch(initial=start.batch_shape, ts=self.ts.shape[:-1])
        self._context = context_by_time(context, self.steps + 1, base)
        self._probe(start, centre.detach(), base)

    def _probe(self, start: AbstractStart, centre: Tensor, base: torch.Size) -> None:
        context = None if self._context is None else self._context[0]
        if context is not None:
            base = joint_batch(initial_and_ts=base, context=context.shape[:-1])
        z = centre.expand(*base, self.state_dim)
        if self.validate and not torch.isfinite(z).all():
            raise DivergedError(f"`initial` is not finite: {short(z)}. A path starts at finite numbers.")
        t = lift(self._t, z.dim())[0]
        batch, noises = probe(self.drift, self.diffusion, t, z, context)
        self.noise_dim = min(noises, self.state_dim)
        self.batch_shape = joint_batch(initial_ts_and_context=base, fields=batch)
        self._check_context(self.batch_shape)
        self.start = start if start.batch_shape == self.batch_shape else start.expand(self.batch_shape)
        if self.validate:
            with torch.no_grad():
                check_diffusion(self.diffusion, self.diffusion(t, z, context), float(self.ts.flatten()[0]))

    def _check_context(self, batch_shape: torch.Size) -> None:
        timed = self._context is not None and self._context.shape[0] > 1
        if timed and self.context is not None and self.context.dim() == 2:
            check_unambiguous(self.context, self.steps + 1, batch_shape)

    def expand(self, batch_shape: torch.Size) -> "Chain":
        """The same chain with a larger batch; the fields broadcast."""
        batch_shape = torch.Size(batch_shape)
        if joint_batch(path=self.batch_shape, wanted=batch_shape) != batch_shape:
            raise ShapeError(
                f"A path of batch shape {tuple(self.batch_shape)} does not expand to {tuple(batch_shape)}. "
                "The plate is smaller than what the path was built from."
            )
        self._check_context(batch_shape)
        new = copy.copy(self)
        new.batch_shape, new.start = batch_shape, self.start.expand(batch_shape)
        return new

    def layout(self, ndim: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """t, dt and context over all steps, for states of `ndim` dimensions (time not counted)."""
        context = self._context
        if context is not None:
            context = lift(context.expand(self.steps + 1, *context.shape[1:])[:-1], ndim)
        return lift(self._t[:-1], ndim), lift(self._dt, ndim), context

    def drifts(self, ndim: int) -> Drifts:
        """The drift of every step, its context bound, for states of `ndim` dimensions."""
        context = self._context if self._own_context is None else self._own_context
        context = in_time(context, self.steps)
        return Drifts(self.drift, None if context is None else lift(context, ndim), self.steps)

    def steered(self, drift: Field, context: Tensor | None) -> "Chain":
        """The same chain with another drift, and a context (*batch, [time,] context_dim) of its own for it.

        Raises:
            FieldError: if the drift does not return the state's shape.
        """
        new = copy.copy(self)
        new.drift, new.own_context = drift, context
        new._own_context = context_by_time(context, self.steps + 1, self.batch_shape)
        z = self.start.centre().detach().expand(*self.batch_shape, self.state_dim)
        if self.steps < 1:
            return new
        own = None if new._own_context is None else lift(new._own_context, z.dim())[0]
        with torch.no_grad():
            f = call_field("guide's drift", drift, lift(self._t, z.dim())[0], z, own)
        if f.shape[-1] not in (self.state_dim, 1):
            raise FieldError(
                f"The guide's drift returned {tuple(f.shape)}, expected (..., state={self.state_dim})."
            )
        batch = joint_batch(path=self.batch_shape, guides_drift=f.shape[:-1])
        return new if batch == self.batch_shape else new.expand(batch)

    def step(
        self, t: Tensor, dt: Tensor, context: Tensor | None, z: Tensor, drift: BoundDrift | None = None
    ) -> tuple[Tensor, AbstractNoise]:
        """Mean and noise of steps; all arguments at one time, or all time-major. `drift` has its context bound."""

        def own(s: Tensor, x: Tensor) -> Tensor:
            return evaluate("drift", self.drift, s, x, context)

        a, G = self.solver.step(drift or own, self.diffusion, t, dt, z, context)
        return a, self.noise_of(G)

    def noise_of(self, G: Tensor) -> AbstractNoise:
        """The noise with a factor G, as the diffusion gives it."""
        if not self.diffusion.diagonal:
            return MatrixNoise(G)
        return DiagonalNoise(G if G.shape[-1] == self.state_dim else G.expand(*G.shape[:-1], self.state_dim))

    def same_noise(self, other: "Chain") -> bool:
        """Whether the noise of a step is the same function of the state in both: the very same objects make it."""
        mine, theirs = self.diffusion, other.diffusion
        module = mine.field is theirs.field and type(mine) is type(theirs)
        context = self.context is other.context
        return module and context and self.solver == other.solver and self.solver.noise_is_diffusion

    def same_drift(self, other: "Chain") -> bool:
        """Whether the drift is the very same object, with the same context."""
        return self.drift is other.drift and self.context is other.context

    @property
    def shares_noise(self) -> bool:
        """Whether the noise of every step is known without drift and state."""
        return self.diffusion.constant and self.solver.noise_is_diffusion

    def constant_noise(self, ndim: int) -> AbstractNoise | None:
        """The noise of all steps at once where the diffusion is a constant."""
        if not self.shares_noise:
            return None
        t, dt, context = self.layout(ndim)
        z = torch.zeros((*[1] * (ndim - 1), self.state_dim), dtype=self.dtype, device=self.device)
        return self.noise_of(self.solver.step(lambda s, x: x, self.diffusion, t, dt, z, context)[1])

    def aligned(self, value: Tensor) -> Tensor:
        """A path with every batch dimension of the chain, so that time-major fields broadcast.

        Raises:
            ShapeError: if its time, state or batch size is another.
        """
        expected = (self.steps + 1, self.state_dim)
        if tuple(value.shape[-2:]) != expected:
            raise ShapeError(
                f"A value of this path must end in (time={expected[0]}, state={expected[1]}), got "
                f"{tuple(value.shape)}. It must live on the path's own grid."
            )
        batch = value.shape[:-2]
        if batch[max(len(batch) - len(self.batch_shape), 0) :] == self.batch_shape:
            return value
        return value.expand(*joint_batch(value=batch, path=self.batch_shape), *expected)

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """A path (*, time, state) as time-major states before and after each step."""
        z = self.aligned(value).movedim(-2, 0)
        return z[:-1], z[1:]

    def steps_of(
        self, value: Tensor, known: Known | None = None
    ) -> tuple[Tensor, AbstractNoise, Tensor, Tensor]:
        """Score every step of a path in one call.

        Args:
            value: the path.
            known: means (None where unknown) and noise of its steps, where they were computed when it was drawn.

        Returns:
            the means a (time, *batch, state), the noise (unit where a step has zero length), the noise
            coordinates xi (time, *batch, noise), and `real` (time, *batch).

        Raises:
            FieldError, DiffusionError: if a mean or a noise is not finite or zero (while validating).
            SupportError: if there are fewer noises than states and the value is not where they reach.
        """
        before, after = self.split(value)
        t, dt, context = self.layout(before.dim() - 1)
        a, noise = known or (None, None)
        if a is None or noise is None:
            drift = self.drifts(before.dim() - 1).at_once()
            if noise is None:
                a, noise = self.step(t, dt, context, before, drift)
            else:
                a = self.solver.advance(drift, t, dt, before)
        real = (dt > 0)[..., 0]
        if self.validate and not torch.isfinite(a).all():
            where = self._place(~torch.isfinite(a).all(-1))
            raise FieldError(f"{where}: the drift is not finite at a finite state. Bound it, or its input.")
        safe = noise.safe(real)
        if self.validate and not torch.isfinite(safe.logdet()).all():
            bad = ~torch.isfinite(safe.logdet())
            raise DiffusionError(
                f"{self._place(bad)}: the diffusion is zero or not finite, so the step has no density. Give "
                "it a floor, e.g. softplus(...) + 1e-3."
            )
        xi = safe.solve(after - a)
        if self.noise_dim < self.state_dim:
            self.check_reached(after, after - a - safe.apply(xi), real)
        return a, safe, xi, real

    def check_reached(self, after: Tensor, residual: Tensor, real: Tensor) -> None:
        """Refuse steps that leave a residual which no noise can make.

        Raises:
            SupportError: with the first of them.
        """
        tolerance = math.sqrt(torch.finfo(self.dtype).eps)
        off = ((residual.abs() > tolerance * (1 + after.abs())) & real[..., None]).any(-1)
        if readable(off) and off.any():
            raise SupportError(
                f"{self._place(off)}: the step moves a state that no noise reaches by "
                f"{residual[off].abs().max().item():.2g} from where the drift takes it. With fewer noises "
                "than states a value comes from this path's own fields."
            )

    def _place(self, bad: Tensor) -> str:
        """Where (time, *batch) is first True, in the user's words."""
        k, *index = bad.nonzero()[0].tolist()
        return place(k, index, self.ts, self.batch_shape)

    def log_prob_of(self, noise: AbstractNoise, xi: Tensor, real: Tensor) -> Tensor:
        """The prior's log density of all steps, summed over time."""
        density = -0.5 * (xi.square().sum(-1) + xi.shape[-1] * LOG_2PI) - noise.logdet()
        return torch.where(real, density, torch.zeros_like(density)).sum(0)

    def check_value(self, value: Tensor) -> None:
        """Refuse a value that has no density here.

        Raises:
            ShapeError: if its time, state or batch size differs.
            DtypeError: if its dtype differs.
            DivergedError: if it is not finite.
            SupportError: if it moves in a step of zero length.
        """
        value = self.aligned(value)
        if value.dtype != self.dtype:
            raise DtypeError(
                f"The path is {self.dtype}, the value {value.dtype}. Convert with .to({self.dtype})."
            )
        self.check_finite(value)
        moved = self.moved(value)
        if moved.any():
            raise SupportError(
                f"{self._place(moved)}: the step has zero length, yet the value moves in it. Repeat the "
                "state there."
            )

    def check_start(self, value: Tensor) -> None:
        """Refuse a value that does not begin at a known start.

        Raises:
            SupportError: with the distance.
        """
        if not isinstance(self.start, KnownStart) or not readable(value):
            return
        if self.starts_elsewhere(value).any():
            gap = (value[..., 0, :] - self.start.centre()).abs().max().item()
            raise SupportError(
                f"The value starts up to {gap:g} away from the path's known start. Set its first row to the "
                "start, or give `initial` a distribution (NUTS needs that where the start is a latent)."
            )

    def starts_elsewhere(self, value: Tensor) -> Tensor:
        """(*batch) whether a path leaves a known start aside; never where the start is random."""
        if not isinstance(self.start, KnownStart):
            return torch.zeros(value.shape[:-2], dtype=torch.bool, device=value.device)
        start = self.start.value.detach()
        gap = (value[..., 0, :].detach() - start).abs()
        return ~(gap <= self._tolerance * (1 + start.abs())).all(-1)

    def moved(self, value: Tensor) -> Tensor:
        """(time, *batch) whether a path moves in a step of zero length."""
        before, after = self.split(value.detach())
        still = ~lift(self.real[..., None], before.dim() - 1)
        return (still & ((after - before).abs() > self._tolerance * (1 + before.abs()))).any(-1)

    @property
    def _tolerance(self) -> float:
        return 1e3 * torch.finfo(self.dtype).eps

    def check_finite(self, value: Tensor) -> None:
        """Raise DivergedError with the first bad time, the batch index and the last finite state."""
        bad = first_bad(value, self.ts, self.batch_shape)
        if bad is not None:
            raise DivergedError(f"{bad} Use more substeps, bound the drift, or start nearer.")
