"""Logarithms of distribution functions, right far in the tails, with exact gradients.

The incomplete gamma and beta functions are evaluated by series and continued fractions on a log scale, in float64.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_MOST = 2000
_LARGE, _SMALL = 1.5e5, 1e-200
_CLOSE = 1e-15


class _Once(torch.autograd.Function):
    """A derivative that has no further ones here; asking for them raises, where zero would be wrong."""

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, *depends: Tensor) -> Tensor:
        return derivative.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "The derivative of a log distribution function with respect to its shape (degrees of freedom, "
            "concentration) is implemented once. A shape that depends on the state works with FreeMessage, not with "
            "FilterMessage."
        )


class _LogProbability(torch.autograd.Function):
    """log F(x; theta): F' = sign exp(slope) in x, to every order; in theta by the forward computation, once."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Callable[..., Tensor],
        slope: Callable[..., Tensor],
        sign: int,
        x: Tensor,
        *theta: Tensor,
    ) -> Tensor:
        out = value(x, *theta)
        ctx.value, ctx.slope, ctx.sign = value, slope, sign
        ctx.save_for_backward(x, out, *theta)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, out, *theta = ctx.saved_tensors
        (gradient,) = gradients
        along = ctx.sign * gradient * (ctx.slope(x, *theta) - out).exp()
        if not any(ctx.needs_input_grad[4:]):
            return (None, None, None, along, *[None] * len(theta))
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in theta]
            shapes = torch.autograd.grad(ctx.value(x.detach(), *leaves).sum(), leaves)
        return (None, None, None, along, *[gradient * _Once.apply(d, x, *theta) for d in shapes])


def log_probability(
    value: Callable[..., Tensor], slope: Callable[..., Tensor], sign: int, x: Tensor, *theta: Tensor
) -> Tensor:
    """log F(x; theta) with exact gradients, from its values and the logarithm of |dF/dx|.

    Args:
        value: (x, *theta) -> log F, elementwise.
        slope: (x, *theta) -> log |dF/dx|, elementwise and differentiable.
        sign: of dF/dx.
        x: where.
        theta: shapes.

    Example:
        >>> log_probability(lambda x: -x, lambda x: -x, -1, torch.tensor([2.0]))
        tensor([-2.])
    """
    return _LogProbability.apply(value, slope, sign, *torch.broadcast_tensors(x, *theta))  # type: ignore[no-any-return]


def log_ndtr(x: Tensor) -> Tensor:
    """log of the standard normal distribution function, for float64.

    Below -30 by its asymptotic series: the curvature of torch's own, near -1 there, is lost to cancellation (-1.5 at
    -10^4).

    References:
        NIST Digital Library of Mathematical Functions, 7.12.1, https://dlmf.nist.gov/7.12.E1

    Example:
        >>> log_ndtr(torch.tensor([-40.0]).double())
        tensor([-804.6084], dtype=torch.float64)
    """
    far = x < -30
    near = torch.special.log_ndtr(torch.where(far, torch.full_like(x, -30.0), x))
    y = torch.where(far, x, torch.full_like(x, -30.0))
    u = y.square().reciprocal()
    series = u * (-1 + u * (3 - u * (15 - u * (105 - u * (945 - u * 10395)))))
    return torch.where(
        far, -0.5 * y.square() - (-y).log() - 0.5 * math.log(2 * math.pi) + torch.log1p(series), near
    )


def log_stdtr(t: Tensor, df: Tensor) -> Tensor:
    """log of the distribution function of Student's t.

    F(t) = I_x(df / 2, 1 / 2) / 2 for t < 0, x = df / (df + t^2), I the regularised incomplete beta function.

    References:
        NIST Digital Library of Mathematical Functions, section 8.17, https://dlmf.nist.gov/8.17

    Example:
        >>> log_stdtr(torch.tensor([0.0]).double(), torch.tensor([3.0]).double()).exp()
        tensor([0.5000], dtype=torch.float64)
    """

    def value(t: Tensor, df: Tensor) -> Tensor:
        logit = df.log() - 2 * t.abs().clamp(min=1e-150).log()
        tail = log_betainc(logit, df / 2, torch.full_like(df, 0.5)) - math.log(2)
        return torch.where(t > 0, log1mexp(tail), tail)

    def slope(t: Tensor, df: Tensor) -> Tensor:
        constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (df * math.pi).log()
        return constant - 0.5 * (df + 1) * torch.log1p(t.square() / df)

    return log_probability(value, slope, 1, t, df)


def log_poisson_at_most(k: Tensor, rate: Tensor) -> Tensor:
    """log P(Y <= k) of a Poisson count, k = 0, 1, ...: the regularised upper incomplete gamma function.

    Example:
        >>> log_poisson_at_most(torch.tensor([1.0]).double(), torch.tensor([2.0]).double()).exp()  # 3 exp(-2)
        tensor([0.4060], dtype=torch.float64)
    """
    k = k.expand(torch.broadcast_shapes(k.shape, rate.shape))
    return log_probability(
        lambda x: _log_gammainc(k + 1, x)[1],
        lambda x: torch.xlogy(k, x) - x - torch.lgamma(k + 1),
        -1,
        rate.expand_as(k),
    )


def log_poisson_at_least(k: Tensor, rate: Tensor) -> Tensor:
    """log P(Y >= k) of a Poisson count, k = 1, 2, ...: the regularised lower incomplete gamma function.

    Example:
        >>> log_poisson_at_least(torch.tensor([2.0]).double(), torch.tensor([2.0]).double()).exp()
        tensor([0.5940], dtype=torch.float64)
    """
    k = k.expand(torch.broadcast_shapes(k.shape, rate.shape))
    return log_probability(lambda x: _log_gammainc(k, x)[0], _log_pmf(k - 1), 1, rate.expand_as(k))


def log_nbinom_at_most(k: Tensor, logits: Tensor, concentration: Tensor) -> Tensor:
    """log P(Y <= k) of a negative binomial count, k = 0, 1, ...: I_{1-p}(r, k + 1), r the concentration.

    Args:
        k: counts.
        logits: log p / (1 - p) = log mean / r.
        concentration: r; the variance is mean + mean^2 / r.

    Example:
        >>> one = torch.ones(1).double()
        >>> log_nbinom_at_most(one, 0 * one, one).exp()  # geometric: 1 - 1 / 4
        tensor([0.7500], dtype=torch.float64)
    """
    k = k.expand(torch.broadcast_shapes(k.shape, logits.shape, concentration.shape))
    return log_probability(
        lambda u, r: log_betainc(-u, r, k + 1),
        lambda u, r: _log_beta_slope(u, k + 1, r),
        -1,
        logits.expand_as(k),
        concentration,
    )


def log_nbinom_at_least(k: Tensor, logits: Tensor, concentration: Tensor) -> Tensor:
    """log P(Y >= k) of a negative binomial count, k = 1, 2, ...: I_p(k, r), r the concentration.

    Example:
        >>> one = torch.ones(1).double()
        >>> log_nbinom_at_least(2 * one, 0 * one, one).exp()
        tensor([0.2500], dtype=torch.float64)
    """
    k = k.expand(torch.broadcast_shapes(k.shape, logits.shape, concentration.shape))
    return log_probability(
        lambda u, r: log_betainc(u, k, r),
        lambda u, r: _log_beta_slope(u, k, r),
        1,
        logits.expand_as(k),
        concentration,
    )


def _log_pmf(k: Tensor) -> Callable[[Tensor], Tensor]:
    """Of a Poisson count, by its rate: also the slope of its distribution function in the rate."""
    return lambda rate: torch.xlogy(k, rate) - rate - torch.lgamma(k + 1)


def _log_beta_slope(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """log dI_x(a, b) / du, x = sigmoid(u)."""
    return a * logsigmoid(u) + b * logsigmoid(-u) + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, without cancellation on either side.

    Example:
        >>> log1mexp(torch.tensor([-1e-20, -50.0]).double())
        tensor([-4.6052e+01, -1.9287e-22], dtype=torch.float64)
    """
    near = x > -math.log(2)
    half = torch.full_like(x, -math.log(2))
    close = (-torch.expm1(torch.where(near, x, half))).log()
    return torch.where(near, close, torch.log1p(-torch.where(near, half, x).exp()))


def log_betainc(logit: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """log I_x(a, b) of the regularised incomplete beta function at x = sigmoid(logit), by a continued fraction.

    References:
        NIST Digital Library of Mathematical Functions, 8.17.22, https://dlmf.nist.gov/8.17.v

    Example:
        >>> two = torch.tensor([2.0]).double()
        >>> log_betainc(0 * two, two, two).exp()
        tensor([0.5000], dtype=torch.float64)
    """
    logit, a, b = torch.broadcast_tensors(logit, a, b)
    direct = torch.sigmoid(logit) < (a + 1) / (a + b + 2)
    u, a, b = torch.where(direct, logit, -logit), torch.where(direct, a, b), torch.where(direct, b, a)
    log_tail = _log_beta_slope(u, a, b) - a.log() + _beta_fraction(torch.sigmoid(u), a, b).log()
    # Of the two tails this one is the smaller or near it; rounding must not carry it above 1.
    log_tail = log_tail.clamp(max=0)
    return torch.where(direct, log_tail, log1mexp(torch.where(direct, torch.full_like(u, -1.0), log_tail)))


def _beta_fraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Lentz's method; a few rounds more than the value needs, for the derivatives."""
    c = torch.ones_like(x)
    d = 1 / (1 - (a + b) * x / (a + 1))
    h, left = d, 5
    for m in range(1, _MOST):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = 1 / (1 + even * d), 1 + even / c
        h = h * d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1 / (1 + odd * d), 1 + odd / c
        h = h * d * c
        left -= bool(((d * c).detach() - 1).abs().max() < _CLOSE)
        if left == 0:
            break
    return h


def _log_gammainc(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """log P(a, x) and log Q(a, x), x > 0: a series below a + 1, a continued fraction above.

    Near the centre of a large a both need too many terms; torch has an expansion there, right to four digits.
    """
    a, x = torch.broadcast_tensors(a, x)
    below = x < a + 1
    lower, upper = (
        torch.special.gammainc(a.detach(), x.detach()),
        torch.special.gammaincc(a.detach(), x.detach()),
    )
    central = (a > _LARGE) & (torch.minimum(lower, upper) > _SMALL)
    front = a * x.log() - x - torch.lgamma(a)
    series = front - a.log() + _gamma_series(a, torch.where(below & ~central, x, a / 2)).log()
    fraction = front + _gamma_fraction(a, torch.where(below | central, 2 * a + 2, x)).log()
    small = torch.where(below, series, fraction).clamp(max=0)
    other = log1mexp(small)
    found = torch.where(below, small, other), torch.where(below, other, small)
    return torch.where(central, lower.log(), found[0]), torch.where(central, upper.log(), found[1])


def _gamma_series(a: Tensor, x: Tensor) -> Tensor:
    term = total = torch.ones_like(x)
    for n in range(1, _MOST):
        term = term * x / (a + n)
        total = total + term
        if bool((term < _CLOSE * total).all()):
            break
    return total


def _gamma_fraction(a: Tensor, x: Tensor) -> Tensor:
    b = x + 1 - a
    c, d = torch.full_like(x, 1e300), 1 / b
    h = d
    for n in range(1, _MOST):
        numerator, b = -n * (n - a), b + 2
        d, c = 1 / (numerator * d + b), b + numerator / c
        h = h * d * c
        if bool((d * c - 1).abs().max() < _CLOSE):
            break
    return h
