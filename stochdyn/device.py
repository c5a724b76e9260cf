"""What makes the host wait for an accelerator: looking at numbers, and factorisations that check themselves.

Work for an accelerator is queued. Each look at a number on it (`if tensor`, `.item()`, a checked Cholesky factor) holds
the host until the queue is empty, and the accelerator then idles until there is new work. A fit looks during its first
steps; after that, inside `without_waiting`, checks are left out, and what fails is NaN instead of an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_queued: ContextVar[bool] = ContextVar("queued", default=False)


def readable(x: Tensor) -> bool:
    """Whether numbers may be looked at: on the CPU always, elsewhere outside `without_waiting`.

    Example:
        >>> readable(torch.zeros(3))
        True
    """
    return x.device.type == "cpu" or not _queued.get()


@contextmanager
def without_waiting(queued: bool = True) -> Iterator[None]:
    """Inside, the host never waits for an accelerator; with False it may again.

    Example:
        >>> with without_waiting(), without_waiting(False):
        ...     readable(torch.zeros(3, device="meta"))
        True
    """
    token = _queued.set(queued)
    try:
        yield
    finally:
        _queued.reset(token)


def cholesky(A: Tensor) -> Tensor:
    """The lower Cholesky factor.

    Raises:
        LinAlgError: if A is not positive definite and `readable`; else the factor is NaN.

    Example:
        >>> cholesky(torch.tensor([[4.0]]))
        tensor([[2.]])
    """
    if readable(A):
        return torch.linalg.cholesky(A)
    return _unless(*torch.linalg.cholesky_ex(A))


def inverse(A: Tensor) -> Tensor:
    """The inverse.

    Raises:
        LinAlgError: if A is singular and `readable`; else the inverse is NaN.

    Example:
        >>> inverse(torch.tensor([[4.0]]))
        tensor([[0.2500]])
    """
    return torch.linalg.inv(A) if readable(A) else _unless(*torch.linalg.inv_ex(A))


def solve(A: Tensor, B: Tensor) -> Tensor:
    """X of A X = B, for matrices B.

    Raises:
        LinAlgError: if A is singular and `readable`; else X is NaN.

    Example:
        >>> solve(torch.tensor([[4.0]]), torch.tensor([[2.0]]))
        tensor([[0.5000]])
    """
    return torch.linalg.solve(A, B) if readable(A) else _unless(*torch.linalg.solve_ex(A, B))


def lowest_eigenvalue(A: Tensor, squarings: int = 10) -> Tensor:
    """(*batch,) of symmetric matrices.

    Where it may not wait it is found by squaring s I - A, s a bound of the spectrum: never too low, and too high by at
    most s log(n) / 2^squarings.

    Example:
        >>> lowest_eigenvalue(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        tensor(-1.)
    """
    if A.shape[-1] == 1:
        return A[..., 0, 0]
    return torch.linalg.eigvalsh(A)[..., 0] if readable(A) else _lowest_by_squaring(A, squarings)


def _lowest_by_squaring(A: Tensor, squarings: int) -> Tensor:
    bound = A.abs().sum(-1).amax(-1)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    scale = torch.where(bound > 0, bound, torch.ones_like(bound))[..., None, None]
    B = eye - A / scale
    power = B
    for _ in range(squarings):
        power = power @ power
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-30)
    top = (power * B.mT).sum((-1, -2))  # the trace of power B, with power of trace 1
    return (1 - top) * scale[..., 0, 0]


def _unless(result: Tensor, info: Tensor) -> Tensor:
    """NaN where a factorisation failed."""
    return torch.where(info[..., None, None] == 0, result, torch.nan)
