"""Simulating an SDE with any solver, along any noise: trajectories without a density."""

import torch
from torch import Tensor

from stochdyn.errors import DivergedError, DtypeError, FieldError, ShapeError
from stochdyn.fields import AbstractDiffusion, Field, as_diffusion, draw_weights, evaluate, probe
from stochdyn.paths.checks import (
    check_resolution,
    check_times,
    context_by_time,
    first_bad,
    joint_batch,
    lift,
)
from stochdyn.solvers import (
    SRK,
    AbstractGradient,
    AbstractSDESolver,
    BrownianMotion,
    Direct,
    EulerMaruyama,
    Milstein,
)
from stochdyn.solvers.gradients import check_gradient
from stochdyn.solvers.kernel import Problem
from stochdyn.solvers.milstein import check_own_coordinates
from stochdyn.solvers.walk import Increments, Walk


def sdeint(
    drift: Field,
    diffusion: "Field | Tensor | AbstractDiffusion",
    z0: Tensor,
    ts: Tensor,
    *,
    solver: AbstractSDESolver = EulerMaruyama(),  # noqa: B008
    gradient: AbstractGradient = Direct(),  # noqa: B008
    noise: "Tensor | BrownianMotion | None" = None,
    context: Tensor | None = None,
) -> Tensor:
    """Simulate dz = f(t, z) dt + g(t, z) dW from z0: one trajectory per series, with any solver.

    For simulation studies, and to compare solvers along the same noise. What is sampled in a model is a path
    (`SDEPath`), which has a density; kernels give the same law in both.

    Args:
        drift: f, `(t, z[, context])` -> shape of z; in the Stratonovich sense where the solver is.
        diffusion: g, a tensor or callable of z's shape (diagonal noise), or `MatrixDiffusion`.
        z0: the start (*batch, state).
        ts: the grid (*batch, time), non-decreasing: one step per gap.
        solver: a kernel (`EulerMaruyama()`, `GaussianStep(...)`, `Milstein()`, `TamedEuler()`,
            `ExponentialEuler(...)`), or `SRK()` (Itô); `StratonovichHeun()`, `StratonovichMidpoint()`,
            `ReversibleHeun()` (Stratonovich).
        gradient: `Direct()`; `Checkpointed()` for long trajectories; `Adjoint()` with `ReversibleHeun()`.
        noise: increments (time - 1, *batch, noise) of the Brownian motions, or a `BrownianMotion`; None draws them.
        context: static, (*batch, context_dim).

    Shapes:
        (*batch, time, state).

    Raises:
        ShapeError, TimeError, FieldError, DtypeError, DiffusionError: if the parts do not fit together.
        DivergedError: naming series and first bad time, if a trajectory leaves the finite numbers.

    Example:
        >>> import torch, stochdyn as sd
        >>> motion = sd.BrownianMotion(0.0, 1.0, (100, 1), seed=0)
        >>> rate, spread = lambda t, z: 0.1 * z, lambda t, z: 0.5 * z
        >>> exact = torch.exp(0.1 - 0.125 + 0.5 * motion.increments(torch.tensor([0.0, 1.0]))[0])
        >>> ts = torch.linspace(0, 1, 33)
        >>> euler = sd.sdeint(rate, spread, torch.ones(100, 1), ts, noise=motion)[:, -1]
        >>> milstein = sd.sdeint(rate, spread, torch.ones(100, 1), ts, noise=motion, solver=sd.Milstein())[:, -1]
        >>> bool((milstein - exact).square().mean() < (euler - exact).square().mean())
        True
    """
    if not isinstance(solver, AbstractSDESolver):
        raise FieldError(
            f"sdeint: `solver` must be an SDE solver, e.g. sd.EulerMaruyama() or sd.SRK(), got {solver!r}. An ODE "
            "solver is a kernel as GaussianStep(mean=...)."
        )
    check_gradient("sdeint", gradient)
    shared: dict[int, torch.nn.Module] = {}
    drift, noises = draw_weights(drift, memo=shared), draw_weights(as_diffusion(diffusion), memo=shared)
    problem, ts = _problem(drift, noises, z0, ts, context)
    if isinstance(solver, Milstein | SRK) and problem.diffusion.diagonal and not problem.diffusion.constant:
        t = problem.times[0].to(z0.dtype)
        check_own_coordinates(type(solver).__name__, problem.diffusion, t, problem.z.detach())
    if isinstance(noise, Tensor):
        _check_increments(noise, problem)
    if isinstance(noise, BrownianMotion):
        _check_motion(noise, problem)
    motion = noise if isinstance(noise, BrownianMotion) else Increments(noise, problem.z)
    states = gradient.simulate(Walk(problem, solver, motion)).movedim(0, -2)
    bad = first_bad(states, ts, problem.z.shape[:-1])
    if bad is not None:
        raise DivergedError(f"{bad} Use smaller steps, bound the drift, or sd.TamedEuler().")
    return states


class _Bound(AbstractDiffusion):
    """A diffusion with its context."""

    def __init__(self, diffusion: AbstractDiffusion, context: Tensor | None) -> None:
        super().__init__(diffusion.field)
        self.diagonal, self.own, self.context = diffusion.diagonal, diffusion, context

    def __call__(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.own(t, z, self.context)

    def scale(self, g: Tensor, factor: Tensor) -> Tensor:
        return self.own.scale(g, factor)


def _problem(
    drift: Field, diffusion: AbstractDiffusion, z0: Tensor, ts: Tensor, context: Tensor | None
) -> tuple[Problem, Tensor]:
    if not isinstance(z0, Tensor) or z0.dim() < 1 or not z0.is_floating_point():
        got = f"{z0.dtype} {tuple(z0.shape)}" if isinstance(z0, Tensor) else type(z0).__name__
        raise ShapeError(f"sdeint: `z0` must be a floating tensor (*batch, state), got {got}.")
    if not torch.isfinite(z0).all():
        raise DivergedError("sdeint: `z0` is not finite. A trajectory starts at finite numbers.")
    given = ts.dtype if isinstance(ts, Tensor) else torch.float64
    ts = check_times(ts, True)
    check_resolution(ts, given, z0.dtype)
    base = joint_batch(z0=z0.shape[:-1], ts=ts.shape[:-1])
    if context is not None and context.dim() > len(base) + 1 and context.shape[-2] == ts.shape[-1]:
        raise ShapeError(
            f"sdeint: `context` of shape {tuple(context.shape)} looks like one by time; it must be static, (*batch, "
            "context_dim). Paths (SDEPath) take contexts by time."
        )
    by_time = context_by_time(context, -1, base)
    row = None if by_time is None else by_time[0]
    if row is not None:
        base = joint_batch(z0_and_ts=base, context=row.shape[:-1])
    times = ts.to(z0.device).movedim(-1, 0)[..., None]
    z = z0.expand(*base, z0.shape[-1])
    batch, noises = probe(drift, diffusion, lift(times, z.dim())[0].to(z.dtype), z, row)
    batch = joint_batch(initial_ts_and_context=base, fields=batch)
    z = z0.expand(*batch, z0.shape[-1])
    return (
        Problem(
            lambda t, x: evaluate("drift", drift, t, x, row),
            diffusion if row is None else _Bound(diffusion, row),
            z,
            lift(times, z.dim()),
            noises,
        ),
        ts,
    )


def _check_motion(noise: BrownianMotion, problem: Problem) -> None:
    expected = (*problem.z.shape[:-1], problem.noises)
    if noise.shape != expected:
        raise ShapeError(f"The BrownianMotion has shape {tuple(noise.shape)}, the equation needs {expected}.")
    if noise.interval.dtype != problem.z.dtype:
        raise DtypeError(
            f"The BrownianMotion is {noise.interval.dtype}, the state {problem.z.dtype}. Make them the same."
        )


def _check_increments(noise: Tensor, problem: Problem) -> None:
    expected = (problem.times.shape[0] - 1, *problem.z.shape[:-1], problem.noises)
    if tuple(noise.shape) != expected:
        raise ShapeError(
            f"`noise` must hold Brownian increments (time - 1, *batch, noise) = {expected}, got {tuple(noise.shape)}."
        )
