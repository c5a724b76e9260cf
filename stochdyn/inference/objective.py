"""What is minimised: the ELBO, and the weight of its KL part."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_if_enumerated, check_model_guide_match

from stochdyn.errors import FitError
from stochdyn.inference.estimators import AbstractEstimator, StickingTheLanding

Program = Callable[..., Any]
_STL = StickingTheLanding()


class AbstractObjective(ABC):
    """A loss to be minimised, made from a model, a guide and data.

    An objective is a value without state. Another bound (importance weighted, Renyi, simulation-free)
    is a subclass with one method.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import stochdyn as sd
        >>> class NegativeLogJoint(sd.AbstractObjective):
        ...     def loss(self, model, guide, *args):
        ...         guide_trace = pyro.poutine.trace(guide).get_trace(*args)
        ...         replayed = pyro.poutine.replay(model, trace=guide_trace)
        ...         return -pyro.poutine.trace(replayed).get_trace(*args).log_prob_sum()
        >>> def model(y):
        ...     pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> NegativeLogJoint().loss(model, lambda y: None, torch.tensor(0.0)).item()  # log(2 pi) / 2
        0.9189385175704956
    """

    @abstractmethod
    def loss(self, model: Program, guide: Program, *args: Any) -> torch.Tensor:
        """The scalar to minimise; its gradient is the gradient estimate."""

    def check_weight(self, weight: float) -> None:  # noqa: B027
        """Refuse a weight of the KL part that the objective has no meaning for; by default none.

        Raises:
            FitError: if the weight is refused.
        """

    def prepared(self, model: Program, guide: Program, *args: Any) -> Self:
        """The same objective with everything filled in that need be found out only once per fit."""
        return self


@dataclass(frozen=True)
class ELBO(AbstractObjective):
    """The evidence lower bound, E_q[log p(y, z) - log q(z)], as a loss (its negative).

    Pathwise gradients where a site has `rsample`, the score function elsewhere, as in Pyro's `Trace_ELBO`. The
    value stays on the device.

    Args:
        particles: Draws from the guide per step. One is usual: lower `lr` or more steps do the same work;
            more particles help where a site has no `rsample`.
        vectorized: Draw all particles at once, in one more batch dimension on the left. Turn it off for
            programs that cannot take that dimension; they are then run `particles` times.
        max_plate_nesting: How many dimensions, counted from the right, plates use. Needed only for
            vectorised particles; None finds it by one more run of guide and model (`fit` does so once).
        estimator: How value and gradient are estimated: `StickingTheLanding()`, `AnalyticKL()` or `LogRatio()`.
            The expectation is the same, the noise is not.

    Raises:
        FitError: `particles` is less than one.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import stochdyn as sd
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def exact(y):
        ...     pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))
        >>> loss = sd.ELBO(particles=4).loss(model, exact, torch.tensor(1.0))
        >>> round(loss.item(), 4)  # the exact guide: -log p(y), whatever is drawn
        1.5155
    """

    particles: int = 1
    vectorized: bool = True
    max_plate_nesting: int | None = None
    estimator: AbstractEstimator = _STL

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise FitError(
                f"ELBO: particles must be at least 1, got {self.particles}. Use ELBO(particles=1)."
            )

    def loss(self, model: Program, guide: Program, *args: Any) -> torch.Tensor:
        nesting = self.prepared(model, guide, *args).max_plate_nesting
        traces = _Traces(
            num_particles=self.particles,
            max_plate_nesting=math.inf if nesting is None else nesting,
            vectorize_particles=self._in_a_dimension,
        )
        traces.align = self.estimator.align
        value = surrogate = 0.0
        for pair in traces.pairs(model, guide, args):
            terms = self.estimator.terms(*pair)
            self.estimator.check_shapes(traces.max_plate_nesting, *pair)
            value, surrogate = value - terms[0] / self.particles, surrogate - terms[1] / self.particles
        if not isinstance(value, torch.Tensor):  # neither program has a sample site
            return torch.zeros(())
        # The value stays a tensor: stock Pyro waits for the device at every site.
        return value.detach() + (surrogate - surrogate.detach())

    def prepared(self, model: Program, guide: Program, *args: Any) -> Self:
        if not self._in_a_dimension or self.max_plate_nesting is not None:
            return self
        return replace(self, max_plate_nesting=_plate_nesting(model, guide, args))

    @property
    def _in_a_dimension(self) -> bool:
        return self.vectorized and self.particles > 1


def _plate_nesting(model: Program, guide: Program, args: tuple) -> int:
    with poutine.block(hide_types=["sample"]):
        guide_trace: Any = poutine.trace(guide).get_trace(*args)
        model_trace: Any = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    sites = [*guide_trace.nodes.values(), *model_trace.nodes.values()]
    frames = [frame for site in sites if site["type"] == "sample" for frame in site["cond_indep_stack"]]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


class _Traces(Trace_ELBO):
    """Pyro's traces of guide and model, one or many particles, before anything is scored."""

    align: Callable[[Any, Any], None] = staticmethod(lambda model_trace, guide_trace: None)

    def pairs(self, model: Program, guide: Program, args: tuple) -> list[tuple[Any, Any]]:
        return list(self._get_traces(model, guide, args, {}))

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        messenger: Any = poutine.unwrap(guide)
        if isinstance(messenger, Messenger):  # a GuideMessenger runs the model itself
            guide(*args, **kwargs)
            model_trace, guide_trace = messenger.get_traces()
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        self.align(model_trace, guide_trace)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            check_if_enumerated(guide_trace)
        return poutine.util.prune_subsample_sites(model_trace), poutine.util.prune_subsample_sites(
            guide_trace
        )


class _KLWeight(Messenger):
    """Multiplies the scale of the sites that make up the KL: in a model the unobserved, in a guide all."""

    def __init__(self, weight: float, *, guide: bool) -> None:
        super().__init__()
        self.weight = weight
        self.guide = guide

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or (msg["is_observed"] and not self.guide):
            return
        msg["scale"] = self.weight * msg["scale"]


def weighted(program: Program, weight: float, *, guide: bool = False) -> Program:
    """The program with the log-probabilities of its latents multiplied by `weight`.

    With the model and the guide both weighted, the ELBO becomes log p(y | z) - weight (log q(z) - log p(z)).
    A `pyro.factor` counts as likelihood in a model, and as part of log q in a guide.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> weighted(model, 1.0) is model
        True
        >>> float(pyro.poutine.trace(weighted(model, 0.5)).get_trace().nodes["z"]["scale"])
        0.5
    """
    return program if weight == 1.0 else _KLWeight(weight, guide=guide)(program)
