"""The algebra of one Gaussian step, z' = a + G xi, and of its twist by a Gaussian message.

A message multiplies the density of the new state by exp(h'z' - z'Jz'/2). In noise space the twisted step is
xi ~ N(S G'(h - J a), S) with S = (I + G'JG)^-1, for any shape of G.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn.device import cholesky, solve
from stochdyn.errors import DiffusionError, DivergedError


def matvec(A: Tensor, x: Tensor) -> Tensor:
    """Batched matrix times vector; small matrices without the overhead of a batched product."""
    if A.shape[-1] <= 8:
        return (A * x[..., None, :]).sum(-1)
    return (A @ x[..., None])[..., 0]


def apply_precision(J: Tensor, z: Tensor, diagonal: bool) -> Tensor:
    """J z for a precision that is diagonal (..., state) or full (..., state, state)."""
    return J * z if diagonal else matvec(J, z)


class AbstractNoise(ABC):
    """The factor G of a batch of steps."""

    @abstractmethod
    def apply(self, xi: Tensor) -> Tensor:
        """G xi."""

    @abstractmethod
    def pull(self, v: Tensor) -> Tensor:
        """G'v."""

    @abstractmethod
    def solve(self, residual: Tensor) -> Tensor:
        """The xi with G xi = residual; with fewer noises than states the least-squares one."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """log sqrt(det G'G): the volume that G spans."""

    @abstractmethod
    def twist(self, J: Tensor, diagonal: bool) -> "AbstractTwist":
        """The covariance side of a twist by precision J."""

    @abstractmethod
    def safe(self, real: Tensor) -> "AbstractNoise":
        """Zero-length steps (real is False) get a unit factor, so that their algebra stays finite."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """G G' as a full matrix."""

    @abstractmethod
    def factor(self) -> Tensor:
        """G as a full matrix."""


class AbstractTwist(ABC):
    """S = (I + G'JG)^-1 of a batch of steps."""

    @abstractmethod
    def smooth(self, v: Tensor) -> Tensor:
        """S v."""

    @abstractmethod
    def colour(self, eps: Tensor) -> Tensor:
        """Standard normal noise to noise of covariance S."""

    @abstractmethod
    def whiten(self, w: Tensor) -> Tensor:
        """The inverse of `colour`."""

    @abstractmethod
    def half_logdet(self) -> Tensor:
        """log det(S) / 2."""


class DiagonalNoise(AbstractNoise):
    """G = diag(scale), scale of shape (..., state)."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def apply(self, xi: Tensor) -> Tensor:
        return self.scale * xi

    def pull(self, v: Tensor) -> Tensor:
        return self.scale * v

    def solve(self, residual: Tensor) -> Tensor:
        return residual / self.scale

    def logdet(self) -> Tensor:
        return self.scale.abs().log().sum(-1)

    def twist(self, J: Tensor, diagonal: bool) -> AbstractTwist:
        if diagonal:
            return DiagonalTwist(1 + self.scale.square() * J)
        return _full_twist(self.scale[..., :, None] * J * self.scale[..., None, :])

    def safe(self, real: Tensor) -> AbstractNoise:
        return DiagonalNoise(torch.where(real[..., None], self.scale, torch.ones_like(self.scale)))

    def covariance(self) -> Tensor:
        return torch.diag_embed(self.scale.square())

    def factor(self) -> Tensor:
        return torch.diag_embed(self.scale)


class MatrixNoise(AbstractNoise):
    """G of shape (..., state, noise); with more noises than states an equivalent square factor is used."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = square_factor(matrix)

    def apply(self, xi: Tensor) -> Tensor:
        return matvec(self.matrix, xi)

    def pull(self, v: Tensor) -> Tensor:
        return matvec(self.matrix.mT, v)

    def solve(self, residual: Tensor) -> Tensor:
        G = self.matrix
        if G.shape[-1] == G.shape[-2]:
            return _guard(lambda: solve(G, residual[..., None])[..., 0])
        return torch.cholesky_solve(self.pull(residual)[..., None], self._gram_cholesky())[..., 0]

    def logdet(self) -> Tensor:
        G = self.matrix
        if G.shape[-1] == G.shape[-2]:
            return torch.linalg.slogdet(G)[1]
        return self._gram_cholesky().diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _gram_cholesky(self) -> Tensor:
        return _guard(lambda: cholesky(self.matrix.mT @ self.matrix))

    def twist(self, J: Tensor, diagonal: bool) -> AbstractTwist:
        G = self.matrix
        return _full_twist(G.mT @ (J[..., None] * G if diagonal else J @ G))

    def safe(self, real: Tensor) -> AbstractNoise:
        unit = torch.eye(*self.matrix.shape[-2:], dtype=self.matrix.dtype, device=self.matrix.device)
        return MatrixNoise(torch.where(real[..., None, None], self.matrix, unit))

    def covariance(self) -> Tensor:
        return self.matrix @ self.matrix.mT

    def factor(self) -> Tensor:
        return self.matrix


def stacked(noises: list[AbstractNoise]) -> AbstractNoise:
    """The noises of single steps as one, time-major."""
    scales = [noise.scale for noise in noises if isinstance(noise, DiagonalNoise)]
    return (
        DiagonalNoise(torch.stack(scales))
        if scales
        else MatrixNoise(torch.stack([n.factor() for n in noises]))
    )


class DiagonalTwist(AbstractTwist):
    """S = diag(1 / p)."""

    def __init__(self, p: Tensor) -> None:
        self.p = p
        self.root = p.sqrt()

    def smooth(self, v: Tensor) -> Tensor:
        return v / self.p

    def colour(self, eps: Tensor) -> Tensor:
        return eps / self.root

    def whiten(self, w: Tensor) -> Tensor:
        return w * self.root

    def half_logdet(self) -> Tensor:
        return -self.root.log().sum(-1)


class FullTwist(AbstractTwist):
    """S = (C C')^-1 with C lower triangular."""

    def __init__(self, C: Tensor) -> None:
        self.C = C

    def smooth(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v[..., None], self.C)[..., 0]

    def colour(self, eps: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.C.mT, eps[..., None], upper=True)[..., 0]

    def whiten(self, w: Tensor) -> Tensor:
        return matvec(self.C.mT, w)

    def half_logdet(self) -> Tensor:
        return -self.C.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def square_factor(G: Tensor) -> Tensor:
    """An equivalent square factor where there are more noises than states, else G itself.

    A step of zero length, G = 0, keeps a factor of 0.
    """
    if G.shape[-1] <= G.shape[-2]:
        return G
    still = (G == 0).all(-1).all(-1)[..., None, None]
    unit = torch.eye(G.shape[-2], dtype=G.dtype, device=G.device)
    C = _guard(lambda: cholesky(torch.where(still, unit, G @ G.mT)))
    return torch.where(still, torch.zeros_like(C), C)


def _full_twist(congruence: Tensor) -> AbstractTwist:
    unit = torch.eye(congruence.shape[-1], dtype=congruence.dtype, device=congruence.device)
    try:
        return FullTwist(cholesky(congruence + unit))
    except torch.linalg.LinAlgError as error:
        raise DivergedError(
            f"A guided step's precision I + G'JG is not positive definite ({error}). The message's precision "
            "J must be positive semi-definite and finite; a smaller learning rate helps if it left the "
            "finite numbers."
        ) from error


def _guard(compute: Callable[[], Tensor]) -> Tensor:
    try:
        return compute()
    except torch.linalg.LinAlgError as error:
        raise DiffusionError(
            f"The diffusion matrix is singular ({error}). Give it as (..., state, noise) with as many "
            "columns as there are independent noises, linearly independent."
        ) from error
