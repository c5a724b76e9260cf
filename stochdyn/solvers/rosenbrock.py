"""A linearly implicit method for stiff systems."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stochdyn.device import solve
from stochdyn.solvers.integrator import AbstractMean, Drift

_GAMMA = 1 - 1 / math.sqrt(2)


@dataclass(frozen=True)
class Rosenbrock(AbstractMean):
    """The two-stage Rosenbrock method ROS2: order 2, L-stable, no iteration.

    (1 - g dt J) k1 = f + g dt f_t, (1 - g dt J) k2 = f(t + dt, z + dt k1) - 2 k1 - g dt f_t,
    z' = z + dt (3 k1 + k2) / 2, with J = df/dz and g = 1 - 1/sqrt(2). For stiff systems: a step may be far longer than
    the fastest time scale, which is then damped, not followed. Each piece costs two calls of the field, state_dim + 1
    derivatives in forward mode and one linear solve per series, so it is for small states. As a mean it makes a stiff
    SDE's step stable: `GaussianStep(mean=Rosenbrock())`. A fixed step does not see a fast nonlinear transient: on
    Robertson's kinetics it is far off, where `Radau` is right.

    Args:
        substeps: into how many equal pieces a step is cut.

    Raises:
        TimeError: if `substeps` is below 1.

    References:
        Verwer, Spee, Blom & Hundsdorfer, "A second-order Rosenbrock method applied to photochemical dispersion
        problems", SIAM J. Sci. Comput. 1999, https://doi.org/10.1137/S1064827597326651

    Example:
        >>> import torch, stochdyn as sd
        >>> z = sd.Rosenbrock().mean(lambda t, z: -1e6 * z, torch.zeros(1), torch.ones(1), torch.ones(1))
        >>> bool(z.abs() < 1e-4)
        True
    """

    any_system: ClassVar[bool] = False

    def once(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        f, J, f_t = derivatives(drift, t, z)
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        matrix, slope = eye - _GAMMA * dt[..., None] * J, _GAMMA * dt * f_t
        k1 = solve(matrix, (f + slope)[..., None])[..., 0]
        rest = drift(t + dt, z + dt * k1) - 2 * k1 - slope
        k2 = solve(matrix, rest[..., None])[..., 0]
        return z + dt * (1.5 * k1 + 0.5 * k2)


def derivatives(drift: Drift, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The field's value (..., state), its Jacobian by the state (..., state, state) and its slope in time.

    Example:
        >>> f, J, f_t = derivatives(lambda t, z: t * z * z.flip(-1), torch.ones(1), torch.tensor([2.0, 3.0]))
        >>> J
        tensor([[3., 2.],
                [3., 2.]])
    """
    t, z = t.contiguous(), z.contiguous()  # forward mode refuses expanded tensors
    still, columns = torch.zeros_like(t), []
    ones, zeros = torch.ones_like(t), torch.zeros_like(z)
    found: Any = torch.func.jvp(lambda s, x: _full(drift(s, x), x), (t, z), (ones, zeros))
    f, f_t = found
    for d in range(z.shape[-1]):
        unit = torch.zeros_like(z)
        unit[..., d] = 1
        columns.append(torch.func.jvp(lambda s, x: _full(drift(s, x), x), (t, z), (still, unit))[1])
    return f, torch.stack(columns, -1), f_t


def _full(f: Tensor, z: Tensor) -> Tensor:
    return f.expand(torch.broadcast_shapes(f.shape, z.shape))
