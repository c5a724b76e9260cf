"""Messages for paths that jump: the backward filter's mixture, corrected by what training learns."""

import torch
from torch import Tensor

from stochdyn.errors import GuideError
from stochdyn.guides.messages import AbstractPathFamily, FilterMessage
from stochdyn.guides.passes import LatentPath
from stochdyn.paths import (
    Compiled,
    GuidedJumpPath,
    GuidedPath,
    JumpDiffusionPath,
    Message,
    MixtureMessage,
    information_filter,
)
from stochdyn.paths.components import settled


def check_family(family: AbstractPathFamily, name: str) -> None:
    """Refuse families that have no form for jumps.

    Raises:
        GuideError: naming the one that has.

    Example:
        >>> check_family(FilterMessage(), "z")
    """
    if not isinstance(family, FilterMessage) or family.control is not None:
        raise GuideError(
            f"path site '{name}' is a jump diffusion, for which a guide has FilterMessage() without a control, got "
            f"{family!r}. Leave `paths` out."
        )


def guided_jumps(
    prior: JumpDiffusionPath,
    family: FilterMessage,
    likelihood: tuple[Message, Tensor],
    unit: Tensor,
    numbers: tuple[Tensor, Tensor],
    valid: Tensor,
) -> GuidedJumpPath:
    """The guided path from the likelihood's message and the point it was expanded around.

    Args:
        prior: the path.
        family: what the numbers mean.
        likelihood: the potential, and the path (*batch, time, state) around which it holds.
        unit: the prior's spread, (state,).
        numbers: (*batch, time, numbers) learned, and the same as a score sees them.
        valid: (*batch, time) where messages are, up to the last observation.
    """
    potential, around = likelihood
    base = prior.filtered(potential, around)
    message, score = (corrected(base, family, x, unit, around).masked(valid) for x in numbers)
    return prior.guided(message, score_message=score)


def unlearned(
    prior: LatentPath, potential: Message, around: Tensor, loop: Compiled | None
) -> GuidedPath | GuidedJumpPath:
    """The guided path whose messages are the filter's own."""
    if isinstance(prior, JumpDiffusionPath):
        base = prior.filtered(potential, around)
        return prior.guided(base, score_message=base)
    message = information_filter(prior, potential, around)
    return prior.guided(message, score_message=message, loop=loop)


def corrected(
    base: MixtureMessage, family: FilterMessage, numbers: Tensor, unit: Tensor, around: Tensor
) -> MixtureMessage:
    """Every component corrected as a message of its own, around its own centre, where its value stays."""
    made = []
    numbers, unit, around = (x.to(base.precision) for x in (numbers, unit, around))
    for c in range(base.log_weight.shape[-1]):
        own = Message(base.information[..., c, :], base.precision[..., c, :, :])
        # Around a point far out in a sharp component, a small correction would move its weight by nats.
        centre = settled(own.information, own.precision, around)
        new = family.build(numbers, unit, centre, own)
        kept = own.log_value(centre) - new.log_value(centre)
        made.append((base.log_weight[..., c] + kept, new.information, new.full()))
    return MixtureMessage(*(torch.stack(x, -1 - k) for k, x in enumerate(zip(*made, strict=True))))
