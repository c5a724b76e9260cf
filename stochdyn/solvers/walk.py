"""A trajectory to be simulated: an equation, a solver and its noise, in one piece or in sections."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import ShapeError
from stochdyn.solvers.backends.torchsde import BrownianMotion
from stochdyn.solvers.kernel import AbstractSDESolver, AbstractStepSolver, Problem


@dataclass(frozen=True)
class Increments:
    """Brownian increments that were given, or are drawn when asked for."""

    given: Tensor | None
    like: Tensor

    def increments(self, times: Tensor, noises: int) -> Tensor:
        """(time - 1, *batch, noise)."""
        if self.given is not None:
            return self.given
        dt = times.diff(dim=0).to(self.like.dtype)
        shape = (dt.shape[0], *self.like.shape[:-1], noises)
        return torch.randn(shape, dtype=self.like.dtype, device=self.like.device) * dt.sqrt()

    def whole(self, problem: Problem) -> BrownianMotion:
        """Motions that can be asked for more than increments.

        Raises:
            ShapeError: if increments were given.
        """
        if self.given is not None:
            raise ShapeError(
                "This solver needs more of the noise than its increments. Pass noise=sd.BrownianMotion(...)."
            )
        first, last = problem.times.min().item(), problem.times.max().item()
        shape = (*self.like.shape[:-1], problem.noises)
        return BrownianMotion(first, last, shape, dtype=self.like.dtype, device=self.like.device)


@dataclass(frozen=True)
class Walk:
    """One simulation.

    Args:
        problem: the equation, its start and its times.
        solver: what integrates it.
        motion: `Increments`, or a `BrownianMotion`.
    """

    problem: Problem
    solver: AbstractSDESolver
    motion: Any

    @property
    def steps(self) -> int:
        return self.problem.times.shape[0] - 1

    def whole(self) -> Tensor:
        """The states (time, *batch, state)."""
        return self.solver.integrate(self.problem, self.motion)

    def fixed(self) -> "Walk":
        """The same walk with its noise drawn, so that sections of it can be repeated."""
        if isinstance(self.solver, AbstractStepSolver):
            drawn = self.motion.increments(self.problem.times, self.problem.noises)
            return replace(self, motion=Increments(drawn, self.problem.z))
        if isinstance(self.motion, Increments):
            return replace(self, motion=self.motion.whole(self.problem))
        return self

    def part(self, z: Tensor, start: int, stop: int) -> Tensor:
        """The states from the time `start` on, where it is z, to the time `stop`; both are positions."""
        motion = self.motion
        if isinstance(motion, Increments) and motion.given is not None:
            motion = replace(motion, given=motion.given[start:stop])
        problem = replace(self.problem, z=z, times=self.problem.times[start : stop + 1])
        return self.solver.integrate(problem, motion)
