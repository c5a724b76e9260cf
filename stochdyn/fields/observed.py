"""Flows and jumps of a state that jumps when something is observed, and what such a state remembers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from stochdyn.errors import FieldError, TimeError
from stochdyn.fields.neural import MLP

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Memory:
    """What was last observed of each channel, all (*batch, channel).

    Attributes:
        values: the last exact value, 0 where there was none.
        elapsed: the time since then; since the start where there was none.
        seen: 1 where there was one, else 0.

    Example:
        >>> memory = Memory.empty(torch.zeros(1), 2).later(torch.tensor([3.0]))
        >>> memory = memory.updated(torch.tensor([5.0, 0.0]), torch.tensor([1.0, 0.0]))
        >>> memory.values.tolist(), memory.elapsed.tolist(), memory.seen.tolist()
        ([5.0, 0.0], [0.0, 3.0], [1.0, 0.0])
    """

    values: Tensor
    elapsed: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, h: Tensor, channels: int) -> "Memory":
        """Before any observation, for states h (*batch, hidden)."""
        nothing = h.new_zeros(*h.shape[:-1], channels)
        return cls(nothing, nothing, nothing)

    def later(self, dt: Tensor) -> "Memory":
        """After a time dt (*batch, 1)."""
        return Memory(self.values, self.elapsed + dt, self.seen)

    def updated(self, y: Tensor, mask: Tensor) -> "Memory":
        """After values y where the mask is 1; censored ones (-1) are not remembered."""
        exact = mask > 0
        return Memory(
            torch.where(exact, y, self.values),
            torch.where(exact, torch.zeros_like(self.elapsed), self.elapsed),
            torch.where(exact, torch.ones_like(self.seen), self.seen),
        )

    def apply(self, change: Callable[..., Tensor], *others: "Memory") -> "Memory":
        """The same function of each of the three tensors."""
        rows = zip(*((m.values, m.elapsed, m.seen) for m in (self, *others)), strict=True)
        return Memory(*(change(*row) for row in rows))


class AbstractMemoryFlow(nn.Module, ABC):
    """A flow that sees what was last observed: called as `(t, h, memory[, context])`, with a `Memory`.

    Example:
        >>> import stochdyn as sd
        >>> isinstance(sd.MemoryFlow(8, obs_dim=2), AbstractMemoryFlow)
        True
    """

    @abstractmethod
    def forward(self, t: Tensor, h: Tensor, memory: Memory, context: Tensor | None = None) -> Tensor:
        """dh/dt (*batch, hidden)."""


class GRUFlow(nn.Module):
    """A gated flow, dh/dt = (1 - z)(g - h), that keeps states between -1 and 1: the flow of GRU-ODE.

    Reset gate r = sigmoid(R h), update gate z = sigmoid(Z h), candidate g = tanh(G(r h)), each with a bias.

    Args:
        hidden: size of h.
        context_dim: size of the context, 0 for none.
        time_unit: the flow is per this time; a typical gap should be near 1 in it.

    Raises:
        TimeError: if `time_unit` is not positive.
        FieldError: when called with a context of another size.

    References:
        De Brouwer, Simm, Arany & Moreau, "GRU-ODE-Bayes: continuous modeling of sporadically-observed time series",
        2019, https://arxiv.org/abs/1905.12374

    Example:
        >>> import stochdyn as sd
        >>> sd.GRUFlow(8)(torch.zeros(1), torch.zeros(5, 8)).shape
        torch.Size([5, 8])
    """

    def __init__(self, hidden: int, *, context_dim: int = 0, time_unit: float = 1.0) -> None:
        super().__init__()
        if not 0 < time_unit < float("inf"):
            raise TimeError(f"GRUFlow: `time_unit` must be positive, got {time_unit}. Give a typical gap.")
        self.context_dim, self.time_unit = context_dim, time_unit
        self.gates = nn.Linear(hidden + context_dim, 2 * hidden)
        self.candidate = nn.Linear(hidden + context_dim, hidden)

    def forward(self, t: Tensor, h: Tensor, context: Tensor | None = None) -> Tensor:
        given = _given("GRUFlow", context, self.context_dim)
        r, z = torch.sigmoid(self.gates(torch.cat([h, *given], -1))).chunk(2, -1)
        g = torch.tanh(self.candidate(torch.cat([r * h, *given], -1)))
        return (1 - z) * (g - h) / self.time_unit


class MemoryFlow(AbstractMemoryFlow):
    """dh/dt = net(h, last values, whether there was one, the time since, t[, context]): the flow of NJ-ODE.

    Args:
        hidden: size of h.
        obs_dim: number of channels.
        widths: of the hidden layers.
        context_dim: size of the context, 0 for none.
        time: whether the flow depends on t itself.

    Raises:
        FieldError: when called with a context of another size.

    References:
        Herrera, Krach & Teichmann, "Neural jump ordinary differential equations: consistent continuous-time
        prediction and filtering", 2021, https://arxiv.org/abs/2006.04727

    Example:
        >>> import stochdyn as sd
        >>> flow = sd.MemoryFlow(8, obs_dim=2, time=False)
        >>> h = torch.zeros(5, 8)
        >>> flow(torch.zeros(1), h, sd.Memory.empty(h, 2)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        hidden: int,
        obs_dim: int,
        widths: Sequence[int] = (50, 50),
        *,
        context_dim: int = 0,
        time: bool = False,
    ) -> None:
        super().__init__()
        self.context_dim, self.time = context_dim, time
        self.net = MLP(hidden + 3 * obs_dim + int(time) + context_dim, hidden, widths, activation=torch.tanh)

    def forward(self, t: Tensor, h: Tensor, memory: Memory, context: Tensor | None = None) -> Tensor:
        parts = [
            h,
            memory.values,
            memory.seen,
            memory.elapsed,
            *_given("MemoryFlow", context, self.context_dim),
        ]
        if self.time:
            parts.append(t.expand(*h.shape[:-1], 1))
        return self.net(torch.cat(parts, -1))


class GRUJump(nn.Module):
    """A GRU cell on what is observed and on what was predicted: the jump of GRU-ODE-Bayes and of ODE-RNN.

    It reads the values, the mask and, with `prediction=True`, mean and logarithm of the standard deviation of the
    prediction, and how far off it was, (y - mean) / sd, on a scale that is logarithmic far out (asinh).

    Args:
        obs_dim: number of channels.
        hidden: size of h.
        prediction: whether the prediction is read too.
        context_dim: size of the context, 0 for none.
        transform: of values and predicted means before they are read, e.g. `torch.log1p` of counts.

    Shapes:
        `(t, h, y, mask, seen[, context])`: t (*batch, 1), h (*batch, hidden), y and mask (*batch, channel), `seen` the
        predicted distribution of that batch shape, or None; the new h. y is 0 where the mask is 0 (missing), and the
        limit where it is -1 (censored).

    Raises:
        FieldError: when called without a prediction that it reads, or with a context of another size.

    References:
        De Brouwer, Simm, Arany & Moreau, "GRU-ODE-Bayes: continuous modeling of sporadically-observed time series",
        2019, https://arxiv.org/abs/1905.12374

    Example:
        >>> import stochdyn as sd
        >>> jump, seen = sd.GRUJump(obs_dim=2, hidden=8), td.Normal(torch.zeros(5, 2), 1.0)
        >>> jump(torch.zeros(5, 1), torch.zeros(5, 8), torch.ones(5, 2), torch.ones(5, 2), seen).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int,
        *,
        prediction: bool = True,
        context_dim: int = 0,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.prediction, self.context_dim, self.transform = prediction, context_dim, transform
        self.cell = nn.GRUCell((5 if prediction else 2) * obs_dim + context_dim, hidden)

    def forward(
        self, t: Tensor, h: Tensor, y: Tensor, mask: Tensor, seen: Any, context: Tensor | None = None
    ) -> Tensor:
        parts = [torch.where(mask != 0, _read(self.transform, y), torch.zeros_like(y)), mask]
        if self.prediction:
            mean, sd = _moments("GRUJump", seen)
            off = torch.where(mask != 0, torch.asinh((y - mean) / sd), torch.zeros_like(y))
            parts += [_read(self.transform, mean), sd.log(), off]
        return self.cell(torch.cat([*parts, *_given("GRUJump", context, self.context_dim)], -1), h)


class ResetJump(nn.Module):
    """h = net(what is observed), whatever h was: the jump of NJ-ODE, right for Markov processes seen without noise.

    A missing channel comes in as its predicted mean, beside the mask.

    Args:
        obs_dim: number of channels.
        hidden: size of h.
        widths: of the hidden layers.
        context_dim: size of the context, 0 for none.
        transform: of values and predicted means before they are read.

    Shapes:
        as for `GRUJump`.

    Raises:
        FieldError: when called without a prediction where a channel is missing, or with a context of another size.

    References:
        Herrera, Krach & Teichmann, "Neural jump ordinary differential equations: consistent continuous-time
        prediction and filtering", 2021, https://arxiv.org/abs/2006.04727

    Example:
        >>> import stochdyn as sd
        >>> jump, seen = sd.ResetJump(obs_dim=2, hidden=8), td.Normal(torch.zeros(5, 2), 1.0)
        >>> jump(torch.zeros(5, 1), torch.zeros(5, 8), torch.ones(5, 2), torch.ones(5, 2), seen).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int,
        widths: Sequence[int] = (50, 50),
        *,
        context_dim: int = 0,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.context_dim, self.transform = context_dim, transform
        self.net = MLP(2 * obs_dim + context_dim, hidden, widths, activation=torch.tanh)

    def forward(
        self, t: Tensor, h: Tensor, y: Tensor, mask: Tensor, seen: Any, context: Tensor | None = None
    ) -> Tensor:
        filled = y if seen is None else torch.where(mask != 0, y, _moments("ResetJump", seen)[0])
        given = _given("ResetJump", context, self.context_dim)
        return self.net(torch.cat([_read(self.transform, filled), mask, *given], -1))


def _read(transform: Transform | None, x: Tensor) -> Tensor:
    return x if transform is None else transform(x)


def _given(name: str, context: Tensor | None, size: int) -> list[Tensor]:
    got = 0 if context is None else context.shape[-1]
    if got != size:
        raise FieldError(f"{name} was made for a context of size {size}, got {got}. Set context_dim={got}.")
    return [] if context is None else [context]


def _moments(name: str, seen: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the prediction; classes are numbers."""
    if seen is None:
        raise FieldError(f"{name} reads a prediction, and there is none. Set prediction=False.")
    if isinstance(seen, td.Categorical):
        classes = torch.arange(seen.probs.shape[-1], dtype=seen.probs.dtype, device=seen.probs.device)
        mean = (seen.probs * classes).sum(-1)
        variance = (seen.probs * (classes - mean[..., None]).square()).sum(-1)
    else:
        mean, variance = seen.mean, seen.variance
    return mean, variance.clamp_min(torch.finfo(mean.dtype).tiny ** 0.5).sqrt()
