"""Stochastic Runge-Kutta, reversible Heun and Brownian motions, by torchsde."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochdyn.errors import DiffusionError, ShapeError, TimeError
from stochdyn.solvers.kernel import AbstractSDESolver, Problem

ROUNDING = 1e-6


class BrownianMotion:
    """Brownian motions that can be asked for their increments over any intervals, again and again.

    The same object gives the same motions at every step size: for comparing solvers, steps, or parameters, without the
    noise of the noise.

    Args:
        t0, t1: the interval on which they live.
        shape: (*batch, noise).
        seed: two with the same seed, asked the same in the same order, are the same; None draws one from torch's
            generator.
        dtype, device: of the increments.

    Raises:
        TimeError: if the interval is empty, or (when asked) a time lies outside.

    References:
        Kidger, Foster, Li & Lyons, "Efficient and accurate gradients for neural SDEs", 2021,
        https://arxiv.org/abs/2105.13493

    Example:
        >>> import torch, stochdyn as sd
        >>> motion = sd.BrownianMotion(0.0, 1.0, (5, 2), seed=0)
        >>> halves = motion.increments(torch.tensor([0.0, 0.5, 1.0]))
        >>> bool((halves.sum(0) - motion.increments(torch.tensor([0.0, 1.0]))[0]).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        t0: float,
        t1: float,
        shape: tuple[int, ...] | torch.Size,
        *,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not (t1 > t0 and math.isfinite(t1 - t0)):
            raise TimeError(f"BrownianMotion: needs t0 < t1, both finite, got {t0:g} and {t1:g}.")
        if len(shape) < 1 or min(shape) < 1:
            raise ShapeError(
                f"BrownianMotion: `shape` must be (*batch, noise) of sizes >= 1, got {tuple(shape)}."
            )
        self.t0, self.t1, self.shape = float(t0), float(t1), torch.Size(shape)
        entropy = int(torch.randint(2**31, ()).item()) if seed is None else seed
        self.interval = _library().BrownianInterval(
            t0=self.t0, t1=self.t1, size=(math.prod(shape[:-1]), shape[-1]), entropy=entropy,
            dtype=dtype or torch.get_default_dtype(), device=device, levy_area_approximation="space-time",
        )  # fmt: skip

    def increments(self, times: Tensor, noises: int | None = None) -> Tensor:
        """The increments (time - 1, *batch, noise) between times shared by all: (time,), or (time, ..., 1).

        Raises:
            TimeError: if the times are not shared, or leave the interval.
            ShapeError: if the number of noises is another one.
        """
        if noises is not None and noises != self.shape[-1]:
            raise ShapeError(f"The equation has {noises} noises, the BrownianMotion {self.shape[-1]}.")
        shared = self.shared(times)
        pairs = pairwise(shared)
        zero = torch.zeros(self.shape, dtype=self.interval.dtype, device=self.interval.device)
        return torch.stack([self.interval(a, b).reshape(self.shape) if b > a else zero for a, b in pairs])

    def shared(self, times: Tensor) -> list[float]:
        """The times as numbers, checked."""
        if times.numel() != times.shape[0]:
            raise TimeError(
                "A BrownianMotion is asked for one interval at a time, so all series must share the times. For times "
                "of their own leave `noise` out."
            )
        shared = times.double().reshape(-1).tolist()
        slack = 1e-9 * (self.t1 - self.t0)
        if shared[0] < self.t0 - slack or shared[-1] > self.t1 + slack:
            raise TimeError(
                f"Times from {shared[0]:g} to {shared[-1]:g} leave the BrownianMotion's [{self.t0:g}, {self.t1:g}]."
            )
        return [min(max(t, self.t0), self.t1) for t in shared]


@dataclass(frozen=True)
class AbstractTorchSDE(AbstractSDESolver):
    """One of torchsde's steps, taken at exactly the grid's times."""

    method: ClassVar[str]

    def integrate(self, problem: Problem, motion: Any) -> Tensor:
        motion = self._whole(problem, motion)
        sde = self._equation(problem)
        stepper = _stepper(self.method, sde, motion)
        y, at, moves = _beginning(problem, motion)
        states, extra = [y], stepper.init_extra_solver_state(at[0], y)
        for k, moved in enumerate(moves):
            if moved:
                y, extra = stepper.step(at[k], at[k + 1], y, extra)
            states.append(y)
        return torch.stack(states).reshape(-1, *problem.z.shape)

    def _whole(self, problem: Problem, motion: Any) -> BrownianMotion:
        if not isinstance(motion, BrownianMotion):
            motion = motion.whole(problem)
        expected = (*problem.z.shape[:-1], problem.noises)
        if motion.shape != expected:
            raise ShapeError(
                f"The BrownianMotion has shape {tuple(motion.shape)}, the equation needs {expected}."
            )
        return motion

    def _equation(self, problem: Problem) -> "_SDE":
        return _SDE(problem, self._noise_type(problem), "stratonovich" if self.stratonovich else "ito")

    def _noise_type(self, problem: Problem) -> str:
        if problem.diffusion.constant:
            return "additive"
        return "diagonal" if problem.diffusion.diagonal else "general"


@dataclass(frozen=True)
class SRK(AbstractTorchSDE):
    """Rößler's stochastic Runge-Kutta methods SRA1 (additive noise) and SRID2 (diagonal noise, or a single one).

    Itô convention. Strong and weak order 1.5; two calls of the drift for additive noise, four of drift and diffusion
    else. The diffusion of a coordinate must depend on that coordinate alone. By torchsde, on times that all series
    share; no density. For accurate simulation along a given `BrownianMotion`.

    Raises:
        DiffusionError: when called, for a matrix diffusion with several noises that is not a constant.

    References:
        Rößler, "Runge-Kutta methods for the strong approximation of solutions of stochastic differential equations",
        SIAM J. Numer. Anal. 2010, https://doi.org/10.1137/09076636X

    Example:
        >>> import torch, stochdyn as sd
        >>> ts = torch.linspace(0, 1, 11)
        >>> sd.sdeint(lambda t, z: -z, torch.tensor([0.3]), torch.ones(5, 1), ts, solver=sd.SRK()).shape
        torch.Size([5, 11, 1])
    """

    method: ClassVar[str] = "srk"

    def _noise_type(self, problem: Problem) -> str:
        kind = super()._noise_type(problem)
        if kind != "general":
            return kind
        if problem.noises > 1:
            raise DiffusionError(
                "SRK: for additive or diagonal noise, or a single one. For a matrix of several noises use "
                "EulerMaruyama() or StratonovichHeun()."
            )
        return "scalar"


@dataclass(frozen=True)
class ReversibleHeun(AbstractTorchSDE):
    """The reversible Heun method: Heun's accuracy at one call of drift and diffusion per step.

    Stratonovich convention, any noise. Strong order 1 for additive noise, else 1/2, weak order 1. Algebraically
    reversible, so `gradient=Adjoint()` gives the gradient of what was computed, up to rounding, and keeps the states
    alone; less stable than `StratonovichHeun`, so it needs smaller steps on stiff equations. By torchsde, on
    times that all series share; no density.

    References:
        Kidger, Foster, Li & Lyons, "Efficient and accurate gradients for neural SDEs", 2021,
        https://arxiv.org/abs/2105.13493

    Example:
        >>> import torch, stochdyn as sd
        >>> ts = torch.linspace(0, 1, 11)
        >>> sd.sdeint(lambda t, z: -z, lambda t, z: 0.3 * z, torch.ones(5, 1), ts, solver=sd.ReversibleHeun()).shape
        torch.Size([5, 11, 1])
    """

    method: ClassVar[str] = "reversible_heun"
    stratonovich: ClassVar[bool] = True
    reversible: ClassVar[bool] = True

    def adjoint(self, problem: Problem, motion: Any, read: list[Tensor]) -> Tensor:
        motion, sde = self._whole(problem, motion), self._equation(problem)
        y, at, moves = _beginning(problem, motion)
        states, extra = [y], None
        for k, moved in enumerate(moves):
            if moved:
                # One call per gap: within one, torchsde takes equal steps only. A step a little too long keeps rounding
                # from leaving a second one of no length, which is no identity for this method.
                gap = at[k : k + 2]
                step = (1 + ROUNDING) * gap.diff().item()
                ys, *extra = _library().sdeint_adjoint(
                    sde, y, gap, bm=motion.interval, method=self.method, dt=step, adjoint_params=read,
                    extra=True, extra_solver_state=extra and tuple(extra[0]),
                )  # fmt: skip
                y = ys[-1]
            states.append(y)
        return torch.stack(states).reshape(-1, *problem.z.shape)


class _SDE(torch.nn.Module):
    """An equation in torchsde's form: states (series, state), a diffusion of diagonal or of a matrix."""

    def __init__(self, problem: Problem, noise_type: str, sde_type: str) -> None:
        super().__init__()
        self.problem, self.noise_type, self.sde_type = problem, noise_type, sde_type

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        z = y.reshape(self.problem.z.shape)
        return self.problem.drift(t.reshape([1] * z.dim()), z).expand(z.shape).reshape(y.shape)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        z = y.reshape(self.problem.z.shape)
        g = self.problem.diffusion(t.reshape([1] * z.dim()), z)
        if self.problem.diffusion.diagonal:
            g = g.expand(z.shape).reshape(y.shape)
            return torch.diag_embed(g) if self.noise_type == "additive" else g
        return g.expand(*z.shape, g.shape[-1]).reshape(*y.shape, -1)


def _beginning(problem: Problem, motion: BrownianMotion) -> tuple[Tensor, Tensor, list[bool]]:
    """The start (series, state), the times, and which gaps have a length."""
    times = motion.shared(problem.times)
    y = problem.z.reshape(-1, problem.z.shape[-1])
    at = torch.tensor(times, dtype=y.dtype, device=y.device)
    return y, at, [b > a for a, b in pairwise(times)]


@cache
def _library() -> Any:
    import torchsde

    return torchsde


def _stepper(method: str, sde: _SDE, motion: BrownianMotion) -> Any:
    library = _library()
    ready = library._core.base_sde.ForwardSDE(sde)
    made = library._core.methods.select(method=method, sde_type=sde.sde_type)
    return made(
        sde=ready, bm=motion.interval, dt=1.0, adaptive=False, rtol=0.0, atol=0.0, dt_min=0.0, options={}
    )  # fmt: skip
