"""The evidence of a fitted model: its guide as the proposal of a particle filter."""

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from stochdyn.data import Jumps, Series
from stochdyn.errors import GuideError
from stochdyn.inference.draws import (
    Draws,
    Site,
    at_times,
    check_follows,
    draw,
    evaluating,
    is_deterministic,
    pair,
    plate_scale,
)
from stochdyn.paths import GuidedJumpPath, GuidedPath, particle_evidence


@dataclass(frozen=True)
class Evidence:
    """Estimates of log p(y) from draws of the latents, the path integrated out by a particle filter.

    Attributes:
        log_likelihood: (draw, series), log p(y_i | latents of the draw), plus log p - log q of the latents
            that belong to the series.
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
        """(series,) log p(y_i): given nothing where all latents belong to series, else given the shared
        latents' posterior (the log of the average over draws)."""
        return torch.logsumexp(self.log_likelihood, 0) - math.log(len(self.log_likelihood))

    @property
    def importance(self) -> Tensor:
        """(draw,) log weights of the latents other than the path, for k-hat: the path is integrated out."""
        return self.log_weights + self.log_likelihood.sum(-1)


def evidence(
    fit: Any, data: Series, *, draws: int = 100, particles: int = 100, seed: int | None = 0
) -> Evidence:
    """Estimate the evidence from a fit: what the ELBO bounds.

    The latents other than the path are drawn from the guide; for each draw the guided path moves a twisted
    particle filter (`particle_evidence`). The gap between `Evidence.total` and the ELBO is what the guide
    loses.

    Args:
        fit: what `sd.fit` returned, or (model, guide).
        data: the series; the model observes (series, time, channel) or (series, time), independent over time
            given the path.
        draws: draws of the latents outside the path; 1 is enough where there are none.
        particles: per draw and series.
        seed: of the draws; None uses the current random state.

    Raises:
        GuideError: for the jumps of a point process; if the model has not exactly one path, or the guide was made for
            another model, or an observation or a latent depends on more of the path than its state at the time of the
            observation.

    References:
        Andrieu & Roberts, "The pseudo-marginal approach for efficient Monte Carlo computations", Annals of
        Statistics 2009, https://doi.org/10.1214/07-AOS574

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
    if isinstance(data, Jumps):
        raise GuideError(
            "evidence integrates out a path, and the jumps of a point process have none: their likelihood is exact, "
            "and only parameters are left. Take the ELBO of the fit, sd.IWAE for a closer bound, or quadrature."
        )
    model, guide = pair(fit)
    with evaluating(model, guide, seed=seed):
        found = draw(fit, data, draws)
        check_follows(found, data)
        path = _only_path(found)
        _check_prior(path, found.prior[path.name])
        likelihood = _Likelihood(model, found, path, data)
        likelihood.check()
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
    paths = [site for site in found.latents.values() if isinstance(site.fn, GuidedPath | GuidedJumpPath)]
    if len(paths) != 1:
        raise GuideError(
            "evidence needs a model with exactly one path guided by AmortizedGuide, got "
            f"{[p.name for p in paths]}. Use particle_evidence on the path itself."
        )
    return paths[0]


def _check_prior(path: Site, prior: Site) -> None:
    """Refuse a guide of another model: the filter moves by the guide's own path, and would weigh that model's."""
    jumping = isinstance(path.fn, GuidedJumpPath)
    own = path.fn.prior if jumping else GuidedPath(path.fn.chain, None, None)
    value = path.value.reshape(*own.batch_shape, *own.event_shape)
    with pyro.validation_enabled(False):
        expected = own.log_prob(value).reshape(len(path.value), -1).sum(-1)
    got = prior.log_prob.reshape(len(path.value), -1).sum(-1)
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-2):
        raise GuideError(
            f"path '{path.name}' has another density in the model than in the guide: {got[0].item():.6g} and "
            f"{expected[0].item():.6g} for one draw. The guide was made for another model; make one for this."
        )


class _Likelihood:
    """`(z, k)` -> the log likelihood of what each series has at grid time k, by running the model on a path
    that stays at z: only the column of that time is read."""

    def __init__(self, model: Any, found: Draws, path: Site, data: Series) -> None:
        self.model, self.data, self.path, self.found = model, data, path, found
        chain = path.fn.chain
        self.points = chain.steps + 1
        self.raw = {name: _lifted(site, found.plates) for name, site in found.latents.items()}
        if at_times(path.value, chain.ts, data.times) is None:
            raise GuideError(
                f"path '{path.name}': its grid lacks times of the data. Build it on sd.TimeGrid(batch.times)."
            )
        times, ts = data.times, chain.ts
        if times.dim() == 2 and ts.dim() > 2:
            times = times.reshape(*ts.shape[:-1], -1)
        shape = torch.broadcast_shapes(times.shape[:-1], ts.shape[:-1])
        ts, times = ts.to(times.device).expand(*shape, -1), times.expand(*shape, -1)
        self.index = torch.searchsorted(ts.contiguous(), times.contiguous())
        self.column = torch.full((*shape, self.points), -1, device=times.device)
        for j in reversed(range(times.shape[-1])):
            self.column.scatter_(-1, self.index[..., j : j + 1], j)

    def __call__(self, z: Tensor, k: int) -> Tensor | None:
        column = self.column[..., k].to(z.device)
        if (column < 0).all():
            return None
        rows, _ = self._rows(z[..., None, :].expand(*z.shape[:-1], self.points, z.shape[-1]))
        lead = torch.broadcast_shapes(rows.shape[:-1], z.shape[:-1], column.shape)
        at = column.clamp(min=0).expand(lead)[..., None]
        picked = rows.expand(*lead, -1).gather(-1, at)[..., 0]
        return torch.where(column >= 0, picked, torch.zeros_like(picked)).sum_to_size(z.shape[:-1])

    def _rows(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(..., series, time) the log likelihood of a path, and the log prior of the latents after it."""
        with pyro.validation_enabled(False), poutine.block(), poutine.trace() as tracer:
            poutine.condition(self.model, {**self.raw, self.path.name: z})(self.data)
        sites = {n: s for n, s in tracer.trace.nodes.items() if s["type"] == "sample" and s["is_observed"]}
        seen = [s for n, s in sites.items() if n not in self.raw and not is_deterministic(s)]
        if not seen:
            raise GuideError(
                "The model observes nothing, so there is no evidence. Give `obs=` to a sample statement."
            )
        rows = [_of_site(site, self.data.values.shape[-2]) for site in seen]
        names = list(sites)
        later = [n for n in names[names.index(self.path.name) + 1 :] if n in self.raw]
        return sum(rows[1:], rows[0]), {n: sites[n]["fn"].log_prob(sites[n]["value"]) for n in later}

    def check(self) -> None:
        """Compare a drawn path with one that always was where that one is last observed.

        Raises:
            GuideError: if something depends on the path before.
        """
        z = self.raw[self.path.name]
        seen = self.data.mask.any(-1)
        last = (seen * torch.arange(1, seen.shape[-1] + 1, device=seen.device)).argmax(-1)
        last = last.reshape(self.index.shape[:-1]) if self.index.dim() > 2 else last
        at = self.index.expand(*last.shape, -1).gather(-1, last[..., None])[..., None].to(z.device)
        lead = torch.broadcast_shapes(z.shape[:-2], last.shape)
        still = z.expand(*lead, *z.shape[-2:]).gather(-2, at.expand(*lead, 1, z.shape[-1]))
        if still.shape[:-2] != z.shape[:-2]:
            return  # one path, observed by many series
        (rows, later), (rows_still, later_still) = self._rows(z), self._rows(still.expand_as(z))
        last = last.to(z.device)[..., None]
        pairs = {
            "what is observed last": tuple(
                r.gather(-1, last.expand(*r.shape[:-1], 1)) for r in (rows, rows_still)
            )
        }
        pairs |= {f"latent '{name}'": (later[name], later_still[name]) for name in later}
        for what, (got, expected) in pairs.items():
            if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4):
                raise GuideError(
                    f"{what} depends on more of path '{self.path.name}' than its state at the time of an "
                    "observation, and a particle filter cannot weigh that. Use the ELBO, or make the path "
                    "carry it as a state."
                )


def _lifted(site: Site, plates: int) -> Tensor:
    """A latent as (draws, *ones, *batch, *event), so that it broadcasts under a dimension of particles."""
    batch = len(site.plates)
    return site.value.reshape(site.value.shape[0], *[1] * (plates - batch), *site.value.shape[1:])


def _of_site(site: dict[str, Any], points: int) -> Tensor:
    """(..., series, time): the log likelihood of an observed site, channels summed."""
    name, fn = site["name"], site["fn"]
    if site["mask"] is not None:
        raise GuideError(f"site '{name}': masked by a handler. Put the mask into .mask(batch.mask).")
    if not torch.allclose(torch.as_tensor(site["scale"]).double(), torch.tensor(plate_scale(site)).double()):
        raise GuideError(f"site '{name}': scaled by a handler. Only plates may scale a likelihood here.")
    rows, events = pointwise(fn, site["value"])
    if len(fn.event_shape) == 2 and events == 2:
        rows, events = rows.sum(-1), 1
    if not (len(fn.event_shape) in (1, 2) and events == 1 and rows.shape[-1] == points):
        raise GuideError(
            f"site '{name}': its log likelihood has shape {tuple(rows.shape)}, not (..., series, "
            f"time={points}). Observe (series, time, channel) with .to_event(2)."
        )
    return rows


def pointwise(fn: Any, value: Tensor) -> tuple[Tensor, int]:
    """log_prob before event dimensions are summed, masks applied; and how many event dimensions are left.

    Example:
        >>> import pyro.distributions as dist
        >>> fn = dist.Normal(torch.zeros(4, 3), 1.0).mask(torch.arange(3) > 0).to_event(2)
        >>> rows, left = pointwise(fn, torch.zeros(4, 3))
        >>> rows[0, 0].item(), rows.shape, left
        (0.0, torch.Size([4, 3]), 2)
    """
    if isinstance(fn, Independent):
        rows, events = pointwise(fn.base_dist, value)
        return rows, events + fn.reinterpreted_batch_ndims
    if hasattr(fn, "_mask") and hasattr(fn, "base_dist"):
        rows, events = pointwise(fn.base_dist, value)
        mask = torch.as_tensor(fn._mask, device=rows.device)
        return torch.where(mask.reshape(*mask.shape, *[1] * events), rows, torch.zeros_like(rows)), events
    return fn.log_prob(value), 0
