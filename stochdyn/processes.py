"""Processes: modules that return paths; what is learnable about a path, in one place."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from stochdyn.errors import FieldError
from stochdyn.fields import AbstractDiffusion, ElementwiseField, NeuralField
from stochdyn.paths import SDEPath
from stochdyn.solvers import AbstractKernel, EulerMaruyama


class NeuralSDE(nn.Module):
    """A stochastic differential equation whose drift and diffusion are networks: `process(ts)` is its path.

    dz = f(t, z, context) dt + g(z) dW, with a normal start of learned mean and spread. Give `drift` or `diffusion` to
    put a module of your own in place of a network: known physics, a bounded net.

    Args:
        state_dim: size of z.
        hidden: widths of the drift's hidden layers; the diffusion's nets (one per coordinate) have one of the last
            width.
        context_dim: size of what `context` gives to the drift, 0 for none.
        time: whether the drift depends on time.
        drift: a module `(t, z[, context]) -> (..., state)` in place of the network.
        diffusion: a module likewise, or a `MatrixDiffusion`, or a tensor.
        solver: the kernel; steps are first order by default, which suits a learned drift.

    Shapes:
        ts (*batch, time), context (*batch, context_dim) or (*batch, time, context_dim); the path's event_shape is
        (time, state).

    Raises:
        FieldError: if a context is missing, or given to a process without one.

    References:
        Li, Wong, Chen & Duvenaud, "Scalable gradients for stochastic differential equations", 2020,
        https://arxiv.org/abs/2001.01328

    Example:
        >>> import stochdyn as sd
        >>> process = sd.NeuralSDE(state_dim=2, hidden=(16,))
        >>> path = process(torch.linspace(0, 1, 11))
        >>> path.rsample((5,)).shape
        torch.Size([5, 11, 2])
    """

    def __init__(
        self,
        state_dim: int,
        hidden: int | Sequence[int] = (64, 64),
        *,
        context_dim: int = 0,
        time: bool = False,
        drift: nn.Module | None = None,
        diffusion: object | None = None,
        solver: AbstractKernel = EulerMaruyama(),  # noqa: B008
    ) -> None:
        super().__init__()
        widths = (hidden, hidden) if isinstance(hidden, int) else tuple(hidden)
        self.state_dim, self.context_dim, self.solver = state_dim, context_dim, solver
        self.drift = drift or NeuralField(state_dim, hidden=widths, context_dim=context_dim, time=time)
        self._set_diffusion(ElementwiseField(state_dim, widths[-1]) if diffusion is None else diffusion)
        self.start_loc = nn.Parameter(torch.zeros(state_dim))
        self.start_log_scale = nn.Parameter(torch.zeros(state_dim))

    def _set_diffusion(self, diffusion: object) -> None:
        if isinstance(diffusion, Tensor) and not isinstance(diffusion, nn.Parameter):
            self.register_buffer("diffusion", diffusion)
            return
        self.diffusion = diffusion
        if isinstance(diffusion, AbstractDiffusion) and isinstance(diffusion.field, nn.Module | nn.Parameter):
            self.diffusion_field = (
                diffusion.field
            )  # a MatrixDiffusion is no module: its field is learned here

    def initial(self) -> dist.TorchDistribution:
        """The learned start."""
        return dist.Normal(self.start_loc, self.start_log_scale.exp()).to_event(1)

    def forward(
        self,
        ts: Tensor,
        context: Tensor | None = None,
        initial: "dist.TorchDistribution | Tensor | None" = None,
    ) -> SDEPath:
        got = 0 if context is None else context.shape[-1]
        if got != self.context_dim:
            raise FieldError(f"NeuralSDE: made for a context of size {self.context_dim}, got {got}.")
        start = self.initial() if initial is None else initial
        return SDEPath(self.drift, self.diffusion, start, ts, solver=self.solver, context=context)
