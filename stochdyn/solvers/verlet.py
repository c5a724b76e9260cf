"""The leapfrog of mechanics."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stochdyn.errors import ShapeError
from stochdyn.solvers.integrator import AbstractMean, Drift


@dataclass(frozen=True)
class Verlet(AbstractMean):
    """Velocity Verlet (leapfrog): kick, drift, kick, for a state z = (x, v) of two halves.

    v1 = v + a(x) dt/2, x' = x + r(v1) dt, v' = v1 + a(x') dt/2. Order 2, symplectic and time-reversible where the
    system is separable: the rate r of the first half depends on v and t alone, the rate a of the second on x and t
    alone. Its energy error then stays bounded for ever, where that of `RungeKutta4` grows. With a force that depends
    on the velocity (friction) it is of order 1: take `RungeKutta4`. Three calls of the field per piece.

    Args:
        substeps: into how many equal pieces a step is cut.

    Raises:
        TimeError: if `substeps` is below 1.
        ShapeError: when called, if the state has an odd number of entries.

    References:
        Hairer, Lubich & Wanner, "Geometric numerical integration illustrated by the Stoermer-Verlet method", Acta
        Numerica 2003, https://doi.org/10.1017/S0962492902000144

    Example:
        >>> import torch, stochdyn as sd
        >>> spring = lambda t, z: torch.cat([z[..., 1:], -z[..., :1]], -1)
        >>> z = sd.odeint(spring, torch.tensor([1.0, 0.0]), torch.linspace(0, 100, 1001), solver=sd.Verlet())
        >>> bool((z.square().sum(-1) - 1).abs().max() < 0.003)
        True
    """

    any_system: ClassVar[bool] = False

    def once(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        if z.shape[-1] % 2:
            raise ShapeError(
                f"Verlet: the state must be (x, v), two halves of one size, got {z.shape[-1]} entries. Use another "
                "solver for a first-order system."
            )
        half = z.shape[-1] // 2
        x, v = z[..., :half], z[..., half:]
        v = v + 0.5 * dt * drift(t, z)[..., half:]
        x = x + dt * drift(t + 0.5 * dt, torch.cat([x, v], -1))[..., :half]
        v = v + 0.5 * dt * drift(t + dt, torch.cat([x, v], -1))[..., half:]
        return torch.cat([x, v], -1)
