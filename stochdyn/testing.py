"""Conformance checks, public: run them on your own path, kernel or field, as our tests run them on ours."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from stochdyn.errors import StochdynError
from stochdyn.solvers import AbstractKernel


class ConformanceError(StochdynError, AssertionError):
    """A check found that a promise of the contract does not hold."""


def check_path(make: Callable[[], Any], *, draws: int = 4000, seed: int = 0) -> None:
    """Check that a path distribution keeps its contract; raise at the first promise broken.

    Shapes of samples and densities; the same noise gives the same path; `expand` keeps type, support and density;
    `log_prob` is finite on samples and differentiable; the sampler and the density belong together (the score has
    mean zero, and the density is that of the draws: importance weights against an overdispersed copy average to 1
    where the path offers `guided`); `biject_to(support)` is a round trip.

    Args:
        make: builds the path in float64, anew at each call, with at least one random step.
        draws: for the statistical checks, which allow four standard errors.
        seed: of the draws; the random state outside is kept.

    Raises:
        ConformanceError: naming the promise, what was got, and where to look.

    Example:
        >>> import stochdyn as sd
        >>> ts = torch.linspace(0, 1, 6).double()
        >>> check_path(lambda: sd.SDEPath(lambda t, z: -z, torch.tensor([0.5]).double(), torch.zeros(1).double(), ts))
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _check_shapes(make())
        _check_expand(make())
        _check_gradient(make())
        _check_weights(make(), draws)
        _check_support(make())


def check_kernel(kernel: AbstractKernel, *, draws: int = 20000, seed: int = 0) -> None:
    """Check that a kernel's `step` and `transition` describe one law, on a nonlinear drift.

    Args:
        kernel: the solver to check.
        draws: for the moments, which allow four standard errors.
        seed: of the draws.

    Raises:
        ConformanceError: if mean or variance of the two differ, or a step of no length moves.

    Example:
        >>> import stochdyn as sd
        >>> check_kernel(sd.EulerMaruyama())
    """

    def drift(t: Tensor, z: Tensor) -> Tensor:
        return torch.sin(z) + t

    t, z = torch.tensor([0.3]).double(), torch.tensor([0.7, -0.2]).double()
    g = torch.tensor([0.4, 0.9]).double()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        step = kernel.transition(drift, g, t, torch.tensor([0.1]).double(), z)
        sample = step.sample(torch.Size((draws,)))
        _within("transition mean", sample.mean(0), step.mean, sample.std(0) / math.sqrt(draws))
        spread = step.variance * math.sqrt(2 / draws)
        _within("transition variance", sample.var(0), step.variance, spread)
    still = kernel.advance(drift, t, torch.zeros(1).double(), z)
    if not torch.equal(still, z):
        raise ConformanceError(f"A step of zero length moved the state by {(still - z).abs().max():g}.")


def _check_shapes(path: Any) -> None:
    if len(path.event_shape) != 2:
        raise ConformanceError(f"event_shape must be (time, state), got {tuple(path.event_shape)}.")
    for sample_shape in ((), (3,), (2, 3)):
        z = path.rsample(torch.Size(sample_shape))
        expected = torch.Size(sample_shape) + path.batch_shape + path.event_shape
        if z.shape != expected:
            raise ConformanceError(f"rsample({sample_shape}) has shape {tuple(z.shape)}, expected {tuple(expected)}.")
        log_prob = path.log_prob(z)
        if log_prob.shape != expected[:-2]:
            raise ConformanceError(f"log_prob has shape {tuple(log_prob.shape)}, expected {tuple(expected[:-2])}.")
        if not torch.isfinite(log_prob).all():
            raise ConformanceError("log_prob of the path's own sample is not finite.")


def _check_expand(path: Any) -> None:
    larger = torch.Size((3,)) + path.batch_shape
    grown = path.expand(larger)
    if type(grown) is not type(path) or grown.batch_shape != larger:
        raise ConformanceError(
            f"expand({tuple(larger)}) gave {type(grown).__name__} of batch {tuple(grown.batch_shape)}; it must keep "
            "the type, or Pyro's plates lose it."
        )
    z = path.rsample()
    difference = (grown.log_prob(z.expand(*larger, *path.event_shape)) - path.log_prob(z)).abs().max()
    if difference > 1e-10:
        raise ConformanceError(f"expand changes log_prob by {difference:g}.")


def _check_gradient(path: Any) -> None:
    z = path.rsample().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(path.log_prob(z).sum(), z)
    if not torch.isfinite(gradient).all():
        raise ConformanceError("The gradient of log_prob with respect to the value is not finite.")


def _check_weights(path: Any, draws: int) -> None:
    """E over the path of (guided density / density) is 1, for a mild message: ties sampler, density and guide."""
    if not hasattr(path, "guided"):
        return
    z = path.rsample(torch.Size((draws,))).detach()
    shape = path.batch_shape + path.event_shape
    loc, spread = z.mean(0), z.std(0)
    precision = torch.where(spread > 0, 0.02 / spread.square().clamp(min=1e-12), torch.zeros_like(spread))
    guided = path.guided(message=(loc.expand(shape), precision.expand(shape)))
    weights = (guided.log_prob(z) - path.log_prob(z)).exp()
    _within("mean of guided density / density", weights.mean(0), torch.ones(()), weights.std(0) / math.sqrt(draws))
    y = guided.rsample(torch.Size((draws,))).detach()
    back = (path.log_prob(y) - guided.log_prob(y)).exp()
    _within("mean of density / guided density", back.mean(0), torch.ones(()), back.std(0) / math.sqrt(draws))


def _check_support(path: Any) -> None:
    transform = biject_to(path.support)
    z = path.rsample()
    u = transform.inv(z)
    again = biject_to(path.support)(u)
    if (again - z).abs().max() > 1e-8 * (1 + z.abs().max()):
        raise ConformanceError(f"biject_to(support) is not a round trip: off by {(again - z).abs().max():g}.")


def _within(what: str, got: Tensor, expected: Tensor, error: Tensor) -> None:
    bad = (got - expected).abs() > 4 * error + 1e-12
    if bad.any():
        k = tuple(bad.nonzero()[0].tolist())
        want = expected.expand_as(got)[k]
        raise ConformanceError(f"{what} at {k}: {got[k]:g}, expected {want:g} within {4 * error[k]:.2g}.")
