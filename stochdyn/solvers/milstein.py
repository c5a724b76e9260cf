"""The Milstein step for diagonal noise."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import DiffusionError
from stochdyn.fields import AbstractDiffusion
from stochdyn.solvers.integrator import Drift
from stochdyn.solvers.kernel import AbstractKernel


@dataclass(frozen=True)
class Milstein(AbstractKernel):
    """Milstein's method: z' = z + f dt + g dW + g g_z (dW^2 - dt) / 2, for diagonal noise, coordinate by coordinate.

    Itô convention. Strong order 1, weak order 1; g of a coordinate must depend on that coordinate alone. Along given
    noise (`sdeint`) the step is the one above. Its law is not Gaussian (a shifted, scaled chi-square with one degree of
    freedom), which no Gaussian message could twist exactly. So in a path the step is the Gaussian of the same mean and
    variance, z' = z + f dt + sqrt(g^2 dt + (g g_z dt)^2 / 2) xi: weak order 1, strong order 1/2. Prefer
    `EulerMaruyama` or `GaussianStep` in paths, which cost no derivative; a path in the coordinate in which the noise is
    constant (the Lamperti transform, log for geometric noise) is better than either.

    Raises:
        DiffusionError: with a `MatrixDiffusion`; in `sdeint`, which checks it, where g of one coordinate depends on
            another.

    References:
        Milstein, "Approximate integration of stochastic differential equations", Theory Probab. Appl. 1975,
        https://doi.org/10.1137/1119062

    Example:
        >>> import torch, stochdyn as sd
        >>> ts = torch.linspace(0, 1, 11)
        >>> sd.sdeint(lambda t, z: 0.1 * z, lambda t, z: 0.3 * z, torch.ones(5, 1), ts, solver=sd.Milstein()).shape
        torch.Size([5, 11, 1])
    """

    def step(
        self,
        drift: Drift,
        diffusion: AbstractDiffusion,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        g, product = self._noise(diffusion, t, z, context)
        # A product of zero would have an infinite slope under the root.
        return self.advance(drift, t, dt, z), g * dt.sqrt() * (
            1 + 0.5 * dt * (product / _nonzero(g)).square()
        ).sqrt()

    def advance(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        return z + drift(t, z) * dt

    def along(
        self, drift: Drift, diffusion: AbstractDiffusion, t: Tensor, dt: Tensor, z: Tensor, dW: Tensor
    ) -> Tensor:
        g, product = self._noise(diffusion, t, z, None)
        return self.advance(drift, t, dt, z) + g * dW + 0.5 * product * (dW.square() - dt)

    def _noise(
        self, diffusion: AbstractDiffusion, t: Tensor, z: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The diffusion g, and g times its derivative by its own coordinate."""
        if not diffusion.diagonal:
            raise DiffusionError(
                "Milstein: for diagonal noise only; a matrix needs iterated integrals of its noises. Use "
                "EulerMaruyama(), or sd.SRK() for additive noise."
            )
        if diffusion.constant:
            g = diffusion(t, z, context)
            return g, torch.zeros_like(g)
        field: Any = diffusion.field
        if getattr(field, "closed_slope", False):
            g, slope = field.with_slope(t, z, context)
            return g, g * slope

        def value(x: Tensor) -> Tensor:
            return diffusion(t, x, context).expand(x.shape)

        one = torch.ones(z.shape, dtype=z.dtype, device=z.device)
        found: Any = torch.func.jvp(value, (z.contiguous(),), (one,))  # forward mode refuses expanded tensors
        g, slope = found
        return g, g * slope


def _nonzero(g: Tensor) -> Tensor:
    return torch.where(g == 0, torch.ones_like(g), g)


def check_own_coordinates(name: str, diffusion: AbstractDiffusion, t: Tensor, z: Tensor) -> None:
    """Refuse, in the name of a solver, a diagonal diffusion of which one coordinate depends on another.

    Raises:
        DiffusionError: naming both coordinates.

    Example:
        >>> from stochdyn.fields import as_diffusion
        >>> check_own_coordinates("Milstein", as_diffusion(lambda t, z: z.square()), torch.zeros(1), torch.ones(2))
    """
    z = z.contiguous()  # forward mode refuses expanded tensors
    for d in range(z.shape[-1]):
        unit = torch.zeros_like(z)
        unit[..., d] = 1
        moved = torch.func.jvp(lambda x: diffusion(t, x, None).expand(x.shape), (z,), (unit,))[1]
        moved = moved.flatten(0, -2).abs().amax(0) if moved.dim() > 1 else moved.abs()
        moved[d] = 0
        if moved.any():
            raise DiffusionError(
                f"{name}: the diffusion of state {int(moved.argmax())} depends on state {d}; the scheme is "
                "for noise that depends on its own state only. Use EulerMaruyama(), or a Stratonovich solver."
            )
