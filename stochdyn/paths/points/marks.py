"""Mark distributions: their width, their density where a row is unused, and their draws."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from stochdyn.errors import ShapeError

Law = Any


def mark_dim(law: Law | None) -> int:
    """How many numbers a mark has.

    Raises:
        ShapeError: if a mark is more than a vector.

    Example:
        >>> mark_dim(None), mark_dim(torch.distributions.Normal(0.0, 1.0))
        (0, 1)
    """
    if law is None:
        return 0
    if not hasattr(law, "event_shape") or len(law.event_shape) > 1:
        got = f"event_shape {tuple(law.event_shape)}" if hasattr(law, "event_shape") else type(law).__name__
        raise ShapeError(f"`marks` must be a distribution over a number or a vector, got {got}.")
    return law.event_shape[0] if law.event_shape else 1


def mark_log_prob(law: Law, marks: Tensor, real: Tensor) -> Tensor:
    """The log density of the marks (row, *batch, mark) where there is a jump, elsewhere 0.

    Example:
        >>> law = torch.distributions.LogNormal(0.0, 1.0)
        >>> mark_log_prob(law, torch.tensor([[1.0], [0.0]]), torch.tensor([True, False]))
        tensor([-0.9189,  0.0000])
    """
    inside = torch.where(real[..., None], marks, _somewhere(law, marks))
    found = law.log_prob(inside if law.event_shape else inside[..., 0])
    return torch.where(real, found, torch.zeros_like(found))


def marks_inside(support: constraints.Constraint | None, value: Tensor) -> Tensor:
    """Which marks of a padded tensor (*batch, jump, 1 + mark) are in a support, whose bounds may be of batch shape.

    Example:
        >>> marks_inside(constraints.positive, torch.tensor([[0.1, 2.0], [0.2, -1.0]]))
        tensor([ True, False])
    """
    if support is None or constraints.is_dependent(support):
        return torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
    marks = value[..., 1:]
    marks = marks if support.event_dim else marks[..., 0]
    # Jumps first, so that bounds (*batch,) broadcast, also over a value that has no batch of its own.
    batch = support.check(marks.new_zeros(marks.shape[marks.dim() - support.event_dim :])).dim()
    marks = marks.movedim(value.dim() - 2, 0)
    lead = marks.dim() - 1 - support.event_dim
    marks = marks.reshape(len(marks), *[1] * max(0, batch - lead), *marks.shape[1:])
    return support.check(marks).movedim(0, -1)


def draw_marks(law: Law | None, shape: torch.Size, like: Tensor) -> Tensor:
    """(*shape, mark) one mark for each; nothing where there is no law.

    Example:
        >>> draw_marks(None, torch.Size((1, 3)), torch.zeros(1)).shape
        torch.Size([1, 3, 0])
    """
    if law is None:
        return like.new_zeros(*shape, 0)
    lead = shape[: len(shape) - len(law.batch_shape)]
    lead = lead if torch.Size((*lead, *law.batch_shape)) == shape else None
    drawn = law.sample(lead) if lead is not None else law.expand(shape).sample()
    return (drawn if law.event_shape else drawn[..., None]).to(like)


def _somewhere(law: Law, like: Tensor) -> Tensor:
    """A mark that the law takes: densities are evaluated in unused rows too, before they drop out."""
    support = law.support
    if support.is_discrete and law.event_shape:
        # One-hot marks and counts of a total are never all 0.
        first = like.new_zeros(like.shape[-1])
        first[0] = 1.0
        return first * torch.as_tensor(getattr(support, "upper_bound", 1), device=like.device)
    if support.is_discrete or constraints.is_dependent(support):
        return like.new_zeros(like.shape[-1])
    transform = biject_to(support)
    shape = transform.inverse_shape(torch.Size(law.event_shape))
    found = transform(like.new_zeros(shape))
    return found if law.event_shape else found[..., None]
