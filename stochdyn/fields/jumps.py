"""Fields of jump ODEs: flows and jump maps with closed forms, a neural jump map, and a head for the intensity."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stochdyn.errors import FieldError
from stochdyn.fields.neural import MLP


class AbstractLinearFlow(nn.Module, ABC):
    """A flow with a closed form, coordinate by coordinate: z(t + dt) = decay z(t) + shift. It needs no solver.

    Example:
        >>> import stochdyn as sd
        >>> isinstance(sd.DecayFlow(2), AbstractLinearFlow)
        True
    """

    @abstractmethod
    def over(self, t: Tensor, dt: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decay and shift over dt from t, for t and dt (..., 1) and a context (..., context_dim)."""


class AbstractAdditiveJump(nn.Module, ABC):
    """A jump map that adds what does not depend on the state. With a linear flow it needs no loop over jumps.

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.AdditiveJump(2)(torch.zeros(1), torch.tensor([0.5, 0.0]), torch.zeros(0))
        tensor([1.5000, 1.0000])
    """

    @abstractmethod
    def size(self, t: Tensor, mark: Tensor, context: Tensor | None = None) -> Tensor:
        """(..., state) what a jump at t (..., 1) with a mark (..., mark) adds."""

    def forward(self, t: Tensor, z: Tensor, mark: Tensor, context: Tensor | None = None) -> Tensor:
        """z after a jump."""
        return z + self.size(t, mark, context)


class DecayFlow(AbstractLinearFlow):
    """dz/dt = push in the first coordinates, which forget nothing, and dz/dt = -rate z in the others; exact.

    With jumps added, the first say how many there were against how many were due, the others how many there were
    lately, on several scales of time.

    Args:
        state_dim: size of z.
        integrators: how many coordinates have a constant flow.
        shortest, longest: bounds of the scales of time 1 / rate of the decays, in units of time. Where jumps are
            integrated with a fixed number of nodes, a scale far below a piece would cheat the quadrature.
        push: of the integrators at the start of training, per unit of time.

    Shapes:
        `push` (*batch, integrators), `place` (*batch, state - integrators), parameters; `rate` (*batch, state).

    Raises:
        FieldError: if sizes or scales are out of range.

    Example:
        >>> import torch, stochdyn as sd
        >>> flow = sd.DecayFlow(2, push=-0.5)
        >>> decay, shift = flow.over(torch.zeros(1), torch.tensor([2.0]))
        >>> decay[0], shift
        (tensor(1., grad_fn=<SelectBackward0>), tensor([-1.,  0.], grad_fn=<MulBackward0>))
    """

    def __init__(
        self,
        state_dim: int,
        integrators: int = 1,
        *,
        shortest: float = 0.5,
        longest: float = 5.0,
        push: float = 0.0,
    ) -> None:
        super().__init__()
        if not (0 <= integrators <= state_dim and state_dim > 0 and 0 < shortest < longest):
            raise FieldError(
                f"DecayFlow: needs 0 <= integrators <= state_dim and 0 < shortest < longest, got {integrators}, "
                f"{state_dim}, {shortest:g}, {longest:g}."
            )
        decays = state_dim - integrators
        self.shortest, self.longest = shortest, longest
        share = (torch.arange(decays) + 0.5) / max(decays, 1)  # evenly over the logarithm of the scale
        self.place = nn.Parameter(torch.logit(share))
        self.push = nn.Parameter(torch.full((integrators,), push))

    @property
    def rate(self) -> Tensor:
        """(*batch, state) the rates of decay, 0 of integrators."""
        return self._rates()[0]

    def _rates(self) -> tuple[Tensor, Tensor]:
        """(*batch, state) rates, and pushes."""
        span = math.log(self.longest / self.shortest)
        rate, push = torch.exp(-span * torch.sigmoid(self.place)) / self.shortest, self.push
        batch = torch.broadcast_shapes(rate.shape[:-1], push.shape[:-1])
        rate, push = (x.expand(*batch, x.shape[-1]) for x in (rate, push))
        return torch.cat([torch.zeros_like(push), rate], -1), torch.cat([push, torch.zeros_like(rate)], -1)

    def over(self, t: Tensor, dt: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rate, push = self._rates()
        return torch.exp(-rate * dt), push * dt

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """dz/dt, for a solver."""
        rate, push = self._rates()
        return push - rate * z


class AdditiveJump(AbstractAdditiveJump):
    """z' = z + 1, or z + size[class], learned, where marks are classes.

    Without classes the size is in the scale of z, and there is nothing to learn.

    Args:
        state_dim: size of z.
        classes: number of classes of the mark, 0 for none.

    Example:
        >>> import torch, stochdyn as sd
        >>> jump = sd.AdditiveJump(2, classes=3)
        >>> jump(torch.zeros(1), torch.zeros(2), torch.tensor([2.0])).tolist()
        [1.0, 1.0]
    """

    def __init__(self, state_dim: int, classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        ones = torch.ones(max(classes, 1), state_dim)
        if classes:
            self.sizes = nn.Parameter(ones)
        else:
            self.register_buffer("sizes", ones)

    def size(self, t: Tensor, mark: Tensor, context: Tensor | None = None) -> Tensor:
        if not self.classes:
            return self.sizes[0]
        return one_hot(mark, self.classes, self.sizes) @ self.sizes


class NeuralJump(nn.Module):
    """z' = z + net(z, mark[, context]), which starts near z' = z.

    Args:
        state_dim: size of z.
        hidden: widths of the hidden layers.
        classes: number of classes of the mark, 0 where it is a quantity.
        mark_dim: how many quantities a mark has, if it has no classes.
        context_dim: size of the context, 0 for none.

    References:
        Jia & Benson, "Neural jump stochastic differential equations", 2019, https://arxiv.org/abs/1905.10403

    Example:
        >>> import torch, stochdyn as sd
        >>> jump = sd.NeuralJump(2, (16,), mark_dim=1)
        >>> jump(torch.zeros(1), torch.randn(5, 2), torch.randn(5, 1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        state_dim: int,
        hidden: Sequence[int] = (32,),
        *,
        classes: int = 0,
        mark_dim: int = 0,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.classes, self.mark_dim = classes, mark_dim
        self.net = MLP(
            state_dim + (classes or mark_dim) + context_dim, state_dim, hidden, activation=torch.tanh
        )

    def forward(self, t: Tensor, z: Tensor, mark: Tensor, context: Tensor | None = None) -> Tensor:
        seen = one_hot(mark, self.classes, z) if self.classes else mark[..., : self.mark_dim].to(z)
        parts = [z, seen.expand(*z.shape[:-1], seen.shape[-1])]
        return z + self.net(torch.cat(parts if context is None else [*parts, context], -1))


class JumpIntensity(nn.Module):
    """lambda_k(z) = exp(base_k + slope_k s(z) + net_k(asinh z)) + sum_j rise_kj max(z_j, 0), of every kind k of jump.

    s(z) is z where it integrates and asinh z where it decays: there the intensity follows a power of z, and a burst
    larger than those in the data is no catastrophe. Excitation adds up (`rise`, of the coordinates that decay), relief
    and inhibition multiply (`slope`). Poisson's, Hawkes' and the self-correcting process are members; the net, which
    starts at 0, is for all else.

    Args:
        state_dim: size of z.
        hidden: widths of the net's hidden layers; () leaves the net out.
        kinds: how many kinds of jumps.
        integrators: how many first coordinates do not decay, and so do not add up.
        context_dim: size of a context, which enters the net.
        rate: the intensity of all kinds together at z = 0, at the start of training.

    Shapes:
        z (..., state) -> (..., kind).

    Example:
        >>> import torch, stochdyn as sd
        >>> intensity = sd.JumpIntensity(3, rate=0.5)
        >>> intensity(torch.zeros(1), torch.zeros(4, 3)).shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        state_dim: int,
        hidden: Sequence[int] = (32,),
        *,
        kinds: int = 1,
        integrators: int = 1,
        context_dim: int = 0,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        if not (rate > 0 and kinds > 0):
            raise FieldError(f"JumpIntensity: `rate` and `kinds` must be positive, got {rate:g} and {kinds}.")
        self.integrators = integrators
        self.base = nn.Parameter(torch.full((kinds,), math.log(rate / kinds)))
        self.slope = nn.Parameter(torch.zeros(kinds, state_dim))
        start = math.log(0.1 * rate / kinds)
        self.log_rise = nn.Parameter(torch.full((kinds, state_dim - integrators), start))
        self.net = MLP(state_dim + context_dim, kinds, hidden, activation=torch.tanh) if len(hidden) else None
        if self.net is not None:
            nn.init.zeros_(self.net.layers[-1].weight)
            nn.init.zeros_(self.net.layers[-1].bias)

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        # Counts grow without bound: in a burst larger than any before, exp(z) would be beyond all measure.
        inputs = torch.asinh(z)
        steady, lately = z[..., : self.integrators], inputs[..., self.integrators :]
        log = self.base + torch.cat([steady, lately], -1) @ self.slope.mT
        if self.net is not None:
            log = log + self.net(inputs if context is None else torch.cat([inputs, context], -1))
        return log.exp() + z[..., self.integrators :].clamp_min(0) @ self.log_rise.exp().mT


def one_hot(mark: Tensor, classes: int, like: Tensor) -> Tensor:
    """(..., class) of a mark (..., 1), in the dtype of another tensor.

    Example:
        >>> one_hot(torch.tensor([[1.0]]), 3, torch.zeros(1))
        tensor([[0., 1., 0.]])
    """
    return (mark[..., :1] == torch.arange(classes, device=mark.device)).to(like)
