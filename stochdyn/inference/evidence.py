"""The evidence of a fitted model: its guide as the proposal of a particle filter."""

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from stochdyn.data import Series
from stochdyn.errors import GuideError
from stochdyn.inference.draws import Draws, Site, draw, evaluating, pair
from stochdyn.paths import GuidedPath, particle_evidence


@dataclass(frozen=True)
class Evidence:
    """Estimates of log p(y) from draws of the latents, the path integrated out by a particle filter.

    Attributes:
        log_likelihood: (draw, series), log p(y_i | latents of the draw), plus log p - log q of the latents that belong
            to the series.
        log_weights: (draw,), log p - log q of the latents outside the series' plate.

    Example:
        >>> import stochdyn as sd
        >>> sd.Evidence(torch.zeros(10, 3), torch.zeros(10)).total
        tensor(0.)
    """

    log_likelihood: Tensor
    log_weights: Tensor

    @property
    def total(self) -> Tensor:
        """log p(y) of all series together; its exponential is unbiased."""
        joint = self.importance
        return torch.logsumexp(joint, 0) - math.log(len(joint))

    @property
    def per_series(self) -> Tensor:
        """(series,) log p(y_i): given nothing where all latents belong to series, else given the shared latents'
        posterior (the log of the average over draws)."""
        return torch.logsumexp(self.log_likelihood, 0) - math.log(len(self.log_likelihood))

    @property
    def importance(self) -> Tensor:
        """(draw,) log weights of the latents other than the path, for k-hat: the path is integrated out."""
        return self.log_weights + self.log_likelihood.sum(-1)


def evidence(
    fit: Any, data: Series, *, draws: int = 100, particles: int = 100, seed: int | None = 0
) -> Evidence:
    """Estimate the evidence from a fit: what the ELBO bounds.

    The latents other than the path are drawn from the guide; for each draw the guided path moves a twisted particle
    filter (`particle_evidence`). The gap between `Evidence.total` and the ELBO is what the guide loses.

    Args:
        fit: what `sd.fit` returned, or (model, guide).
        data: the series; the model observes (series, time, channel) or (series, time), independent over time given
            the path.
        draws: draws of the latents outside the path; 1 is enough where there are none.
        particles: per draw and series.
        seed: of the draws; None uses the current random state.

    Raises:
        GuideError: if the model has not exactly one path, or its observations are not per time.

    References:
        Andrieu & Roberts, "The pseudo-marginal approach for efficient Monte Carlo computations", Annals of Statistics
        2009, https://doi.org/10.1214/07-AOS574

    Example:
        >>> import pyro, pyro.distributions as dist, stochdyn as sd
        >>> def model(batch):
        ...     grid = sd.TimeGrid(batch.times)
        ...     with batch.plate("series"):
        ...         z = pyro.sample("z", sd.SDEPath(lambda t, z: -z, torch.tensor([0.3]),
        ...                                         dist.Normal(torch.zeros(1), 1.0).to_event(1), grid.ts))
        ...         seen = dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2)
        ...         pyro.sample("y", seen, obs=batch.values)
        >>> data = sd.Series([0.0, 1.0], torch.randn(3, 2, 1))
        >>> sd.evidence((model, sd.AmortizedGuide(model)), data, draws=1, particles=10).per_series.shape
        torch.Size([3])
    """
    model, guide = pair(fit)
    with evaluating(model, guide, seed=seed):
        found = draw(fit, data, draws)
        path = _only_path(found)
        likelihood = _Likelihood(model, found, path, data)
        log_likelihood = particle_evidence(path.fn, likelihood, particles=particles)
        log_likelihood = log_likelihood.reshape(draws, -1)
        shared = torch.zeros(draws, dtype=log_likelihood.dtype, device=log_likelihood.device)
        for name, q in found.latents.items():
            if name == path.name:
                continue
            difference = found.prior[name].log_prob - q.log_prob
            if q.plates == path.plates and q.plates:
                log_likelihood = log_likelihood + difference.reshape(draws, -1)
            else:
                shared = shared + difference.reshape(draws, -1).sum(-1)
    return Evidence(log_likelihood, shared)


def _only_path(found: Draws) -> Site:
    paths = [site for site in found.latents.values() if isinstance(site.fn, GuidedPath)]
    if len(paths) != 1:
        raise GuideError(
            f"evidence needs a model with exactly one path guided by AmortizedGuide, got {[p.name for p in paths]}. "
            "Use particle_evidence on the path itself."
        )
    return paths[0]


class _Likelihood:
    """`(z, k)` -> the log likelihood of what each series has at grid time k, by running the model on a path that stays
    at z: only the column of that time is read."""

    def __init__(self, model: Any, found: Draws, path: Site, data: Series) -> None:
        self.model, self.data, self.path, self.plates = model, data, path, found.plates
        chain = path.fn.chain
        self.points = chain.steps + 1
        self.values = {name: site.value for name, site in found.latents.items() if name != path.name}
        self.raw = {name: _lifted(site, found.plates) for name, site in found.latents.items() if name != path.name}
        times, ts = data.times, chain.ts
        shape = torch.broadcast_shapes(times.shape[:-1], ts.shape[:-1])
        index = torch.searchsorted(ts.expand(*shape, -1).contiguous(), times.expand(*shape, -1).contiguous())
        self.column = torch.full((*shape, self.points), -1)
        for j in reversed(range(times.shape[-1])):
            self.column.scatter_(-1, index[..., j : j + 1], j)

    def __call__(self, z: Tensor, k: int) -> Tensor | None:
        column = self.column[..., k].to(z.device)
        if (column < 0).all():
            return None
        constant = z[..., None, :].expand(*z.shape[:-1], self.points, z.shape[-1])
        rows = _pointwise_rows(self.model, {**self.raw, self.path.name: constant}, self.data)
        rows = rows.expand(*z.shape[:-1], rows.shape[-1])
        at = column.clamp(min=0).expand(rows.shape[:-1])[..., None]
        picked = rows.gather(-1, at)[..., 0]
        return torch.where(column >= 0, picked, torch.zeros_like(picked))


def _lifted(site: Site, plates: int) -> Tensor:
    """A latent as (draws, *ones, *batch, *event), so that it broadcasts under a dimension of particles."""
    batch = len(site.plates)
    return site.value.reshape(site.value.shape[0], *[1] * (plates - batch), *site.value.shape[1:])


def _pointwise_rows(model: Any, values: dict[str, Tensor], data: Series) -> Tensor:
    """(..., series, time): the log likelihood of all observed sites, channels summed."""
    with pyro.validation_enabled(False), poutine.block(), poutine.trace() as tracer:
        poutine.condition(model, values)(data)
    total: Tensor | None = None
    points = data.values.shape[-2]
    for name, site in tracer.trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or name in values:
            continue
        if (site["infer"] or {}).get("_deterministic"):
            continue
        rows = _pointwise(site["fn"], site["value"])
        if site["mask"] is not None:
            raise GuideError(f"site '{name}': masked by a handler. Put the mask into .mask(batch.mask).")
        if len(site["fn"].event_shape) == 2 and rows.shape[-2:] == site["value"].shape[-2:]:
            rows = rows.sum(-1)
        if rows.dim() < 1 or rows.shape[-1] != points:
            raise GuideError(
                f"site '{name}': its log likelihood has shape {tuple(rows.shape)}, not (..., series, time={points}). "
                "Observe (series, time, channel) with .to_event(2)."
            )
        total = rows if total is None else total + rows
    if total is None:
        raise GuideError("The model observes nothing, so there is no evidence. Give `obs=` to a sample statement.")
    return total


def _pointwise(fn: Any, value: Tensor) -> Tensor:
    """log_prob before event dimensions are summed, masks applied."""
    if isinstance(fn, Independent):
        return _pointwise(fn.base_dist, value)
    if hasattr(fn, "_mask") and hasattr(fn, "base_dist"):
        rows = _pointwise(fn.base_dist, value)
        mask = torch.as_tensor(fn._mask)
        mask = mask.reshape(*mask.shape, *[1] * (rows.dim() - mask.dim())) if mask.dim() < rows.dim() else mask
        return torch.where(mask, rows, torch.zeros_like(rows))
    return fn.log_prob(value)
