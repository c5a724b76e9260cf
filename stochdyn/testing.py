"""Conformance checks, public: run them on your own path, kernel or encoder, as our tests run them on ours."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from stochdyn.data import Series
from stochdyn.encoders import AbstractEncoder
from stochdyn.errors import StochdynError
from stochdyn.fields import AbstractDiffusion, MatrixDiffusion, as_diffusion
from stochdyn.solvers import AbstractKernel

__all__ = ["ConformanceError", "check_encoder", "check_kernel", "check_path"]


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


def check_encoder(encoder: AbstractEncoder, *, channels: int = 2, covariates: int = 0, seed: int = 0) -> None:
    """Check that an encoder reads the data and nothing else, each entry from its time on; raise at the first fault.

    On ragged series with holes, by a copy in float64: the shape, and that the same data give the same encoding;
    values where the mask is False change nothing, bit for bit; neither padding nor the order of the batch nor times
    without observations change an entry; entry k does not depend on what came before time k; every entry depends on
    times, values, mask and covariates from its time on; all parameters get finite gradients.

    Args:
        encoder: the encoder, with parameters of any values; it is left as it is.
        channels: how many it is made for.
        covariates: how many it is made for; both static and time-varying ones are tried.
        seed: of the data; the random state outside is kept.

    Raises:
        ConformanceError: naming the promise and what was got.

    Example:
        >>> import stochdyn as sd
        >>> check_encoder(sd.GRUEncoder(obs_dim=2, hidden=8))
    """
    net = copy.deepcopy(encoder).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for timed in (False, True) if covariates else (False,):
            batch = _example(channels, covariates, timed)
            _check_encoding(net, batch)
            _check_data_only(net, batch)
            _check_parameters(net, batch)


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


def _example(channels: int, covariates: int, timed: bool) -> Series:
    """Three series of 7, 5 and 6 times; holes in single channels, and one time without any observation."""
    lengths = (7, 5, 6)
    times = [(0.2 + torch.rand(n).double()).cumsum(0) for n in lengths]
    values = [torch.randn(n, channels).double() for n in lengths]
    masks = [torch.ones(n, channels).bool() for n in lengths]
    masks[0][2, 0] = masks[1][3, -1] = False
    masks[2][3] = False
    given: Any = torch.randn(3, covariates).double() if covariates else None
    if covariates and timed:
        given = [torch.randn(n, covariates).double() for n in lengths]
    return Series.from_list(list(zip(times, values, masks, strict=True)), covariates=given)


def _remade(batch: Series, **changes: Any) -> Series:
    fields = {
        "times": batch.times,
        "values": batch.values,
        "mask": batch.mask,
        "covariates": batch.covariates,
    }
    return Series(**{**fields, **changes})


def _check_encoding(net: AbstractEncoder, batch: Series) -> None:
    got, expected = net(batch), (*batch.values.shape[:2], net.hidden)
    if got.shape != expected or got.dtype != torch.float64:
        raise ConformanceError(
            f"encoding: {tuple(got.shape)} {got.dtype}, expected {expected} torch.float64."
        )
    if not torch.isfinite(got).all():
        raise ConformanceError("encoding: not finite.")
    if not torch.equal(got, net(batch)):
        raise ConformanceError("encoding: the same batch gave two different encodings.")
    # `Series` would put its own stand-ins back.
    filled = batch._with(values=torch.where(batch.mask, batch.values, batch.values + 7))
    if not torch.equal(got, net(filled)):
        raise ConformanceError(
            "missing values: changing values where the mask is False changes the encoding."
        )
    nothing = _remade(batch, mask=torch.zeros_like(batch.mask))
    if not torch.isfinite(net(nothing)).all():
        raise ConformanceError("missing values: without any observation the encoding is not finite.")


@torch.no_grad()
def _check_data_only(net: AbstractEncoder, batch: Series) -> None:
    _check_padding(net, batch)
    _check_reach(net, batch)
    timed = batch.covariates is not None and batch.covariates.dim() == 3
    for what in _CHANGES[: 3 + timed]:
        _check_causality(net, batch, what)
    if batch.covariates is not None:
        _check_read("covariates", net, batch, _remade(batch, covariates=batch.covariates + 1))


def _check_padding(net: AbstractEncoder, batch: Series) -> None:
    together, real = net(batch), batch.mask.any(-1)
    for i, length in enumerate(batch.lengths.tolist()):
        given = batch[[i]].covariates
        given = given[:, :length] if given is not None and given.dim() == 3 else given
        row = {"values": batch.values[i : i + 1, :length], "mask": batch.mask[i : i + 1, :length]}
        alone = net(Series(batch.times[i, :length], **row, covariates=given))
        keep = real[i, :length]
        _same("padding", alone[0, keep], together[i, :length][keep])
    order = torch.tensor([2, 0, 1])
    _same("order of the batch", net(batch[order]), together[order])
    between = (batch.times[0, :1] + batch.times[0, 1:2]) / 2
    more = batch.extend(torch.cat([between, batch.times.max() + torch.tensor([1.0, 2.0]).double()]))
    _same("times without observations", net(more)[more.mask.any(-1)], together[real])


def _check_reach(net: AbstractEncoder, batch: Series) -> None:
    """What must have influence on some entry; the first series has its hole in one channel only."""
    first = batch[[0]]
    zero = torch.where(first.mask, first.values, torch.zeros_like(first.values))
    full = _remade(first, values=zero, mask=torch.ones_like(first.mask))
    _check_read("mask", net, full._with(mask=first.mask), full)
    _check_read("times", net, batch, _remade(batch, times=batch.times * 1.5))


def _check_read(what: str, net: AbstractEncoder, batch: Series, other: Series) -> None:
    if not ((net(batch) - net(other)).abs().amax((1, 2)) > 1e-9).any():
        raise ConformanceError(f"{what}: not read; other {what} give the same encoding.")


def _moved(batch: Series, j: int, what: str) -> Series:
    """The batch with what was observed at time j changed."""
    at = torch.arange(batch.values.shape[1]) == j
    if what == "times":
        return _remade(batch, times=batch.times - 0.1 * at)
    if what == "mask":
        return _remade(batch, mask=batch.mask & ~(at[:, None] & (torch.arange(batch.obs_dim) == 0)))
    return _remade(batch, **{what: getattr(batch, what) + 1.0 * at[:, None]})


_CHANGES = ("values", "times", "mask", "covariates")


def _check_causality(net: AbstractEncoder, batch: Series, what: str) -> None:
    """The first series has no hole at time 4, and observations before and after it."""
    j, before, after = 4, net(batch[[0]])[0], net(_moved(batch[[0]], 4, what))[0]
    difference = (before - after).abs().amax(-1)
    later, earlier = difference[j + 1 :].max(), difference[: j + 1].min()
    if later > 1e-10:
        raise ConformanceError(f"causality: {what} at time {j} change a later entry by {later:g}.")
    if not earlier > 1e-10:
        raise ConformanceError(f"reach: {what} at time {j} do not change all entries up to {j}.")


def _check_parameters(net: AbstractEncoder, batch: Series) -> None:
    net.zero_grad()
    (net(batch) * torch.randn(net.hidden).double()).sum().backward()
    for name, p in net.named_parameters():
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any():
            raise ConformanceError(f"gradients: parameter '{name}' gets none, zero, or not a finite one.")


def _same(what: str, got: Tensor, expected: Tensor) -> None:
    difference = (got - expected).abs().max()
    if not difference < 1e-10:
        raise ConformanceError(f"{what}: changes an entry by {difference:g}.")
