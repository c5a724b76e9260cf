"""Solvers as values. A kernel has a transition density, z' = a(z) + G(z) xi with xi ~ N(0, I).

How to choose: `GaussianStep(mean=Heun())` for mechanistic models, whose rates are read afterwards (a
first-order mean biases them); `EulerMaruyama()` for learned drifts, at half the cost;
`GaussianStep(mean=RungeKutta4())` for fast oscillations at a coarse grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from stochdyn.errors import DiffusionError, FieldError, TimeError
from stochdyn.fields import AbstractDiffusion, as_diffusion

Drift = Callable[[Tensor, Tensor], Tensor]


class AbstractMean(ABC):
    """One step of an ODE solver, used as the mean of a Gaussian step."""

    @abstractmethod
    def mean(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        """The state after one step of length dt from z at t."""


@dataclass(frozen=True)
class Heun(AbstractMean):
    """Heun's method (explicit trapezoidal rule): order 2, two calls of the drift.

    Example:
        >>> import stochdyn as sd
        >>> sd.Heun().mean(lambda t, z: -z, torch.zeros(1), torch.tensor([0.1]), torch.ones(1))
        tensor([0.9050])
    """

    def mean(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        f = drift(t, z)
        return z + 0.5 * (f + drift(t + dt, z + f * dt)) * dt


@dataclass(frozen=True)
class RungeKutta4(AbstractMean):
    """The classical Runge-Kutta method: order 4, four calls of the drift per substep.

    Args:
        substeps: how many equal pieces a step is cut into.

    Raises:
        TimeError: if `substeps` is below 1.

    Example:
        >>> import stochdyn as sd
        >>> sd.RungeKutta4().mean(lambda t, z: -z, torch.zeros(1), torch.tensor([0.1]), torch.ones(1))
        tensor([0.9048])
    """

    substeps: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.substeps, int) or self.substeps < 1:
            raise TimeError(
                f"RungeKutta4: `substeps` must be an integer of at least 1, got {self.substeps!r}."
            )

    def mean(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        h = dt / self.substeps
        for k in range(self.substeps):
            s = t + k * h
            k1 = drift(s, z)
            k2 = drift(s + 0.5 * h, z + 0.5 * h * k1)
            k3 = drift(s + 0.5 * h, z + 0.5 * h * k2)
            k4 = drift(s + h, z + h * k3)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z


class AbstractKernel(ABC):
    """A solver with a transition density.

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
            return dist.MultivariateNormal(a, scale_tril=torch.linalg.cholesky(G @ G.mT))
        except torch.linalg.LinAlgError as error:
            raise DiffusionError(
                f"The diffusion matrix is singular ({error}). Make its rows independent."
            ) from error


@dataclass(frozen=True)
class GaussianStep(AbstractKernel):
    """A Gaussian step with a better mean: the mean of an ODE solver, the noise of Euler-Maruyama.

    z' = mean(z) + g(t, z) sqrt(dt) xi. Itô convention. Weak order 1, and as the noise gets small the order of
    its mean. Prefer it to `EulerMaruyama` wherever the drift's parameters have a meaning: a first-order mean
    shifts their posterior.

    Args:
        mean: `Heun()` (order 2) or `RungeKutta4()` (order 4).

    References:
        Milstein & Tretyakov, "Numerical methods in the weak sense for stochastic differential equations with
        small noise", SIAM J. Numer. Anal. 1997, https://doi.org/10.1137/S0036142996278967

    Example:
        >>> import stochdyn as sd
        >>> path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.1]), torch.ones(1), torch.linspace(0, 1, 6),
        ...                   solver=sd.GaussianStep(mean=sd.Heun()))
        >>> path.event_shape
        torch.Size([6, 1])
    """

    noise_is_diffusion: ClassVar[bool] = True
    mean: AbstractMean = field(default_factory=Heun)

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

    def advance(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        return self.mean.mean(drift, t, dt, z)


@dataclass(frozen=True)
class EulerMaruyama(AbstractKernel):
    """Euler-Maruyama: z' = z + f(t, z) dt + g(t, z) sqrt(dt) xi.

    Itô convention. Strong order 1/2 (1 for additive noise), weak order 1, one call of drift and diffusion.
    Prefer `GaussianStep(mean=Heun())` for models whose parameters are read.

    References:
        Maruyama, "Continuous Markov processes and stochastic equations", 1955,
        https://doi.org/10.1007/BF02846028

    Example:
        >>> import stochdyn as sd
        >>> sd.EulerMaruyama() == sd.EulerMaruyama()
        True
    """

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

    def advance(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        return z + drift(t, z) * dt


def as_kernel(solver: object) -> AbstractKernel:
    """Refuse what has no transition density.

    Raises:
        FieldError: with the object to write instead.

    Example:
        >>> as_kernel(EulerMaruyama())
        EulerMaruyama()
    """
    if isinstance(solver, AbstractKernel):
        return solver
    fix = "Solvers are objects, e.g. EulerMaruyama() or GaussianStep(mean=Heun())."
    if isinstance(solver, AbstractMean):
        fix = f"It integrates only; as a kernel it is GaussianStep(mean={solver!r})."
    raise FieldError(f"`solver` must have a transition density, got {solver!r}. {fix}")
