"""The KL divergence of one path from another, along the path that the first drew last."""

import torch
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from stochdyn.device import readable
from stochdyn.errors import SupportError
from stochdyn.paths.guided import GuidedPath
from stochdyn.paths.sde import SDEPath
from stochdyn.paths.start import RandomStart


@register_kl(GuidedPath, SDEPath)
@register_kl(SDEPath, SDEPath)
def _kl_paths(q: "GuidedPath | SDEPath", p: SDEPath) -> Tensor:
    """Sum over steps of the Gaussian KL of the two transitions, along the path that q drew last.

    An unbiased estimate of the path's KL with less noise than the log ratio. NotImplementedError (where
    nothing was drawn) makes Pyro's TraceMeanField_ELBO fall back on the log ratio.
    """
    value = q._drawn
    if value is None:
        raise NotImplementedError("The path KL is estimated along a drawn path: call rsample first.")
    guided = q if isinstance(q, GuidedPath) else q.guided()
    _check_comparable(guided, p, value)
    a, noise, mean, twist, real = guided.moments(value)
    before, after = p.chain.split(value)
    t, dt, context = p.chain.layout(before.dim() - 1)
    drift = p.chain.drifts(before.dim() - 1).at_once()
    if guided.known(value) is not None and p.chain.same_noise(q.chain):
        a_p, noise_p = p.chain.solver.advance(drift, t, dt, before), noise
    else:
        a_p, noise_p = p.chain.step(t, dt, context, before, drift)
        noise_p = noise_p.safe(real)
    gap = a + noise.apply(mean) - a_p
    shift = noise_p.solve(gap)
    if p.chain.noise_dim < p.chain.state_dim:
        p.chain.check_reached(after, gap - noise_p.apply(shift), real)
    columns = []
    for m in range(mean.shape[-1]):
        unit = torch.zeros_like(mean)
        unit[..., m] = 1.0
        columns.append(noise_p.solve(noise.apply(unit if twist is None else twist.colour(unit))))
    W = torch.stack(columns, -1)
    logdet = noise.logdet() - noise_p.logdet() + (0.0 if twist is None else twist.half_logdet())
    kl = 0.5 * (W.square().sum((-2, -1)) + shift.square().sum(-1) - mean.shape[-1]) - logdet
    return _kl_start(guided, p, value) + torch.where(real, kl, torch.zeros_like(kl)).sum(0)


def _check_comparable(q: GuidedPath, p: SDEPath, value: Tensor) -> None:
    """Two paths on other grids, or with other kinds of start, have no density ratio."""
    same = q.chain.ts.shape[-1] == p.chain.ts.shape[-1]
    if same and q.ts is not p.ts and readable(q.ts):
        same = torch.equal(*torch.broadcast_tensors(q.ts, p.ts))
    if not same:
        raise SupportError(
            "The KL of two paths on different grids is not defined. Build both on one TimeGrid."
        )
    if q.chain.noise_dim != p.chain.noise_dim:
        raise SupportError(
            f"The KL of paths with {q.chain.noise_dim} and {p.chain.noise_dim} independent noises is "
            "infinite."
        )
    if isinstance(p.chain.start, RandomStart) != isinstance(q.chain.start, RandomStart):
        raise SupportError("The KL of a path with a known start and one with a random start is infinite.")
    p.chain.check_start(value)


def _kl_start(q: GuidedPath, p: SDEPath, value: Tensor) -> Tensor:
    z0, start = value[..., 0, :], q.chain.start
    if not isinstance(start, RandomStart) or not isinstance(p.chain.start, RandomStart):
        return z0.new_zeros(z0.shape[:-1])
    if q.message is None:
        try:
            return kl_divergence(start.prior, p.chain.start.prior)
        except NotImplementedError:
            pass
    return q.score_start(z0, q.message) - p.chain.start.log_prob(z0)
