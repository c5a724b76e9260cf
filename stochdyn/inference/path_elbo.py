"""The ELBO without simulation: paths enter by their marginals."""

from dataclasses import dataclass
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask

from stochdyn.errors import FitError, GuideError
from stochdyn.guides.marginals import KnotsOnly
from stochdyn.inference.estimators import AbstractEstimator, StickingTheLanding, samples
from stochdyn.inference.objective import ELBO, AbstractObjective, Program
from stochdyn.paths import MarginalPath, SDEPath
from stochdyn.paths.marginal import Knots

_FIX = (
    "By marginals the path is known at observed times only: read it by grid.observed(z), under batch.mask, or use "
    "objective=sd.ELBO(), which simulates the same guide."
)


@dataclass(frozen=True)
class PathELBO(AbstractObjective):
    """The evidence lower bound of continuous time, without a solver, for guides with `paths=sd.Marginals()`.

    log p(y | z at the observations) - KL(q(z0) | p(z0)) - the integral over time of E |g^-1 (f - h)|^2 / 2, estimated
    at random times in every gap between observations. Neither time nor memory depends on the steps of the grid. It
    bounds the evidence of the continuous-time model: do not rank it against an ELBO on a grid. All other latents
    enter as in `ELBO()`. The states at different observation times are drawn independently, so the likelihood must be a
    product over the times; and it may read the path at observed times only, through `grid.observed(z)` (`sd.fit` checks
    this once).

    Args:
        times: random times per gap between observations.
        particles: draws from the guide per step.
        max_plate_nesting: see `ELBO`.

    Raises:
        FitError: if `times` or `particles` is below 1.
        GuideError: if the guide gives no path by marginals, or the model uses its path beyond the observation times.

    References:
        Bartosh, Vetrov & Naesseth, "SDE Matching: scalable and simulation-free training of latent stochastic
        differential equations", 2025, https://arxiv.org/abs/2502.02472

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series(torch.linspace(0, 1, 6), torch.randn(8, 6, 3))
        >>> model = sd.LatentSDE(3, 2, hidden=16, paths=sd.Marginals())
        >>> sd.PathELBO(times=2).loss(model, model.guide, batch).shape
        torch.Size([])
    """

    times: int = 1
    particles: int = 1
    max_plate_nesting: int | None = None

    def __post_init__(self) -> None:
        if self.times < 1 or self.particles < 1:
            raise FitError(
                f"PathELBO: times and particles must be at least 1, got {self.times} and {self.particles}."
            )

    def loss(self, model: Program, guide: Program, *args: Any) -> torch.Tensor:
        try:
            return self._elbo().loss(model, KnotsOnly()(guide), *args)
        except (IndexError, RuntimeError, ValueError):
            check_use(model, guide, *args)  # says more, where the model reads what is not there
            raise

    def prepared(self, model: Program, guide: Program, *args: Any) -> Self:
        check_use(model, guide, *args)
        nesting = self._elbo().prepared(model, KnotsOnly()(guide), *args).max_plate_nesting
        return type(self)(self.times, self.particles, nesting)

    def _elbo(self) -> ELBO:
        return ELBO(
            self.particles, max_plate_nesting=self.max_plate_nesting, estimator=_ByMarginals(self.times)
        )


@dataclass(frozen=True)
class _ByMarginals(AbstractEstimator):
    """Paths by the divergence of their marginals' path, all else by sticking the landing."""

    times: int

    def align(self, model_trace: Any, guide_trace: Any) -> None:
        for name, site in samples(guide_trace):
            if isinstance(site["fn"], MarginalPath) and name in model_trace.nodes:
                model_trace.nodes[name]["fn"] = site["fn"]

    def terms(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        paths = {n: s["fn"] for n, s in samples(guide_trace) if isinstance(s["fn"], MarginalPath)}
        _check(paths, guide_trace)
        divergence: Any = 0.0
        for name, q in paths.items():
            site = model_trace.nodes[name]
            kl = scale_and_mask(q.path_kl(self.times), site["scale"], site["mask"])
            divergence = divergence + kl.sum()
            model_trace.remove_node(name)
            guide_trace.remove_node(name)
        value, surrogate = StickingTheLanding().terms(model_trace, guide_trace)
        return value - divergence, surrogate - divergence


class _OnTheGrid(MarginalPath):
    """The same on the prior's whole grid, NaN wherever nothing is observed: it tells what a model reads."""

    def __init__(self, prior: SDEPath, knots: Knots, observed: torch.Tensor) -> None:
        super().__init__(prior, knots, observed)
        self._event_shape = prior.event_shape

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> torch.Tensor:  # noqa: B008
        z = MarginalPath(self.prior, self.knots, self.observed).rsample(sample_shape)
        grid, seen = self.chain.ts.to(z.device), self.knots.times.to(z.device).gather(-1, self.observed)
        place = torch.searchsorted(grid.expand(*seen.shape[:-1], -1).contiguous(), seen.contiguous())
        out = z.new_full((*z.shape[:-2], *self.event_shape), torch.nan)
        return out.scatter(-2, place[..., None].expand(z.shape), z)


def _traces(model: Program, guide: Program, args: tuple) -> tuple[Any, Any]:
    guide_trace = poutine.trace(guide).get_trace(*args)
    return guide_trace, poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)


@torch.no_grad()
def check_use(model: Program, guide: Program, *args: Any) -> None:
    """Refuse a model that reads its path elsewhere than at observed times: one run with a path that is NaN there.

    Raises:
        GuideError: naming the site.
    """
    handler = KnotsOnly(lambda q: _OnTheGrid(q.prior, q.knots, q.observed))
    with pyro.validation_enabled(False):
        try:
            guide_trace, model_trace = _traces(model, handler(guide), args)
            paths = [name for name, site in samples(guide_trace) if isinstance(site["fn"], MarginalPath)]
            if not paths:
                return
            for name in paths:
                model_trace.remove_node(name)
            model_trace.compute_log_prob()
        except GuideError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            _traces(model, guide, args)  # a model that fails on any path says so itself
            raise GuideError(
                f"PathELBO: the model failed on a path without its other times. {_FIX}"
            ) from error
    for name, site in samples(model_trace):
        hidden = (site["infer"] or {}).get("_deterministic")
        if not hidden and bool(torch.as_tensor(site["log_prob_sum"]).isnan()):
            raise GuideError(
                f"PathELBO: site '{name}' reads the path at times without an observation. {_FIX}"
            )


def _check(paths: dict[str, MarginalPath], guide_trace: Any) -> None:
    others = [n for n, s in samples(guide_trace) if hasattr(s["fn"], "chain") and n not in paths]
    if not paths or others:
        what = f"gives path '{others[0]}' by simulation" if others else "has no path by marginals"
        raise GuideError(
            f"PathELBO: the guide {what}. Use sd.AmortizedGuide(model, encoder, paths=sd.Marginals()), or "
            "objective=sd.ELBO()."
        )
