"""Gaussian messages exp(h'z - z'Jz/2) on the states of a path, and the information filter that makes them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stochdyn.data import TimeGrid
from stochdyn.device import inverse
from stochdyn.errors import DataError, ShapeError
from stochdyn.paths.chain import Chain
from stochdyn.paths.checks import lift
from stochdyn.paths.noise import apply_precision, matvec


@dataclass(frozen=True, eq=False)
class Message:
    """A Gaussian factor on every state of a path, in natural parameters.

    The factor on the state at grid time k is exp(h_k'z - z'J_k z/2). Zero is no information. The message at
    the first time twists the initial state (in its Gaussian base coordinates where `initial` is transformed).

    Args:
        information: h, (*batch, time, state); units 1/state.
        precision: J, (*batch, time, state) where diagonal, else (*batch, time, state, state), symmetric and
            positive semi-definite; units 1/state^2. For diagonal plus low rank use `Message.low_rank`. With
            as many states as times it is read as diagonal where it has as many dimensions as h.

    Attributes:
        diagonal: whether the precision is.

    Raises:
        ShapeError: if the shapes do not belong together.

    Example:
        >>> import stochdyn as sd
        >>> m = sd.Message.at(loc=torch.zeros(6, 1), precision=torch.ones(6, 1))
        >>> m.diagonal, m.information.shape
        (True, torch.Size([6, 1]))
    """

    information: Tensor
    precision: Tensor
    diagonal: bool = field(init=False)

    def __post_init__(self) -> None:
        diagonal = _is_diagonal("information", self.information, self.precision)
        object.__setattr__(self, "diagonal", diagonal)

    @classmethod
    def at(cls, loc: Tensor, precision: Tensor) -> "Message":
        """A message centred at `loc` (*batch, time, state): h = J loc.

        Example:
            >>> Message.at(torch.tensor([[2.0]]), torch.tensor([[3.0]])).information
            tensor([[6.]])
        """
        return cls(apply_precision(precision, loc, _is_diagonal("loc", loc, precision)), precision)

    @classmethod
    def low_rank(cls, information: Tensor, diagonal: Tensor, factor: Tensor) -> "Message":
        """Precision diag(diagonal) + factor factor', factor (*batch, time, state, rank).

        Example:
            >>> Message.low_rank(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, 1)).precision
            tensor([[[2., 1.],
                     [1., 2.]]])
        """
        return cls(information, torch.diag_embed(diagonal) + factor @ factor.mT)

    @classmethod
    def observed(
        cls,
        grid: TimeGrid,
        values: Tensor,
        mask: Tensor,
        scale: "Tensor | float",
        matrix: Tensor | None = None,
    ) -> "Message":
        """The likelihood of Gaussian observations y = H z + scale * noise, as a message on the grid.

        Args:
            grid: the grid of the path.
            values: (*batch, time, channel) at the observation times.
            mask: likewise, True = observed.
            scale: standard deviation of the observation noise, broadcasts against `values`.
            matrix: H, (channel, state); the identity by default.

        Raises:
            DataError: if an observed value is not finite or a scale is not positive.

        Example:
            >>> import stochdyn as sd
            >>> grid = sd.TimeGrid(torch.tensor([0.0, 1.0]), substeps=2)
            >>> seen = torch.ones(2, 1, dtype=torch.bool)
            >>> sd.Message.observed(grid, torch.tensor([[1.0], [2.0]]), seen, 0.5).information[:, 0]
            tensor([4., 0., 8.])
        """
        scale = torch.as_tensor(scale, dtype=values.dtype, device=values.device)
        _check_observed(values, mask, scale)
        values = torch.where(mask, values, torch.zeros_like(values))
        w = torch.where(mask, scale.pow(-2), torch.zeros_like(values))
        H = torch.eye(values.shape[-1]).to(values) if matrix is None else matrix
        h, J = (w * values) @ H, H.mT @ (w[..., None] * H)
        return cls(_on_grid(grid, h), _on_grid(grid, J.flatten(-2)).unflatten(-1, J.shape[-2:]))

    def full(self) -> Tensor:
        """The precision as full matrices."""
        return torch.diag_embed(self.precision) if self.diagonal else self.precision

    def gradient(self, z: Tensor) -> Tensor:
        """h - J z."""
        return self.information - apply_precision(self.precision, z, self.diagonal)

    def log_value(self, z: Tensor) -> Tensor:
        """h'z - z'Jz/2."""
        return (z * (self.information - 0.5 * apply_precision(self.precision, z, self.diagonal))).sum(-1)

    def detach(self) -> "Message":
        """The same numbers without their history."""
        return _raw(self.information.detach(), self.precision.detach(), self.diagonal)

    def time_major(self) -> "Message":
        """Time moved to the front: information (time, *batch, state)."""
        h = self.information.movedim(-2, 0)
        return _raw(h, self.precision.movedim(-2 if self.diagonal else -3, 0), self.diagonal)

    def lifted(self, ndim: int) -> "Message":
        """Of a time-major message: batch dimensions inserted for states of `ndim` dimensions."""
        h, J = lift(self.information, ndim), lift(self.precision, ndim if self.diagonal else ndim + 1)
        return _raw(h, J, self.diagonal)

    def __getitem__(self, k: "int | slice") -> "Message":
        return _raw(self.information[k], self.precision[k], self.diagonal)

    def unbind(self) -> "list[Message]":
        """Of a time-major message: one per time."""
        pairs = zip(self.information.unbind(0), self.precision.unbind(0), strict=True)
        return [_raw(h, J, self.diagonal) for h, J in pairs]

    @property
    def batch_shape(self) -> torch.Size:
        """The batch of a message that is not time-major."""
        J_batch = self.precision.shape[: -2 if self.diagonal else -3]
        return torch.broadcast_shapes(self.information.shape[:-2], J_batch)


def _is_diagonal(name: str, h: Tensor, J: Tensor) -> bool:
    if h.dim() >= 2 and J.shape[-2:] == h.shape[-2:]:
        square = J.dim() > h.dim() and h.shape[-1] == h.shape[-2] and J.shape[-3] == h.shape[-2]
        return not square
    if h.dim() >= 2 and J.dim() >= 3 and J.shape[-3:] == (*h.shape[-2:], h.shape[-1]):
        return False
    raise ShapeError(
        "The message's precision must have shape (*batch, time, state) or (*batch, time, state, state) and "
        f"its {name} (*batch, time, state), got {tuple(J.shape)} and {tuple(h.shape)}."
    )


def _check_observed(values: Tensor, mask: Tensor, scale: Tensor) -> None:
    bad = mask & ~torch.isfinite(values)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise DataError(
            f"`values` at {tuple(where)} is {values.expand(bad.shape)[tuple(where)].item()}. Missing values "
            "go into `mask`, not into `values`."
        )
    if not (scale > 0).all():
        raise DataError(f"`scale` must be positive, got {scale.min().item():g}. Use softplus with a floor.")


def _on_grid(grid: TimeGrid, x: Tensor) -> Tensor:
    """Rows (*batch, time, n) at the observation times, added into zeros on the grid."""
    batch = torch.broadcast_shapes(x.shape[:-2], grid.index.shape[:-1])
    index = grid.index.to(x.device).expand(*batch, x.shape[-2])[..., None].expand(*batch, *x.shape[-2:])
    zeros = x.new_zeros(*batch, grid.ts.shape[-1], x.shape[-1])
    return zeros.scatter_add(-2, index, x.expand(index.shape))


def _raw(information: Tensor, precision: Tensor, diagonal: bool) -> Message:
    message = object.__new__(Message)
    for name, value in (("information", information), ("precision", precision), ("diagonal", diagonal)):
        object.__setattr__(message, name, value)
    return message


@dataclass(frozen=True)
class LinearStep:
    """z' = F z + b + noise of covariance Q, time-major (time, *batch, ...)."""

    F: Tensor
    b: Tensor
    Q: Tensor


def linearise(chain: Chain, around: Tensor) -> LinearStep:
    """The steps of a chain, linearised around a path (*batch, time, state); exact where they are linear."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        before = chain.split(around.detach())[0].requires_grad_()
        t, dt, context = chain.layout(before.dim() - 1)
        a, noise = chain.step(t, dt, context, before)
        rows = [
            torch.autograd.grad(a[..., d].sum(), before, create_graph=differentiable, retain_graph=True)[0]
            for d in range(chain.state_dim)
        ]
        F = torch.stack(rows, -2)
        b, Q = a - matvec(F, before.detach()), noise.covariance()
    if not differentiable:
        F, b, Q = F.detach(), b.detach(), Q.detach()
    return LinearStep(F, b, Q.expand(F.shape))


def backward_information(steps: LinearStep, potential: Message) -> Message:
    """The backward information filter as a parallel scan over time (logarithmic depth).

    Args:
        steps: the linear-Gaussian steps, time-major.
        potential: the log likelihood at every grid time, (*batch, time, ...); one time more than `steps`.

    Returns:
        Messages of full precision: the one at k is the likelihood of everything observed from k on, given the
        state at k.

    References:
        Särkkä & García-Fernández, "Temporal parallelization of Bayesian smoothers", IEEE TAC 2021,
        https://doi.org/10.1109/TAC.2020.2976316
    """
    potential = _raw(potential.information, potential.full(), False).time_major()
    n = potential.information.shape[-1]
    ndim = max(potential.information.dim(), potential.precision.dim() - 1, steps.b.dim()) - 1
    h, b = lift(potential.information, ndim), lift(steps.b, ndim)
    J, F, Q = (lift(x, ndim + 1) for x in (potential.precision, steps.F, steps.Q))
    shape = torch.broadcast_shapes(h.shape[1:], b.shape[1:], J.shape[1:-1])
    h, J = h.expand(-1, *shape), J.expand(-1, *shape, n)
    F, Q = (torch.cat([x.expand(-1, *shape, n), torch.zeros_like(J[-1:])]) for x in (F, Q))
    b = torch.cat([b.expand(-1, *shape), torch.zeros_like(h[-1:])])
    h, J = _suffixes(F, b, Q, h, J)
    return _raw(h.movedim(0, -2), (0.5 * (J + J.mT)).movedim(0, -3), False)


def _suffixes(F: Tensor, b: Tensor, Q: Tensor, h: Tensor, J: Tensor) -> tuple[Tensor, Tensor]:
    n = F.shape[0]
    if n == 1:
        return h, J
    pairs = n // 2
    even = [x[0 : 2 * pairs : 2] for x in (F, b, Q, h, J)]
    odd = [x[1 : 2 * pairs : 2] for x in (F, b, Q, h, J)]
    merged = _combine(even, odd)
    if n % 2:
        merged = [torch.cat([m, x[-1:]]) for m, x in zip(merged, (F, b, Q, h, J), strict=True)]
    h_even, J_even = _suffixes(*merged)
    followed = (n - 1) // 2
    h_odd, J_odd = _absorb([x[1 : 2 * followed : 2] for x in (F, b, Q, h, J)], h_even[1:], J_even[1:])
    if n % 2 == 0:
        h_odd, J_odd = torch.cat([h_odd, h[-1:]]), torch.cat([J_odd, J[-1:]])
    return _interleave(h_even, h_odd), _interleave(J_even, J_odd)


def _combine(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Two consecutive stretches as one: its linear map, offset, noise, and the potential on its start."""
    F1, b1, Q1, h1, J1 = first
    F2, b2, Q2, h2, J2 = second
    eye = torch.eye(F1.shape[-1], dtype=F1.dtype, device=F1.device)
    shrink = inverse(eye + Q1 @ J2)
    through = F2 @ shrink
    F = through @ F1
    b = matvec(through, b1 + matvec(Q1, h2)) + b2
    Q = through @ Q1 @ F2.mT + Q2
    back = F1.mT @ shrink.mT
    return [F, b, Q, matvec(back, h2 - matvec(J2, b1)) + h1, back @ J2 @ F1 + J1]


def _absorb(first: list[Tensor], h2: Tensor, J2: Tensor) -> tuple[Tensor, Tensor]:
    """The potential on the start of a stretch, given the one on its end."""
    F1, b1, Q1, h1, J1 = first
    eye = torch.eye(F1.shape[-1], dtype=F1.dtype, device=F1.device)
    back = F1.mT @ inverse(eye + Q1 @ J2).mT
    return matvec(back, h2 - matvec(J2, b1)) + h1, back @ J2 @ F1 + J1


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    out = torch.empty((even.shape[0] + odd.shape[0], *even.shape[1:]), dtype=even.dtype, device=even.device)
    out = out.index_copy(0, torch.arange(0, out.shape[0], 2, device=out.device), even)
    return out.index_copy(0, torch.arange(1, out.shape[0], 2, device=out.device), odd)
