"""Neural fields: multilayer perceptrons whose weights may have batch dimensions, and nets per coordinate."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from stochdyn.errors import FieldError, ShapeError
from stochdyn.fields.time import AbstractTimeFeatures

Activation = Callable[[Tensor], Tensor]


class Linear(nn.Module):
    """y = W x + b, where W and b may have batch dimensions (one set of weights per particle, say).

    Args:
        inputs, outputs: sizes.

    Shapes:
        x (*batch, inputs) to (*batch, outputs); weight (*batch, outputs, inputs), bias (*batch, outputs), whose batch
        broadcasts against that of x.

    Example:
        >>> layer = Linear(2, 3)
        >>> del layer.weight
        >>> layer.weight = torch.randn(5, 1, 3, 2)  # five particles, each for all series
        >>> layer(torch.randn(5, 8, 2)).shape
        torch.Size([5, 8, 3])
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(max(inputs, 1))
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b, where W (..., outputs, inputs) and b (..., outputs) may have a batch.

    Example:
        >>> affine(torch.ones(8, 2), torch.ones(5, 1, 3, 2), None).shape
        torch.Size([5, 8, 3])
    """
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return nn.functional.linear(x, weight, bias)
    # einsum multiplies without copies of the weights for every time and series, which matmul would make.
    y = torch.einsum("...oi,...i->...o", weight, x)
    return y if bias is None else y + bias


class MLP(nn.Module):
    """A multilayer perceptron; the weights may have batch dimensions, see `Linear`.

    Args:
        inputs, outputs: sizes of the last dimension.
        hidden: widths of the hidden layers.
        activation: between the layers; smooth ones keep a drift smooth.
        final: applied to the output, e.g. `torch.sigmoid`.

    Shapes:
        (*batch, inputs) to (*batch, outputs).

    Raises:
        ShapeError: if a size is below 1.

    Example:
        >>> import stochdyn as sd
        >>> sd.MLP(3, 2, hidden=(16, 16))(torch.randn(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        *,
        activation: Activation = nn.functional.softplus,
        final: Activation | None = None,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        if min(widths) < 1:
            raise ShapeError(
                f"MLP: sizes must be at least 1, got {widths}. `hidden` are the widths of layers."
            )
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        self.activation, self.final = activation, final

    def forward(self, x: Tensor) -> Tensor:
        return self.after_first(self.layers[0](x))

    def after_first(self, x: Tensor) -> Tensor:
        """The rest of the net, from the output of its first linear layer on."""
        for layer in list(self.layers)[1:]:
            x = layer(self.activation(x))
        return x if self.final is None else self.final(x)


class NeuralField(nn.Module):
    """A field (t, z[, context]) -> (..., outputs) by a multilayer perceptron.

    The first layer is applied to state, context and time apart, so that a path can apply it to the context of all its
    steps at once (`contribution`), outside its loop over time. A field of your own may have the same two methods.

    Args:
        state_dim: size of z.
        outputs: size of what it returns, by default `state_dim`.
        hidden: widths of the hidden layers.
        context_dim: size of the context, 0 for none.
        time: whether the field depends on time: True adds t as an input, so times near unit scale; an object such as
            `FourierTime` adds its features of t instead.
        activation, final: see `MLP`.

    Raises:
        FieldError: when called with a context of another size than it was made for.

    Example:
        >>> import stochdyn as sd
        >>> drift = sd.NeuralField(2, hidden=(16,), context_dim=3)
        >>> drift(torch.zeros(1), torch.randn(5, 2), torch.randn(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        state_dim: int,
        outputs: int | None = None,
        hidden: Sequence[int] = (64, 64),
        *,
        context_dim: int = 0,
        time: bool | AbstractTimeFeatures = False,
        activation: Activation = nn.functional.softplus,
        final: Activation | None = None,
    ) -> None:
        super().__init__()
        self.state_dim, self.context_dim, self.time = state_dim, context_dim, time
        size = state_dim + context_dim + (int(time) if isinstance(time, bool) else time.size)
        self.net = MLP(size, outputs or state_dim, hidden, activation=activation, final=final)

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.from_contribution(t, z, self.contribution(context))

    def contribution(self, context: Tensor | None) -> Tensor:
        """What the context, and the bias, add to the first layer: (..., width)."""
        got = 0 if context is None else context.shape[-1]
        if got != self.context_dim:
            raise FieldError(
                f"The field was made for a context of size {self.context_dim}, got {got}. Set context_dim={got}."
            )
        first = self.net.layers[0]
        if context is None:
            return first.bias
        weight = first.weight[..., self.state_dim : self.state_dim + self.context_dim]
        return affine(context, weight, first.bias)

    def from_contribution(self, t: Tensor, z: Tensor, contribution: Tensor) -> Tensor:
        """The field's value, given what its context contributes."""
        weight = self.net.layers[0].weight
        if contribution.dim() == 1 and weight.dim() == 2 and not self.time and not self.context_dim:
            return self.net(z)
        return self._from_parts(t, z, contribution, self._parts())

    def prepared(self, context: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """The contributions of all steps, and the field as a function of t, z and one step's contribution."""
        parts = self._parts()  # sliced once: a slice per step would cost a full-size gradient each
        return self.contribution(context), lambda t, z, c: self._from_parts(t, z, c, parts)

    def _parts(self) -> tuple[Tensor, Tensor]:
        weight = self.net.layers[0].weight
        rest = (
            weight[..., -1]
            if isinstance(self.time, bool)
            else weight[..., self.state_dim + self.context_dim :]
        )
        return weight[..., : self.state_dim], rest

    def _from_parts(self, t: Tensor, z: Tensor, contribution: Tensor, parts: tuple[Tensor, Tensor]) -> Tensor:
        x = affine(z, parts[0], None) + contribution
        if not isinstance(self.time, bool):
            x = x + affine(self.time(t), parts[1], None)
        elif self.time:
            x = x + t * parts[1]
        return self.net.after_first(x)


class ElementwiseField(nn.Module):
    """One small net per coordinate, all at once: output d depends on z[..., d] alone.

    The usual diagonal diffusion of a neural SDE. By default positive, between `floor` and `floor + scale`.

    Args:
        state_dim: number of coordinates.
        hidden: width of the hidden layer of every net.
        scale: of the sigmoid at the end.
        floor: added to it, so that the noise never vanishes.
        activation: of the hidden layer.

    Shapes:
        z (*batch, state) to (*batch, state).

    Example:
        >>> import stochdyn as sd
        >>> diffusion = sd.ElementwiseField(4, hidden=16)
        >>> bool((diffusion(torch.zeros(1), torch.randn(5, 4)) > 0).all())
        True
    """

    elementwise = True

    @property
    def fan_in(self) -> dict[str, int | None]:
        """How many inputs every weight sums, None for biases; see `bayesian`."""
        return {"weight": 1, "bias": None, "out_weight": self.bias.shape[-1], "out_bias": None}

    def __init__(
        self,
        state_dim: int,
        hidden: int = 64,
        *,
        scale: float = 1.0,
        floor: float = 1e-3,
        activation: Activation = nn.functional.softplus,
    ) -> None:
        super().__init__()
        if not (scale > 0 and floor >= 0):
            raise FieldError(
                f"ElementwiseField: needs scale > 0 and floor >= 0, got {scale} and {floor}. Noise is positive."
            )
        bound = 1 / math.sqrt(hidden)
        self.weight = nn.Parameter(torch.empty(state_dim, hidden).uniform_(-1, 1))
        self.bias = nn.Parameter(torch.empty(state_dim, hidden).uniform_(-1, 1))
        self.out_weight = nn.Parameter(torch.empty(state_dim, hidden).uniform_(-bound, bound))
        self.out_bias = nn.Parameter(torch.empty(state_dim).uniform_(-bound, bound))
        self.scale, self.floor, self.activation = scale, floor, activation

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        out = self._output(self.activation(self._before(z)))
        return self.scale * torch.sigmoid(out) + self.floor

    @property
    def closed_slope(self) -> bool:
        """Whether `with_slope` knows the activation's derivative."""
        return self.activation is nn.functional.softplus

    def with_slope(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The value, and its derivative by z, coordinate by coordinate, with the softplus activation in closed form.

        Raises:
            FieldError: with another activation.
        """
        if not self.closed_slope:
            raise FieldError(
                "ElementwiseField.with_slope needs the softplus activation; use autograd for others."
            )
        before = self._before(z)
        share = torch.sigmoid(self._output(nn.functional.softplus(before)))
        inner = (torch.sigmoid(before) * (self.out_weight * self.weight)).sum(-1)
        return self.scale * share + self.floor, self.scale * share * (1 - share) * inner

    def _before(self, z: Tensor) -> Tensor:
        """What goes into the hidden units: (*batch, state, hidden)."""
        return torch.addcmul(self.bias, z[..., None], self.weight)

    def _output(self, hidden: Tensor) -> Tensor:
        return (hidden * self.out_weight).sum(-1) + self.out_bias
