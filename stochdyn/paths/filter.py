"""The twisted particle filter: an unbiased estimate of the evidence from any guided path."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn.errors import FieldError
from stochdyn.paths.moves import Path, moves_of

LogLikelihood = Callable[[Tensor, int], "Tensor | None"]


@torch.no_grad()
def particle_evidence(
    path: Path,
    log_likelihood: LogLikelihood,
    *,
    particles: int = 1000,
    resample_below: float = 0.5,
) -> Tensor:
    """Log evidence per series: the log of an unbiased estimate, by a filter that moves as the path does.

    A plain `SDEPath` or `JumpDiffusionPath` gives the bootstrap filter; a guided path the twisted one, whose weights
    look ahead through the messages: with exact messages a single particle gives the exact answer.

    Args:
        path: prior or guided path, batch_shape (*batch).
        log_likelihood: `(z, k) -> (particles, *batch)`, the log density of what was observed at grid time k,
            given states z (particles, *batch, state); None where nothing was.
        particles: how many.
        resample_below: resample a series when its effective sample size falls below this share of particles.

    Returns:
        (*batch,) estimates of log p(y). exp of it is unbiased, itself it is low by about half its variance.

    Raises:
        FieldError: if `log_likelihood` returns another shape, there are no particles, or the path is of another kind.

    References:
        Whiteley & Lee, "Twisted particle filters", Annals of Statistics 2014, https://doi.org/10.1214/13-AOS1167;
        Guarniero, Johansen & Lee, "The iterated auxiliary particle filter", JASA 2017,
        https://doi.org/10.1080/01621459.2016.1222291

    Example:
        >>> import stochdyn as sd, pyro.distributions as dist
        >>> path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.5]), torch.zeros(1), torch.linspace(0, 1, 11))
        >>> def seen_at_the_end(z, k):
        ...     return dist.Normal(z[..., 0], 0.1).log_prob(torch.tensor(0.2)) if k == 10 else None
        >>> sd.particle_evidence(path, seen_at_the_end, particles=100).shape
        torch.Size([])
    """
    if not isinstance(particles, int) or particles < 1:
        raise FieldError(f"`particles` must be an integer of at least 1, got {particles!r}.")
    moves = moves_of(path)
    z, log_w = moves.start(particles)
    total = torch.zeros(log_w.shape[1:], dtype=z.dtype, device=z.device)
    for k in range(moves.path.chain.steps + 1):
        log_w = log_w + _checked(log_likelihood(z, k), log_w)
        if k == moves.path.chain.steps:
            break
        ahead, carried = moves.ahead(k, z)
        z, total, log_w, (ahead, *carried), picked = _resampled(
            z, total, log_w + ahead, (ahead, *carried), particles * resample_below
        )
        z, gained = moves.move(k, z, tuple(carried), picked)
        z, log_w = _kept(z, log_w - ahead + gained)
    return (total + torch.logsumexp(_finite(log_w), 0) - math.log(particles)).to(z)


def _checked(value: Tensor | None, log_w: Tensor) -> Tensor | float:
    if value is None:
        return 0.0
    if value.shape != log_w.shape:
        raise FieldError(
            f"`log_likelihood` returned shape {tuple(value.shape)}, expected (particles, *batch) = "
            f"{tuple(log_w.shape)}. Sum over channels, keep particles and series."
        )
    return value


def _kept(z: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """A particle that left the finite numbers gets weight zero and waits at zero to be resampled."""
    lost = ~torch.isfinite(z).all(-1)
    if not lost.any():
        return z, log_w
    return z.masked_fill(lost[..., None], 0.0), log_w.masked_fill(lost, -math.inf)


def _finite(log_w: Tensor) -> Tensor:
    return torch.where(log_w.isnan(), torch.full_like(log_w, -math.inf), log_w)


def _resampled(
    z: Tensor, total: Tensor, log_w: Tensor, carried: tuple[Tensor, ...], below: float
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], bool]:
    """Systematic resampling of those series whose effective sample size is too small."""
    log_w = _finite(log_w)
    w = torch.softmax(log_w, 0)
    needy = 1 / w.square().sum(0) < below
    if not needy.any():
        return z, total, log_w, carried, False
    n = log_w.shape[0]
    cumulative = w.cumsum(0).movedim(0, -1).contiguous()
    offset = torch.rand(*needy.shape, 1, dtype=w.dtype, device=w.device)
    comb = torch.arange(n, dtype=w.dtype, device=w.device) + offset
    index = torch.searchsorted(cumulative, comb / n).clamp(max=n - 1).movedim(-1, 0)
    still = torch.arange(n, device=w.device).reshape(-1, *[1] * needy.dim())
    index = torch.where(needy, index, still)

    def pick(x: Tensor) -> Tensor:
        x = x.expand(*log_w.shape, *x.shape[log_w.dim() :])
        extra = x.dim() - index.dim()
        return x.gather(0, index.reshape(*index.shape, *[1] * extra).expand(x.shape))

    gained = torch.logsumexp(log_w, 0) - math.log(n)
    total = total + torch.where(needy, gained, torch.zeros_like(gained))
    log_w = torch.where(needy, torch.zeros_like(log_w), log_w)
    return pick(z), total, log_w, tuple(pick(x) for x in carried), True
