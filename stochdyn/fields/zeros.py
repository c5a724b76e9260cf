"""Where a field is zero, and its slope there."""

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]

_POLISH = 3


def jacobian(f: Map, z: Tensor) -> Tensor:
    """The derivative of every output by every state, (*batch, output, state), differentiable where gradients are on.

    Members of the batch are independent, so that one reverse pass per output serves all of them; the parameters that a
    field closes over may have the batch's dimensions.

    Args:
        f: (*batch, state) to (*batch, output).
        z: with the whole batch of what f returns.

    Example:
        >>> jacobian(lambda z: torch.stack([z[..., 0] * z[..., 1], z[..., 1]], -1), torch.tensor([2.0, 3.0]))
        tensor([[3., 2.],
                [0., 1.]])
    """
    differentiable = torch.is_grad_enabled() and (z.requires_grad or f(z).requires_grad)
    with torch.enable_grad():
        z = z if z.requires_grad and differentiable else z.detach().requires_grad_()
        out = f(z)
        if not out.requires_grad:
            return z.new_zeros(*z.shape[:-1], out.shape[-1], z.shape[-1])
        rows = [
            torch.autograd.grad(
                out[..., d].sum(),
                z,
                create_graph=differentiable,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )[0]
            for d in range(out.shape[-1])
        ]
    return torch.stack(rows, -2)


def find_zeros(
    f: Map, z: Tensor, scale: Tensor, *, tolerance: float, iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Damped Newton (Levenberg-Marquardt) from every start at once.

    Args:
        f: (*batch, state) to the same.
        z: the starts.
        scale: (*batch) a typical size of f.
        tolerance: a member has converged once |f| <= tolerance * scale; all then get a few more steps.
        iterations: at most.

    Returns:
        The last states (*batch, state), and |f| there. What did not converge is at a local minimum of |f|, or on its
        way.

    References:
        Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963,
        https://doi.org/10.1137/0111030

    Example:
        >>> find_zeros(lambda z: z**2 - 2, torch.tensor([[1.0]]), torch.ones(1), tolerance=1e-4)[0]
        tensor([[1.4142]])
    """
    with torch.no_grad():
        value = f(z)
        speed = _size(value)
        damping = torch.full_like(speed, 1e-3)
        left = _POLISH
        for _ in range(iterations):
            left -= int(bool((speed <= tolerance * scale).all()))
            if left < 0:
                break
            step = _damped_step(jacobian(f, z), value, damping)
            there = z - step
            new = f(there)
            better = _size(new) < speed
            z, value = (
                torch.where(better[..., None], x, y) for x, y in ((there, z), (new.nan_to_num(), value))
            )
            speed = _size(value)
            damping = torch.where(better, damping / 10, damping * 10).clamp(1e-14, 1e8)
        return z, speed


def _damped_step(J: Tensor, value: Tensor, damping: Tensor) -> Tensor:
    """(J'J + damping * size * I)^-1 J'f; none where J is not finite."""
    J = J.nan_to_num(0.0, 0.0, 0.0)
    normal = J.mT @ J
    size = normal.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(J.dtype).tiny ** 0.5
    eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    ridge = (damping * size)[..., None, None] * eye
    return torch.linalg.solve_ex(normal + ridge, J.mT @ value[..., None])[0][..., 0]


def _size(value: Tensor) -> Tensor:
    """|f| by member; infinite where f is not finite."""
    size = torch.linalg.vector_norm(value, dim=-1)
    return torch.where(size.isfinite(), size, torch.full_like(size, torch.inf))
