"""Explicit Runge-Kutta methods of a fixed step."""

from dataclasses import dataclass

from torch import Tensor

from stochdyn.solvers.integrator import AbstractMean, Drift


@dataclass(frozen=True)
class Euler(AbstractMean):
    """Euler's method: z' = z + f(t, z) dt. Order 1, one call of the field per piece.

    For learned fields where the grid is part of the model; elsewhere `Heun` or `RungeKutta4` are cheaper for the same
    error.

    Args:
        substeps: into how many equal pieces a step is cut.

    Raises:
        TimeError: if `substeps` is below 1.

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.Euler().mean(lambda t, z: -z, torch.zeros(1), torch.tensor([0.1]), torch.ones(1))
        tensor([0.9000])
    """

    def once(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        return z + drift(t, z) * dt


@dataclass(frozen=True)
class Heun(AbstractMean):
    """Heun's method (explicit trapezoidal rule): order 2, two calls of the field per piece.

    Args:
        substeps: into how many equal pieces a step is cut.

    Raises:
        TimeError: if `substeps` is below 1.

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.Heun().mean(lambda t, z: -z, torch.zeros(1), torch.tensor([0.1]), torch.ones(1))
        tensor([0.9050])
    """

    def once(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        f = drift(t, z)
        return z + 0.5 * (f + drift(t + dt, z + f * dt)) * dt


@dataclass(frozen=True)
class Midpoint(AbstractMean):
    """The explicit midpoint rule: order 2, two calls of the field per piece.

    As good as `Heun` for smooth fields; it does not look at the end of a step, where a covariate may jump.

    Args:
        substeps: into how many equal pieces a step is cut.

    Raises:
        TimeError: if `substeps` is below 1.

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.Midpoint().mean(lambda t, z: -z, torch.zeros(1), torch.tensor([0.1]), torch.ones(1))
        tensor([0.9050])
    """

    def once(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        return z + drift(t + 0.5 * dt, z + 0.5 * dt * drift(t, z)) * dt


@dataclass(frozen=True)
class RungeKutta4(AbstractMean):
    """The classical Runge-Kutta method: order 4, four calls of the field per piece.

    The usual choice for a smooth field on a known grid; `Dopri5` where the step should follow an error tolerance.

    Args:
        substeps: into how many equal pieces a step is cut.

    Raises:
        TimeError: if `substeps` is below 1.

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.RungeKutta4().mean(lambda t, z: -z, torch.zeros(1), torch.tensor([0.1]), torch.ones(1))
        tensor([0.9048])
    """

    def once(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        k1 = drift(t, z)
        k2 = drift(t + 0.5 * dt, z + 0.5 * dt * k1)
        k3 = drift(t + 0.5 * dt, z + 0.5 * dt * k2)
        k4 = drift(t + dt, z + dt * k3)
        return z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
