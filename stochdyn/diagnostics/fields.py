"""Reading a fit: the drift and diffusion of its path, over posterior draws."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.data import Series
from stochdyn.errors import FieldError, ShapeError
from stochdyn.fields import evaluate
from stochdyn.inference import scopes
from stochdyn.inference.draws import Draws, draw, evaluating, pair
from stochdyn.inference.parameters import modules_of
from stochdyn.paths import SDEPath

_LINE, _SIDE, _MARGIN, _BLOCK = 121, 31, 0.25, 200_000


@dataclass(frozen=True)
class PosteriorFields:
    """Drift and diffusion of one series' path, as functions of the state, for every posterior draw.

    Attributes:
        path: the model's path with the draws as its first batch dimension.
        states: (draw, time, state) the smoothed path: where the data speak.
        t: the time at which the fields are read.
        context: (context_dim,) their input in place of the path's own at `t`, or None.

    Example:
        >>> import pyro, pyro.distributions as dist, stochdyn as sd
        >>> def model(batch):
        ...     theta = pyro.sample("theta", dist.LogNormal(0.0, 0.5))
        ...     grid = sd.TimeGrid(batch.times)
        ...     with batch.plate("series"):
        ...         path = sd.SDEPath(lambda t, z: -theta[..., None] * z, torch.tensor([0.3]), torch.ones(1), grid.ts)
        ...         z = pyro.sample("z", path)
        ...         seen = dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2)
        ...         pyro.sample("y", seen, obs=batch.values)
        >>> data = sd.Series([0.0, 1.0], [[[1.0], [0.5]]])
        >>> fields = sd.posterior_fields((model, sd.AmortizedGuide(model)), data, draws=20)
        >>> fields.drift(torch.zeros(1), torch.ones(5, 20, 1)).shape
        torch.Size([5, 20, 1])
    """

    path: SDEPath
    states: Tensor
    t: float
    context: Tensor | None
    _modules: tuple[Any, ...]

    @property
    def draws(self) -> int:
        """How many."""
        return len(self.states)

    def drift(self, t: Tensor, z: Tensor) -> Tensor:
        """The drift at `self.t`, whatever `t` is: (*points, draw, state) for z of the same shape, or of one draw."""
        return self._call("drift", z)

    def diffusion(self, t: Tensor, z: Tensor) -> Tensor:
        """The standard deviation of every state's noise per square root of time, likewise."""
        return self._call("diffusion", z)

    def _call(self, name: str, z: Tensor) -> Tensor:
        """In the layout of scoring: the points where time is, then the path's batch."""
        chain, lead = self.path.chain, z.shape[:-2]
        batch = (self.draws, *chain.batch_shape[1:])
        x = z.expand(*lead, self.draws, z.shape[-1]).reshape(
            -1, self.draws, *[1] * (len(batch) - 1), z.shape[-1]
        )
        x = x.expand(-1, *batch, -1)
        time = torch.full((1,) * x.dim(), self.t, dtype=x.dtype, device=x.device)
        with scopes.mode(self._modules, train=False) if self._modules else nullcontext():
            if name == "drift":
                out = evaluate(name, chain.drift, time, x, self._row(x.dim()))
            else:
                out = chain.diffusion(time, x, self._row(x.dim()))
                out = out.abs() if chain.diffusion.diagonal else torch.linalg.vector_norm(out, dim=-1)
        return out.expand(x.shape).reshape(*lead, self.draws, z.shape[-1])

    def _row(self, ndim: int) -> Tensor | None:
        own = self.path.chain._context
        if self.context is not None or own is None:
            return self.context
        ts = self.path.ts.reshape(-1, self.path.ts.shape[-1])[0]
        k = int(torch.searchsorted(ts, self.t, right=True)) - 1
        row = own[min(max(k, 0), len(own) - 1)]
        return row.reshape(*[1] * (ndim - row.dim()), *row.shape)


@dataclass(frozen=True)
class FieldReading:
    """Values of drift and diffusion on a set of points.

    Attributes:
        points: (point, state).
        drift: (draw, point, state), in units of the state per time.
        diffusion: the same: the standard deviation of every state's noise, per square root of time.
        states: (draw, time, state) the smoothed path: where the data speak.
        dims: the states along which the points vary; the others are at their posterior mean.
        shape: the number of points along each of them, None for points of the user's own.

    Example:
        >>> x = torch.linspace(-1, 1, 5)[:, None]
        >>> FieldReading(x, -x[None], 0 * x[None] + 0.3, x[None], (0,), (5,)).drift.shape
        torch.Size([1, 5, 1])
    """

    points: Tensor
    drift: Tensor
    diffusion: Tensor
    states: Tensor
    dims: tuple[int, ...]
    shape: tuple[int, ...] | None


def posterior_fields(
    fit: Any,
    data: Series,
    *,
    site: str | None = None,
    series: int = 0,
    draws: int = 100,
    t: float | None = None,
    context: Tensor | None = None,
    seed: int | None = 0,
) -> PosteriorFields:
    """The drift and the diffusion that a fit has learned, as functions, with the posterior of what was sampled.

    A draw differs from another by the latents on which the fields depend. Weights that were trained as parameters, not
    sampled, are the same in all draws: their uncertainty is not in here.

    Args:
        fit: what `sd.fit` returned, or (model, guide).
        data: the series.
        site: the name of the path; the first one by default.
        series: whose parameters, by its row.
        draws: how many.
        t: for fields that depend on time or on covariates: when; the first time by default.
        context: (context_dim,) an input to freeze the fields at, in place of the path's own at `t`.
        seed: of the draws; None uses the current random state.

    Raises:
        FieldError: if there is no such path, or it lies in plates besides that of the series.

    Example:
        >>> import stochdyn as sd
        >>> data = sd.Series([0.0, 1.0], torch.randn(3, 2, 1))
        >>> model = sd.LatentSDE(1, 2, hidden=8)
        >>> fields = sd.posterior_fields((model, model.guide), data, draws=10)
        >>> fields.states.shape, fields.diffusion(torch.zeros(1), torch.zeros(7, 1, 2)).shape
        (torch.Size([10, 2, 2]), torch.Size([7, 10, 2]))
    """
    one = data[[series]]
    programs = pair(fit)
    with evaluating(*programs, seed=seed):
        found = draw(fit, one, draws)
    name = _name(found, site)
    path, states = found.prior[name].fn, found.latents[name].value
    if not isinstance(path, SDEPath):
        raise FieldError(f"site '{name}' is a {type(path).__name__}, not an SDEPath. Name a path with site=.")
    sizes = states.shape[1:-2]
    if sizes.numel() != 1:
        raise FieldError(
            f"path '{name}' has batch shape {tuple(sizes)} for one series: it lies in further plates, and there is one "
            "drift for each. Read a model whose path is in the plate of the series alone."
        )
    path = path.expand(torch.broadcast_shapes(path.batch_shape, (draws, *[1] * found.plates)))
    states = states.reshape(draws, *states.shape[-2:])
    grid = path.ts.reshape(-1, path.ts.shape[-1])[0]
    index = torch.searchsorted(grid, one.times.reshape(-1)[: int(one.lengths[0])].to(grid.device)).clamp_max(
        len(grid) - 1
    )
    when = float(grid[0]) if t is None else float(t)
    modules = tuple(module for program in programs for module in modules_of(program))
    return PosteriorFields(path, states[:, index], when, context, modules)


def read_field(
    fit: Any,
    data: Series,
    points: Tensor | None = None,
    *,
    dims: Sequence[int] | None = None,
    **options: Any,
) -> FieldReading:
    """The learned drift and diffusion in numbers, on a line or a plane through the data; `plot_field` shows them.

    Args:
        fit: what `sd.fit` returned, or (model, guide); or `PosteriorFields`.
        data: the series.
        points: (point, state) where to read; by default a line of 121, or a plane of 31 x 31, as far as the smoothed
            states reach and a quarter further.
        dims: the one or two states along which to read; the others stay at their posterior mean. By default all states
            if there are one or two, else the first two.
        options: `site`, `series`, `draws`, `t`, `context`, `seed` as for `posterior_fields`.

    Raises:
        ShapeError: if points or dims do not fit the states.

    Example:
        >>> import stochdyn as sd
        >>> data = sd.Series([0.0, 1.0], torch.randn(3, 2, 1))
        >>> model = sd.LatentSDE(1, 3, hidden=8)
        >>> reading = sd.read_field((model, model.guide), data, dims=[2], draws=10)
        >>> reading.points.shape, reading.drift.shape
        (torch.Size([121, 3]), torch.Size([10, 121, 3]))
    """
    if isinstance(fit, PosteriorFields) and options:
        raise ShapeError(
            f"read_field: {sorted(options)} belong to posterior_fields, which was called before."
        )
    fields = fit if isinstance(fit, PosteriorFields) else posterior_fields(fit, data, **options)
    size = fields.states.shape[-1]
    chosen = tuple(range(min(size, 2))) if dims is None else tuple(dims)
    if len(chosen) not in (1, 2) or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(size)):
        raise ShapeError(f"dims={chosen}: name one or two of the {size} states, numbered from 0.")
    shape = None
    if points is None:
        points, shape = _lattice(fields.states, chosen)
    elif points.dim() != 2 or points.shape[-1] != size:
        raise ShapeError(f"`points` must have shape (point, state={size}), got {tuple(points.shape)}.")
    points = points.to(fields.states)
    drift, diffusion = [], []
    with torch.no_grad():
        for some in points[:, None].split(max(1, _BLOCK // (fields.draws * size))):
            drift.append(fields.drift(some, some))
            diffusion.append(fields.diffusion(some, some))
    drift, diffusion = torch.cat(drift).movedim(1, 0), torch.cat(diffusion).movedim(1, 0)
    return FieldReading(points, drift, diffusion, fields.states, chosen, shape)


def _lattice(states: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    flat = states.flatten(0, 1)
    low, high = flat.amin(0), flat.amax(0)
    width = torch.where(high > low, high - low, torch.ones_like(high))
    count = _LINE if len(dims) == 1 else _SIDE
    share = torch.linspace(-_MARGIN, 1 + _MARGIN, count, dtype=flat.dtype, device=flat.device)
    lines = [low[d] + width[d] * share for d in dims]
    mesh = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(-1, len(dims))
    points = flat.mean(0).repeat(len(mesh), 1)
    points[:, list(dims)] = mesh
    return points, (count,) * len(dims)


def _name(found: Draws, site: str | None) -> str:
    names = [name for name in found.prior if hasattr(found.prior[name].fn, "ts")]
    if not names or (site is not None and site not in names):
        raise FieldError(
            f"There is no path {'' if site is None else repr(site) + ' '}in the model; its paths are {names}."
        )
    return names[0] if site is None else site
