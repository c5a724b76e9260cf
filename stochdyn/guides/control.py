"""A control from the encoding: what messages cannot say, because it depends on the state."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from stochdyn.fields import NeuralField


class ControlNet(nn.Module):
    """u(t, z) in noise units: a network of the state, in units of the prior, and of the encoding of what follows.

    It starts at nothing, and is nothing where its context ends in a zero: where no observation follows.

    Args:
        state, noises: sizes of what goes in and comes out.
        features: size of the context, the last number (1 where something follows, 0 elsewhere) not counted.
        hidden: widths of the hidden layers.
        scale: centre and spread of every state under the prior, (state,) each.

    Example:
        >>> scale = torch.zeros(2), torch.ones(2)
        >>> control = ControlNet(2, 2, features=3, hidden=(8,), scale=scale)
        >>> bool((control(torch.zeros(1), torch.randn(5, 2), torch.randn(5, 4)) == 0).all())  # until trained
        True
    """

    centre: Tensor
    unit: Tensor

    def __init__(
        self, state: int, noises: int, features: int, hidden: Sequence[int], scale: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__()
        self.net = NeuralField(state, noises, hidden, context_dim=features).to(scale[1])
        last = self.net.net.layers[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()
        self.register_buffer("centre", scale[0].clone())
        self.register_buffer("unit", scale[1].clone())

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "ControlNet":
        """An empty one with the shapes of a state_dict."""
        weights = [v for k, v in state.items() if k.startswith("net.net.layers.") and k.endswith("weight")]
        states, inputs, scale = len(state["centre"]), weights[0].shape[1], (state["centre"], state["unit"])
        hidden = [w.shape[0] for w in weights[:-1]]
        return cls(states, weights[-1].shape[0], inputs - states, hidden, scale)

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return self.net(t, self._standard(z), context[..., :-1]) * context[..., -1:]

    def prepared(self, context: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """What the context contributes at all steps, and the control given one step's; see `NeuralField.prepared`."""
        given, value = self.net.prepared(context[..., :-1])
        flag = context[..., -1:].expand(*given.shape[:-1], 1)

        def control(t: Tensor, z: Tensor, c: Tensor) -> Tensor:
            return value(t, self._standard(z), c[..., :-1]) * c[..., -1:]

        return torch.cat([given, flag], -1), control

    def _standard(self, z: Tensor) -> Tensor:
        return (z - self.centre) / self.unit
