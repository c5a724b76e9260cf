"""A step that is exact for a linear part of the drift."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stochdyn.device import readable
from stochdyn.errors import DiffusionError, ShapeError
from stochdyn.fields import AbstractDiffusion
from stochdyn.solvers.integrator import Drift
from stochdyn.solvers.kernel import AbstractKernel


@dataclass(frozen=True, eq=False)
class ExponentialEuler(AbstractKernel):
    """Exponential Euler-Maruyama: exact for dz = A z dt + g dW, first order in the rest of the drift.

    z' = e^(A dt) z + phi(A dt) (f(t, z) - A z) dt + xi with phi(x) = (e^x - 1) / x and xi ~ N(0, Q), Q the integral of
    e^(A s) g g' e^(A' s) over the step. Itô convention; g is frozen over a step. Strong order 1/2 (1 for additive
    noise), weak order 1 in the rest, exact in law where the rest is a constant and g too. For stiff linear parts: fast
    decay, long gaps between observations. The drift given to the path is the whole one, A z included, so a wrong A
    costs accuracy only.

    Args:
        linear: A, (*batch, state) for rates of each state apart (negative is decay), or (*batch, state, state).
        matrix: whether A is a matrix; then the path needs a `MatrixDiffusion` of at least as many noises as states.

    Raises:
        ShapeError: if A is no matrix where it should be, or larger than 16.
        DiffusionError: when a step is taken, if A does not fit the noise.

    References:
        Lord & Tambue, "Stochastic exponential integrators for the finite element discretization of SPDEs", IMA J.
        Numer. Anal. 2013, https://arxiv.org/abs/1005.5315
        Van Loan, "Computing integrals involving the matrix exponential", IEEE TAC 1978,
        https://doi.org/10.1109/TAC.1978.1101743

    Example:
        >>> import torch, stochdyn as sd
        >>> rate = torch.tensor([-50.0])
        >>> path = sd.SDEPath(lambda t, z: rate * (z - 1), torch.tensor([1.0]), torch.zeros(1),
        ...                   torch.linspace(0, 1, 3), solver=sd.ExponentialEuler(rate))
        >>> bool(path.rsample()[-1].sub(1).abs() < 1)
        True
    """

    noise_is_diffusion: ClassVar[bool] = True
    linear: Tensor
    matrix: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.linear.shape)
        if not shape or (self.matrix and (len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] > _LARGEST)):
            raise ShapeError(
                f"ExponentialEuler: `linear` must be (..., state), or (..., state, state) with matrix=True and at most "
                f"{_LARGEST} states, got {shape}."
            )

    def step(
        self,
        drift: Drift,
        diffusion: AbstractDiffusion,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        g = diffusion(t, z, context)
        if not self.matrix:
            if not diffusion.diagonal:
                raise DiffusionError(
                    "ExponentialEuler: rates of single states need noise of single states. For a MatrixDiffusion write "
                    "ExponentialEuler(torch.diag_embed(rates), matrix=True)."
                )
            return self.advance(drift, t, dt, z), g * dt.sqrt() * _phi(2 * self.linear * dt).sqrt()
        if diffusion.diagonal or g.shape[-1] < g.shape[-2]:
            raise DiffusionError(
                "ExponentialEuler: a matrix `linear` mixes the noises and reaches all states. Give "
                "sd.MatrixDiffusion with at least as many noises as states, e.g. of torch.diag_embed(g)."
            )
        return self.advance(drift, t, dt, z), _factor(self.linear, g, dt)

    def advance(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        f = drift(t, z)
        if not self.matrix:
            return z + f * dt * _phi(self.linear * dt)
        return z + (_integral(self.linear, dt) @ f.expand(z.shape)[..., None])[..., 0]


_LARGEST = 16


def _phi(x: Tensor) -> Tensor:
    """(e^x - 1) / x, 1 at 0, with its gradient."""
    small = x.abs() < 1e-4
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1 + x / 2 + x.square() / 6, safe.expm1() / safe)


def _integral(A: Tensor, dt: Tensor) -> Tensor:
    """The integral of e^(A s) over a step; dt (..., 1)."""
    n = A.shape[-1]
    scaled = A * dt[..., None]
    eye = torch.eye(n, dtype=A.dtype, device=A.device) * dt[..., None]
    top = torch.cat([scaled, eye.expand(scaled.shape)], -1)
    return torch.linalg.matrix_exp(torch.cat([top, torch.zeros_like(top)], -2))[..., :n, n:]


def _factor(A: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    """The Cholesky factor of the noise's covariance over a step, 0 for a step of no length."""
    n = A.shape[-1]
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    both = (
        A[..., :, None, :, None] * eye[:, None, :] + eye[:, None, :, None] * A[..., None, :, None, :]
    ).flatten(-2)
    weights = _integral(both.reshape(*A.shape[:-2], n * n, n * n), dt)
    Q = (weights @ (g @ g.mT).flatten(-2)[..., None])[..., 0].unflatten(-1, (n, n))
    real = (dt > 0)[..., None]
    factor, info = torch.linalg.cholesky_ex(torch.where(real, 0.5 * (Q + Q.mT), eye))
    if not readable(info):
        factor = torch.where(info[..., None, None] == 0, factor, torch.nan)
    elif info.any():
        raise DiffusionError(
            "ExponentialEuler: the noise of a step is singular. Make the columns of the diffusion independent."
        )
    return factor * real
