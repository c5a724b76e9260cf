"""Diffusions: how noise enters a path."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stochdyn.errors import DiffusionError, FieldError
from stochdyn.fields.calls import Field, call_field, evaluate


class AbstractDiffusion(ABC):
    """How noise enters: `diagonal` noise has one Brownian motion per state, the other kind a matrix."""

    diagonal: bool

    def __init__(self, field: Field | Tensor) -> None:
        self.field = field

    @property
    def constant(self) -> bool:
        """Whether the diffusion depends neither on time nor on the state."""
        return isinstance(self.field, Tensor)

    def __call__(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        if isinstance(self.field, Tensor):
            return self.field
        return evaluate("diffusion", self.field, t, z, context)

    @abstractmethod
    def scale(self, g: Tensor, factor: Tensor) -> Tensor:
        """Multiply a diffusion value by a factor of shape (..., 1)."""


class DiagonalDiffusion(AbstractDiffusion):
    """Independent noise in every state: the field, or the tensor, has the state's shape.

    Example:
        >>> DiagonalDiffusion(lambda t, z: 0.1 * z)(torch.zeros(1), torch.ones(2))
        tensor([0.1000, 0.1000])
    """

    diagonal = True

    def scale(self, g: Tensor, factor: Tensor) -> Tensor:
        return g * factor


class MatrixDiffusion(AbstractDiffusion):
    """Correlated, scalar or rank-deficient noise: a matrix (..., state, noise), from a field or as a tensor.

    With fewer noises than states (noise on the velocity only, say) the density of a path is taken on the
    subspace that the noise reaches, and a value off that subspace is refused.

    Args:
        field: `(t, z[, context]) -> (..., state, noise)`, or a tensor of that shape.

    Shapes:
        returns (..., state, noise); units: state per square root of time.

    Raises:
        FieldError: when a path is built, if the shape does not fit the state.
        DiffusionError: when a path is built, if the columns are linearly dependent at the first time.

    Example:
        >>> import stochdyn as sd
        >>> noise_on_velocity = sd.MatrixDiffusion(torch.tensor([[0.0], [0.5]]))
        >>> path = sd.SDEPath(lambda t, z: torch.stack([z[..., 1], -z[..., 0]], -1), noise_on_velocity,
        ...                   torch.zeros(2), torch.linspace(0, 1, 11))
        >>> path.rsample().shape
        torch.Size([11, 2])
    """

    diagonal = False

    def scale(self, g: Tensor, factor: Tensor) -> Tensor:
        return g * factor[..., None]


def as_diffusion(diffusion: Field | Tensor | AbstractDiffusion) -> AbstractDiffusion:
    """Wrap what a user may pass as a diffusion; a tensor or callable is diagonal.

    Example:
        >>> as_diffusion(torch.tensor([0.5])).diagonal
        True
    """
    if isinstance(diffusion, AbstractDiffusion):
        return diffusion
    if isinstance(diffusion, int | float):
        raise FieldError(
            f"`diffusion` must be a tensor, a callable or MatrixDiffusion, got {diffusion!r}. "
            f"Write torch.tensor([{diffusion}])."
        )
    return DiagonalDiffusion(diffusion)


def probe(
    drift: Field, diffusion: AbstractDiffusion, t: Tensor, z: Tensor, context: Tensor | None
) -> tuple[torch.Size, int]:
    """Call both fields once, check what they return, and learn the batch shape and the number of noises.

    Raises:
        FieldError: if a field fails or its output does not fit the state.
        DtypeError: if a field changes the dtype.

    Example:
        >>> noise = DiagonalDiffusion(torch.tensor([0.1, 0.2]))
        >>> probe(lambda t, z: -torch.ones(5, 1) * z, noise, torch.zeros(1), torch.ones(2), None)
        (torch.Size([5]), 2)
    """
    with torch.no_grad():
        f = call_field("drift", drift, t, z, context)
        g = call_field("diffusion", diffusion, t, z, context)
    state = z.shape[-1]
    if f.shape[-1] not in (state, 1):
        raise FieldError(_misfit("drift", f, f"(..., state={state})", z))
    if diffusion.diagonal:
        if g.shape[-1] not in (state, 1):
            hint = " For a matrix use sd.MatrixDiffusion(...)." if g.dim() >= 2 else ""
            raise FieldError(_misfit("diffusion", g, f"(..., state={state})", z) + hint)
        batches, noise = [f.shape[:-1], g.shape[:-1], z.shape[:-1]], state
    else:
        if g.dim() < 2 or g.shape[-2] != state:
            raise FieldError(_misfit("diffusion", g, f"(..., state={state}, noise)", z))
        batches, noise = [f.shape[:-1], g.shape[:-2], z.shape[:-1]], g.shape[-1]
    try:
        return torch.broadcast_shapes(*batches), noise
    except RuntimeError as error:
        raise FieldError(
            f"The batch shapes of drift {tuple(batches[0])}, diffusion {tuple(batches[1])} and state "
            f"{tuple(batches[2])} do not broadcast. Index a parameter as theta[..., None] against z."
        ) from error


def _misfit(name: str, out: Tensor, expected: str, z: Tensor) -> str:
    return (
        f"The {name} returned shape {tuple(out.shape)} for z of shape {tuple(z.shape)}, expected {expected}."
    )


def check_diffusion(diffusion: AbstractDiffusion, g: Tensor, time: float) -> None:
    """Refuse a value of the diffusion with which a step has no density.

    Raises:
        DiffusionError: naming the time, the state and the value.

    Example:
        >>> noise = DiagonalDiffusion(torch.tensor([0.1, 0.2]))
        >>> check_diffusion(noise, noise(torch.zeros(1), torch.zeros(2)), 0.0)
    """
    if diffusion.diagonal:
        bad = ~((g > 0) & (g < torch.inf))
        if bad.any():
            where = bad.nonzero()[0].tolist()
            raise DiffusionError(
                f"time {time:g}, state {where[-1]}: the diffusion is {g[tuple(where)].item():g}; a density "
                "needs it positive and finite. Use softplus or exp with a floor, or MatrixDiffusion without "
                "that noise."
            )
        return
    if not torch.isfinite(g).all():
        raise DiffusionError(f"time {time:g}: the diffusion matrix is not finite. Bound it, or its input.")
    sizes = torch.linalg.svdvals(g)
    if (sizes[..., -1] <= 1e2 * torch.finfo(g.dtype).eps * sizes[..., 0]).any():
        raise DiffusionError(
            f"time {time:g}: the diffusion matrix is singular. Give it as (..., state, noise) with as many "
            "columns as there are independent noises, linearly independent."
        )
