"""How the gradient of a solve is computed: the same number, at another price in time and memory."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.errors import DivergedError, FieldError
from stochdyn.fields import Field, evaluate
from stochdyn.solvers.integrator import AbstractMean, AbstractODESolver, Drift
from stochdyn.solvers.recompute import reads, recomputed
from stochdyn.solvers.walk import Walk

Part = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class Flow:
    """An ODE to be solved: the field, its context, the state at the first of the times, and the solver.

    Args:
        field: `(t, z[, context])`.
        context: (gap, *batch, context_dim), one row for each gap between the times, or (1, ...) for all, or None.
        z: (*batch, state).
        times: (time, ..., 1) float64.
        solver: what integrates.
    """

    field: Field
    context: Tensor | None
    z: Tensor
    times: Tensor
    solver: AbstractODESolver

    def row(self, gap: int) -> Tensor | None:
        """The context that holds in a gap."""
        return None if self.context is None else self.context[gap if self.context.shape[0] > 1 else 0]

    def bound(self, gap: int = 0) -> Drift:
        """The field with the context of a gap."""
        row = self.row(gap)
        return lambda t, z: evaluate("field", self.field, t, z, row)

    def part(self, z: Tensor, start: int, stop: int) -> Tensor:
        """The states from the time `start` on, where it is z, to the time `stop`; both are positions."""
        if self.context is None or self.context.shape[0] == 1:
            return self.solver.solve(self.bound(), z, self.times[start : stop + 1])
        states = [z]
        for k in range(start, stop):
            states.append(self.solver.solve(self.bound(k), states[-1], self.times[k : k + 2])[-1])
        return torch.stack(states)

    def fine(self) -> tuple["Flow", int]:
        """The same solution step by step, and how many steps make a gap."""
        solver, context = self.solver, self.context
        if not isinstance(solver, AbstractMean) or solver.substeps == 1:
            return self, 1
        if context is not None and context.shape[0] > 1:
            context = context.repeat_interleave(solver.substeps, 0)
        times = solver.fine(self.times)
        return replace(
            self, times=times, context=context, solver=replace(solver, substeps=1)
        ), solver.substeps


class AbstractGradient(ABC):
    """How the gradient of a solve is computed."""

    @abstractmethod
    def solve(self, flow: Flow) -> Tensor:
        """The states (time, *batch, state)."""

    @abstractmethod
    def simulate(self, walk: Walk) -> Tensor:
        """The states (time, *batch, state) of an SDE."""


def check_gradient(name: str, gradient: object) -> None:
    """Refuse what is not a way to a gradient.

    Raises:
        FieldError: naming the ways.

    Example:
        >>> check_gradient("odeint", Direct())
    """
    if not isinstance(gradient, AbstractGradient):
        raise FieldError(
            f"{name}: `gradient` must be sd.Direct(), sd.Checkpointed() or sd.Adjoint(), got {gradient!r}."
        )


@dataclass(frozen=True)
class Direct(AbstractGradient):
    """Backpropagation through the solver's operations: exact for what was computed, fastest, memory grows with steps.

    The default. Raises `FieldError` for a solver that is not differentiable.

    Example:
        >>> import torch, stochdyn as sd
        >>> k = torch.tensor([1.0], requires_grad=True)
        >>> sd.odeint(lambda t, z: -k * z, torch.ones(1), torch.tensor([0.0, 1.0]))[-1].backward()
        >>> k.grad
        tensor([-0.3679])
    """

    def solve(self, flow: Flow) -> Tensor:
        _check_differentiable(flow)
        return flow.part(flow.z, 0, flow.times.shape[0] - 1)

    def simulate(self, walk: Walk) -> Tensor:
        return walk.whole()


@dataclass(frozen=True)
class Checkpointed(AbstractGradient):
    """Keep the state at the ends of some segments only, and compute each segment again when its gradient is due.

    The same gradient as `Direct` up to rounding; of an adaptive solver, which starts anew in each segment, up to its
    tolerance. One more solve in time, for about 1/30 of the memory at 1,000 steps, which `Direct` may pay for in time
    too. Fields must be the same function at both passes: no dropout, no noise drawn inside. There are no second
    derivatives.

    Args:
        segments: how many; None is the square root of the number of steps.

    Raises:
        FieldError: if `segments` is below 1; in the backward pass, if the field reads a tensor that needs a gradient
            and that it did not read in its first step, or if a second derivative is asked for.

    References:
        Gholami, Keutzer & Biros, "ANODE: unconditionally accurate memory-efficient gradients for neural ODEs", 2019,
        https://arxiv.org/abs/1902.10298
        Griewank & Walther, "Algorithm 799: revolve", 2000, https://doi.org/10.1145/347837.347846

    Example:
        >>> import torch, stochdyn as sd
        >>> k, ts = torch.tensor([1.0], requires_grad=True), torch.linspace(0, 1, 101)
        >>> z = sd.odeint(lambda t, z: -k * z, torch.ones(1), ts, solver=sd.Heun(), gradient=sd.Checkpointed())
        >>> z[-1].backward(); k.grad
        tensor([-0.3679])
    """

    segments: int | None = None

    def __post_init__(self) -> None:
        if self.segments is not None and self.segments < 1:
            raise FieldError(f"Checkpointed: `segments` must be at least 1, got {self.segments}.")

    def solve(self, flow: Flow) -> Tensor:
        _check_differentiable(flow)
        fine, stride = flow.fine()
        return self._run(fine.part, fine.z, fine.times.shape[0] - 1, stride)

    def simulate(self, walk: Walk) -> Tensor:
        if walk.solver.reversible:
            raise FieldError(
                f"Checkpointed: {type(walk.solver).__name__} carries more than the state from step to step. Use "
                "gradient=sd.Adjoint(), which is exact for it."
            )
        walk = walk.fixed()
        return self._run(walk.part, walk.problem.z, walk.steps)

    def _run(self, part: Part, z: Tensor, steps: int, stride: int = 1) -> Tensor:
        """The states at every `stride`-th of so many steps."""
        size = self.length(steps)
        if size >= steps or not torch.is_grad_enabled():
            return part(z, 0, steps)[::stride]
        read = reads(lambda z: part(z, 0, 1), z)
        states = [z[None]]
        for start in range(0, steps, size):
            stop = min(start + size, steps)
            out = recomputed(_segment(part, start, stop, stride), z, read)
            z = out[-1]
            states.append(out[:-1])
        return torch.cat(states)

    def length(self, steps: int) -> int:
        """How many steps a segment has."""
        segments = self.segments or max(1, math.isqrt(steps))
        return max(1, -(-steps // segments))


def _check_differentiable(flow: Flow) -> None:
    if flow.solver.differentiable or not torch.is_grad_enabled():
        return
    if flow.z.requires_grad or flow.bound()(flow.times[0].to(flow.z.dtype), flow.z).requires_grad:
        raise FieldError(
            f"{type(flow.solver).__name__} has no gradient of its own, and one is asked for. Pass "
            "gradient=sd.Adjoint(), use sd.Rosenbrock(), or solve under torch.no_grad()."
        )


def _segment(part: Part, start: int, stop: int, stride: int) -> Callable[[Tensor], Tensor]:
    """The states at every `stride`-th time in a segment, and the one at its end."""
    first = (start // stride + 1) * stride - start

    def run(z: Tensor) -> Tensor:
        states = part(z, start, stop)
        return torch.cat([states[first::stride], states[-1:]])

    return run


@dataclass(frozen=True)
class Adjoint(AbstractGradient):
    """Solve the adjoint equation backwards in time: memory that does not grow with the number of steps.

    Of an SDE, `ReversibleHeun` alone, which goes backwards step by step without error: the gradient is that of what was
    computed, up to rounding. The rest is about ODEs.

    da/dt = -a df/dz from the last time to the first, with the state solved backwards beside it from the kept states at
    all times. It is the gradient of the exact flow, so it agrees with `Direct` up to the solver's error only, and it is
    wrong where the flow backwards in time is unstable (strong decay): prefer `Checkpointed`. Times get no gradient.

    Everything that needs a gradient must be visible: the parameters of the field, a `torch.nn.Module`, the start and
    the context. A tensor that the field reads from elsewhere would silently lose its gradient (in torchdiffeq it does);
    it is refused here. Give latents as `context`, and read them in the field as `field(t, z, context)`.

    Args:
        solver: for the backward solve, by default the forward one.

    Raises:
        FieldError: when solving, if the field reads a tensor that needs a gradient and is neither a parameter of the
            field nor the context; if the SDE's solver is another one.

    References:
        Chen, Rubanova, Bettencourt & Duvenaud, "Neural ordinary differential equations", 2018,
        https://arxiv.org/abs/1806.07366; Kidger, Foster, Li & Lyons, "Efficient and accurate gradients for neural
        SDEs", 2021, https://arxiv.org/abs/2105.13493

    Example:
        >>> import torch, stochdyn as sd
        >>> k = torch.tensor([1.0], requires_grad=True)
        >>> z = sd.odeint(lambda t, z, k: -k * z, torch.ones(1), torch.tensor([0.0, 1.0]), context=k,
        ...               gradient=sd.Adjoint())
        >>> z[-1].backward(); k.grad
        tensor([-0.3679])
    """

    solver: AbstractODESolver | None = None

    def solve(self, flow: Flow) -> Tensor:
        backwards = self.solver or flow.solver
        if not backwards.any_system:
            raise FieldError(
                f"Adjoint: {type(backwards).__name__} cannot solve the equation backwards, whose state holds adjoints "
                "and parameters too. Pass another solver for it, e.g. sd.Adjoint(sd.RungeKutta4(4)), or use "
                "gradient=sd.Checkpointed()."
            )
        names, values = _parameters(flow.field)
        _check_visible(flow, names, values)
        given = flow.context if flow.context is not None else flow.z.new_zeros(1, 0)
        setup = replace(flow, context=None), backwards, names, flow.context is not None
        return _AdjointSolve.apply(setup, flow.z, given, *values)

    def simulate(self, walk: Walk) -> Tensor:
        if not walk.solver.reversible:
            raise FieldError(
                f"Adjoint: {type(walk.solver).__name__} cannot be run backwards exactly. Use sd.ReversibleHeun(), or "
                "gradient=sd.Checkpointed()."
            )
        walk = walk.fixed()
        if not torch.is_grad_enabled():
            return walk.whole()
        read = reads(lambda z: walk.part(z, 0, 1), walk.problem.z)
        if read is None:
            raise FieldError(
                "Adjoint: drift and diffusion read a tensor and another that was made from it, or cannot be watched. "
                "Read the one alone, or use gradient=sd.Checkpointed() with another solver."
            )
        return walk.solver.adjoint(walk.problem, walk.motion, read)


def _parameters(field: Any) -> tuple[list[str], list[Tensor]]:
    named = (
        [(n, p) for n, p in field.named_parameters() if p.requires_grad]
        if isinstance(field, nn.Module)
        else []
    )
    return [n for n, _ in named], [p for _, p in named]


def _with(field: Any, names: list[str], values: tuple[Tensor, ...] | list[Tensor]) -> Field:
    """The field with other tensors in the place of its parameters."""
    if not names:
        return field
    table = dict(zip(names, values, strict=True))
    return lambda *inputs: torch.func.functional_call(field, table, inputs)


def _check_visible(flow: Flow, names: list[str], values: list[Tensor]) -> None:
    """With every visible tensor replaced by one without a gradient, nothing may be left that has one."""
    row = flow.row(0)
    context = None if row is None else row.detach()
    with torch.enable_grad():
        field = _with(flow.field, names, [v.detach() for v in values])
        value = evaluate("field", field, flow.times[0].to(flow.z.dtype), flow.z.detach(), context)
    if value.requires_grad:
        raise FieldError(
            "Adjoint: the field reads a tensor that needs a gradient and is neither one of its parameters nor the "
            "context, so its gradient would be lost. Pass it as `context=` and read it as field(t, z, context), make "
            "it a parameter of the field, or use gradient=sd.Checkpointed()."
        )


class _AdjointSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setup: tuple[Any, ...], z: Tensor, context: Tensor, *values: Tensor) -> Tensor:
        flow, _, names, has_context = setup
        flow = replace(flow, field=_with(flow.field, names, values), context=context if has_context else None)
        states = flow.part(z, 0, flow.times.shape[0] - 1)
        ctx.setup = setup
        ctx.save_for_backward(states, context, *values)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        flow, solver, names, has_context = ctx.setup
        states, context, *values = ctx.saved_tensors
        adjoint, sums = grads[0][-1], [torch.zeros_like(v) for v in values]
        by_row = torch.zeros_like(context)
        for k in range(states.shape[0] - 1, 0, -1):
            row = k - 1 if context.shape[0] > 1 else 0
            gap = _Gap(flow, solver, names, context[row] if has_context else None, values)
            adjoint, of_row, *sums = gap.back(k, states[k], [adjoint, by_row[row], *sums])
            by_row[row] = of_row
            adjoint = adjoint + grads[0][k - 1]
        return (None, adjoint, by_row if has_context else None, *sums)


@dataclass(frozen=True)
class _Gap:
    """The adjoint equation over one gap, of one vector (state, adjoint, sums), in time from its end over its length."""

    flow: Flow
    solver: AbstractODESolver
    names: list[str]
    context: Tensor | None
    values: list[Tensor]

    def back(self, k: int, z: Tensor, sums: list[Tensor]) -> list[Tensor]:
        """The adjoint and the sums at the start of the gap before time k."""
        t, before = self.flow.times[k], self.flow.times[k - 1]
        end, length = t.to(z.dtype), (t - before).to(z.dtype)
        unit = torch.arange(2, dtype=torch.float64, device=z.device)[:, None]
        shapes = [z, *sums]
        sizes = [x.numel() for x in shapes]

        def pieces(flat: Tensor) -> list[Tensor]:
            return [p.reshape(s.shape) for p, s in zip(flat.split(sizes), shapes, strict=True)]

        def rates(r: Tensor, flat: Tensor) -> Tensor:
            x, a, *_ = pieces(flat)
            return self.rates(end - r * length, length, x, a)

        start = torch.cat([x.reshape(-1) for x in shapes])
        try:
            return pieces(self.solver.solve(rates, start, unit, sizes)[-1])[1:]
        except DivergedError as error:
            raise DivergedError(
                f"The adjoint equation failed between times {t.max().item():g} and {before.min().item():g}, backwards: "
                "the flow is unstable in that direction, or stiff. Use gradient=sd.Checkpointed()."
            ) from error

    @torch.enable_grad()
    def rates(self, t: Tensor, length: Tensor, x: Tensor, a: Tensor) -> Tensor:
        context = x.new_zeros(0) if self.context is None else self.context
        leaves = [v.detach().requires_grad_() for v in (x, context, *self.values)]
        field = _with(self.flow.field, self.names, leaves[2:])
        f = evaluate("field", field, t, leaves[0], None if self.context is None else leaves[1])
        f = (length * f).expand(x.shape)
        found: Any = [None] * len(leaves)
        if f.requires_grad:
            found = torch.autograd.grad(f, leaves, a.detach(), allow_unused=True)
        moved = [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True)]
        return torch.cat([-f.detach().reshape(-1), *[g.reshape(-1) for g in moved]])
