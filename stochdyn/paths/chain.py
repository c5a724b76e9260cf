"""The discretised Markov chain that every path shares: fields, start and grid, laid out time-major."""

import math

import torch
from torch import Tensor

from stochdyn.errors import DivergedError, DtypeError, ShapeError, SupportError, TimeError
from stochdyn.fields import AbstractDiffusion, Field, check_positive, evaluate, probe
from stochdyn.paths.noise import AbstractNoise, DiagonalNoise, MatrixNoise, square_factor
from stochdyn.paths.start import AbstractStart, KnownStart
from stochdyn.solvers import AbstractKernel

LOG_2PI = math.log(2 * math.pi)


class Chain:
    """z[0] from the start, then `steps` Gaussian steps.

    Attributes:
        batch_shape: broadcast of start, times and fields (found by calling the fields once).
        state_dim, noise_dim, steps: sizes.
        real: (time, *ones or batch) bool; False for zero-length steps, which have no density.
    """

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
        self.drift, self.diffusion, self.solver = drift, diffusion, solver
        self.ts = _check_times(ts, validate)
        self.steps, self.state_dim = self.ts.shape[-1] - 1, start.state_dim
        self.dtype, self.device = start.centre().dtype, start.centre().device
        if validate:
            _check_resolution(self.ts, self.dtype)
        times = self.ts.to(self.device).movedim(-1, 0)[..., None]
        self._dt = times.diff(dim=0).to(self.dtype)
        self._t = times[:-1].to(self.dtype)
        base = torch.broadcast_shapes(start.batch_shape, self.ts.shape[:-1])
        self.context = context
        self._context = _context_by_time(context, self.steps + 1, base)
        self._probe(start, base, validate)
        self.real = (self._dt > 0)[..., 0]

    def _probe(self, start: AbstractStart, base: torch.Size, validate: bool) -> None:
        z = start.centre().detach().expand(*base, self.state_dim)
        context = None if self._context is None else self._context[0]
        t = self._lift(self._t, z.dim())[0]
        batch, noises = probe(self.drift, self.diffusion, t, z, context)
        self.noise_dim = min(noises, self.state_dim)
        context_batch = () if context is None else context.shape[:-1]
        self.batch_shape = torch.broadcast_shapes(base, batch, context_batch)
        self.start = start if start.batch_shape == self.batch_shape else start.expand(self.batch_shape)
        if validate and self.diffusion.diagonal:
            with torch.no_grad():
                check_positive(self.diffusion(t, z, context), "at the first time")

    def expand(self, batch_shape: torch.Size) -> "Chain":
        """The same chain with a larger batch; the fields broadcast."""
        new = object.__new__(Chain)
        new.__dict__.update(self.__dict__)
        new.batch_shape = torch.Size(batch_shape)
        new.start = self.start.expand(new.batch_shape)
        return new

    @staticmethod
    def _lift(x: Tensor, ndim: int) -> Tensor:
        """Insert batch dimensions after time, so that a slice at one time has `ndim` dimensions."""
        missing = ndim + 1 - x.dim()
        return x.reshape(x.shape[0], *[1] * missing, *x.shape[1:]) if missing > 0 else x

    def layout(self, ndim: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """t, dt and context over all steps, for states of `ndim` dimensions (time not counted)."""
        context = None if self._context is None else self._context
        if context is not None:
            context = self._lift(context.expand(self.steps + 1, *context.shape[1:])[:-1], ndim)
        return self._lift(self._t, ndim), self._lift(self._dt, ndim), context

    def step(self, t: Tensor, dt: Tensor, context: Tensor | None, z: Tensor) -> tuple[Tensor, AbstractNoise]:
        """Mean and noise of steps; all arguments at one time, or all time-major."""

        def drift(s: Tensor, x: Tensor) -> Tensor:
            return evaluate("drift", self.drift, s, x, context)

        a, G = self.solver.step(drift, self.diffusion, t, dt, z, context)
        return a, DiagonalNoise(G) if self.diffusion.diagonal else MatrixNoise(G)

    def constant_noise(self, ndim: int) -> AbstractNoise | None:
        """The noise of all steps at once where the diffusion is a constant."""
        if not self.diffusion.constant:
            return None
        t, dt, context = self.layout(ndim)
        z = torch.zeros((1,) * ndim, dtype=self.dtype, device=self.device)
        _, G = self.solver.step(lambda s, x: x, self.diffusion, t, dt, z, context)
        return DiagonalNoise(G) if self.diffusion.diagonal else MatrixNoise(square_factor(G))

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """A path (*, time, state) as time-major states before and after each step."""
        z = value.movedim(-2, 0)
        return z[:-1], z[1:]

    def steps_of(self, value: Tensor) -> tuple[Tensor, AbstractNoise, Tensor, Tensor]:
        """Score every step of a path in one call.

        Returns:
            the means a (time, *batch, state), the noise (unit where a step has zero length), the noise coordinates
            xi (time, *batch, noise), and `real` (time, *batch).
        """
        before, after = self.split(value)
        t, dt, context = self.layout(before.dim() - 1)
        a, noise = self.step(t, dt, context, before)
        real = (dt > 0)[..., 0]
        safe = noise.safe(real)
        return a, safe, safe.solve(after - a), real

    def log_prob_of(self, noise: AbstractNoise, xi: Tensor, real: Tensor) -> Tensor:
        """The prior's log density of all steps, summed over time."""
        density = -0.5 * (xi.square().sum(-1) + xi.shape[-1] * LOG_2PI) - noise.logdet()
        return torch.where(real, density, torch.zeros_like(density)).sum(0)

    def check_value(self, value: Tensor) -> None:
        """Refuse a value that has no density here.

        Raises:
            ShapeError: if its time or state size differs.
            DivergedError: if it is not finite.
            SupportError: if a known start or a zero-length step does not agree with it.
        """
        expected = (self.steps + 1, self.state_dim)
        if tuple(value.shape[-2:]) != expected:
            raise ShapeError(
                f"A value of this path must end in (time={expected[0]}, state={expected[1]}), got "
                f"{tuple(value.shape)}. It must live on the path's own grid."
            )
        if value.dtype != self.dtype:
            raise DtypeError(f"The path is {self.dtype}, the value {value.dtype}. Convert with .to({self.dtype}).")
        self.check_finite(value)
        tolerance = 1e3 * torch.finfo(self.dtype).eps
        if isinstance(self.start, KnownStart):
            gap = (value[..., 0, :] - self.start.value).abs()
            if (gap > tolerance * (1 + self.start.value.abs())).any():
                raise SupportError(
                    f"The value starts up to {gap.max().item():g} away from the path's known start. Set its first "
                    "row to the start, or give `initial` a distribution."
                )
        before, after = self.split(value)
        still = ~self._lift(self.real[..., None], before.dim() - 1)
        moved = still & ((after - before).abs() > tolerance * (1 + before.abs()))
        if moved.any():
            k = int(moved.nonzero()[0, 0])
            raise SupportError(f"Step {k} has zero length, yet the value moves in it. Repeat the state there.")

    def check_finite(self, value: Tensor) -> None:
        """Raise DivergedError with the first bad time, the batch index and the last finite state."""
        if torch.isfinite(value).all():
            return
        bad = ~torch.isfinite(value).all(-1)
        k = int(bad.flatten(0, -2).any(0).nonzero()[0, 0]) if bad.dim() > 1 else int(bad.nonzero()[0, 0])
        index = bad[..., k].nonzero()[0].tolist() if bad.dim() > 1 else []
        ts = self.ts.expand(*self.batch_shape, self.steps + 1) if self.ts.dim() > 1 else self.ts
        time = ts[(*index[-(ts.dim() - 1) :], k)] if ts.dim() > 1 else ts[k]
        last = value[(*index, max(k - 1, 0))].tolist()
        raise DivergedError(
            f"series {_series(index, self.batch_shape)}, time {float(time):g} (step {k}): the path is not finite; the "
            f"last state was {[round(x, 4) for x in last]}. Use more substeps, bound the drift, or start nearer."
        )


def _series(index: list[int], batch_shape: torch.Size) -> str:
    own = index[len(index) - len(batch_shape) :] if batch_shape else []
    return str(own[0] if len(own) == 1 else tuple(own)) if own else "0"


def _check_times(ts: Tensor, validate: bool) -> Tensor:
    if not isinstance(ts, Tensor):
        raise TimeError(f"`ts` must be a tensor (*batch, time), got {type(ts).__name__}. Use TimeGrid(...).ts.")
    if ts.dim() < 1 or ts.shape[-1] < 1:
        raise TimeError(f"`ts` must have shape (*batch, time) with at least one time, got {tuple(ts.shape)}.")
    ts = ts.double()
    if not validate:
        return ts
    if not torch.isfinite(ts).all():
        k = int((~torch.isfinite(ts)).nonzero()[0, -1])
        raise TimeError(f"`ts` is not finite at position {k}. Times must be finite numbers.")
    down = ts.diff(dim=-1) < 0
    if down.any():
        where = down.nonzero()[0].tolist()
        pair = ts[tuple(where)].item(), ts[(*where[:-1], where[-1] + 1)].item()
        raise TimeError(
            f"`ts` goes back from {pair[0]:g} to {pair[1]:g} at position {where[-1] + 1}. Sort the times; TimeGrid "
            "makes a grid from observation times."
        )
    return ts


def _check_resolution(ts: Tensor, dtype: torch.dtype) -> None:
    gaps = ts.diff(dim=-1)
    if not (gaps > 0).any():
        return
    largest, smallest = ts.abs().max().item(), gaps[gaps > 0].min().item()
    spacing = torch.finfo(dtype).eps * largest
    if spacing > smallest / 100:
        raise TimeError(
            f"Times up to {largest:g} with steps down to {smallest:g} cannot be told apart in {dtype} (spacing "
            f"{spacing:.1g}). Subtract the first time and choose a unit in which a step is near 1 (Unix seconds: "
            "divide by 86400 for days), or use float64."
        )


def _context_by_time(context: Tensor | None, points: int, base: torch.Size) -> Tensor | None:
    """Context time-major: (time or 1, *batch, context_dim)."""
    if context is None:
        return None
    if context.dim() < 1:
        raise ShapeError("`context` must have shape (*batch, context_dim) or (*batch, time, context_dim).")
    timed = context.dim() >= 2 and context.shape[-2] == points
    if timed and context.dim() == 2 and points == (base[-1] if base else 0):
        raise ShapeError(
            f"`context` of shape {tuple(context.shape)} may be (time, context_dim) or (batch, context_dim): there are "
            f"{points} of both. Write a static one as context[..., None, :]."
        )
    if timed or (context.dim() >= 2 and context.shape[-2] == 1 and context.dim() > len(base) + 1):
        return context.movedim(-2, 0)
    return context[None]
