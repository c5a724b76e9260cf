"""How a guide makes the messages of a path: from the information filter with a learned correction, or from nothing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stochdyn.errors import GuideError
from stochdyn.paths import Message


@dataclass(frozen=True)
class AbstractPathFamily:
    """How the path sites of a model are guided; a value that `AmortizedGuide` is given as `paths`."""


@dataclass(frozen=True)
class AbstractMessageFamily(AbstractPathFamily, ABC):
    """Guiding by messages: what the learned numbers of every grid time mean.

    `control` are the widths of the hidden layers of a control network, or None for none.
    """

    control: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        widths = self.control
        if widths is None or (
            isinstance(widths, Sequence) and all(isinstance(w, int) and w > 0 for w in widths)
        ):
            return
        raise GuideError(
            f"{type(self).__name__}: `control` must be the widths of hidden layers, got {widths!r}. Write "
            "control=(32, 32)."
        )

    @abstractmethod
    def numbers(self, state: int) -> int:
        """How many learned numbers a message takes."""

    @abstractmethod
    def start(self, state: int) -> Tensor:
        """Their initial values."""

    @abstractmethod
    def build(self, numbers: Tensor, unit: Tensor, around: Tensor, base: Message | None) -> Message:
        """The message from its numbers (*batch, time, numbers), in units of the prior's spread (state,)."""


@dataclass(frozen=True)
class FilterMessage(AbstractMessageFamily):
    """Messages of the linearised backward information filter, corrected by what training learns.

    In every run of the guide the filter uses the latents sampled before the path and the model's own likelihood
    (expanded to second order around a running estimate of the path), so the messages know both. The correction
    rescales the precision, J -> C J C', and shifts the centre; it starts at nothing. Exact, untrained, for models
    whose path is linear-Gaussian given the other latents.

    Beside the messages a control may act: a network of the state and of the encoding, in noise units, which starts at
    nothing. It adds what messages cannot say: pulls that depend on the state otherwise than linearly, or, beside
    diagonal messages, on the other states. It does not cure the ELBO's taste for one mode: where two ways explain the
    data equally well, training settles on one of them.

    Args:
        refine: relinearisations when a series is first seen (an iterated smoother).
        follow: in training, how fast the point of linearisation follows the sampled paths.
        control: widths of the hidden layers of a control network; None for none. It needs an encoder, and runs
            uncompiled.

    Raises:
        GuideError: if `control` is not a sequence of positive integers.

    Example:
        >>> import stochdyn as sd
        >>> sd.FilterMessage().refine
        5
    """

    refine: int = 5
    follow: float = 0.05

    def numbers(self, state: int) -> int:
        return state * state + state

    def start(self, state: int) -> Tensor:
        return torch.zeros(self.numbers(state))

    def build(self, numbers: Tensor, unit: Tensor, around: Tensor, base: Message | None) -> Message:
        if base is None:
            raise ValueError("FilterMessage corrects a base message, got none.")
        state = around.shape[-1]
        eye = torch.eye(state, dtype=numbers.dtype, device=numbers.device)
        C = eye + numbers[..., : state * state].unflatten(-1, (state, state)) * unit / unit[:, None]
        shift = numbers[..., state * state :] * unit
        J = C @ base.precision @ C.mT
        gradient = base.gradient(around)
        return Message(gradient + (J @ (around + shift)[..., None])[..., 0], J)


@dataclass(frozen=True)
class FreeMessage(AbstractMessageFamily):
    """Messages learned from nothing, one per grid time.

    Args:
        rank: None for a full precision, 0 for a diagonal one, r for diagonal plus rank r.
        init: initial precision, in units of the prior's.
        control: widths of the hidden layers of a control network, see `FilterMessage`; None for none.

    Raises:
        GuideError: if `control` is not a sequence of positive integers.

    Example:
        >>> import stochdyn as sd
        >>> sd.FreeMessage(rank=0).numbers(3)
        6
    """

    rank: int | None = None
    init: float = 0.1

    def numbers(self, state: int) -> int:
        extra = state * (state - 1) // 2 if self.rank is None else state * self.rank
        return 2 * state + extra

    def start(self, state: int) -> Tensor:
        out = torch.zeros(self.numbers(state))
        out[:state] = torch.tensor(self.init).log() / 2
        if self.rank:
            out[2 * state :] = 0.01 * torch.linspace(-1, 1, state * self.rank)
        return out

    def build(self, numbers: Tensor, unit: Tensor, around: Tensor, base: Message | None) -> Message:
        state = around.shape[-1]
        root = numbers[..., :state].exp() / unit
        loc = around + numbers[..., state : 2 * state] * unit
        extra = numbers[..., 2 * state :]
        if self.rank == 0:
            return Message(root.square() * loc, root.square())
        if self.rank is None:
            i, j = torch.tril_indices(state, state, -1, device=root.device)
            L = torch.diag_embed(root)
            L[..., i, j] = extra / unit[i]
            J = L @ L.mT
        else:
            U = extra.unflatten(-1, (state, self.rank)) / unit[:, None]
            J = torch.diag_embed(root.square()) + U @ U.mT
        return Message((J @ loc[..., None])[..., 0], J)


def masked(message: Message, valid: Tensor) -> Message:
    """No message where valid (*batch, time) is False."""
    h = torch.where(valid[..., None], message.information, torch.zeros_like(message.information))
    keep = valid[..., None] if message.diagonal else valid[..., None, None]
    return Message(h, torch.where(keep, message.precision, torch.zeros_like(message.precision)))
