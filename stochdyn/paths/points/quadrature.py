"""Integrals over the gaps between jumps, each to a given error."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from stochdyn.errors import FieldError
from stochdyn.paths.points.support import member

# Kronrod's 15 nodes on [0, 1] of [-1, 1], their weights, and Gauss's 7 (0 where a node is not Gauss's).
_NODES = (
    0.991455371120812639206854697526329,
    0.949107912342758524526189684047851,
    0.864864423359769072789712788640926,
    0.741531185599394439863864773280788,
    0.586087235467691130294144691693600,
    0.405845151377397166906606412076961,
    0.207784955007898467600689403773245,
    0.0,
)
_KRONROD = (
    0.022935322010529224963732008058970,
    0.063092092629978553290700663189204,
    0.104790010322250183839876322541518,
    0.140653259715525918745189590510238,
    0.169004726639267902826583426598550,
    0.190350578064785409913256402421014,
    0.204432940075298892414161999234649,
    0.209482141084727828012999174891714,
)
_GAUSS = (
    0.0,
    0.129484966168869693270611432679082,
    0.0,
    0.279705391489276667901467771423780,
    0.0,
    0.381830050505118944950369775488975,
    0.0,
    0.417959183673469387755102040816327,
)
# A step inside a gap needs about 33 halvings, a kink 13; a pole or noise more panels than this.
_DEPTH, _PANELS = 40, 20_000
# The ends of the first panels of every gap: what a jump sets off may be over soon after it.
_CUTS = (0.0, 2.0**-14, 2.0**-7, 0.25, 0.5, 0.75, 1.0)
POINTS = 15 * (len(_CUTS) - 1)

# Of rows (row,) and times (row, *batch), whose rows lie in the gaps of the same numbers.
Integrand = Callable[[Tensor, Tensor], Tensor]


def integrate(
    f: Integrand, a: Tensor, b: Tensor, *, tolerance: float = 1e-9, chunk: int | None = None
) -> Tensor:
    """The integral of f over [a_k, b_k] for every k, by Gauss and Kronrod's rule; panels that need it are halved.

    The first panels get finer towards a_k. What none of their points sees is missed: a pulse narrower than a hundredth
    of the gap, far from its start.

    Args:
        f: `(row, t)` -> (point, *batch): `row` (point,) says in which interval each row of t (point, *batch) lies.
        a, b: (interval, *batch); where they agree the integral is 0.
        tolerance: of every integral, absolute and relative to it.
        chunk: intervals at a time, to bound memory; None takes all.

    Returns:
        (interval, *batch), differentiable in whatever f depends on.

    Raises:
        FieldError: if an interval does not reach the tolerance in 40 halvings, or f is negative or not finite.

    References:
        Piessens et al., "QUADPACK", 1983, https://doi.org/10.1007/978-3-642-61786-7

    Example:
        >>> a, b = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[1.0], [3.0]]).double()
        >>> integrate(lambda row, t: t.exp(), a, b).flatten()
        tensor([ 1.7183, 17.3673], dtype=torch.float64)
    """
    rows = torch.arange(len(a), device=a.device)
    total = torch.zeros_like(a)
    panels = len(_CUTS) - 1
    for part in rows.split(chunk or max(len(rows), 1)):
        ends = torch.stack([a[part] + cut * (b - a)[part] for cut in _CUTS[:-1]] + [b[part]])
        wide = part.repeat(panels)
        found = _adaptive(f, wide, ends[:-1].flatten(0, 1), ends[1:].flatten(0, 1), tolerance)
        total = total.index_add(0, part, found.unflatten(0, (panels, len(part))).sum(0))
    return total


def gauss_legendre(f: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, nodes: int) -> Tensor:
    """The integral of f over [a_k, b_k] for every k by a fixed rule: exact for polynomials of degree 2 nodes - 1.

    Args:
        f: of (node, interval, *batch), in one call.
        a, b: (interval, *batch).
        nodes: how many.

    Example:
        >>> a, b = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])
        >>> gauss_legendre(lambda t: t**3, a, b, 2)
        tensor([ 0.2500, 20.0000])
    """
    places, weights = (a.new_tensor(x).reshape(-1, *[1] * a.dim()) for x in _rule(nodes))
    values = f(0.5 * (a + b) + 0.5 * (b - a) * places)
    return (weights.to(values) * values).sum(0) * (0.5 * (b - a)).to(values)


@cache
def _rule(nodes: int) -> tuple[list[float], list[float]]:
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return places.tolist(), weights.tolist()


def _adaptive(f: Integrand, rows: Tensor, a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Panels that are good enough are added up; the others are halved and tried again."""
    first, total = rows, torch.zeros_like(a)
    where = torch.arange(len(rows), device=a.device)
    for depth in range(_DEPTH + 1):
        fine, error, grain = _panel(f, rows, a, b)
        allowed = 0.1 * tolerance * (fine.detach().abs() + 1)
        # Rounding bounds what halving can gain.
        floor = 50 * grain * fine.detach().abs()
        bad = error > torch.maximum(allowed, floor)
        again = bad.reshape(len(error), -1).any(1)
        total = total.to(fine).index_add(0, where[~again], fine[~again])
        if not bool(again.any()):
            return total
        rows, where, a, b, bad = rows[again], where[again], a[again], b[again], bad[again]
        if depth == _DEPTH or len(rows) > _PANELS + 2 * len(first):
            break
        middle = 0.5 * (a + b)
        rows, where = rows.repeat(2), where.repeat(2)
        a, b = torch.cat([a, middle]), torch.cat([middle, b])
    worst = bad.nonzero()[0].tolist()
    raise FieldError(
        f"{member(worst[1:])}: the compensator over the gap before jump {int(first[where[0]])} is not known to "
        f"{tolerance:g} after {depth} halvings, near time {float(a[(0, *worst[1:])]):.6g}. The intensity has a "
        "pole there, or is noisy: smooth it, or raise `tolerance`."
    )


def _panel(f: Integrand, rows: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """The integral over each panel and an estimate of its error, (panel, *batch); the precision of f."""
    half = [[-x for x in _NODES], list(reversed(_NODES[:-1]))]
    nodes = a.new_tensor(half[0] + half[1])
    kronrod = a.new_tensor([*_KRONROD, *reversed(_KRONROD[:-1])])
    gauss = a.new_tensor([*_GAUSS, *reversed(_GAUSS[:-1])])
    centre, reach = 0.5 * (a + b), 0.5 * (b - a)
    lift = (-1, *[1] * a.dim())
    ts = (centre + nodes.reshape(lift) * reach).flatten(0, 1)
    values = f(rows.repeat(len(nodes)), ts)
    grain = max(torch.finfo(values.dtype).eps, torch.finfo(ts.dtype).eps)
    values = values.to(torch.promote_types(values.dtype, ts.dtype)).expand(ts.shape)
    values = values.unflatten(0, (len(nodes), len(rows)))
    good = torch.isfinite(values) & (values >= 0)
    if not bool(good.all()):
        bad = (~good).nonzero()[0].tolist()
        time = float(ts.reshape(values.shape)[tuple(bad)])
        raise FieldError(
            f"{member(bad[2:])}: the intensity is {float(values[tuple(bad)]):.6g} at time {time:.6g}. "
            "It must be finite and not negative everywhere in the window."
        )
    fine = torch.tensordot(kronrod.to(values), values, 1) * reach
    coarse = torch.tensordot(gauss.to(values), values, 1) * reach
    # QUADPACK's estimate: the difference is the error of the coarse rule, far above that of the fine one.
    with torch.no_grad():
        tiny = torch.finfo(fine.dtype).tiny
        difference = (fine - coarse).abs()
        mean = torch.where(reach == 0, reach, fine / (2 * reach))
        spread = torch.tensordot(kronrod.to(values), (values - mean).abs(), 1) * reach.abs()
        scaled = spread * torch.clamp((200 * difference / spread.clamp_min(tiny)) ** 1.5, max=1.0)
    return fine, torch.where(spread > 0, scaled, difference), grain
