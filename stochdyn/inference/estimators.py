"""How the ELBO of one draw is estimated: three rules with the same expectation and other noise."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.util import is_validation_enabled
from pyro.util import check_site_shape
from torch import Tensor, broadcast_shapes
from torch.distributions import kl_divergence

from stochdyn.errors import FitError, ShapeError
from stochdyn.paths import GuidedPath, SDEPath


class AbstractEstimator(ABC):
    """Makes an unbiased estimate of the ELBO, and of its gradient, from the traces of one draw."""

    @abstractmethod
    def terms(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        """The value, and a number whose gradient is the gradient estimate.

        Args:
            model_trace: of the model replayed on the guide's draw; nothing is scored yet.
            guide_trace: of the guide.
        """

    def align(self, model_trace: Any, guide_trace: Any) -> None:  # noqa: B027
        """Make both traces comparable, before Pyro compares their shapes."""

    def check_shapes(self, nesting: float, *traces: Any) -> None:
        """Pyro's check that log-densities fit the plates, where its validation is on."""
        if not is_validation_enabled():
            return
        for trace in traces:
            for site in trace.nodes.values():
                if site["type"] == "sample" and "log_prob" in site:
                    check_dimensions(site["name"], site["log_prob"].shape, nesting)
                    check_site_shape(site, nesting)


def check_dimensions(name: str, shape: Sequence[int], most: float) -> None:
    """Refuse a log-density with dimensions left of all plates: Pyro, which enumerates there, would add them up.

    Raises:
        ShapeError: naming the site.

    Example:
        >>> check_dimensions("z", (1, 4, 1), 2)
        >>> check_dimensions("z", (4, 4, 1), 2)
        Traceback (most recent call last):
        ...
        stochdyn.errors.ShapeError: site 'z': its log-density has shape (4, 4, 1), and particles and plates have 2 ...
    """
    if len(shape) > most and any(size != 1 for size in shape[: len(shape) - int(most)]):
        raise ShapeError(
            f"site '{name}': its log-density has shape {tuple(shape)}, and particles and plates have {int(most)} "
            "dimensions. Something in the model was given one too many: a latent theta is theta[..., None] against the "
            "state, theta[..., None, None] against (time, channel), and the start of a path as it is."
        )


@dataclass(frozen=True)
class StickingTheLanding(AbstractEstimator):
    """log p - log q, the gradient of log q seen through the drawn values only: the default.

    grad = d/dz [log p(y, z) - log q(z)] dz/dphi. What is dropped, the gradient of log q by the guide's own
    parameters at a fixed z, is zero on average. At the exact guide the gradient is zero for every draw, so the
    noise vanishes where a fit ends. Each distribution decides by its `score_parts`: those of this package
    drop the term, Pyro's own keep it.

    References:
        Roeder, Wu & Duvenaud, "Sticking the landing: simple, lower-variance gradient estimators for
        variational inference", 2017, https://arxiv.org/abs/1703.09194

    Example:
        >>> import stochdyn as sd
        >>> sd.ELBO().estimator
        StickingTheLanding()
    """

    def terms(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        recall_draws(model_trace, guide_trace)
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
        return _log_ratio(model_trace, guide_trace)


@dataclass(frozen=True)
class LogRatio(AbstractEstimator):
    """log p - log q with the whole gradient: the reference that the others are compared with.

    The gradient goes through the drawn values and through the guide's parameters in log q. It is noisy at the
    optimum too. Of use where a distribution's `score_parts` is in doubt.

    Example:
        >>> import stochdyn as sd
        >>> sd.ELBO(particles=4, estimator=sd.LogRatio()).estimator
        LogRatio()
    """

    def terms(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        model_trace.compute_log_prob()
        for _, site in samples(guide_trace):
            _score_plainly(site, site["scale"], site["mask"])
        return _log_ratio(model_trace, guide_trace)


@dataclass(frozen=True)
class AnalyticKL(AbstractEstimator):
    """log p(y | z) minus closed-form divergences, where there are any; the log ratio elsewhere.

    For a path the divergence of every step is closed-form given the state before it: the sum over the steps
    runs along the drawn path (Girsanov's formula, in discrete time). Scale and mask are the model's, for both
    sides, so a mask that stands in the model only acts on all of a site's divergence. Latents whose divergence
    is used are scored neither in the model nor in the guide. Least noise far from the optimum, but the noise
    stays at the optimum.

    The log ratio is taken where no divergence is registered, where the guide draws a latent before one that
    precedes it in the model, and where a path's value is not the one that its distribution drew last.

    Raises:
        FitError: while fitting, if a latent has no `rsample`.

    References:
        Kingma & Welling, "Auto-encoding variational Bayes", 2014, https://arxiv.org/abs/1312.6114; Li et al.,
        "Scalable gradients for stochastic differential equations", 2020, https://arxiv.org/abs/2001.01328

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import stochdyn as sd
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(torch.tensor(1.0), 1.0))
        >>> sd.ELBO(estimator=sd.AnalyticKL()).loss(model, guide)  # exactly 1 / 2, whatever is drawn
        tensor(0.5000)
    """

    def terms(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        recall_draws(model_trace, guide_trace)
        divergences = dict(_divergences(model_trace, guide_trace))
        model_trace.compute_log_prob(lambda name, site: name not in divergences)
        elbo: Any = -sum(divergences.values())
        for name, site in samples(model_trace):
            if name not in divergences:
                elbo = elbo + site["log_prob_sum"]
        for name, site in samples(guide_trace):
            if name not in divergences:
                weigh = model_trace.nodes.get(name, site)
                _score_plainly(site, weigh["scale"], weigh["mask"])
                elbo = elbo - site["log_prob_sum"]
        return elbo, elbo


def samples(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sample sites of a trace, by name.

    Example:
        >>> import pyro
        >>> trace = pyro.poutine.trace(lambda: pyro.sample("z", pyro.distributions.Normal(0, 1))).get_trace()
        >>> [name for name, _ in samples(trace)]
        ['z']
    """
    return ((name, site) for name, site in trace.nodes.items() if site["type"] == "sample")


def recall_draws(model_trace: Any, guide_trace: Any) -> None:
    """Let paths be scored with what drawing them computed: for gradients by parameters that is the same."""
    for name, site in samples(guide_trace):
        q, p = _inner(site["fn"]), model_trace.nodes.get(name)
        if isinstance(q, GuidedPath):
            q.recall()
            if p is not None and isinstance(_inner(p["fn"]), SDEPath):
                _inner(p["fn"]).recall(q)


def _log_ratio(model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
    joint = model_trace.log_prob_sum()
    surrogate, log_r = joint, None
    for _, site in samples(guide_trace):
        _, score, entropy = site["score_parts"]
        if not is_identically_zero(entropy):
            surrogate = surrogate - entropy.sum()
        if not is_identically_zero(score):
            log_r = log_r or _compute_log_r(model_trace, guide_trace)
            surrogate = surrogate + (log_r.sum_to(site["cond_indep_stack"]) * score).sum()
    return joint - guide_trace.log_prob_sum(), surrogate


def _score_plainly(site: dict[str, Any], scale: Any, mask: Any) -> None:
    """The whole gradient of log q; the score function where values carry no gradient."""
    fn, value = site["fn"], site["value"]
    if type(_inner(fn)).score_parts.__module__.startswith("pyro."):
        parts = fn.score_parts(value, *site["args"], **site["kwargs"])
    else:
        log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
        parts = ScoreParts(log_prob, 0, log_prob) if fn.has_rsample else ScoreParts(log_prob, log_prob, 0)
    parts = parts.scale_and_mask(scale, mask)
    site.update(score_parts=parts, log_prob=parts.log_prob, log_prob_sum=parts.log_prob.sum())


def _divergences(model_trace: Any, guide_trace: Any) -> Iterator[tuple[str, Tensor]]:
    """KL(q | p) of the latents that have one, scaled and masked as in the model, summed."""
    position = {name: k for k, name in enumerate(guide_trace.nodes)}
    latest = -1  # the guide's last draw among what the model has sampled so far
    for name, site in samples(guide_trace):
        if not site["fn"].has_rsample and name in model_trace.nodes:
            raise FitError(
                f"AnalyticKL: latent '{name}' has no rsample, so a gradient through its values is missing. Use "
                "ELBO(estimator=StickingTheLanding()), which takes the score function there."
            )
    for name, p in samples(model_trace):
        if p["is_observed"] or name not in position:
            continue
        q, in_order = guide_trace.nodes[name], position[name] > latest
        latest = max(latest, position[name])
        kl = _divergence(q, p) if in_order else None
        if kl is not None:
            yield name, scale_and_mask(kl, p["scale"], p["mask"]).sum()


def _divergence(q: dict[str, Any], p: dict[str, Any]) -> Tensor | None:
    drawn = getattr(_inner(q["fn"]), "_drawn", q["value"])
    if drawn is not q["value"]:
        return None
    try:
        kl = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None
    return kl.expand(broadcast_shapes(kl.shape, q["fn"].batch_shape, p["fn"].batch_shape))


def _inner(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
