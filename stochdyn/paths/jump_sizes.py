"""Compound Poisson jumps: when, by an intensity, and how far, by a law of sizes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import FieldError

Number = Tensor | float
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_FRACTIONS = 250
# The four normals nearest to Exp(1), by the divergence from it (.048 nat): weights, means, standard deviations.
_ONE = (
    (0.17413, 0.11993, 0.07744),
    (0.33079, 0.47498, 0.22122),
    (0.35450, 1.24183, 0.52398),
    (0.14058, 2.71714, 1.26750),
)
# A sum of several: weights and multiples of its variance, the second one for the tails.
_SEVERAL = ((0.875, 5 / 7), (0.125, 3.0))


class AbstractJumpSize(ABC):
    """The law of a jump's size, in the units of the state.

    Attributes:
        gaussian: whether sums of sizes are normal, so that `normals` is exact.
    """

    gaussian: bool = False

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Of one jump, (*batch, state)."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Of one jump, (*batch, state)."""

    @abstractmethod
    def log_density(self, count: int, x: Tensor, scale: Tensor) -> Tensor:
        """The log density at x (..., state) of the sum of `count` jumps and normal noise of this scale, per state."""

    def log_densities(self, most: int, x: Tensor, scale: Tensor) -> list[Tensor]:
        """`log_density` for 0, ..., most jumps."""
        return [self.log_density(n, x, scale) for n in range(most + 1)]

    def normals(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of `count` jumps as a mixture of normals, for guides: log weights (*batch, component), means and
        variances (*batch, component, state). By default one normal with its mean and variance."""
        mean, variance = (torch.atleast_1d(x)[..., None, :] for x in (self.mean, self.variance))
        return torch.zeros(1, dtype=mean.dtype, device=mean.device), count * mean, count * variance

    @abstractmethod
    def expected(self, count: int, x: Tensor, scale: Tensor) -> Tensor:
        """The mean of the sum of `count` jumps, given that with the noise it is x."""

    @abstractmethod
    def sample(self, counts: Tensor, like: Tensor) -> Tensor:
        """Sums of sizes (..., state) for counts (..., 1)."""


@dataclass(frozen=True, eq=False)
class NormalJump(AbstractJumpSize):
    """Normal sizes, as in Merton's model; the states of one path jump together, each by its own size.

    Args:
        loc: mean size, a number or (*batch, state).
        scale: standard deviation, likewise; zero is a jump of one size.

    Raises:
        FieldError: if a number is not finite, or the scale negative.

    References:
        Merton, "Option pricing when underlying stock returns are discontinuous", Journal of Financial Economics 1976,
        https://doi.org/10.1016/0304-405X(76)90022-2

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.NormalJump(-0.1, 0.15).variance
        tensor(0.0225)
    """

    loc: Number
    scale: Number
    gaussian: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_finite("NormalJump", loc=self.loc, scale=self.scale)
        if bool((torch.as_tensor(self.scale) < 0).any()):
            raise FieldError(
                "NormalJump: `scale` must not be negative. Write scale.exp(), or softplus(scale)."
            )

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.loc)

    @property
    def variance(self) -> Tensor:
        return torch.as_tensor(self.scale) ** 2

    def log_density(self, count: int, x: Tensor, scale: Tensor) -> Tensor:
        return _log_normal(x - count * self.loc, scale.square() + count * self.variance)

    def expected(self, count: int, x: Tensor, scale: Tensor) -> Tensor:
        v = count * self.variance
        return count * self.loc + v / (v + scale.square()) * (x - count * self.loc)

    def sample(self, counts: Tensor, like: Tensor) -> Tensor:
        return counts * self.loc + counts.sqrt() * self.scale * torch.randn_like(like)


@dataclass(frozen=True, eq=False)
class DoubleExponentialJump(AbstractJumpSize):
    """Exponential sizes, upwards with probability p and downwards else, as in Kou's model; paths of one state.

    density(y) = p r exp(-r y) for y > 0, (1 - p) s exp(s y) for y < 0, with r and s the rates up and down

    Sums of them are mixtures of Erlang distributions; with normal noise their density is closed, in terms of the
    repeated integrals of the normal tail. For guides each side of one jump is replaced by four normals, and a sum of
    several by two, so that their draws have to be weighed: the bound is that of the exact density.

    Args:
        up: probability of an upward jump.
        rate_up, rate_down: one over the mean sizes, 1/state.

    Raises:
        FieldError: if `up` is outside [0, 1] or a rate is not positive.

    References:
        Kou, "A jump-diffusion model for option pricing", Management Science 2002,
        https://doi.org/10.1287/mnsc.48.8.1086.166

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.DoubleExponentialJump(0.4, 10.0, 5.0).mean
        tensor(-0.0800)
    """

    up: Number
    rate_up: Number
    rate_down: Number

    def __post_init__(self) -> None:
        _check_finite("DoubleExponentialJump", up=self.up, rate_up=self.rate_up, rate_down=self.rate_down)
        up, rates = torch.as_tensor(self.up), [torch.as_tensor(r) for r in (self.rate_up, self.rate_down)]
        if bool(((up < 0) | (up > 1)).any()):
            raise FieldError(
                "DoubleExponentialJump: `up` is a probability, in [0, 1]. Write torch.sigmoid(up)."
            )
        if any(bool((r <= 0).any()) for r in rates):
            raise FieldError("DoubleExponentialJump: rates must be positive. Write rate.exp().")

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.up) / self.rate_up - (1 - torch.as_tensor(self.up)) / self.rate_down

    @property
    def variance(self) -> Tensor:
        up = torch.as_tensor(self.up)
        return 2 * up / self.rate_up**2 + 2 * (1 - up) / self.rate_down**2 - self.mean**2

    def normals(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        if count == 0:
            return super().normals(0)
        given = map(torch.as_tensor, (self.up, self.rate_up, self.rate_down))
        up, rise, fall = torch.broadcast_tensors(
            *(x if x.is_floating_point() else x.to(torch.get_default_dtype()) for x in given)
        )
        up, rise, fall = (torch.atleast_1d(x)[..., None, :] for x in (up, rise, fall))
        if count > 1:
            _, mean, variance = super().normals(count)
            share, wider = torch.tensor(_SEVERAL, dtype=up.dtype, device=up.device).unbind(-1)
            return share.log(), mean.expand(*mean.shape[:-2], len(share), 1), variance * wider[:, None]
        share, mean, sd = torch.tensor(_ONE, dtype=up.dtype, device=up.device).T[..., None]
        least = torch.finfo(up.dtype).tiny
        log_weight = torch.cat([_log(up, least) + share.log(), _log(1 - up, least) + share.log()], -2)[..., 0]
        return (
            log_weight,
            torch.cat([mean / rise, -mean / fall], -2),
            torch.cat([sd / rise, sd / fall], -2).square(),
        )

    def log_density(self, count: int, x: Tensor, scale: Tensor) -> Tensor:
        return self.log_densities(count, x, scale)[count]

    def log_densities(self, most: int, x: Tensor, scale: Tensor) -> list[Tensor]:
        found = [_log_normal(x, scale.square())]
        if most == 0:
            return found
        rises = _log_normal_plus_erlang(most, x, scale, torch.as_tensor(self.rate_up))
        falls = _log_normal_plus_erlang(most, -x, scale, torch.as_tensor(self.rate_down))
        least = torch.finfo(x.dtype).tiny
        for n in range(1, most + 1):
            ups, downs = _erlang_weights(n, torch.as_tensor(self.up), self.rate_up, self.rate_down)
            up, down = _log(ups.to(x), least) + rises[..., :n], _log(downs.to(x), least) + falls[..., :n]
            found.append(torch.logsumexp(torch.cat([up, down], -1), -1))
        return found

    def expected(self, count: int, x: Tensor, scale: Tensor) -> Tensor:
        """By Tweedie's formula: the noise's mean is -scale^2 times the slope of the log density."""
        if count == 0:
            return torch.zeros_like(x)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            slope = torch.autograd.grad(self.log_density(count, at, scale.detach()).sum(), at)[0]
        return x + scale.square() * slope

    def sample(self, counts: Tensor, like: Tensor) -> Tensor:
        up = torch.as_tensor(self.up, dtype=like.dtype).expand(counts.shape)
        rises = torch.binomial(counts, up)
        return _erlang(rises) / self.rate_up - _erlang(counts - rises) / self.rate_down


@dataclass(frozen=True, eq=False)
class CompoundPoisson:
    """Jumps that come at an intensity, with independent sizes.

    Args:
        intensity: jumps per unit of time: a number, (*batch,), or `(t, z[, context]) -> (..., 1)`, read at the start of
            every step.
        size: `NormalJump(loc, scale)` or `DoubleExponentialJump(up, rate_up, rate_down)`.

    Raises:
        FieldError: if a constant intensity is negative or not finite, or the size is no law of sizes.

    Example:
        >>> import stochdyn as sd
        >>> jumps = sd.CompoundPoisson(0.5, sd.NormalJump(0.0, 2.0))
        >>> jumps.size.variance
        tensor(4.)
    """

    intensity: "Number | Callable[..., Tensor]"
    size: AbstractJumpSize

    def __post_init__(self) -> None:
        if not isinstance(self.size, AbstractJumpSize):
            raise FieldError(
                f"CompoundPoisson: `size` must be NormalJump or DoubleExponentialJump, got {self.size!r}."
            )
        if callable(self.intensity):
            return
        _check_finite("CompoundPoisson", intensity=self.intensity)
        if bool((torch.as_tensor(self.intensity) < 0).any()):
            raise FieldError("CompoundPoisson: `intensity` must not be negative. Write intensity.exp().")


def log_poisson(n: int, rate: Tensor) -> Tensor:
    """log Poisson(n; rate), also where the rate is zero.

    Example:
        >>> log_poisson(1, torch.ones(1)), log_poisson(2, torch.zeros(1))
        (tensor([-1.]), tensor([-inf]))
    """
    if n == 0:
        return -rate
    positive = torch.where(rate > 0, rate, torch.ones_like(rate))
    value = n * positive.log() - positive - math.lgamma(n + 1)
    return torch.where(rate > 0, value, torch.full_like(value, -math.inf))


def _check_finite(where: str, **values: Any) -> None:
    for name, value in values.items():
        if not bool(torch.isfinite(torch.as_tensor(value)).all()):
            raise FieldError(f"{where}: `{name}` is not finite, got {value}. Give a finite number.")


def _log_normal(x: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (x.square() / variance + variance.log()) - _HALF_LOG_2PI


def _log(weight: Tensor, least: float) -> Tensor:
    """The logarithm, of a weight of nothing too, without a gradient there that is not a number."""
    return weight.clamp(min=least).log()


def _erlang(counts: Tensor) -> Tensor:
    """Sums of `counts` standard exponentials."""
    drawn = torch._standard_gamma(counts.clamp(min=1.0))
    return torch.where(counts > 0, drawn, torch.zeros_like(drawn))


def _erlang_weights(count: int, up: Tensor, rate_up: Number, rate_down: Number) -> tuple[Tensor, Tensor]:
    """The weights of 1, ..., count exponentials upwards, and of as many downwards, in a sum: (..., count) each."""
    share = torch.as_tensor(rate_up / (rate_up + rate_down))
    return _one_side(count, up, share), _one_side(count, 1 - up, 1 - share)


def _one_side(n: int, p: Tensor, share: Tensor) -> Tensor:
    weights = []
    for k in range(1, n):
        terms = [
            math.comb(n - k - 1, i - k)
            * math.comb(n, i)
            * share ** (i - k)
            * (1 - share) ** (n - i)
            * p**i
            * (1 - p) ** (n - i)
            for i in range(k, n)
        ]
        weights.append(torch.stack(torch.broadcast_tensors(*terms)).sum(0))
    return torch.stack(torch.broadcast_tensors(*weights, p**n), -1)


def _log_normal_plus_erlang(count: int, x: Tensor, scale: Tensor, rate: Tensor) -> Tensor:
    """Log densities at x of normal noise plus k exponentials of a rate, for k = 1, ..., count: (..., count)."""
    s = scale * rate
    tails = log_normal_integrals(count - 1, (s - x / scale).double()).to(x.dtype)
    k = torch.arange(1, count + 1, dtype=x.dtype, device=x.device)
    front = 0.5 * s.square() - x * rate - scale.log() - _HALF_LOG_2PI
    return front[..., None] + k * s.log()[..., None] + tails


def log_normal_integrals(order: int, x: Tensor) -> Tensor:
    """log Hh_k(x) for k = 0, ..., order: (..., order + 1), with Hh_k(x) = 1/k! int_x^inf (t - x)^k exp(-t^2/2) dt.

    The recurrence k Hh_k = Hh_(k-2) - x Hh_(k-1) upwards where x is at most 1, and downwards, as a continued fraction
    of the ratios, where it is larger and the other loses digits.

    References:
        Abramowitz & Stegun, "Handbook of mathematical functions", 1964, section 19.14

    Example:
        >>> log_normal_integrals(1, torch.zeros(1, dtype=torch.float64)).exp()
        tensor([[1.2533, 1.0000]], dtype=torch.float64)
    """
    return _LogIntegrals.apply(order, x)  # pyright: ignore[reportReturnType]


class _LogIntegrals(torch.autograd.Function):
    """With d log Hh_k / dx = -Hh_(k-1) / Hh_k, so that a gradient does not keep the recurrences."""

    @staticmethod
    def forward(ctx: Any, order: int, x: Tensor) -> Tensor:
        found = _log_integrals(order, x)
        ctx.save_for_backward(x, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, found = ctx.saved_tensors
        before = torch.cat([(-0.5 * x.square())[..., None], found[..., :-1]], -1)
        return None, -(grads[0] * (before - found).exp()).sum(-1)


def _log_integrals(order: int, x: Tensor) -> Tensor:
    small = x.clamp(max=1.0)
    below, now = torch.exp(-0.5 * small.square()), math.sqrt(2 * math.pi) * torch.special.ndtr(-small)
    up = [now]
    for k in range(1, order + 1):
        below, now = now, (below - small * now) / k
        up.append(now)
    large, ratios = x.clamp(min=1.0), []
    r = 2 / (large + (large.square() + 4 * (order + _FRACTIONS)).sqrt())
    for k in range(order + _FRACTIONS, 0, -1):
        if k <= order:
            ratios.append(r)
        r = 1 / (large + k * r)
    first = _HALF_LOG_2PI + torch.special.log_ndtr(-large)
    down = [first]
    for r in reversed(ratios):
        down.append(down[-1] + r.log())
    return torch.where((x <= 1.0)[..., None], torch.stack(up, -1).log(), torch.stack(down, -1))
