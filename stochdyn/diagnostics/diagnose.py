"""`diagnose`: one call after a fit that says whether its posterior can be believed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stochdyn.data import AbstractPopulation, Series
from stochdyn.diagnostics.coverage import Coverage, coverage
from stochdyn.diagnostics.diagnosis import Diagnosis, LatentUse, Verdict
from stochdyn.diagnostics.importance import MIN_DRAWS
from stochdyn.diagnostics.rescaling import TimeRescaling, time_rescaling
from stochdyn.diagnostics.settling import Settling, settling
from stochdyn.diagnostics.tree import as_array
from stochdyn.diagnostics.verdicts import (
    NO_LATENTS,
    OTHER_MODEL,
    POINTS,
    judge_coverage,
    judge_gap,
    judge_latents,
    judge_rescaling,
    judge_settling,
    judge_tail,
    judge_tails,
)
from stochdyn.diagnostics.weights import (
    Weights,
    integrated,
    is_local,
    joint_weights,
    log_mean,
    mean,
    reason,
    series_count,
    series_plates,
    tails,
    try_evidence,
)
from stochdyn.errors import FitError, StochdynError
from stochdyn.guides import AmortizedGuide
from stochdyn.inference.collapse import site_uses, unconstrained
from stochdyn.inference.draws import Draws, check_follows, draw, draw_prior, evaluating, pair
from stochdyn.inference.result import Fit
from stochdyn.inference.scopes import unvalidated
from stochdyn.paths import AbstractPointProcess

_COVERAGE_DRAWS = 200
_RESCALINGS = 20


def diagnose(
    fit: Any, data: Any, *, draws: int = 1000, particles: int = 10, seed: int | None = 0
) -> Diagnosis:
    """Say whether the posterior of a fit can be believed.

    Verdicts, one per line: the gap between evidence and ELBO (`sd.evidence`, where it applies), k-hat of the importance
    weights, how far each latent has left its prior, coverage of what is observed, time rescaling of jumps, and whether
    training had settled. None proves the posterior right: a mode that the guide never visits leaves no trace, and a
    parameter's posterior that is too narrow by less than half passes k-hat in one dimension. `sd.sbc` sees that.

    Args:
        fit: what `sd.fit` returned, or (model, guide), which has no losses.
        data: what the model takes, best the data of the fit; of very many series take some, `data[:100]`.
        draws: from the guide, at least 25; k-hat needs about 1000.
        particles: of the particle filter in `sd.evidence`, per draw and series.
        seed: of the draws; None uses the current random state.

    Raises:
        FitError: if `draws` is below 25 or `particles` below 1.
        GuideError: if the guide cannot be drawn from and weighed: a latent is missing in it, or summed out in training.

    References:
        Yao, Vehtari, Simpson & Gelman, "Yes, but did it work? Evaluating variational inference", 2018,
        https://arxiv.org/abs/1802.02538

    Example:
        >>> import pyro, pyro.distributions as dist, stochdyn as sd
        >>> def model(batch):
        ...     grid = sd.TimeGrid(batch.times)
        ...     with batch.plate("series"):
        ...         z = pyro.sample("z", sd.SDEPath(lambda t, z: -z, torch.tensor([0.3]),
        ...                                         dist.Normal(torch.zeros(1), 1.0).to_event(1), grid.ts))
        ...         seen = dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2)
        ...         pyro.sample("y", seen, obs=batch.values)
        >>> data = sd.Series([0.0, 1.0], torch.tensor([[[0.5], [0.3]], [[-0.2], [0.1]]]))
        >>> found = sd.diagnose((model, sd.AmortizedGuide(model)), data, draws=50, particles=5)
        >>> print(found.verdict("training"))
        -     training  a pair (model, guide) has no losses
    """
    if draws < MIN_DRAWS or particles < 1:
        raise FitError(
            f"diagnose: `draws` must be at least {MIN_DRAWS} and `particles` at least 1, got {draws} and {particles}."
        )
    model, guide = pair(fit)
    with evaluating(model, guide, seed=seed):
        found = draw(fit, data, draws)
        if isinstance(data, AbstractPopulation):
            check_follows(found, data)
    series = series_count(found, data)
    weights = joint_weights(found, series)
    latents = _latents(fit, data, found, series, seed)
    weighed = _weigh(
        fit, data, found, weights, latents, {"draws": draws, "particles": particles, "seed": seed}
    )
    covered = _coverage(fit, data, found, min(draws, _COVERAGE_DRAWS), seed)
    rescaled = _rescaling(fit, data, found, seed)
    settled = _settled(fit)
    trusted = all(v.level == "good" for v in weighed.verdicts)
    verdicts = [*weighed.verdicts, judge_latents(latents, trusted)]
    verdicts += [covered if isinstance(covered, Verdict) else judge_coverage(covered)] if covered else []
    verdicts += [rescaled if isinstance(rescaled, Verdict) else judge_rescaling(rescaled)] if rescaled else []
    return Diagnosis(
        verdicts=(*verdicts, judge_settling(settled)),
        ids=_ids(data, weights),
        draws=draws,
        elbo=mean(weights.joint),
        elbo_per_series=None if weights.series is None else mean(weights.series),
        latents=latents,
        coverage=covered if isinstance(covered, Coverage) else None,
        rescaling=rescaled if isinstance(rescaled, dict) else None,
        settling=settled if isinstance(settled, Settling) else None,
        **weighed.numbers,
    )


@dataclass(frozen=True)
class _Weighed:
    verdicts: tuple[Verdict, ...]
    numbers: dict[str, Any]


def _weigh(
    fit: Any,
    data: Any,
    found: Draws,
    weights: Weights,
    latents: tuple[LatentUse, ...],
    options: dict[str, Any],
) -> _Weighed:
    """Gap and k-hat."""
    if not latents:
        both = (Verdict("gap", "good", NO_LATENTS), Verdict("k-hat", "good", NO_LATENTS))
        return _Weighed(both, {"no_evidence": NO_LATENTS})
    if any(latent.is_point for latent in latents):
        return _Weighed((Verdict("gap", "-", POINTS), Verdict("k-hat", "-", POINTS)), {"no_evidence": POINTS})
    evidence, why = None, OTHER_MODEL
    if _own_guide(*pair(fit)):
        evidence, why = try_evidence(fit, data, **options)
    if evidence is None:
        tail, numbers = _tail(weights, latents, latents, _ids(data, weights))
        return _Weighed((Verdict("gap", "-", f"no evidence: {why}"), tail), {"no_evidence": why, **numbers})
    without = integrated(evidence)
    gap, numbers = _gap(without, weights, latents, data)
    others = tuple(latent for latent in latents if latent.name not in found.paths)
    local = all(latent.local for latent in latents)
    used = weights if local and not others else without
    tail, more = _tail(used, others or latents, latents, _ids(data, weights))
    return _Weighed((gap, tail), {**numbers, **more, "evidence": log_mean(without.joint)})


def _own_guide(model: Any, guide: Any) -> bool:
    """Whether an AmortizedGuide was made for this model: its paths are the proposals of the particle filter."""
    return not isinstance(guide, AmortizedGuide) or guide.model is model


def _gap(
    without: Weights, weights: Weights, latents: Sequence[LatentUse], data: Any
) -> tuple[Verdict, dict[str, Any]]:
    total = log_mean(without.joint, less=weights.joint)
    shared = None if all(latent.local for latent in latents) else log_mean(without.joint, less=without.joint)
    ids = _ids(data, weights)
    if weights.series is None or without.series is None or without.series.shape != weights.series.shape:
        per = mean((without.joint - weights.joint)[:, None])
        ids = ids if len(ids) == 1 else ("all",)
    elif shared is None:
        per = log_mean(without.series, less=weights.series)
    else:
        per = mean(without.series - weights.series)
    points = as_array(data.mask.any(-1).sum(-1)) if isinstance(data, Series) else np.ones(len(ids))
    points = points if len(points) == len(ids) else points.sum(keepdims=True)
    known = len(ids) == len(_ids(data, weights))
    return judge_gap(per, ids, points, shared), {"gap": total, "gap_per_series": per if known else None}


def _tail(
    weights: Weights, weighed: Sequence[LatentUse], latents: Sequence[LatentUse], ids: tuple[Any, ...]
) -> tuple[Verdict, dict[str, Any]]:
    what = ", ".join(latent.name for latent in weighed[:4]) + (" and others" if len(weighed) > 4 else "")
    if all(latent.local for latent in latents) and weights.series is not None:
        ks, numbers = tails(weights.series), sum(latent.units for latent in weighed)
        gap = log_mean(weights.series, less=weights.series)
        verdict = judge_tails(ks, ids, what, numbers, gap)
        return verdict, {"k_hat_per_series": np.array([k.k for k in ks])}
    (k,) = tails(weights.joint[:, None])
    numbers = sum(latent.posterior_sd.size for latent in weighed)
    return judge_tail(k, what, numbers, log_mean(weights.joint, less=weights.joint)), {"k_hat": k}


def _ids(data: Any, weights: Weights) -> tuple[Any, ...]:
    if isinstance(data, AbstractPopulation):
        return tuple(data.ids)
    return ("all",) if weights.series is None else tuple(range(weights.series.shape[1]))


def _latents(
    fit: Any, data: Any, found: Draws, series: int | None, seed: int | None
) -> tuple[LatentUse, ...]:
    plates = series_plates(found, series)
    uses = site_uses(found, lambda site: is_local(site, plates), series or 1)
    try:
        with evaluating(*pair(fit), seed=seed), unvalidated():
            prior = draw_prior(fit, data, found)
            sds = {name: as_array(unconstrained(site).double().std(0)) for name, site in prior.items()}
    except (StochdynError, RuntimeError, ValueError):  # draws of a wide prior may explode
        sds = {}
    out = []
    for use in uses:
        posterior = as_array(unconstrained(found.prior[use.name]).double().std(0))
        before = sds.get(use.name, np.array(np.nan))
        before = np.broadcast_to(before, posterior.shape) if before.ndim == 0 else before
        before = np.full(posterior.shape, np.nan) if before.shape != posterior.shape else before
        out.append(LatentUse(use.name, use.local, posterior, before, use.units, use.active, use.kl))
    return tuple(out)


def _coverage(fit: Any, data: Any, found: Draws, draws: int, seed: int | None) -> Coverage | Verdict | None:
    try:
        return coverage(fit, data, found, draws=draws, seed=seed)
    except (StochdynError, RuntimeError, ValueError) as error:  # a likelihood that cannot be drawn, say
        return Verdict("coverage", "-", reason(error))


def _rescaling(
    fit: Any, data: Any, found: Draws, seed: int | None
) -> dict[str, TimeRescaling] | Verdict | None:
    names = [name for name, site in found.observed.items() if isinstance(site.fn, AbstractPointProcess)]
    if not names:
        return None
    try:
        with evaluating(*pair(fit), seed=seed):
            drawn = [draw(fit, data, 1).observed for _ in range(_RESCALINGS if found.latents else 1)]
            return {name: _median([_rescaled(sites[name]) for sites in drawn]) for name in names}
    except StochdynError as error:
        return Verdict("jumps", "-", reason(error))


def _rescaled(site: Any) -> TimeRescaling:
    shape = torch.Size((*site.fn.batch_shape, *site.value.shape[-2:]))
    fits = site.value.numel() == shape.numel()
    return time_rescaling(site.fn, site.value.reshape(shape) if fits else site.value)


def _median(tests: list[TimeRescaling]) -> TimeRescaling:
    return sorted(tests, key=lambda test: min(test.ks_pvalue, test.lag_pvalue))[len(tests) // 2]


def _settled(fit: Any) -> Settling | str:
    if not isinstance(fit, Fit):
        return "a pair (model, guide) has no losses"
    return settling(fit.losses, fit.kl_weights, fit.population)
