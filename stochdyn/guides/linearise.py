"""The likelihood of a path as Gaussian messages: its gradient and curvature, time by time."""

from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn.device import lowest_eigenvalue
from stochdyn.paths import Message


def likelihood_message(log_likelihood: Callable[[Tensor], Tensor], around: Tensor) -> Message:
    """Expand a log likelihood to second order around a path, one block per time.

    Exact for Gaussian observations of linear functions of the state. Where the likelihood is not log-concave the
    curvature is shifted until it is. Where it couples times or series, the block of a time gets the sum of its row,
    far too much or too little: the message is then a poor start, never a wrong bound.

    Args:
        log_likelihood: path (*batch, time, state) -> the sum over everything observed.
        around: the path to expand around.

    Example:
        >>> m = likelihood_message(lambda z: -0.5 * ((z[..., 1, 0] - 3.0) / 0.5).square().sum(), torch.zeros(3, 1))
        >>> m.information[:, 0].tolist(), m.precision[:, 0, 0].tolist()
        ([0.0, 12.0, 0.0], [0.0, 4.0, 0.0])
    """
    differentiable = torch.is_grad_enabled()
    state = around.shape[-1]
    with torch.enable_grad():
        z = around.detach().clone().requires_grad_()
        gradient = _grad(log_likelihood(z), z)
        rows = [_grad(gradient[..., d].sum(), z, differentiable) for d in range(state)]
        J = _semidefinite(-torch.stack(rows, -2))
        h = gradient + (J @ around.detach()[..., None])[..., 0]
    return Message(h, J) if differentiable else Message(h.detach(), J.detach())


def _grad(value: Tensor, z: Tensor, create_graph: bool = True) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(z)
    out = torch.autograd.grad(value, z, create_graph=create_graph, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(z) if out is None else out


def _semidefinite(J: Tensor) -> Tensor:
    """Shift the spectrum up by its most negative eigenvalue."""
    J = 0.5 * (J + J.mT)
    lowest = lowest_eigenvalue(J.detach())
    eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    return J + (-lowest).clamp(min=0)[..., None, None] * eye
