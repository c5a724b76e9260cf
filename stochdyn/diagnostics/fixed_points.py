"""Fixed points of a drift: where they are, how stable, and how sure that is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.diagnostics.tree import as_array
from stochdyn.errors import ShapeError
from stochdyn.fields import Field, call_field, evaluate
from stochdyn.fields.zeros import find_zeros, jacobian

_CENTRE = 1e-6
_LEVELS = (0.05, 0.95)


@dataclass(frozen=True)
class FixedPoint:
    """One fixed point across the draws that have it.

    Attributes:
        draw: (k,) the draws that have it.
        location: (k, state).
        eigenvalues: (k, state) complex, those with the largest real part first.
        speed: (k,) |f| there.
        distance: (k,) the length of a Newton step from there: how far the zero may be.
        kinds: the share of each kind among these draws, the most frequent first.
        presence: the share of all draws that have it.

    Example:
        >>> import stochdyn as sd
        >>> point = sd.fixed_points(lambda t, z: 1 - z, torch.linspace(-2, 2, 5)[:, None]).points[0]
        >>> point.kind, point.location.item()
        ('stable node', 1.0)
    """

    draw: np.ndarray
    location: np.ndarray
    eigenvalues: np.ndarray
    speed: np.ndarray
    distance: np.ndarray
    kinds: dict[str, float]
    presence: float

    @property
    def kind(self) -> str:
        """The most frequent kind."""
        return next(iter(self.kinds))


@dataclass(frozen=True)
class FixedPoints:
    """What `fixed_points` found.

    Attributes:
        points: those in the most draws first, then from left to right.
        converged: (start, draw) which starts ended in a zero in the region.
        outside: (start, draw) which ended in one outside it; these are no points.
        draws: how many.

    Example:
        >>> import stochdyn as sd
        >>> found = sd.fixed_points(lambda t, z: z - z**3, torch.linspace(-2, 2, 9).double()[:, None])
        >>> [(point.kind, round(point.location.item(), 6)) for point in found.points]
        [('stable node', -1.0), ('unstable node', 0.0), ('stable node', 1.0)]
    """

    points: tuple[FixedPoint, ...]
    converged: np.ndarray
    outside: np.ndarray
    draws: int

    def __len__(self) -> int:
        return len(self.points)

    def summary(self) -> str:
        """A table: kind, share of the draws, location and leading eigenvalue with 90 % intervals, largest speed."""
        share, beyond = self.converged.mean(), self.outside.mean()
        head = f"{len(self)} fixed points; of {len(self.converged)} starts x {self.draws} draws {share:.0%} converged"
        head += f", {beyond:.0%} outside the region" if beyond else ""
        none = int((~self.converged.any(0)).sum())
        lines = [head + (f"; {none} draws have none" if none else "")]
        for point in self.points:
            kinds = ", ".join(f"{kind} {part:.0%}" for kind, part in point.kinds.items())
            where = ", ".join(_interval(x) for x in point.location.T)
            lead = point.eigenvalues[:, 0]
            rate = _interval(lead.real)
            turn = f", frequency {_interval(np.abs(lead.imag))}" if (lead.imag != 0).mean() > 0.5 else ""
            label = point.kind if len(point.kinds) == 1 else kinds
            lines.append(
                f"  {label}, in {point.presence:.0%} of draws, at ({where}); leading eigenvalue {rate}{turn}; "
                f"speed at most {point.speed.max():.1e}"
            )
        return "\n".join(lines)

    __repr__ = summary


def fixed_points(
    field: Field,
    starts: Tensor,
    *,
    t: float = 0.0,
    context: Tensor | None = None,
    tolerance: float | None = None,
    merge: float = 1e-3,
    match: float = 0.25,
    reach: float = 0.25,
    iterations: int = 200,
) -> FixedPoints:
    """Fixed points of a drift, f(z) = 0, with the eigenvalues of its Jacobian, across posterior draws.

    Damped Newton from many starts. Points of one draw nearer than `merge` are one. Across draws points are matched by
    distance among those with the same Poincaré index, the sign of det(-J): a saddle is never taken for the node that
    it may be born with, while a focus whose stability is uncertain stays one point. What no start reaches is missing:
    take many starts, over the whole region of interest.

    Fixed points far from data are extrapolations: hold them against `read_field(...).states`.

    Args:
        field: f, `(t, z[, context])` -> shape of z. Its batch is that of the draws: `posterior_fields(...).drift`, or a
            closure with parameters theta[..., None].
        starts: (start, state), in the field's dtype; or (start, draw, state), for a field that does not broadcast one
            state against its draws.
        t: the time at which the drift is taken.
        context: (context_dim,) a frozen input.
        tolerance: a start has converged once |f| is below this share of the median |f| over the starts of its draw;
            by default the square root of the dtype's precision.
        merge, match: distances, as shares of the starts' spread (per state): below `merge` two points of a draw are
            one; above `match` points of two draws are not.
        reach: the region is the box of the starts, widened on every side by this share of its width. Zeros outside it
            are counted, not listed: a net that levels off has some far from everything.
        iterations: of Newton's method, at most.

    Raises:
        ShapeError: if the starts have no two dimensions, or the field another batch than one of draws.

    References:
        Sussillo & Barak, "Opening the black box: low-dimensional dynamics in high-dimensional recurrent neural
        networks", 2013, https://doi.org/10.1162/NECO_a_00409

    Example:
        >>> import stochdyn as sd
        >>> a = torch.tensor([0.9, 1.0, 1.1]).double()  # three draws
        >>> found = sd.fixed_points(lambda t, z: a[..., None] * z - z**3, torch.linspace(-2, 2, 9).double()[:, None])
        >>> print(found.summary().splitlines()[0])
        3 fixed points; of 9 starts x 3 draws 100% converged
    """
    if starts.dim() not in (2, 3) or not starts.numel():
        got = tuple(starts.shape)
        raise ShapeError(
            f"`starts` must have shape (start, state) or (start, draw, state), got {got}. One: z[None]."
        )
    starts = starts[:, None] if starts.dim() == 2 else starts
    z, f = _prepare(field, starts, t, context)
    starts = starts.flatten(0, 1)
    with torch.no_grad():
        speeds = torch.linalg.vector_norm(f(z), dim=-1)
        scale = speeds.masked_fill(~speeds.isfinite(), torch.nan).nanmedian(0).values.expand(z.shape[:-1])
        limit = torch.finfo(z.dtype).eps ** 0.5 if tolerance is None else tolerance
        z, speed = find_zeros(f, z, scale, tolerance=limit, iterations=iterations)
        J = jacobian(f, z)
        step = _newton_steps(J, f(z)) if z.numel() else J
    zero = as_array(speed <= limit * scale)
    arrays = [
        as_array(x).astype(float) for x in (z, J, speed, torch.linalg.vector_norm(step[..., 0], dim=-1))
    ]
    width = as_array(starts.amax(0) - starts.amin(0)).astype(float)
    width = np.where(width > 0, width, 1.0)
    box = [as_array(x).astype(float) for x in (starts.amin(0), starts.amax(0))]
    inside = ((arrays[0] >= box[0] - reach * width) & (arrays[0] <= box[1] + reach * width)).all(-1)
    converged = zero & inside
    found = [_of_draw(converged[:, d], *(x[:, d] for x in arrays), merge * width) for d in range(z.shape[1])]
    groups = _match(found, match, width)
    points = [_summarised(group, found, z.shape[1]) for group in groups]
    points.sort(key=lambda p: (-round(p.presence, 2), tuple(np.median(p.location, 0))))
    return FixedPoints(tuple(points), converged, zero & ~inside, z.shape[1])


def _newton_steps(J: Tensor, f: Tensor) -> Tensor:
    """The last steps (start, draw, state, 1), of least length where J is singular; infinite where f is not finite."""
    usable = J.isfinite().all((-1, -2)) & f.isfinite().all(-1)
    J, f = J.masked_fill(~usable[..., None, None], 0.0), f.masked_fill(~usable[..., None], 0.0)
    step = torch.linalg.lstsq(J.double().cpu(), f[..., None].double().cpu(), driver="gelsd").solution
    return step.masked_fill(~usable[..., None, None].cpu(), torch.inf)


def _prepare(
    field: Field, starts: Tensor, t: float, context: Tensor | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The starts of every draw (start, draw, state), and the field on them."""
    z = starts
    time = torch.full((1, 1, 1), t, dtype=z.dtype, device=z.device)
    with torch.no_grad():
        shape = call_field("drift", field, time, z, context).shape
    if len(shape) != 3 or shape[0] != len(starts) or shape[-1] not in (1, z.shape[-1]):
        raise ShapeError(
            f"The drift returned {tuple(shape)} for starts of shape {tuple(z.shape)}, expected (start, draw, state). "
            "Its parameters have one batch dimension, the draws: theta[..., None]; starts are (start, state)."
        )
    z = z.expand(-1, shape[1], -1)

    def f(x: Tensor) -> Tensor:
        return evaluate("drift", field, time, x, context).expand(x.shape)

    return z, f


@dataclass(frozen=True)
class _Zero:
    draw_location: np.ndarray
    jacobian: np.ndarray
    speed: float
    distance: float

    @property
    def index(self) -> int:
        """The Poincaré index, the sign of det(-J)."""
        return int(np.sign(np.linalg.det(-self.jacobian)))


def _of_draw(
    converged: np.ndarray,
    z: np.ndarray,
    J: np.ndarray,
    speed: np.ndarray,
    distance: np.ndarray,
    near: np.ndarray,
) -> list[_Zero]:
    """The distinct zeros of one draw, the most exact one of each."""
    zeros: list[_Zero] = []
    for k in np.flatnonzero(converged)[np.argsort(speed[converged], kind="stable")]:
        if all(np.abs((z[k] - other.draw_location) / near).max() > 1 for other in zeros):
            zeros.append(_Zero(z[k], J[k], float(speed[k]), float(distance[k])))
    return zeros


def _match(found: list[list[_Zero]], match: float, width: np.ndarray) -> list[list[tuple[int, int]]]:
    """Groups of (draw, position): the draws with most points first, then once more around the medians."""
    order = sorted(range(len(found)), key=lambda d: -len(found[d]))
    groups: list[list[tuple[int, int]]] = []
    for _ in range(3):
        centres = [_centre(group, found) for group in groups]
        groups = [[] for _ in groups]
        for d in order:
            for i, c in sorted(_assign(found[d], centres, match, width).items()):
                groups.extend([] for _ in range(c + 1 - len(groups)))
                groups[c].append((d, i))
        groups = [group for group in groups if group]
    return _gathered(groups, found, match, width)


def _gathered(
    groups: list[list[tuple[int, int]]], found: list[list[_Zero]], match: float, width: np.ndarray
) -> list[list[tuple[int, int]]]:
    """A point in few draws gives its zeros to a near one in more draws, where that has none: one wide posterior."""
    groups = sorted(groups, key=len, reverse=True)
    for k, group in enumerate(groups):
        location, index = _centre(group, found) if group else (0.0, None)
        for c, other in enumerate(groups[k + 1 :], k + 1):
            have = {d for d, _ in group}
            near = [
                (d, i)
                for d, i in other
                if d not in have
                and found[d][i].index == index
                and np.abs((found[d][i].draw_location - location) / width).max() <= match
            ]
            group.extend(near)
            groups[c] = [pair for pair in other if pair not in near]
    return [group for group in groups if group]


def _assign(
    zeros: list[_Zero], centres: list[tuple[np.ndarray, int]], match: float, width: np.ndarray
) -> dict[int, int]:
    """A centre for each zero of a draw, the nearest pairs first; what finds none becomes a centre."""
    pairs = sorted(
        (np.abs((zero.draw_location - location) / width).max(), i, c)
        for i, zero in enumerate(zeros)
        for c, (location, index) in enumerate(centres)
        if index == zero.index
    )
    taken: dict[int, int] = {}
    for gap, i, c in pairs:
        if gap <= match and i not in taken and c not in taken.values():
            taken[i] = c
    for i, zero in enumerate(zeros):
        if i not in taken:
            taken[i] = len(centres)
            centres.append((zero.draw_location, zero.index))
    return taken


def _centre(group: list[tuple[int, int]], found: list[list[_Zero]]) -> tuple[np.ndarray, int]:
    zeros = [found[d][i] for d, i in group]
    return np.median([zero.draw_location for zero in zeros], 0), zeros[0].index


def _summarised(group: list[tuple[int, int]], found: list[list[_Zero]], draws: int) -> FixedPoint:
    zeros = [found[d][i] for d, i in sorted(group)]
    values = np.linalg.eigvals(np.stack([zero.jacobian for zero in zeros])).astype(complex)
    order = np.lexsort((-values.imag, -np.round(values.real, 12)), axis=-1)
    values = np.take_along_axis(values, order, -1)
    names = [classify(row) for row in values]
    counts = {
        name: names.count(name) / len(names) for name in sorted(set(names), key=names.count, reverse=True)
    }
    return FixedPoint(
        np.array(sorted(d for d, _ in group)),
        np.stack([zero.draw_location for zero in zeros]),
        values,
        np.array([zero.speed for zero in zeros]),
        np.array([zero.distance for zero in zeros]),
        counts,
        len(zeros) / draws,
    )


def classify(eigenvalues: Any) -> str:
    """The kind of a fixed point by its eigenvalues: stable or unstable node or focus, saddle, centre, degenerate.

    A centre has complex eigenvalues with a real part of zero, to 1e-6 of the largest, and no positive ones: in a
    nonlinear drift its linear part does not decide. A degenerate one has an eigenvalue of zero.

    Example:
        >>> classify([-1 + 2j, -1 - 2j]), classify([1.0, -1.0]), classify([2j, -2j])
        ('stable focus', 'saddle', 'centre')
    """
    values = np.asarray(eigenvalues, complex)
    small = _CENTRE * max(np.abs(values).max(), np.finfo(float).tiny)
    turning = np.abs(values.imag) > small
    still, growing = np.abs(values.real) <= small, values.real > small
    if (still & ~turning).any():
        return "degenerate"
    if growing.any() and (values.real < -small).any():
        return "saddle"
    if still.any():
        return "unstable focus" if growing.any() else "centre"
    return ("unstable " if growing.any() else "stable ") + ("focus" if turning.any() else "node")


def _interval(x: np.ndarray) -> str:
    x = np.round(x, 12) + 0.0
    mean = f"{x.mean():.4g}"
    if len(x) == 1 or np.ptp(x) <= 1e-9 * max(np.abs(x).max(), 1.0):
        return mean
    low, high = np.quantile(x, _LEVELS)
    return f"{mean} [{low:.4g}, {high:.4g}]"
