"""ODE solvers that choose their steps by an error tolerance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stochdyn.errors import TimeError
from stochdyn.solvers.backends.scipy import solve as implicit
from stochdyn.solvers.backends.torchdiffeq import Control
from stochdyn.solvers.backends.torchdiffeq import solve as explicit
from stochdyn.solvers.integrator import AbstractODESolver, Drift


@dataclass(frozen=True)
class AbstractAdaptive(AbstractODESolver):
    """Steps of an error below atol + rtol |z|: the root mean square over the state, the worst series of the batch.

    Args:
        rtol, atol: relative and absolute tolerance; float32 does not reach below 1e-6.
        max_steps: between two times; more is an error, with the place.
    """

    method: ClassVar[str]
    rtol: float = 1e-6
    atol: float = 1e-8
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0 and self.max_steps >= 1):
            raise TimeError(
                f"{type(self).__name__}: needs rtol > 0, atol > 0 and max_steps >= 1, got {self.rtol}, {self.atol}, "
                f"{self.max_steps}."
            )

    def solve(self, field: Drift, z: Tensor, times: Tensor, parts: Sequence[int] = ()) -> Tensor:
        control = Control(self.rtol, self.atol, self.max_steps, tuple(parts))
        return (explicit if self.differentiable else implicit)(self.method, field, z, times, control)


@dataclass(frozen=True)
class Dopri5(AbstractAdaptive):
    """Dormand and Prince's method of order 5 (4), adaptive: the usual choice where nothing is stiff.

    By torchdiffeq. Series on one time grid share their steps; series with times of their own are solved gap by gap,
    each gap scaled to the same length. Gradients pass through the accepted steps; `Adjoint()` saves memory.

    Args:
        rtol, atol: relative and absolute tolerance; float32 does not reach below 1e-6.
        max_steps: between two times; more is an error, with the place.

    Raises:
        TimeError: if a tolerance is not positive.
        DivergedError: when solving, naming time and series, if the state explodes or the steps get too small.

    References:
        Dormand & Prince, "A family of embedded Runge-Kutta formulae", 1980,
        https://doi.org/10.1016/0771-050X(80)90013-3

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.odeint(lambda t, z: -z, torch.ones(1), torch.tensor([0.0, 1.0]), solver=sd.Dopri5())[-1]
        tensor([0.3679])
    """

    method: ClassVar[str] = "dopri5"


@dataclass(frozen=True)
class Tsit5(AbstractAdaptive):
    """Tsitouras' method of order 5 (4), adaptive: a little more exact per call than `Dopri5`.

    Args:
        rtol, atol, max_steps: as for `Dopri5`.

    Raises:
        TimeError, DivergedError: as for `Dopri5`.

    References:
        Tsitouras, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption", 2011,
        https://doi.org/10.1016/j.camwa.2011.06.002

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.odeint(lambda t, z: -z, torch.ones(1), torch.tensor([0.0, 1.0]), solver=sd.Tsit5())[-1]
        tensor([0.3679])
    """

    method: ClassVar[str] = "tsit5"


@dataclass(frozen=True)
class Dopri8(AbstractAdaptive):
    """Dormand and Prince's method of order 8 (7), adaptive: for tolerances below 1e-8, in float64.

    Args:
        rtol, atol, max_steps: as for `Dopri5`.

    Raises:
        TimeError, DivergedError: as for `Dopri5`.

    References:
        Prince & Dormand, "High order embedded Runge-Kutta formulae", 1981,
        https://doi.org/10.1016/0771-050X(81)90010-3

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.odeint(lambda t, z: -z, torch.ones(1), torch.tensor([0.0, 1.0]), solver=sd.Dopri8())[-1]
        tensor([0.3679])
    """

    method: ClassVar[str] = "dopri8"


@dataclass(frozen=True)
class Radau(AbstractAdaptive):
    """The implicit Radau IIA method of order 5, adaptive, for stiff systems; by scipy, on the CPU.

    The Jacobian is found by finite differences over the whole batch, so it is for few series; `Rosenbrock` is for
    batches. Not differentiable by itself: `gradient=Adjoint()` gives the gradient.

    Args:
        rtol, atol: as for `Dopri5`; use float64, a stiff field in float32 is too rough for tight tolerances.
        max_steps: calls of the field per time, Jacobians included.

    Raises:
        TimeError, DivergedError: as for `Dopri5`.

    References:
        Hairer & Wanner, "Solving ordinary differential equations II", 1996, https://doi.org/10.1007/978-3-642-05221-7

    Example:
        >>> import torch, stochdyn as sd
        >>> ts, z0 = torch.tensor([0.0, 1.0]), torch.zeros(1, dtype=torch.float64)
        >>> sd.odeint(lambda t, z: 1e6 * (t.cos() - z), z0, ts, solver=sd.Radau())[-1]
        tensor([0.5403], dtype=torch.float64)
    """

    differentiable: ClassVar[bool] = False
    method: ClassVar[str] = "Radau"


@dataclass(frozen=True)
class BDF(AbstractAdaptive):
    """Backward differentiation formulae of orders 1 to 5, adaptive, for stiff systems; by scipy, on the CPU.

    Cheaper per step than `Radau`, less exact for oscillations; the rest is the same.

    Args:
        rtol, atol, max_steps: as for `Radau`.

    Raises:
        TimeError, DivergedError: as for `Dopri5`.

    References:
        Shampine & Reichelt, "The MATLAB ODE suite", SIAM J. Sci. Comput. 1997,
        https://doi.org/10.1137/S1064827594276424

    Example:
        >>> import torch, stochdyn as sd
        >>> ts, z0 = torch.tensor([0.0, 1.0]), torch.zeros(1, dtype=torch.float64)
        >>> sd.odeint(lambda t, z: 1e6 * (t.cos() - z), z0, ts, solver=sd.BDF())[-1]
        tensor([0.5403], dtype=torch.float64)
    """

    differentiable: ClassVar[bool] = False
    method: ClassVar[str] = "BDF"
