"""A field made of a learned energy."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stochdyn.errors import FieldError
from stochdyn.fields.neural import MLP, Activation, affine

SLOPES: dict[Activation, Callable[[Tensor], Tensor]] = {
    nn.functional.softplus: torch.sigmoid,
    torch.tanh: lambda x: 1 - torch.tanh(x).square(),
    torch.sin: torch.cos,
    torch.sigmoid: lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x)),
}


class HamiltonianField(nn.Module):
    """Motion in a learned energy: z = (q, p), dq = dH/dp dt, dp = -(dH/dq + friction dH/dp) dt, with H a network.

    Without friction H is conserved along trajectories; with it dH/dt = -friction |dH/dp|^2 <= 0. An integrator keeps H
    up to its own error: a fourth-order one to (step)^4, the Euler method makes it grow. The gradient of H is written
    out, not taken by autograd: it costs two passes through the net, works under `torch.no_grad()`, and its own
    derivative is an ordinary one.

    Args:
        state_dim: size of z, even: the first half are positions, the second momenta.
        hidden: widths of the hidden layers of H.
        context_dim: size of the context, which H may depend on; 0 for none.
        friction: per time and unit of mass.
        learned: whether the friction is learned, from this value on; one for each degree of freedom.
        activation: softplus, tanh, sin or sigmoid.

    Shapes:
        z (*batch, state) to (*batch, state); weights may have a batch, see `Linear`.

    Raises:
        FieldError: for an odd `state_dim`, a negative friction (or 0 where learned), another activation; when called
            with a context of another size.

    References:
        Greydanus, Dzamba & Yosinski, "Hamiltonian neural networks", 2019, https://arxiv.org/abs/1906.01563;
        Zhong, Dey & Chakraborty, "Dissipative SymODEN", 2020, https://arxiv.org/abs/2002.08860

    Example:
        >>> import stochdyn as sd
        >>> field, z = sd.HamiltonianField(2, hidden=(16,)).double(), torch.ones(2).double()
        >>> before, dt = field.energy(z), torch.tensor(0.1).double()
        >>> with torch.no_grad():
        ...     for _ in range(100):
        ...         z = sd.RungeKutta4().mean(field, torch.zeros(1), dt, z)
        >>> bool((field.energy(z) - before).abs() < 1e-6)
        True
    """

    friction_buffer: Tensor

    def __init__(
        self,
        state_dim: int,
        hidden: Sequence[int] = (64, 64),
        *,
        context_dim: int = 0,
        friction: float = 0.0,
        learned: bool = False,
        activation: Activation = nn.functional.softplus,
    ) -> None:
        super().__init__()
        if state_dim < 2 or state_dim % 2:
            raise FieldError(
                f"HamiltonianField: `state_dim` must be even (positions, momenta), got {state_dim}."
            )
        if friction < 0 or (learned and friction == 0):
            raise FieldError(
                f"HamiltonianField: friction must be at least 0, and positive where it is learned, got {friction}."
            )
        if activation not in SLOPES:
            raise FieldError(
                "HamiltonianField: the activation must be one of torch's softplus, tanh, sin, sigmoid."
            )
        self.state_dim, self.context_dim = state_dim, context_dim
        self.net = MLP(state_dim + context_dim, 1, hidden, activation=activation)
        values = torch.full((state_dim // 2,), float(friction))
        self.log_friction = nn.Parameter(values.log()) if learned else None
        self.register_buffer("friction_buffer", values, persistent=not learned)

    @property
    def friction(self) -> Tensor:
        """The friction of every degree of freedom."""
        return self.friction_buffer if self.log_friction is None else self.log_friction.exp()

    def energy(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """H, (*batch)."""
        return self.net(self._inputs(z, context))[..., 0]

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        slope = gradient(self.net, self._inputs(z, context))[..., : self.state_dim]
        by_position, by_momentum = slope.chunk(2, -1)
        return torch.cat([by_momentum, -by_position - self.friction * by_momentum], -1)

    def _inputs(self, z: Tensor, context: Tensor | None) -> Tensor:
        got = 0 if context is None else context.shape[-1]
        if got != self.context_dim:
            raise FieldError(
                f"HamiltonianField: made for a context of size {self.context_dim}, got {got}. Set context_dim={got}."
            )
        return z if context is None else torch.cat([z, context.expand(*z.shape[:-1], got)], -1)


def gradient(net: MLP, x: Tensor) -> Tensor:
    """The gradient of a net with one output by its input, (*batch, inputs), written out backwards.

    Example:
        >>> x = torch.randn(5, 3)
        >>> gradient(MLP(3, 1, (8,), activation=torch.tanh), x).shape
        torch.Size([5, 3])
    """
    layers = list(net.layers)
    before = []
    for layer in layers[:-1]:
        before.append(affine(x, layer.weight, layer.bias))
        x = net.activation(before[-1])
    slope, out = SLOPES[net.activation], layers[-1].weight[..., 0, :]
    for layer, a in zip(reversed(layers[:-1]), reversed(before), strict=True):
        out = affine(out * slope(a), layer.weight.mT, None)
    return out.expand(*torch.broadcast_shapes(out.shape[:-1], x.shape[:-1]), out.shape[-1])
