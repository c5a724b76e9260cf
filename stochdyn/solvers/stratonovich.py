"""Stratonovich integrators of a fixed step, and the drift that turns one convention into the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stochdyn.fields import AbstractDiffusion, Field, as_diffusion, evaluate
from stochdyn.solvers.integrator import Drift
from stochdyn.solvers.kernel import AbstractStepSolver


def _noise(diffusion: AbstractDiffusion, g: Tensor, dW: Tensor) -> Tensor:
    return g * dW if diffusion.diagonal else (g @ dW[..., None])[..., 0]


@dataclass(frozen=True)
class StratonovichHeun(AbstractStepSolver):
    """Heun's method for Stratonovich equations: the average of the rates at both ends of a step, along dW.

    Stratonovich convention. Strong order 1 for commutative noise (diagonal with own coordinates, scalar, additive),
    else 1/2; weak order 1; two calls of drift and diffusion. For any noise, a matrix too. `ReversibleHeun` costs one
    call less, at less stability.

    References:
        Rümelin, "Numerical treatment of stochastic differential equations", SIAM J. Numer. Anal. 1982,
        https://doi.org/10.1137/0719041

    Example:
        >>> import torch, stochdyn as sd
        >>> ts = torch.linspace(0, 1, 11)
        >>> sd.sdeint(lambda t, z: -z, lambda t, z: 0.3 * z, torch.ones(5, 1), ts, solver=sd.StratonovichHeun()).shape
        torch.Size([5, 11, 1])
    """

    stratonovich: ClassVar[bool] = True

    def along(
        self, drift: Drift, diffusion: AbstractDiffusion, t: Tensor, dt: Tensor, z: Tensor, dW: Tensor
    ) -> Tensor:
        f, g = drift(t, z), diffusion(t, z)
        there = z + f * dt + _noise(diffusion, g, dW)
        f, g = f + drift(t + dt, there), g + diffusion(t + dt, there)
        return z + 0.5 * (f * dt + _noise(diffusion, g, dW))


@dataclass(frozen=True)
class StratonovichMidpoint(AbstractStepSolver):
    """The midpoint rule for Stratonovich equations: the rates in the middle of a step, along dW.

    Stratonovich convention; orders and cost as `StratonovichHeun`, from which it differs only in looking at the middle
    of a step, not at its end.

    References:
        Kloeden & Platen, "Numerical solution of stochastic differential equations", 1992,
        https://doi.org/10.1007/978-3-662-12616-5

    Example:
        >>> import torch, stochdyn as sd
        >>> ts, rate = torch.linspace(0, 1, 11), lambda t, z: -z
        >>> sd.sdeint(rate, lambda t, z: 0.3 * z, torch.ones(5, 1), ts, solver=sd.StratonovichMidpoint()).shape
        torch.Size([5, 11, 1])
    """

    stratonovich: ClassVar[bool] = True

    def along(
        self, drift: Drift, diffusion: AbstractDiffusion, t: Tensor, dt: Tensor, z: Tensor, dW: Tensor
    ) -> Tensor:
        half = z + 0.5 * (drift(t, z) * dt + _noise(diffusion, diffusion(t, z), dW))
        s = t + 0.5 * dt
        return z + drift(s, half) * dt + _noise(diffusion, diffusion(s, half), dW)


def ito_drift(drift: Field, diffusion: "Field | Tensor | AbstractDiffusion") -> Callable[..., Tensor]:
    """The Itô drift of a Stratonovich equation: f + sum_k (dg_k/dz) g_k / 2 over the columns g_k of the diffusion.

    Paths are Itô: `SDEPath(ito_drift(f, g), g, ...)` is the path of the Stratonovich equation dz = f dt + g o dW.

    Args:
        drift: `(t, z[, context])`, Stratonovich.
        diffusion: as in `SDEPath`.

    References:
        Øksendal, "Stochastic differential equations", 2003, section 3.3,
        https://doi.org/10.1007/978-3-642-14394-6

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.ito_drift(lambda t, z: 0 * z, lambda t, z: 0.5 * z)(torch.zeros(1), torch.ones(1))
        tensor([0.1250])
    """
    noise = as_diffusion(diffusion)

    def ito(t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        f = evaluate("drift", drift, t, z, context)
        if noise.constant:
            return f
        z = z.contiguous()  # forward mode refuses expanded tensors
        g = noise(t, z, context)
        total = f.expand(torch.broadcast_shapes(f.shape, z.shape))
        for k in range(z.shape[-1] if noise.diagonal else g.shape[-1]):
            direction = _column(noise, g, k, z).expand(z.shape).contiguous()
            moved = torch.func.jvp(
                lambda x, k=k: _column(noise, noise(t, x, context), k, x).expand(x.shape), (z,), (direction,)
            )[1]
            total = total + 0.5 * moved
        return total

    return ito


def _column(noise: AbstractDiffusion, g: Tensor, k: int, z: Tensor) -> Tensor:
    if not noise.diagonal:
        return g[..., k]
    only = torch.zeros(z.shape[-1], dtype=z.dtype, device=z.device)
    only[k] = 1
    return g * only
