"""When a jump diffusion jumped: the posterior probability and size of a jump in every gap between observations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from stochdyn.data import Series
from stochdyn.diagnostics.plots import COLORS, INK, MUTED, clean, given_axes, new_axes
from stochdyn.errors import DataError, FieldError
from stochdyn.inference.draws import Site, draw, evaluating, pair
from stochdyn.paths import JumpDiffusionPath


@dataclass(frozen=True, eq=False)
class JumpReading:
    """What the data say of jumps between observations.

    Within a gap the time of a jump is not identified, so it is reported by gap.

    Attributes:
        starts, ends: (series, gap) the times of the observations around.
        probability: (series, gap) that at least one jump fell into it.
        size: (series, gap, state) the expected sum of the jumps' sizes, zero where there was none.
        data: what was observed.
        site: the name of the path.

    Example:
        >>> import numpy as np, torch, stochdyn as sd
        >>> data, p = sd.Series([0.0, 1.0], torch.zeros(1, 2, 1)), np.array([[0.5]])
        >>> sd.JumpReading(np.zeros((1, 1)), np.ones((1, 1)), p, 2 * p[..., None], data, "z").size_if_jumped.item()
        2.0
    """

    starts: np.ndarray
    ends: np.ndarray
    probability: np.ndarray
    size: np.ndarray
    data: Series
    site: str

    @property
    def size_if_jumped(self) -> np.ndarray:
        """(series, gap, state) the expected sum of sizes, given that there was a jump."""
        return self.size / np.maximum(self.probability, 1e-12)[..., None]


def read_jumps(
    fit: Any, data: Series, *, site: str | None = None, draws: int = 200, seed: int | None = 0
) -> JumpReading:
    """Posterior probability and size of the jumps in every gap between observations.

    Averaged over posterior draws of the parameters and, where it is latent, of the path: given both ends of a step
    the number of its jumps has a closed form, so no jump is ever sampled.

    Args:
        fit: what `sd.fit` returns, or (model, guide).
        data: the series, as the model was given.
        site: the name of the jump diffusion; None where there is one.
        draws: posterior draws.
        seed: of the draws; None goes on with torch's generator.

    Raises:
        FieldError: if the model has no jump diffusion of that name, or several and none is named.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, stochdyn as sd
        >>> y = torch.tensor([0.0, 0.1, 5.0, 5.1])[None, :, None]
        >>> series = sd.Series(torch.arange(4.0), y)
        >>> def model(batch):
        ...     scale = pyro.sample("scale", dist.LogNormal(torch.tensor(-1.0), 0.5))
        ...     jumps = sd.CompoundPoisson(0.1, sd.NormalJump(0.0, 4.0))
        ...     with batch.plate("series"):
        ...         path = sd.JumpDiffusionPath(lambda t, z: 0 * z, lambda t, z: scale[..., None] + 0 * z, jumps,
        ...                                     batch.values[:, 0], batch.times)
        ...         pyro.sample("y", path, obs=batch.values)
        >>> fit = sd.fit(model, sd.AmortizedGuide(model), series, steps=50, lr=0.05, progress=False)
        >>> sd.read_jumps(fit, series).probability.round(1).tolist()
        [[0.0, 1.0, 0.0]]
    """
    with evaluating(*pair(fit), seed=seed):
        found = draw(fit, data, draws)
        chosen = _chosen({**found.observed, **found.prior}, site)
        path = _inner(chosen.fn)
        log_none, size = path.steps(chosen.value).posterior()
    gap, inside, edges = _gaps(path.ts, data)
    none, size = log_none.movedim(0, -1), size.movedim(0, -2)
    shape = none.shape[:-1]
    index = gap.expand(*shape, -1)
    count = edges.shape[-1] - 1
    kept = torch.zeros(*shape, count, dtype=none.dtype).scatter_add(-1, index, none * inside)
    sums = torch.zeros(*shape, count, size.shape[-1], dtype=size.dtype)
    sums = sums.scatter_add(-2, index[..., None].expand(size.shape), size * inside[..., None])
    probability = -torch.expm1(kept)
    rows, states = (-1, len(data), count), size.shape[-1]
    probability = probability.reshape(rows).mean(0)
    mean = sums.reshape(*rows, states).mean(0)
    known = edges.expand(len(data), -1).numpy()
    return JumpReading(known[:, :-1], known[:, 1:], probability.numpy(), mean.numpy(), data, chosen.name)


def _inner(fn: Any) -> Any:
    """A distribution without what `to_event` and `mask` wrap around it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _chosen(sites: dict[str, Site], name: str | None) -> Site:
    jumping = {n: s for n, s in sites.items() if isinstance(_inner(s.fn), JumpDiffusionPath)}
    if name is not None and name in jumping:
        return jumping[name]
    if name is None and len(jumping) == 1:
        return next(iter(jumping.values()))
    asked = "several" if name is None else f"site='{name}'"
    raise FieldError(
        f"read_jumps: {asked if jumping else 'none'} of the model's sites {sorted(sites)} is meant; its jump "
        f"diffusions are {sorted(jumping)}. Name one with site=."
    )


def _gaps(ts: Tensor, data: Series) -> tuple[Tensor, Tensor, Tensor]:
    """The gap of every step of a grid, 1 where it is inside one, and its edges (series, time).

    A time with nothing observed is no edge: it stands where the next observation does, as a gap of no length.
    """
    seen, edges = data.mask.any(-1).cpu(), data.times.double().cpu()
    edges = edges.expand(seen.shape)
    last = torch.where(seen, edges, -torch.inf).amax(-1, keepdim=True)
    edges = torch.where(seen, edges, torch.inf).flip(-1).cummin(-1).values.flip(-1).minimum(last)
    starts = ts.double().cpu()[..., :-1]
    edges, starts = (x.reshape(-1, x.shape[-1]) for x in (edges, starts))
    rows = max(len(edges), len(starts))
    edges, starts = (x.expand(rows, -1).contiguous() for x in (edges, starts))
    gap = torch.searchsorted(edges, starts, right=True) - 1
    inside = (gap >= 0) & (gap < edges.shape[-1] - 1)
    return gap.clamp(0, edges.shape[-1] - 2), inside.to(torch.get_default_dtype()), edges


def plot_jumps(
    reading: JumpReading,
    *,
    series: int = 0,
    channel: int | str = 0,
    threshold: float = 0.5,
    time_label: str = "time",
    axes: Any = None,
) -> np.ndarray:
    """The data, with the gaps in which they probably jumped, and the probability of a jump in every gap.

    Args:
        reading: what `read_jumps` returns.
        series: the row of the series to show.
        channel: which channel of the data is drawn.
        threshold: gaps of at least this probability are marked, with the expected size where they are few.
        time_label: what the x axis is called.
        axes: two axes to draw on; a new figure by default.

    Returns:
        The two axes.

    Raises:
        DataError: if the series or channel does not exist.
        ShapeError: if not two axes are given.

    Example:
        >>> import numpy as np, torch, stochdyn as sd
        >>> data = sd.Series(torch.arange(4.0), torch.tensor([0.0, 0.1, 5.0, 5.1])[None, :, None])
        >>> t = np.arange(4.0)[None]
        >>> reading = sd.JumpReading(t[:, :-1], t[:, 1:], np.array([[0.0, 1.0, 0.1]]), np.zeros((1, 3, 1)), data, "z")
        >>> [ax.get_ylabel() for ax in sd.plot_jumps(reading)]
        ['0', 'P(jump)']
    """
    if not 0 <= series < len(reading.probability):
        raise DataError(
            f"series {series} does not exist: there are {len(reading.probability)}, numbered from 0."
        )
    names = reading.data.channels
    number = _number(channel, names)
    top, bottom = new_axes(2, (8, 2.3)) if axes is None else given_axes(axes, 2)
    times, values, seen = _points(reading.data, series, number)
    top.plot(times[seen], values[seen], "o-", ms=3, lw=0.7, color=INK, mfc=INK, label="data")
    p, starts, ends = reading.probability[series], reading.starts[series], reading.ends[series]
    likely = (p >= threshold) & (ends > starts)
    for k, at in enumerate(np.flatnonzero(likely)):
        label = f"P(jump) of at least {threshold:g}" if k == 0 else None
        top.axvspan(starts[at], ends[at], color=COLORS[1], alpha=0.25, lw=0, label=label)
    _write_sizes(top, reading.size_if_jumped[series], starts, ends, likely)
    real = ends > starts
    colors = [COLORS[1] if x >= threshold else MUTED for x in p[real]]
    bottom.bar(starts[real], p[real], (ends - starts)[real], align="edge", color=colors, lw=0)
    bottom.axhline(threshold, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    bottom.set(ylim=(0, 1.02), ylabel="P(jump)", xlabel=time_label)
    top.set_ylabel(names[number])
    top.legend(
        frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2, borderaxespad=0
    )
    for ax in (top, bottom):
        clean(ax)
    return np.array([top, bottom], dtype=object)


def _number(channel: int | str, names: Sequence[str]) -> int:
    if channel in names:
        return list(names).index(channel)  # type: ignore
    if isinstance(channel, int) and 0 <= channel < len(names):
        return channel
    raise DataError(
        f"channel {channel!r} does not exist: there are {tuple(names)}. Give a name or a number from 0."
    )


def _points(data: Series, series: int, channel: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    times = data.times[series] if data.times.dim() == 2 else data.times
    values, seen = data.values[series, :, channel], data.mask[series, :, channel]
    return times.cpu().numpy(), values.detach().cpu().numpy(), seen.cpu().numpy()


def _write_sizes(
    ax: Axes, sizes: np.ndarray, starts: np.ndarray, ends: np.ndarray, likely: np.ndarray
) -> None:
    """Expected sizes beside their gaps, where they can be read."""
    if sizes.shape[-1] != 1 or likely.sum() > 12:
        return
    for at in np.flatnonzero(likely):
        place = ((starts[at] + ends[at]) / 2, 0.98)
        ax.annotate(
            f"{sizes[at, 0]:+.3g}", place, xycoords=("data", "axes fraction"), ha="center", va="top",
            fontsize="x-small", color=INK,
        )  # fmt: skip
