"""A Gaussian step around the mean of an ODE solver."""

from dataclasses import dataclass, field

from torch import Tensor

from stochdyn.solvers.integrator import AbstractMean, Drift
from stochdyn.solvers.kernel import AbstractEulerNoise
from stochdyn.solvers.runge_kutta import Heun


@dataclass(frozen=True)
class GaussianStep(AbstractEulerNoise):
    """A Gaussian step with a better mean: the mean of an ODE solver, the noise of Euler-Maruyama.

    z' = mean(z) + g(t, z) sqrt(dt) xi. Itô convention. Weak order 1, and as the noise gets small the order of
    its mean. Prefer it to `EulerMaruyama` wherever the drift's parameters have a meaning: a first-order mean
    shifts their posterior.

    Args:
        mean: `Heun()` (order 2), `RungeKutta4()` (order 4), or `Rosenbrock()` (order 2, stiff).

    References:
        Milstein & Tretyakov, "Numerical methods in the weak sense for stochastic differential equations with
        small noise", SIAM J. Numer. Anal. 1997, https://doi.org/10.1137/S0036142996278967

    Example:
        >>> import torch, stochdyn as sd
        >>> path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.1]), torch.ones(1), torch.linspace(0, 1, 6),
        ...                   solver=sd.GaussianStep(mean=sd.Heun()))
        >>> path.event_shape
        torch.Size([6, 1])
    """

    mean: AbstractMean = field(default_factory=Heun)

    def advance(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        return self.mean.mean(drift, t, dt, z)
