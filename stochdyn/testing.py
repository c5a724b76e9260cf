"""Conformance checks, public: run them on your own path or kernel, as our tests run them on ours."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from stochdyn.errors import StochdynError
from stochdyn.fields import AbstractDiffusion, MatrixDiffusion, as_diffusion
from stochdyn.solvers import AbstractKernel

__all__ = ["ConformanceError", "check_kernel", "check_path"]


class ConformanceError(StochdynError, AssertionError):
    """A check found that a promise of the contract does not hold."""


def check_path(make: Callable[[], Any], *, draws: int = 4000, seed: int = 0) -> None:
    """Check that a path distribution keeps its contract; raise at the first promise broken.

    Shapes of samples and densities; the same noise gives the same path; `expand` keeps type, support and
    density, and its copies are independent; `log_prob` is finite on samples and differentiable;
    `biject_to(support)` is a round trip; the sampler and the density belong together: in unconstrained space
    E[score] = 0 and E[u score] = -1. Where the path offers `guided`, the density also has mass one: its ratio
    to a mildly guided copy's averages to 1 over the draws of either.

    Args:
        make: builds the path in float64, anew at each call, with at least one random step.
        draws: for the statistical checks, which allow five standard errors.
        seed: of the draws; the random state outside is kept.

    Raises:
        ConformanceError: naming the promise, what was got, and where to look.

    Example:
        >>> import stochdyn as sd
        >>> ts = torch.linspace(0, 1, 6).double()
        >>> check_path(lambda: sd.SDEPath(lambda t, z: -z, torch.tensor([0.5]).double(), torch.zeros(1).double(), ts))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _check_shapes(make())
        _check_repeats(make, seed)
        _check_expand(make())
        _check_gradient(make())
        _check_support(make())
        _check_score(make(), draws)
        _check_mass(make(), draws)


def check_kernel(kernel: AbstractKernel, *, draws: int = 20000, seed: int = 0) -> None:
    """Check that a kernel's `step`, `advance` and `transition` describe one law, and the right one for small
    steps.

    On a nonlinear drift that depends on time, with diagonal and with matrix noise.

    Args:
        kernel: the solver to check.
        draws: for the moments of `transition`'s samples, which allow five standard errors.
        seed: of the draws; the random state outside is kept.

    Raises:
        ConformanceError: if they differ, a step of no length moves, or the mean is not z + f dt + O(dt^2) and
            the covariance not g g' dt + O(dt^2).

    Example:
        >>> import stochdyn as sd
        >>> check_kernel(sd.EulerMaruyama())
    """
    matrix = torch.tensor([[0.4, 0.0], [0.3, 0.9]]).double()
    for diffusion in (torch.tensor([0.4, 0.9]).double(), MatrixDiffusion(lambda t, z: matrix)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _check_step(kernel, as_diffusion(diffusion), draws)


def _drift(t: Tensor, z: Tensor) -> Tensor:
    return torch.sin(z) + t


def _check_step(kernel: AbstractKernel, diffusion: AbstractDiffusion, draws: int) -> None:
    t, z = torch.tensor([0.3]).double(), torch.tensor([0.7, -0.2]).double()
    dt = torch.tensor([0.1]).double()
    a, G = kernel.step(_drift, diffusion, t, dt, z, None)
    covariance = _square(G, diffusion)
    _equal("`advance`, against the mean of `step`", kernel.advance(_drift, t, dt, z), a)
    step = kernel.transition(_drift, diffusion, t, dt, z)
    _equal("transition mean, against `step`", step.mean, a)
    _equal("transition variance, against `step`", step.variance, covariance.diagonal())
    sample = step.sample(torch.Size((draws,)))
    _within("mean of transition samples", sample.mean(0), a, sample.std(0) / math.sqrt(draws))
    outer = (sample - a)[:, :, None] * (sample - a)[:, None, :]
    _within("covariance of transition samples", outer.mean(0), covariance, outer.std(0) / math.sqrt(draws))
    still = kernel.advance(_drift, t, torch.zeros(1).double(), z)
    if not torch.equal(still, z):
        raise ConformanceError(f"A step of zero length moved the state by {(still - z).abs().max():g}.")
    short = torch.tensor([1e-4]).double()
    a, G = kernel.step(_drift, diffusion, t, short, z, None)
    g = diffusion(t, z, None)
    _equal("(mean - z) / dt of a short step, against the drift", (a - z) / short, _drift(t, z), 1e-3)
    speed = _square(G, diffusion) / short
    _equal("G G' / dt of a short step, against g g'", speed, _square(g, diffusion), 1e-3)


def _square(G: Tensor, diffusion: AbstractDiffusion) -> Tensor:
    G = torch.diag_embed(G) if diffusion.diagonal else G
    return G @ G.mT


def _equal(what: str, got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
        raise ConformanceError(f"{what}: got {got.tolist()}, expected {expected.tolist()}.")


def _check_shapes(path: Any) -> None:
    if len(path.event_shape) != 2:
        raise ConformanceError(f"event_shape must be (time, state), got {tuple(path.event_shape)}.")
    for sample_shape in ((), (3,), (2, 3)):
        z = path.rsample(torch.Size(sample_shape))
        expected = torch.Size(sample_shape) + path.batch_shape + path.event_shape
        if z.shape != expected:
            raise ConformanceError(
                f"rsample({sample_shape}) has shape {tuple(z.shape)}, expected {tuple(expected)}."
            )
        log_prob = path.log_prob(z)
        if log_prob.shape != expected[:-2]:
            raise ConformanceError(
                f"log_prob has shape {tuple(log_prob.shape)}, expected {tuple(expected[:-2])}."
            )
        if not torch.isfinite(log_prob).all():
            raise ConformanceError("log_prob of the path's own sample is not finite.")


def _check_repeats(make: Callable[[], Any], seed: int) -> None:
    samples = []
    for _ in range(2):
        torch.manual_seed(seed)
        samples.append(make().rsample())
    if not torch.equal(*samples):
        raise ConformanceError(
            "The same seed gave two different paths: draw all noise from torch's generator."
        )


def _check_expand(path: Any) -> None:
    larger = torch.Size((3,)) + path.batch_shape
    grown = path.expand(larger)
    if type(grown) is not type(path) or grown.batch_shape != larger:
        raise ConformanceError(
            f"expand({tuple(larger)}) gave {type(grown).__name__} of batch {tuple(grown.batch_shape)}; it "
            "must keep the type, or Pyro's plates lose it."
        )
    z = path.rsample()
    difference = (grown.log_prob(z.expand(*larger, *path.event_shape)) - path.log_prob(z)).abs().max()
    if difference > 1e-10:
        raise ConformanceError(f"expand changes log_prob by {difference:g}.")
    copies = grown.rsample()
    if copies.shape != larger + path.event_shape or not grown.support.check(copies).all():
        raise ConformanceError(
            f"expand({tuple(larger)}) samples {tuple(copies.shape)}, or leaves its own support."
        )
    if torch.equal(copies[0], copies[1]):
        raise ConformanceError("expand gives the same path for every copy: each needs noise of its own.")


def _check_gradient(path: Any) -> None:
    z = path.rsample().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(path.log_prob(z).sum(), z)
    if not torch.isfinite(gradient).all():
        raise ConformanceError("The gradient of log_prob with respect to the value is not finite.")


def _check_support(path: Any) -> None:
    z = path.rsample()
    if not path.support.check(z).all():
        raise ConformanceError("`support` refuses the path's own sample.")
    # A transform remembers its last inverse; another one has to compute.
    again = biject_to(path.support)(biject_to(path.support).inv(z))
    if (again - z).abs().max() > 1e-8 * (1 + z.abs().max()):
        raise ConformanceError(f"biject_to(support) is not a round trip: off by {(again - z).abs().max():g}.")


def _check_score(path: Any, draws: int) -> None:
    """Stein's identities for the density in unconstrained space; idle numbers are drawn, as `biject_to` "
    "says."""
    transform = biject_to(path.support)
    u = transform.inv(path.rsample(torch.Size((draws,))).detach())
    u = torch.where((u == u[:1]).all(0), torch.randn_like(u), u).requires_grad_()
    z = transform(u)
    log_density = path.log_prob(z) + transform.log_abs_det_jacobian(u, z)
    (score,) = torch.autograd.grad(log_density.sum(), u)
    where = "in unconstrained space: `rsample`, `log_prob` and `support` are not of one law"
    error = score.std(0) / math.sqrt(draws)
    _within(f"mean of the score {where}", score.mean(0), torch.zeros(()).double(), error)
    product = ((u.detach() - u.detach().mean(0)) * score).sum(-1)
    expected = -torch.tensor(float(u.shape[-1])).double()
    _within(f"mean of u * score {where}", product.mean(0), expected, product.std(0) / math.sqrt(draws))


def _check_mass(path: Any, draws: int) -> None:
    """E over the path of (guided density / density) is 1, for a mild message: ties sampler, density and "
    "guide."""
    if not hasattr(path, "guided"):
        return
    z = path.rsample(torch.Size((draws,))).detach()
    shape = path.batch_shape + path.event_shape
    loc, spread = z.mean(0), z.std(0)
    precision = torch.where(spread > 1e-9, 0.02 / spread.square().clamp(min=1e-12), torch.zeros_like(spread))
    guided = path.guided(message=(loc.expand(shape), precision.expand(shape)))
    one = torch.ones(()).double()
    weights = (guided.log_prob(z) - path.log_prob(z)).exp()
    _within("mean of guided density / density", weights.mean(0), one, weights.std(0) / math.sqrt(draws))
    y = guided.rsample(torch.Size((draws,))).detach()
    back = (path.log_prob(y) - guided.log_prob(y)).exp()
    _within("mean of density / guided density", back.mean(0), one, back.std(0) / math.sqrt(draws))


def _within(what: str, got: Tensor, expected: Tensor, error: Tensor) -> None:
    bad = ~((got - expected).abs() <= 5 * error + 1e-12)
    if bad.any():
        k = tuple(bad.nonzero()[0].tolist())
        want = expected.expand_as(got)[k]
        raise ConformanceError(f"{what}, at {k}: {got[k]:g}, expected {want:g} within {5 * error[k]:.2g}.")
