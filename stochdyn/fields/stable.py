"""Fields with a promise about where their trajectories go."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stochdyn.errors import FieldError
from stochdyn.fields.neural import Activation, NeuralField, affine
from stochdyn.fields.time import AbstractTimeFeatures


class AntisymmetricField(nn.Module):
    """f = speed * tanh((W - W' - damping I) z + V [context, time] + b): no direction in which it locally expands.

    Its Jacobian at any state is D (W - W' - damping I) with D = diag(speed * tanh') >= 0. Similar to sqrt(D) (W - W')
    sqrt(D) - damping D, antisymmetric plus negative semidefinite, it has eigenvalues with real parts in [-damping max
    D, 0]. That is a statement about one state. It does not say that two trajectories stay close for ever, as D changes
    along them; `BoundedField` and `HamiltonianField` have promises about whole trajectories. Since |tanh| <= 1, a
    trajectory does move by no more than `speed` per unit of time.

    Args:
        state_dim: size of z.
        context_dim: size of the context, 0 for none.
        damping: at least 0. At 0 eigenvalues are imaginary, which the Euler method amplifies: then keep steps small.
        time: whether it depends on time, as in `NeuralField`.
        activation: non-decreasing, else the promise does not hold.

    Shapes:
        z (*batch, state) to (*batch, state); weights may have a batch, see `Linear`.

    Raises:
        FieldError: if `damping` is negative, or when called with a context of another size.

    References:
        Haber & Ruthotto, "Stable architectures for deep neural networks", 2018, https://arxiv.org/abs/1705.03341;
        Chang, Chen, Haber & Chi, "AntisymmetricRNN: a dynamical system view on recurrent neural networks", 2019,
        https://arxiv.org/abs/1902.09689

    Example:
        >>> import stochdyn as sd
        >>> field = sd.AntisymmetricField(3, damping=0.1)
        >>> J = torch.autograd.functional.jacobian(lambda z: field(torch.zeros(1), z), torch.randn(3))
        >>> bool((torch.linalg.eigvals(J).real <= 1e-6).all())
        True
    """

    def __init__(
        self,
        state_dim: int,
        *,
        context_dim: int = 0,
        damping: float = 0.01,
        time: bool | AbstractTimeFeatures = False,
        activation: Activation = torch.tanh,
    ) -> None:
        super().__init__()
        if not damping >= 0:
            raise FieldError(f"AntisymmetricField: `damping` must be at least 0, got {damping}.")
        self.context_dim, self.damping, self.activation, self.time = context_dim, damping, activation, time
        given = context_dim + (int(time) if isinstance(time, bool) else time.size)
        bound = 1 / math.sqrt(state_dim)
        self.weight = nn.Parameter(torch.empty(state_dim, state_dim).uniform_(-bound, bound))
        self.given_weight = (
            nn.Parameter(torch.empty(state_dim, given).uniform_(-bound, bound)) if given else None
        )
        self.bias = nn.Parameter(torch.zeros(state_dim))
        self.log_speed = nn.Parameter(torch.zeros(state_dim))

    @property
    def fan_in(self) -> dict[str, int | None]:
        """How many terms every weight sums, None for the bias; see `bayesian`."""
        given = 0 if self.given_weight is None else self.given_weight.shape[-1]
        return {"weight": 2 * len(self.log_speed), "given_weight": given, "bias": None}

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        got = 0 if context is None else context.shape[-1]
        if got != self.context_dim:
            raise FieldError(
                f"AntisymmetricField: made for a context of size {self.context_dim}, got {got}. Set context_dim={got}."
            )
        x = affine(z, self.weight - self.weight.mT, self.bias) - self.damping * z
        given = [] if context is None else [context]
        if self.time is not False:
            now = t if isinstance(self.time, bool) else self.time(t)
            given.append(now.expand(*z.shape[:-1], now.shape[-1]))
        if given and self.given_weight is not None:
            x = x + affine(torch.cat(given, -1), self.given_weight, None)
        return self.log_speed.exp() * self.activation(x)


class BoundedField(nn.Module):
    """f = decay (bound tanh(net(t, z[, context])) - z): a drift that cannot explode.

    Every trajectory obeys |z_d(t)| <= max(|z_d(0)|, bound_d), and in the end |z_d| <= bound_d + |z_d(0)| exp(-decay_d
    t): where |z_d| > bound_d, the rate of |z_d| is at most decay_d (bound_d - |z_d|) < 0. So does the Euler method with
    decay dt <= 1, as |z + f dt| <= (1 - decay dt) |z| + decay dt bound.

    With noise, a path never leaves the tube of half-width bound_d around the Ornstein-Uhlenbeck path of rate decay_d
    with the same noise and the same start: their difference e obeys de = decay (bound tanh(net) - e) dt. So with
    noise that does not depend on the state all its moments are bounded, whatever the weights: a prior for drifts of
    which no draw explodes.

    Args:
        state_dim: size of z.
        hidden: widths of the hidden layers.
        context_dim, time, activation: see `NeuralField`.
        bound: of every state, one number or one each; in the units of z, and fixed.
        decay: rate at the start of training, per time; learned, one for each state.

    Shapes:
        z (*batch, state) to (*batch, state).

    Raises:
        FieldError: if `bound` or `decay` is not positive.

    Example:
        >>> import stochdyn as sd
        >>> drift = sd.BoundedField(2, hidden=(16,), bound=3.0)
        >>> z = torch.full((1000, 2), 3.0)
        >>> bool((drift(torch.zeros(1), z) < 0).all())
        True
    """

    bound: Tensor

    def __init__(
        self,
        state_dim: int,
        hidden: Sequence[int] = (64, 64),
        *,
        context_dim: int = 0,
        time: bool | AbstractTimeFeatures = False,
        activation: Activation = nn.functional.softplus,
        bound: float | Sequence[float] = 1.0,
        decay: float = 1.0,
    ) -> None:
        super().__init__()
        limits = torch.as_tensor(bound, dtype=torch.get_default_dtype()).expand(state_dim).clone()
        if not ((limits > 0).all() and decay > 0):
            raise FieldError(f"BoundedField: `bound` and `decay` must be positive, got {bound} and {decay}.")
        self.net = NeuralField(
            state_dim,
            None,
            hidden,
            context_dim=context_dim,
            time=time,
            activation=activation,
            final=torch.tanh,
        )
        self.context_dim = context_dim
        self.register_buffer("bound", limits)
        self.log_decay = nn.Parameter(torch.full((state_dim,), float(decay)).log())

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._towards(self.net(t, z, context), z)

    def contribution(self, context: Tensor | None) -> Tensor:
        """What the context adds to the first layer; see `NeuralField`."""
        return self.net.contribution(context)

    def from_contribution(self, t: Tensor, z: Tensor, contribution: Tensor) -> Tensor:
        """The field's value, given what its context contributes."""
        return self._towards(self.net.from_contribution(t, z, contribution), z)

    def prepared(self, context: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """The contributions of all steps, and the field as a function of t, z and one step's contribution."""
        given, value = self.net.prepared(context)
        return given, lambda t, z, c: self._towards(value(t, z, c), z)

    def _towards(self, level: Tensor, z: Tensor) -> Tensor:
        return self.log_decay.exp() * (self.bound * level - z)
