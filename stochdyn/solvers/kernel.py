"""Solvers of stochastic differential equations, and those among them that have a transition density."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from stochdyn.device import cholesky
from stochdyn.errors import DiffusionError, FieldError
from stochdyn.fields import AbstractDiffusion, as_diffusion
from stochdyn.solvers.integrator import AbstractMean, Drift


@dataclass(frozen=True)
class Problem:
    """What an SDE solver integrates: dz = f(t, z) dt + g(t, z) dW from z at the first of some times.

    Args:
        drift: called as (t, z), its context bound.
        diffusion: its context bound too.
        z: (*batch, state), with every batch dimension.
        times: (time, ..., 1) float64, the middle broadcast against the batch.
        noises: the number of Brownian motions.
    """

    drift: Drift
    diffusion: AbstractDiffusion
    z: Tensor
    times: Tensor
    noises: int


class AbstractSDESolver(ABC):
    """Integrates an SDE along given Brownian motions.

    Attributes:
        stratonovich: whether the equation is read in the Stratonovich sense; False is Itô.
        reversible: whether it goes backwards without error, from the state and more that it carries from step to step.
    """

    stratonovich: ClassVar[bool] = False
    reversible: ClassVar[bool] = False

    @abstractmethod
    def integrate(self, problem: Problem, motion: Any) -> Tensor:
        """The states (time, *batch, state) along a Brownian motion, as `sdeint` hands it over."""

    def adjoint(self, problem: Problem, motion: Any, read: list[Tensor]) -> Tensor:
        """The same, of which the gradient keeps the states alone; reversible solvers have it.

        Args:
            problem: the equation.
            motion: a Brownian motion.
            read: the tensors that need a gradient and that drift and diffusion read.
        """
        raise NotImplementedError


class AbstractStepSolver(AbstractSDESolver):
    """An SDE solver that goes step by step and needs nothing of the Brownian motion but its increments."""

    @abstractmethod
    def along(
        self, drift: Drift, diffusion: AbstractDiffusion, t: Tensor, dt: Tensor, z: Tensor, dW: Tensor
    ) -> Tensor:
        """The state after one step along the increments dW (*batch, noise)."""

    def integrate(self, problem: Problem, motion: Any) -> Tensor:
        times, dtype = problem.times, problem.z.dtype
        states, increments = [problem.z], motion.increments(times, problem.noises)
        t, dt = times.to(dtype), times.diff(dim=0).to(dtype)
        for s, h, dW in zip(t.unbind(0), dt.unbind(0), increments.unbind(0), strict=False):
            states.append(self.along(problem.drift, problem.diffusion, s, h, states[-1], dW))
        return torch.stack(states)


class AbstractKernel(AbstractStepSolver):
    """A solver with a transition density: z' = a(z) + G(z) xi with xi ~ N(0, I).

    `noise_is_diffusion` says that G depends on the diffusion and the step alone, neither on drift nor state; with a
    constant diffusion all steps then share one computation.
    """

    noise_is_diffusion: ClassVar[bool] = False

    @abstractmethod
    def step(
        self,
        drift: Drift,
        diffusion: AbstractDiffusion,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The mean a and the noise factor G of one step; G is (..., state) where the noise is diagonal.

        `drift` is called as (t, z), its context already bound.
        """

    @abstractmethod
    def advance(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        """The mean of one step alone: the `a` of `step`."""

    def transition(
        self,
        drift: Drift,
        diffusion: "AbstractDiffusion | Callable[..., Tensor] | Tensor",
        t: Tensor,
        dt: Tensor,
        z: Tensor,
    ) -> dist.TorchDistribution:
        """The distribution of the state after one step, over a vector of size (state,).

        Args:
            drift: called as (t, z).
            diffusion: as in `SDEPath`.
            t: time, broadcasts against z with a last dimension of 1 (or 0-d).
            dt: the step, likewise, in the units of t.
            z: state (*batch, state).

        Raises:
            DiffusionError: if there are fewer noises than states, or the matrix is singular: no density on
                the whole space exists.

        Example:
            >>> import stochdyn as sd
            >>> step = sd.EulerMaruyama().transition(lambda t, z: -z, torch.tensor([0.5]), torch.tensor(0.0),
            ...                                      torch.tensor(0.01), torch.ones(3, 1))
            >>> step.batch_shape, step.event_shape
            (torch.Size([3]), torch.Size([1]))
        """
        noise = as_diffusion(diffusion)
        t, dt = (x.reshape(1) if x.dim() == 0 else x for x in (torch.as_tensor(t), torch.as_tensor(dt)))
        a, G = self.step(drift, noise, t, dt, z, None)
        if noise.diagonal:
            return dist.Normal(*torch.broadcast_tensors(a, G.abs())).to_event(1)
        if G.shape[-1] < G.shape[-2]:
            raise DiffusionError(
                f"{G.shape[-1]} noises for {G.shape[-2]} states: the step has no density on the whole space. "
                "Use SDEPath, which scores on the subspace that the noise reaches."
            )
        try:
            return dist.MultivariateNormal(a, scale_tril=cholesky(G @ G.mT))
        except torch.linalg.LinAlgError as error:
            raise DiffusionError(
                f"The diffusion matrix is singular ({error}). Make its rows independent."
            ) from error

    def along(
        self, drift: Drift, diffusion: AbstractDiffusion, t: Tensor, dt: Tensor, z: Tensor, dW: Tensor
    ) -> Tensor:
        a, G = self.step(drift, diffusion, t, dt, z, None)
        xi = dW / torch.where(dt > 0, dt, torch.ones_like(dt)).sqrt()
        return a + (G * xi if diffusion.diagonal else (G @ xi[..., None])[..., 0])


class AbstractEulerNoise(AbstractKernel):
    """A kernel with the noise of Euler-Maruyama, G = g(t, z) sqrt(dt); subclasses give the mean."""

    noise_is_diffusion: ClassVar[bool] = True

    def step(
        self,
        drift: Drift,
        diffusion: AbstractDiffusion,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return self.advance(drift, t, dt, z), diffusion.scale(diffusion(t, z, context), dt.sqrt())


def as_kernel(solver: object) -> AbstractKernel:
    """Refuse what has no transition density.

    Raises:
        FieldError: with the object to write instead.

    Example:
        >>> import stochdyn as sd
        >>> as_kernel(sd.EulerMaruyama())
        EulerMaruyama()
    """
    if isinstance(solver, AbstractKernel):
        return solver
    fix = "Solvers are objects, e.g. EulerMaruyama() or GaussianStep(mean=Heun())."
    if isinstance(solver, AbstractSDESolver):
        fix = "It integrates only, by sd.sdeint: choose a kernel for a path."
    if isinstance(solver, AbstractMean):
        fix = f"It integrates only; as a kernel it is GaussianStep(mean={solver!r})."
    raise FieldError(f"`solver` must have a transition density, got {solver!r}. {fix}")
