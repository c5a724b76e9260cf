"""The jump ODE: a point process whose intensity is read off a state that flows, and jumps at every jump."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.errors import FieldError, TimeError
from stochdyn.fields import AbstractAdditiveJump, AbstractLinearFlow, call_field, draw_weights
from stochdyn.paths.points.base import AbstractPointProcess, Rows, State, joint, window
from stochdyn.paths.points.marks import Law, draw_marks, mark_dim, mark_log_prob
from stochdyn.paths.points.occurrences import Occurrences
from stochdyn.paths.points.pieces import Pieces
from stochdyn.paths.points.quadrature import gauss_legendre, integrate
from stochdyn.paths.points.scan import linear_scan
from stochdyn.paths.points.simulate import AbstractSampler, Thinning
from stochdyn.solvers import RungeKutta4
from stochdyn.solvers.integrator import AbstractMean

_PIECES = 100
_ROOM = 4


class JumpODE(AbstractPointProcess):
    """dz/dt = flow(t, z) between jumps, z = jump_map(t, z-, mark) at each; jumps come at intensity(t, z-).

    Every sequence is integrated over its own gaps, cut into pieces of at most `step`, all sequences of a batch at once:
    a batch takes as many steps as its longest sequence. A linear flow (`DecayFlow`) needs no solver, and with an
    additive jump map no loop. The integral of the intensity is found along the flow, piece by piece.

    Args:
        flow: `(t, z[, context])` -> dz/dt of the shape of z, or a linear flow.
        jump_map: `(t, z, mark[, context])` -> z after the jump; a mark is (..., mark), of width 0 without marks.
        intensity: `(t, z[, context])` -> (..., 1), positive: jumps per unit of time. With (..., kind) there are several
            kinds of jumps, and the mark is the kind 0, 1, ...
        initial: the state (*batch, state) at t0.
        t0, t1: the window, numbers or (*batch,).
        marks: for one kind of jumps, the law of a mark, of event shape () or (mark,), or `(t, z[, context])` -> such a
            law, z before the jump.
        context: (*batch, context_dim), passed on with the batch of z.
        solver: a one-step method of order 3 or more, for each piece; not used by a linear flow.
        step: longest piece, in units of time; by default a hundredth of each window. Halve it to see the solver's
            error.
        nodes: of Gauss-Legendre quadrature in every piece, without control of the error, fast for training; None takes
            as many as `tolerance` asks for.
        tolerance: of the integral over a piece, absolute and relative.
        bound: for `Thinning()`: an upper bound of the intensity of all kinds together, or `(t, z[, context])` -> (...,
            1), one that holds from t to the next jump.
        max_jumps: rows of samples; None pads to the longest of a draw.
        sampler: by default `Thinning()` where a bound is given, else `Inversion()`.

    Shapes:
        t is (..., 1) and z (..., *batch, state), so that a parameter of batch shape is written theta[..., None];
        batch_shape: broadcast of what the fields return, of initial, window and context; event_shape (max_jumps,
        1 + mark).

    Raises:
        FieldError: for a field that fails, returns another shape, or an intensity that is negative or not finite.
        TimeError, DataError, ShapeError: for a value outside the support, naming the series and the jump.
        PaddingError, BoundError: from `sample`.

    References:
        Jia & Benson, "Neural jump stochastic differential equations", 2019, https://arxiv.org/abs/1905.10403

    Example:
        >>> import stochdyn as sd
        >>> def flow(t, z):
        ...     return -1.6 * z
        >>> def jump_map(t, z, mark):
        ...     return z + 0.8
        >>> process = sd.JumpODE(flow, jump_map, lambda t, z: 0.5 + z, torch.zeros(1).double(), 0.0, 4.0)
        >>> times = torch.tensor([0.2, 0.5, 0.9, 1.0, 1.7, 2.4, 2.45, 3.1]).double()
        >>> process.log_prob(times[:, None])  # Hawkes'
        tensor(-4.8973, dtype=torch.float64)
    """

    def __init__(
        self,
        flow: Callable[..., Tensor],
        jump_map: Callable[..., Tensor],
        intensity: Callable[..., Tensor],
        initial: Tensor,
        t0: Any,
        t1: Any,
        *,
        marks: Law | Callable[..., Law] | None = None,
        context: Tensor | None = None,
        solver: AbstractMean = RungeKutta4(),  # noqa: B008
        step: float | None = None,
        nodes: int | None = None,
        tolerance: float = 1e-6,
        bound: float | Tensor | Callable[..., Tensor] | None = None,
        max_jumps: int | None = None,
        sampler: AbstractSampler | None = None,
        validate_args: bool | None = None,
    ) -> None:
        memo: dict = {}
        self.flow, self.jump_map, self.field = (
            draw_weights(f, memo=memo) for f in (flow, jump_map, intensity)
        )
        self.initial, self.context, self.solver, self.bound = initial, context, solver, bound
        self.nodes, self.tolerance = nodes, tolerance
        self.mark_field = (
            None if marks is None or hasattr(marks, "log_prob") else draw_weights(marks, memo=memo)
        )
        fixed = marks if self.mark_field is None else None
        _check_numbers(initial, step, nodes)
        batch = self._probe(window(t0, t1), fixed)
        super().__init__(
            batch,
            t0,
            t1,
            marks=fixed,
            max_jumps=max_jumps,
            sampler=sampler or (None if bound is None else Thinning()),
            device=initial.device,
            validate_args=validate_args,
        )
        length = (self.t1 - self.t0) / _PIECES
        self.step = length if step is None else torch.full_like(length, step)

    # What is known of the fields from one call.

    def _probe(self, ends: tuple[Tensor, Tensor], marks: Law | None) -> torch.Size:
        own = () if self.context is None else self.context.shape[:-1]
        wide = joint("JumpODE", self.initial.shape[:-1], ends[0].shape, ends[1].shape, own)
        # Room on the left for the batch of what the fields close over.
        z = self.initial.expand(1, *[1] * _ROOM, *wide, self.initial.shape[-1])
        t = ends[0].to(z).expand(wide).expand(z.shape[:-1])[..., None]
        context = self._context(t)
        with torch.no_grad():
            rate = call_field("intensity", self.field, t, z, context)
            law = marks if self.mark_field is None else self._call(self.mark_field, t, z)
            self.kinds = rate.shape[-1]
            if self.kinds > 1 and law is not None:
                raise FieldError(
                    f"JumpODE: the intensity has {self.kinds} kinds, which are the marks; `marks` would be another. "
                    "Return (..., 1), or leave `marks` out."
                )
            self._width = 1 if self.kinds > 1 else mark_dim(law)
            self._support = None if law is None else law.support
            mark = z.new_zeros(*z.shape[:-1], self._width)
            after = _call_jump(self.jump_map, t, z, mark, context)
            shapes = [z.shape[:-1], rate.shape[:-1], after.shape[:-1]]
            shapes += [] if law is None else [law.batch_shape]
            shapes.append(self._probe_flow(t, z, context))
        shape = joint("JumpODE: fields", *shapes)[1:]
        while len(shape) > len(wide) and shape[0] == 1:
            shape = shape[1:]
        return shape

    def _probe_flow(self, t: Tensor, z: Tensor, context: Tensor | None) -> torch.Size:
        if isinstance(self.flow, AbstractLinearFlow):
            decay, shift = self.flow.over(t, torch.zeros_like(t), context)
            return torch.broadcast_shapes(decay.shape, shift.shape, z.shape)[:-1]
        slope = call_field("flow", self.flow, t, z, context)
        if slope.shape[-1] != z.shape[-1]:
            raise FieldError(
                f"The flow returned shape {tuple(slope.shape)} for z of shape {tuple(z.shape)}: it must end in "
                "the state."
            )
        return slope.shape[:-1]

    def _context(self, t: Tensor) -> Tensor | None:
        return None if self.context is None else self.context.expand(*t.shape[:-1], self.context.shape[-1])

    def _call(self, field: Callable[..., Any], t: Tensor, *states: Tensor) -> Any:
        context = self._context(t.expand(*states[0].shape[:-1], 1))
        return field(t, *states) if context is None else field(t, *states, context)

    # The flow.

    def _over(self, t: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Of a linear flow, decay and shift over dt (row, *batch) from t."""
        t, dt = t.to(self.initial)[..., None], dt.to(self.initial)[..., None]
        return self.flow.over(t, dt, self._context(t))

    def _advance(self, t: Tensor, dt: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the solver, for t and dt (*batch,); and the slope at its start, which the solver needs too."""
        at = t.to(z)[..., None]
        slope = self._call(self.flow, at, z)

        def flow(s: Tensor, y: Tensor) -> Tensor:
            return slope if s is at and y is z else self._call(self.flow, s, y)

        return self.solver.mean(flow, at, dt.to(z)[..., None], z), slope.expand(z.shape)

    def _at(self, state: State, t: Tensor) -> Tensor:
        """z at t (row, *batch) inside the pieces that start at the rows' own times."""
        since, z = state.parts[:2]
        if isinstance(self.flow, AbstractLinearFlow):
            decay, shift = self._over(since, t - since)
            return decay * z + shift
        return _hermite(t, *state.parts)

    def _states(self, jumps: Occurrences) -> State:
        edges = jumps.edges
        t, dt = edges[:-1], edges.diff(dim=0)
        z = self.initial.expand(*t.shape[1:], self.initial.shape[-1])
        if isinstance(self.flow, AbstractLinearFlow):
            return Rows((t, self._linear(t, dt, z, jumps)), t.dim() - 1)
        starts, ends, slopes = [], [], []
        for k in range(len(t)):
            starts.append(z)
            end, slope = self._advance(t[k], dt[k], z)
            ends.append(end)
            slopes.append(slope)
            if k < len(jumps.times):
                z = self._jump(jumps.times[k], end, jumps.marks[k], jumps.real[k])
        return self._solved(t, torch.stack(starts), dt, torch.stack(ends), torch.stack(slopes))

    def _solved(self, t: Tensor, z: Tensor, dt: Tensor, end: Tensor, slope: Tensor) -> Rows:
        """Pieces of length dt from z at t, with this slope there, to `end`, with the slope there too."""
        last = self._call(self.flow, (t + dt).to(end)[..., None], end)
        return Rows((t, z, dt, end, slope, last.expand(z.shape)), t.dim() - 1)

    def _linear(self, t: Tensor, dt: Tensor, z: Tensor, jumps: Occurrences) -> Tensor:
        """(row, *batch, state) z at the start of every piece."""
        decay, shift = (x.expand(*t.shape, z.shape[-1]) for x in self._over(t, dt))
        if isinstance(self.jump_map, AbstractAdditiveJump):
            at = jumps.times.to(z)[..., None]
            size = self.jump_map.size(at, jumps.marks.to(z), self._context(at))
            rise = shift[:-1] + torch.where(jumps.real[..., None], size, torch.zeros_like(size))
            first = z[None]
            return linear_scan(torch.cat([torch.zeros_like(first), decay[:-1]]), torch.cat([first, rise]))
        out = [z]
        for k in range(len(jumps.times)):
            z = self._jump(jumps.times[k], decay[k] * z + shift[k], jumps.marks[k], jumps.real[k])
            out.append(z)
        return torch.stack(out)

    def _jump(self, t: Tensor, z: Tensor, mark: Tensor, happened: Tensor) -> Tensor:
        after = self._call(self.jump_map, t.to(z)[..., None], z, mark.to(z))
        return torch.where(happened[..., None], after, z)

    # The contract of a point process.

    def _read(self, value: Any) -> Occurrences:
        jumps = super()._read(value)
        return Pieces.cut(jumps, self.step.to(jumps.times))

    def _mark_dim(self) -> int:
        return self._width

    def _mark_support(self) -> constraints.Constraint | None:
        return constraints.integer_interval(0, self.kinds - 1) if self.kinds > 1 else self._support

    def _begin(self, now: Tensor) -> State:
        return self._onward(
            Rows((now, self.initial.expand(*now.shape, self.initial.shape[-1])), now.dim() - 1), now
        )

    def _next(self, state: State, t: Tensor, mark: Tensor, happened: Tensor) -> State:
        return Rows((t, self._jump(t, self._at(state, t), mark, happened)), t.dim() - 1)

    def _onward(self, state: State, t: Tensor) -> State:
        if isinstance(self.flow, AbstractLinearFlow):
            return state
        z = state.parts[1] if len(state.parts) == 2 else self._at(state, t)
        dt = torch.minimum(self.step.to(t), self.t1.to(t) - t).expand(t.shape)
        return self._solved(t, z, dt, *self._advance(t, dt, z))

    def _until(self, state: State, now: Tensor, end: Tensor) -> Tensor:
        return end if len(state.parts) == 2 else torch.minimum(end, now + state.parts[2])

    def _rates(self, state: State, t: Tensor) -> Tensor:
        z = self._at(state, t)
        return self._call(self.field, t.to(z)[..., None], z)

    def _rate(self, state: State, t: Tensor) -> Tensor:
        return self._rates(state, t).sum(-1)

    def _integral(self, state: State, a: Tensor, b: Tensor) -> Tensor:
        if self.nodes is None:
            return integrate(lambda row, t: self._rate(state.take(row), t), a, b, tolerance=self.tolerance)
        # One more dimension, for the nodes, in front of what the rows know.
        wide = Rows(tuple(part[None] for part in state.parts), state.batch)
        return gauss_legendre(lambda t: self._rate(wide, t), a, b, self.nodes)

    def _log_density(self, state: State, jumps: Occurrences) -> Tensor:
        if self.kinds == 1 and self.mark_field is None:
            return super()._log_density(state, jumps)
        if self.kinds == 1:
            law = self._call(
                self.mark_field, jumps.times.to(self.initial)[..., None], self._at(state, jumps.times)
            )
            return super()._log_density(state, jumps) + mark_log_prob(law, jumps.marks, jumps.real)
        rates = self._rates(state, jumps.times).expand(*jumps.times.shape, self.kinds)
        rate = rates.gather(-1, jumps.marks.long())[..., 0]
        if self._validate_args:
            self._check_rate(rate, jumps)
        return torch.where(jumps.real, rate, torch.ones_like(rate)).log()

    def _draw_mark(self, state: State, t: Tensor) -> Tensor:
        if self.kinds > 1:
            rates = self._rates(state, t).expand(*t.shape, self.kinds)
            return torch.multinomial(rates.reshape(-1, self.kinds), 1).reshape(*t.shape, 1).to(t)
        law = self.marks
        if self.mark_field is not None:
            law = self._call(self.mark_field, t.to(self.initial)[..., None], self._at(state, t))
        return draw_marks(law, t.shape, t)

    def _bound(self, state: State, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.bound is None:
            return None
        if callable(self.bound):
            return self._call(self.bound, now.to(self.initial)[..., None], self._at(state, now))[..., 0], end
        return torch.as_tensor(self.bound).to(now), end

    # What users call.

    def states(self, ts: Any, jumps: Any) -> Tensor:
        """The state at any times, given the jumps before them.

        Shapes:
            ts (time,) or (*batch, time); jumps (*batch, jump, 1 + mark) -> (*batch, time, state)

        Example:
            >>> import stochdyn as sd
            >>> flow, jump = sd.DecayFlow(1, 0, shortest=0.5, longest=2.0), sd.AdditiveJump(1)
            >>> process = sd.JumpODE(flow, jump, lambda t, z: 1 + z, torch.zeros(1), 0.0, 4.0)
            >>> process.states([1.0, 2.0], torch.tensor([[1.5]])).detach()
            tensor([[0.0000],
                    [0.6065]])
        """
        found = self._read(jumps)
        at, count = self._times(ts, found)
        return self._at(self._states(found).take(count), at).movedim(0, -2)

    def intensities(self, ts: Any, jumps: Any) -> Tensor:
        """The intensity of every kind at any times, given the jumps before them: (*batch, time, kind).

        Example:
            >>> import stochdyn as sd
            >>> flow, jump = sd.DecayFlow(2, 0), sd.AdditiveJump(2, classes=2)
            >>> process = sd.JumpODE(flow, jump, lambda t, z: 1 + z, torch.zeros(2), 0.0, 4.0)
            >>> process.intensities([1.0], torch.tensor([[1.5, 0.0]])).detach()
            tensor([[1., 1.]])
        """
        found = self._read(jumps)
        at, count = self._times(ts, found)
        return self._rates(self._states(found).take(count), at).movedim(0, -2)

    def residuals(self, jumps: Any) -> tuple[Tensor, Tensor]:
        """See `AbstractPointProcess.residuals`.

        Example:
            >>> import stochdyn as sd
            >>> flow, jump = sd.DecayFlow(1), sd.AdditiveJump(1)
            >>> process = sd.JumpODE(flow, jump, lambda t, z: 2 + 0 * z, torch.zeros(1), 0.0, 1.0)
            >>> own, after = process.residuals(torch.tensor([[0.25], [0.75]]))
            >>> own.detach(), after.detach()
            (tensor([0.5000, 1.0000]), tensor(0.5000))
        """
        rows = jumps.shape[-2] if isinstance(jumps, Tensor) else jumps.values.shape[-2]
        found = self._read(jumps)
        edges = found.edges
        gaps = self._integral(self._states(found), edges[:-1], edges[1:]).expand(edges[:-1].shape)
        done, total = gaps[:-1].cumsum(0), gaps.sum(0)
        first = (~found.real).long().argsort(dim=0, stable=True)[:rows]
        real, own = found.real.gather(0, first), done.gather(0, first)
        after = total - torch.where(real, own, torch.zeros_like(own)).amax(0) if len(own) else total
        own = torch.cat([torch.zeros_like(total)[None], own]).diff(dim=0)
        own = torch.where(real, own, torch.full_like(own, float("nan"))).movedim(0, -1)
        return torch.nn.functional.pad(own, (0, rows - own.shape[-1]), value=float("nan")), after


def _hermite(t: Tensor, *piece: Tensor) -> Tensor:
    """The cubic with the given ends and slopes, at t (row, *batch)."""
    since, z0, length, z1, f0, f1 = piece
    h = length.to(z0)[..., None]
    u = torch.where(length > 0, (t - since) / torch.where(length > 0, length, 1.0), 0.0).to(z0)[..., None]
    # Coefficients first: they are of the piece, and u is of every node in it.
    rise, first, last = z1 - z0, h * f0, h * f1
    square, cube = 3 * rise - 2 * first - last, first + last - 2 * rise
    return z0 + u * (first + u * (square + u * cube))


def _call_jump(jump_map: Any, t: Tensor, z: Tensor, mark: Tensor, context: Tensor | None) -> Tensor:
    if not callable(jump_map):
        raise FieldError(
            f"The jump map must be callable as (t, z, mark[, context]), got {type(jump_map).__name__}."
        )
    after = call_field("jump map", lambda s, y, *c: jump_map(s, y, mark, *c), t, z, context)
    if after.shape[-1] != z.shape[-1]:
        raise FieldError(
            f"The jump map returned shape {tuple(after.shape)} for z of shape {tuple(z.shape)}: it must end in the "
            "state."
        )
    return after


def _check_numbers(initial: Any, step: float | None, nodes: int | None) -> None:
    if not isinstance(initial, Tensor) or initial.dim() < 1 or not initial.is_floating_point():
        raise FieldError("JumpODE: `initial` must be a floating tensor (*batch, state): the state at t0.")
    if step is not None and not 0 < step < float("inf"):
        raise TimeError(
            f"JumpODE: `step` must be positive, got {step}. It is the longest piece, in units of time."
        )
    if nodes is not None and not (isinstance(nodes, int) and 1 <= nodes <= 64):
        raise FieldError(f"JumpODE: `nodes` must be None or a number from 1 to 64, got {nodes!r}.")
