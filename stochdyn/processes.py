"""Processes: modules that return paths; what is learnable about a path, in one place."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from stochdyn.data import Jumps
from stochdyn.errors import FieldError
from stochdyn.fields import (
    AbstractDiffusion,
    AdditiveJump,
    DecayFlow,
    ElementwiseField,
    JumpIntensity,
    NeuralField,
    NeuralJump,
)
from stochdyn.paths import JumpODE, SDEPath
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


class NeuralJumpODE(nn.Module):
    """A learned point process: `process(batch)` is the `JumpODE` over the windows of a batch of `Jumps`.

    A state flows between jumps and jumps with them; intensity and marks are read off it. As it stands the flow is
    linear with learned rates and the jumps add up, so that no solver and no loop are needed, and a network reads the
    intensity off the state: Poisson's, Hawkes' and the self-correcting process are members, and any process that
    forgets gradually is near one with enough states. With `flow=sd.NeuralField(state_dim)` and
    `jump_map=sd.NeuralJump(state_dim)` it is the neural jump SDE of Jia & Benson. Every part can be replaced by a
    module of your own.

    Args:
        state_dim: size of the state; the first coordinate integrates, the others decay.
        hidden: widths of the hidden layers of all networks.
        marks: the number of classes of the mark; or the law of other marks, `(t, z[, context])` -> distribution.
        mark_dim: how many quantities such a mark has.
        context_dim: size of the context, 0 for none: covariates, or latents of each series.
        rate: jumps per unit of time, at the start of training.
        shortest, longest: bounds of the scales of time of the decays, in units of time.
        flow, jump_map, intensity: in place of `DecayFlow`, of `AdditiveJump` (for quantities as marks `NeuralJump`),
            and of `JumpIntensity`.
        nodes: of the quadrature in a piece; `process(batch, nodes=None)` controls the error.
        **options: for `JumpODE`: step, solver, max_jumps and so on.

    Raises:
        FieldError: if a context is missing, or given to a process without one.

    References:
        Jia & Benson, "Neural jump stochastic differential equations", 2019, https://arxiv.org/abs/1905.10403;
        Mei & Eisner, "The neural Hawkes process", 2017, https://arxiv.org/abs/1612.09328

    Example:
        >>> import stochdyn as sd
        >>> jumps = sd.Jumps.from_list([[0.4, 1.1, 1.3], []], t0=0.0, t1=[4.0, 3.0], dtype=torch.float32)
        >>> process = sd.NeuralJumpODE(3, (16,), rate=0.5)
        >>> process(jumps).log_prob(jumps.values).shape
        torch.Size([2])
    """

    def __init__(
        self,
        state_dim: int,
        hidden: int | Sequence[int] = (32,),
        *,
        marks: int | Callable[..., Any] | None = None,
        mark_dim: int = 1,
        context_dim: int = 0,
        rate: float = 1.0,
        shortest: float = 0.5,
        longest: float = 5.0,
        flow: nn.Module | None = None,
        jump_map: nn.Module | None = None,
        intensity: nn.Module | None = None,
        nodes: int | None = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        classes = marks if isinstance(marks, int) else 0
        self.marks = None if isinstance(marks, int) else marks
        self.context_dim, self.nodes, self.options = context_dim, nodes, options
        self.flow = flow or DecayFlow(state_dim, shortest=shortest, longest=longest, push=-rate)
        sizes = {"kinds": max(classes, 1), "context_dim": context_dim, "rate": rate}
        self.intensity = intensity or JumpIntensity(state_dim, widths, **sizes)
        if jump_map is None and self.marks is None:
            jump_map = AdditiveJump(state_dim, classes)
        self.jump_map = jump_map or NeuralJump(state_dim, widths, mark_dim=mark_dim, context_dim=context_dim)
        self.initial = nn.Parameter(torch.zeros(state_dim))

    def forward(self, batch: Jumps, context: Tensor | None = None, **options: Any) -> JumpODE:
        """The process over the windows of a batch; `options` go before those given at the start."""
        got = 0 if context is None else context.shape[-1]
        if got != self.context_dim:
            raise FieldError(f"NeuralJumpODE: made for a context of size {self.context_dim}, got {got}.")
        given = {"nodes": self.nodes, **self.options, **options}
        fields = (self.flow, self.jump_map, self.intensity)
        return JumpODE(*fields, self.initial, batch.t0, batch.t1, marks=self.marks, context=context, **given)
