"""What all point processes share: density, intensity and compensator from a state that every jump renews."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.data import Jumps
from stochdyn.errors import BoundError, FieldError, ShapeError, TimeError
from stochdyn.paths.points.marks import Law, draw_marks, mark_dim, mark_log_prob
from stochdyn.paths.points.occurrences import Occurrences
from stochdyn.paths.points.quadrature import integrate
from stochdyn.paths.points.simulate import AbstractSampler, Inversion, simulate
from stochdyn.paths.points.support import JumpSupport, member


class State(Protocol):
    """What the intensity between two jumps depends on: rows (row, *batch), one for each gap."""

    def take(self, index: Tensor) -> "State":
        """The rows of numbers (n,), or for each sequence its own (n, *batch)."""
        ...


@dataclass(frozen=True)
class Rows:
    """A state of tensors (row, *batch, ...).

    Attributes:
        parts: the tensors.
        batch: the number of batch dimensions.

    Example:
        >>> Rows((torch.arange(3.0),), 0).take(torch.tensor([2, 0])).parts
        (tensor([2., 0.]),)
    """

    parts: tuple[Tensor, ...]
    batch: int

    def take(self, index: Tensor) -> "Rows":
        """See `State`."""
        if index.dim() == 1:
            return Rows(tuple(part[index] for part in self.parts), self.batch)
        out = []
        for part in self.parts:
            tail = part.shape[index.dim() :]
            wide = index.reshape(*index.shape, *[1] * len(tail)).expand(*index.shape, *tail)
            out.append(part.gather(0, wide))
        return Rows(tuple(out), self.batch)


class AbstractPointProcess(dist.TorchDistribution, ABC):
    """A law of sequences of jumps in a window; a value is the padded tensor (*batch, max_jumps, 1 + mark).

    log p = sum log intensity(t_i) + sum log p(mark_i | t_i) - integral of the intensity over the window.

    A subclass says how a jump renews the state, what the intensity is in a state, and if it knows, its integral. All is
    time-major: times are (row, *batch), so that a parameter of batch shape broadcasts against them.

    Args:
        batch_shape: of the parameters.
        t0, t1: the window, numbers or (*batch,).
        marks: the law of the marks where it is not of the subclass's making.
        max_jumps: rows of samples; None pads to the longest of a draw, of 20,000 at most. Densities take any number.
        sampler: `Thinning()` or `Inversion()`.
        device: of the parameters, to which the window goes; None leaves it where it is.

    Example:
        >>> import stochdyn as sd
        >>> isinstance(sd.PoissonProcess(2.0, 0.0, 1.0), AbstractPointProcess)
        True
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = False
    tolerance = 1e-9
    bound: Any = None

    def __init__(
        self,
        batch_shape: torch.Size | tuple[int, ...],
        t0: Any,
        t1: Any,
        *,
        marks: Law | None = None,
        max_jumps: int | None = None,
        sampler: AbstractSampler | None = None,
        device: torch.device | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.t0, self.t1 = (t if device is None else t.to(device) for t in window(t0, t1))
        self.marks, self.max_jumps, self.sampler = marks, max_jumps, sampler
        own = () if marks is None else marks.batch_shape
        batch = joint(type(self).__name__, batch_shape, self.t0.shape, self.t1.shape, own)
        width = 1 + self._mark_dim()
        super().__init__(batch, torch.Size((max_jumps or 0, width)), validate_args=validate_args)

    # The contract of a subclass.

    @abstractmethod
    def _states(self, jumps: Occurrences) -> State:
        """The state after each jump: (jump + 1) rows, the first before any."""

    @abstractmethod
    def _begin(self, now: Tensor) -> State:
        """The state before any jump (one row), at the start of the window now (1, *batch)."""

    @abstractmethod
    def _next(self, state: State, t: Tensor, mark: Tensor, happened: Tensor) -> State:
        """The state (one row) after a jump at t (1, *batch), where one happened."""

    @abstractmethod
    def _rate(self, state: State, t: Tensor) -> Tensor:
        """The intensity at t (row, *batch), until the next jump."""

    def _log_rate(self, state: State, jumps: Occurrences) -> Tensor:
        """(jump, *batch) its logarithm at the jumps, anything in unused rows."""
        rate = self._rate(state, jumps.times).expand(jumps.times.shape)
        if self._validate_args:
            self._check_rate(rate, jumps)
        # In an unused row a rate of 0 would make the gradient NaN.
        return torch.where(jumps.real, rate, torch.ones_like(rate)).log()

    def _integral(self, state: State, a: Tensor, b: Tensor) -> Tensor:
        """The integral of the intensity from a to b (row, *batch), no jump between them."""
        return integrate(lambda row, t: self._rate(state.take(row), t), a, b, tolerance=self.tolerance)

    def _bound(self, state: State, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor] | None:
        """A bound of the intensity, and until when it holds if there is no jump; None where none is known."""
        return None

    def _until(self, state: State, now: Tensor, end: Tensor) -> Tensor:
        """How far a state of `_begin`, `_next` or `_onward` reaches."""
        return end

    def _onward(self, state: State, t: Tensor) -> State:
        """The state from t on, after a jump there, if there was one."""
        return state

    def _mark_dim(self) -> int:
        return mark_dim(self.marks)

    def _mark_support(self) -> constraints.Constraint | None:
        return None if self.marks is None else self.marks.support

    def _log_density(self, state: State, jumps: Occurrences) -> Tensor:
        """(jump, *batch) the log intensity of a jump with its mark, 0 in unused rows."""
        log_rate = self._log_rate(state, jumps).expand(jumps.times.shape)
        if self._validate_args:
            self._check_rate(log_rate.detach().exp(), jumps)
        out = torch.where(jumps.real, log_rate, torch.zeros_like(log_rate))
        return out if self.marks is None else out + mark_log_prob(self.marks, jumps.marks, jumps.real)

    def _draw_mark(self, state: State, t: Tensor) -> Tensor:
        """(1, *batch, mark)"""
        return draw_marks(self.marks, t.shape, t)

    # What users call.

    @property
    def support(self) -> constraints.Constraint:
        return JumpSupport(self.t0, self.t1, 1 + self._mark_dim(), self._mark_support())

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "AbstractPointProcess":
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        shape = joint(f"{type(self).__name__}.expand", batch_shape, self.batch_shape)
        if shape != torch.Size(batch_shape):
            raise ShapeError(f"Cannot expand batch shape {tuple(self.batch_shape)} to {tuple(batch_shape)}.")
        new._batch_shape = shape
        return new

    def _validate_sample(self, value: Tensor) -> None:
        JumpSupport.explain(self.support, value, type(self).__name__)

    def _read(self, value: "Tensor | Jumps") -> Occurrences:
        value = value.values if isinstance(value, Jumps) else value
        if not isinstance(value, Tensor):
            raise ShapeError(
                f"{type(self).__name__}: a value is a tensor (*batch, max_jumps, 1 + mark), got "
                f"{type(value).__name__}. Take `.values` of sd.Jumps.from_list."
            )
        if self._validate_args:
            self._validate_sample(value)
        return Occurrences.of(value, self.t0.expand(self.batch_shape), self.t1.expand(self.batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        jumps = self._read(value)
        states, edges = self._states(jumps), jumps.edges
        gaps = self._integral(states, edges[:-1], edges[1:])
        if len(jumps.times) == 0:
            return -gaps.sum(0)
        before = states.take(torch.arange(len(jumps.times), device=edges.device))
        return self._log_density(before, jumps).sum(0) - gaps.sum(0)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        return simulate(self, torch.Size((*sample_shape, *self.batch_shape)), self.sampler or Inversion())

    def intensity(self, ts: Any, jumps: "Tensor | Jumps") -> Tensor:
        """The intensity at any times given the jumps before them.

        Shapes:
            ts (time,) or (*batch, time), inside the window; jumps (*batch, jump, 1 + mark) -> (*batch, time)

        Raises:
            TimeError: if a time is outside the window.

        Example:
            >>> import stochdyn as sd
            >>> process = sd.Hawkes(0.5, 0.8, 1.6, 0.0, 4.0)
            >>> process.intensity([0.1, 1.0], torch.tensor([[0.2]]).double())
            tensor([0.5000, 0.7224], dtype=torch.float64)
        """
        found = self._read(jumps)
        at, count = self._times(ts, found)
        rate = self._rate(self._states(found).take(count), at)
        return rate.expand(at.shape).movedim(0, -1)

    def compensator(self, ts: Any, jumps: "Tensor | Jumps") -> Tensor:
        """The integral of the intensity from t0 to any times, given the jumps before them.

        Shapes:
            ts (time,) or (*batch, time), inside the window; jumps (*batch, jump, 1 + mark) -> (*batch, time)

        Raises:
            TimeError: if a time is outside the window.

        Example:
            >>> import stochdyn as sd
            >>> process = sd.Hawkes(0.5, 0.8, 1.6, 0.0, 4.0)
            >>> process.compensator([0.2, 0.5], torch.tensor([[0.2], [0.5]]).double())
            tensor([0.1000, 0.4406], dtype=torch.float64)
        """
        found = self._read(jumps)
        at, count = self._times(ts, found)
        states, edges = self._states(found), found.edges
        gaps = self._integral(states, edges[:-1], edges[1:])
        gaps = gaps.expand(edges[:-1].shape)
        done = torch.cat([torch.zeros_like(gaps[:1]), gaps.cumsum(0)])
        rest = self._integral(states.take(count), edges.gather(0, count), at)
        return (done.gather(0, count) + rest).movedim(0, -1)

    def residuals(self, jumps: "Tensor | Jumps") -> tuple[Tensor, Tensor]:
        """The compensator over the gap before each jump, and over what follows the last one.

        Under the true law those before jumps are independent Exp(1): see `sd.time_rescaling`.

        Shapes:
            jumps (*batch, jump, 1 + mark) -> (*batch, jump), NaN in unused rows, and (*batch,)

        Example:
            >>> import stochdyn as sd
            >>> sd.PoissonProcess(2.0, 0.0, 1.0).residuals(torch.tensor([[0.25], [0.75]]).double())
            (tensor([0.5000, 1.0000], dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
        """
        found = self._read(jumps)
        edges = found.edges
        gaps = self._integral(self._states(found), edges[:-1], edges[1:]).expand(edges[:-1].shape)
        after = gaps.sum(0) - torch.where(found.real, gaps[:-1], torch.zeros_like(gaps[:-1])).sum(0)
        own = torch.where(found.real, gaps[:-1], torch.full_like(gaps[:-1], float("nan")))
        return own.movedim(0, -1), after

    def _times(self, ts: Any, jumps: Occurrences) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(ts, dtype=jumps.start.dtype, device=jumps.start.device)
        if at.dim() == 0:
            raise ShapeError("`ts` must be (time,) or (*batch, time), got a single number. Write [t].")
        batch = torch.broadcast_shapes(at.shape[:-1], jumps.start.shape)
        at = at.expand(*batch, at.shape[-1]).movedim(-1, 0)
        outside = (at < jumps.start) | (at > jumps.end)
        if bool(outside.any()):
            time = float(at[outside][0])
            raise TimeError(
                f"`ts`: time {time:g} is outside the window of the process. Take times inside it."
            )
        return at, jumps.before(at)

    def _check_rate(self, rate: Tensor, jumps: Occurrences) -> None:
        bad = jumps.real & ~((rate >= 0) & torch.isfinite(rate))
        if bool(bad.any()):
            k, *where = bad.nonzero()[0].tolist()
            nth = int(jumps.real[(slice(None, k), *where)].sum())
            raise FieldError(
                f"{member(where)}, jump {nth}, time {float(jumps.times[(k, *where)]):.6g}: the intensity is "
                f"{float(rate[(k, *where)]):.6g}. It must be finite and not negative: end it in softplus or exp."
            )


def joint(name: str, *shapes: Any) -> torch.Size:
    """The shape to which batch shapes broadcast.

    Raises:
        ShapeError: if they do not.

    Example:
        >>> joint("Hawkes", (3, 1), (4,))
        torch.Size([3, 4])
    """
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise ShapeError(
            f"{name}: the batch shapes {[tuple(s) for s in shapes]} of parameters, window and marks do not broadcast."
        ) from error


def window(t0: Any, t1: Any) -> tuple[Tensor, Tensor]:
    """Both ends as float64 tensors.

    Raises:
        TimeError: if they are not finite and in order.

    Example:
        >>> window(0, 1.5)
        (tensor(0., dtype=torch.float64), tensor(1.5000, dtype=torch.float64))
    """
    start, end = (torch.as_tensor(t).double() for t in (t0, t1))
    if not bool(((start < end) & start.isfinite() & end.isfinite()).all()):
        raise TimeError(f"The window [t0, t1] must be finite and have a length, got t0={t0}, t1={t1}.")
    return start, end


def number(value: Any) -> Tensor:
    """A number as a tensor that keeps its digits; without dimensions it does not raise the dtype of others.

    Raises:
        FieldError: if it is no number.

    Example:
        >>> number(0.5), number(torch.tensor([1.0]))
        (tensor(0.5000, dtype=torch.float64), tensor([1.]))
    """
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FieldError(f"A parameter must be a number or a tensor, got {value!r}.") from error


def parameter(name: str, value: Any, *, positive: bool, owner: str, validate: bool) -> Tensor:
    """A parameter as a tensor, not negative, or positive.

    Raises:
        FieldError: naming the batch member that breaks the rule.

    Example:
        >>> parameter("beta", 1.5, positive=True, owner="Hawkes", validate=True)
        tensor(1.5000, dtype=torch.float64)
    """
    tensor = number(value)
    good = torch.isfinite(tensor) & ((tensor > 0) if positive else (tensor >= 0))
    if validate and not bool(good.all()):
        first = (~good).nonzero()[0].tolist()
        where = f", batch member {first[0] if len(first) == 1 else tuple(first)}" if first else ""
        rule = "positive" if positive else "not negative"
        raise FieldError(
            f"{owner}{where}: `{name}` must be {rule}, got {float(tensor[tuple(first)]):.6g}. Constrain it, e.g. by a "
            "LogNormal prior or exp."
        )
    return tensor


def upper_bound(value: Any, owner: str) -> Tensor:
    """A given bound of the intensity as a tensor.

    Raises:
        BoundError: if it is not finite and positive.

    Example:
        >>> upper_bound(2.0, "PoissonProcess")
        tensor(2., dtype=torch.float64)
    """
    bound = number(value)
    if not bool((torch.isfinite(bound) & (bound > 0)).all()):
        raise BoundError(
            f"{owner}: `bound` must be finite and positive, got {value}. Give one above the intensity, or leave it out "
            "and sample by sd.Inversion()."
        )
    return bound
