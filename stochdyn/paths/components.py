"""Mixtures of normals as steps of a path: normal components times Gaussian factors, their draws and densities."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.device import cholesky
from stochdyn.errors import DivergedError
from stochdyn.paths.noise import matvec

if TYPE_CHECKING:
    from stochdyn.paths.mixture_message import MixtureMessage

_LOG_2PI = math.log(2 * math.pi)
# The log weight of what does not happen: finite, so that gradients are; far below that of anything that does, which is
# the value at zero of a factor whose centre may lie anywhere.
NOTHING = -1e30


def root(A: Tensor) -> Tensor:
    """The lower triangular L with L L' = A.

    Raises:
        DivergedError: if A is not positive definite.

    Example:
        >>> root(torch.tensor([[4.0]]))
        tensor([[2.]])
    """
    if A.shape[-1] == 1:
        return A.sqrt()
    try:
        return cholesky(A)
    except torch.linalg.LinAlgError as error:
        raise DivergedError(
            f"A component of a mixture message is not positive definite ({error}). A smaller learning rate helps if "
            "it left the finite numbers."
        ) from error


def solved(L: Tensor, x: Tensor) -> Tensor:
    """A^-1 x for vectors x, by the root L of A.

    Example:
        >>> solved(torch.tensor([[2.0]]), torch.tensor([8.0]))
        tensor([2.])
    """
    return x / L[..., 0].square() if L.shape[-1] == 1 else torch.cholesky_solve(x[..., None], L)[..., 0]


def log_volume(L: Tensor) -> Tensor:
    """log det L.

    Example:
        >>> log_volume(torch.eye(2))
        tensor(0.)
    """
    return L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@dataclass(frozen=True)
class Products:
    """Normal components N(m_n, diag(d_n)^2) times factors exp(w_c + h_c'z - z'J_c z / 2): a mixture, unnormalised.

    Component k has the covariance diag(d) A^-1 diag(d), A = 1 + diag(d) J diag(d) = L L'.

    Args:
        log_weight: (..., component) the logarithms of the integrals.
        mean, spread: (..., component, state), the means, and d.
        root: (..., component, state, state), L.
    """

    log_weight: Tensor
    mean: Tensor
    spread: Tensor
    root: Tensor

    @classmethod
    def of(cls, log_prior: Tensor, m: Tensor, d: Tensor, message: "MixtureMessage") -> "Products":
        """log_prior (..., n), m and d (..., n, state), with a message's factors (..., c)."""
        h, J = message.information[..., None, :, :], message.precision[..., None, :, :, :]
        m, d = m[..., None, :], d[..., None, :]
        L = root(_scaled(d, J))
        pull = matvec(J, m)
        u = d * (h - pull)
        s = solved(L, u)
        log_integral = (m * (h - 0.5 * pull)).sum(-1) + 0.5 * (u * s).sum(-1) - log_volume(L)
        log_weight = log_prior[..., None] + message.log_weight[..., None, :] + log_integral
        mean = m + d * s
        parts = mean, d.expand(mean.shape), L.expand(*mean.shape, L.shape[-1])
        return cls(
            log_weight.flatten(-2), *(x.flatten(1 - k, 2 - k) for k, x in zip((4, 4, 5), parts, strict=True))
        )

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As tensors."""
        return self.log_weight, self.mean, self.spread, self.root

    def expanded(self, batch: torch.Size) -> "Products":
        """With a larger batch."""
        return Products(
            *(x.expand(*batch, *x.shape[-1 - k :]) for k, x in zip((0, 1, 1, 2), self.parts, strict=True))
        )

    def log_integral(self) -> Tensor:
        """Of the whole mixture."""
        return torch.logsumexp(self.log_weight, -1)

    def log_density(self, z: Tensor) -> Tensor:
        """Of the normalised mixture at states (..., state)."""
        e = matvec(self.root.mT, (z[..., None, :] - self.mean) / self.spread)
        normal = -0.5 * (e.square() + _LOG_2PI).sum(-1) + log_volume(self.root) - self.spread.log().sum(-1)
        return torch.logsumexp(torch.log_softmax(self.log_weight, -1) + normal, -1)

    def draw(self) -> Tensor:
        """States (..., state), one coordinate after the other from the last to the first, each with the gradient of
        its conditional distribution function."""
        size, log_weight = self.mean.shape[-1], self.log_weight
        out: list[Tensor] = []
        apart: list[Tensor] = []  # (z - mean) / d of the coordinates drawn, the last one first
        for j in reversed(range(size)):
            scale = self.spread[..., j] / self.root[..., j, j]
            centre = self.mean[..., j]
            for k, x in zip(reversed(range(j + 1, size)), apart, strict=True):
                centre = centre - scale * self.root[..., k, j] * x
            z = implicit(log_weight, centre, scale)
            out.append(z)
            if j:
                e = (z - centre) / scale
                log_weight = log_weight - 0.5 * e.square() - scale.log()
                apart.append((z - self.mean[..., j]) / self.spread[..., j])
        return torch.cat(out[::-1], -1)


def _scaled(d: Tensor, J: Tensor) -> Tensor:
    """1 + diag(d) J diag(d)."""
    eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    return eye + d[..., None] * J * d[..., None, :]


def before(
    F: Tensor, m: Tensor, d: Tensor, log_prior: Tensor, after: "MixtureMessage"
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors before steps z' = F z + m_n + diag(d_n) xi: log weights, h and J, components (..., n, c).

    Args:
        F: (..., state, state).
        m, d: (..., n, state).
        log_prior: (..., n), of the step's components.
        after: the message after the step, without time.
    """
    h, J = after.information[..., None, :, :], after.precision[..., None, :, :, :]
    m = m[..., None, :]
    # Without noise a tiny one: what is divided by it again must not be zero.
    d = d[..., None, :].clamp(min=1e-12)
    B = d[..., None] * J * d[..., None, :]
    L = root(_scaled(d, J))
    pull = matvec(J, m)
    u = d * (h - pull)
    s = solved(L, u)
    log_integral = (m * (h - 0.5 * pull)).sum(-1) + 0.5 * (u * s).sum(-1) - log_volume(L)
    inner = B / L.square() if L.shape[-1] == 1 else torch.cholesky_solve(B, L)
    inner = inner / d[..., None] / d[..., None, :]
    F = F[..., None, None, :, :]
    precision = F.square() * inner if L.shape[-1] == 1 else F.mT @ (0.5 * (inner + inner.mT)) @ F
    return (
        log_prior[..., None] + after.log_weight[..., None, :] + log_integral,
        matvec(F.mT, s / d),
        precision,
    )


def merged(w: Tensor, h: Tensor, J: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The one factor with the mass, mean and covariance of several, w (..., c), h (..., c, state), J likewise.

    Factors that say nothing of some direction have no moments there: all get the same weak normal beside them first,
    which is taken away again. It stands where their product does. What weighs nothing says nothing.

    Example:
        >>> w, h, J = merged(torch.zeros(2), torch.tensor([[1.0], [1.0]]), torch.ones(2, 1, 1))
        >>> round(h.item(), 4), round(J.item(), 4)
        (1.0, 1.0)
    """
    if w.shape[-1] == 1:
        return w[..., 0], h[..., 0, :], J[..., 0, :, :]
    alive = (w > 0.5 * NOTHING)[..., None]
    h, J = torch.where(alive, h, torch.zeros_like(h)), torch.where(alive[..., None], J, torch.zeros_like(J))
    P, known = _weak(J)
    origin = solved(root(J.sum(-3) + torch.diag_embed(P)), h.sum(-2)).detach()
    w, h = _moved(w, h, J, origin[..., None, :])
    L = root(J + torch.diag_embed(P)[..., None, :, :])
    mean = solved(L, h)
    mass = w + 0.5 * (h * mean).sum(-1) - log_volume(L)
    total = torch.logsumexp(mass, -1)
    share = (mass - total[..., None]).exp()[..., None]
    centre = (share * mean).sum(-2)
    apart = mean - centre[..., None, :]
    covariance = (share[..., None] * (_inverse(L) + apart[..., None] * apart[..., None, :])).sum(-3)
    L = root(covariance)
    information = solved(L, centre)
    back = 0.5 * (information * centre).sum(-1) + log_volume(L)
    # A bound of the largest ratio of a variance and that of N(0, P^-1): what is left stays positive.
    widest = (P * known * covariance.detach().diagonal(dim1=-2, dim2=-1)).sum(-1, keepdim=True).clamp(min=1.0)
    left = torch.diag_embed(P / widest)
    precision = torch.where(
        known[..., None] & known[..., None, :], _inverse(L) - left, torch.zeros_like(covariance)
    )
    information = torch.where(known, information, torch.zeros_like(information))
    return (*_moved(total - back, information, precision, -origin), precision)


def _moved(w: Tensor, h: Tensor, J: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Log weight and information of a factor as it is seen from a point."""
    pull = matvec(J, origin)
    return w + (origin * (h - 0.5 * pull)).sum(-1), h - pull


def _inverse(L: Tensor) -> Tensor:
    """A^-1 by the root L of A."""
    return 1 / L.square() if L.shape[-1] == 1 else torch.cholesky_inverse(L)


def settled(h: Tensor, J: Tensor, around: Tensor) -> Tensor:
    """The centre of a factor, h and z (..., state): where it says nothing of a direction, a point stays.

    Example:
        >>> J = torch.diag(torch.tensor([2.0, 0.0]).double())
        >>> settled(torch.tensor([4.0, 0.0]).double(), J, torch.tensor([0.0, 7.0]).double()).round(decimals=3).tolist()
        [2.0, 7.0]
    """
    P, _ = _weak(J[..., None, :, :])
    return around + solved(root(J + torch.diag_embed(P)), h - matvec(J, around))


def _weak(J: Tensor) -> tuple[Tensor, Tensor]:
    """A diagonal precision (..., state) far below those of factors (..., c, state, state), and of which states any of
    these says something."""
    own = J.detach().diagonal(dim1=-2, dim2=-1)
    known = (own > 0).any(-2)
    least = torch.where(own > 0, own, torch.full_like(own, math.inf)).amin(-2)
    # With several states half of the digits go into the directions that something is known of.
    share = torch.finfo(J.dtype).eps ** (0.5 if J.shape[-1] == 1 else 0.375)
    return torch.where(known, share * least, torch.ones_like(least)), known


def implicit(log_weight: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """A draw (..., 1) of a mixture of normals of one state, components last, whose gradient is -dF / density.

    Example:
        >>> mean = torch.zeros(1, requires_grad=True)
        >>> z = implicit(torch.zeros(1), mean, torch.ones(1))
        >>> torch.autograd.grad(z.sum(), mean)[0].round(decimals=3)
        tensor([1.])
    """
    with torch.no_grad():
        chosen = torch.distributions.Categorical(logits=log_weight, validate_args=False).sample()[..., None]
        mean_, sd_ = (x.expand(log_weight.shape).gather(-1, chosen) for x in (mean, sd))
        z = mean_ + sd_ * torch.randn_like(mean_)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (log_weight, mean, sd))):
        return z
    weight = torch.softmax(log_weight, -1)
    e = (z - mean) / sd
    below = (weight * torch.special.ndtr(e)).sum(-1, keepdim=True)
    with torch.no_grad():
        density = (weight * (-0.5 * (e.square() + _LOG_2PI)).exp() / sd).sum(-1, keepdim=True)
    return z - (below - below.detach()) / density.clamp(min=torch.finfo(density.dtype).tiny)
