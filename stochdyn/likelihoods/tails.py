"""Log probabilities of half-lines and intervals, for the distributions that have them here.

They are computed in float64 and returned in the dtype of the distribution.
"""

from functools import singledispatch

import torch
from torch import Tensor
from torch import distributions as td

from stochdyn.errors import SupportError
from stochdyn.likelihoods import special


@singledispatch
def log_at_most(fn: td.Distribution, x: Tensor) -> Tensor:
    """log P(Y <= x), right far in the tails, with gradients.

    Known for Normal, LogNormal, StudentT, Poisson and NegativeBinomial. Others are added by
    `log_at_most.register(Class)`; the function must stay finite where it is evaluated, with finite gradients.

    Args:
        fn: a distribution over scalars.
        x: broadcasts with its batch shape.

    Raises:
        SupportError: for a distribution without one.

    Example:
        >>> log_at_most(td.Normal(0.0, 1.0), torch.tensor(-30.0))
        tensor(-454.3213)
    """
    raise _unknown(fn)


@singledispatch
def log_at_least(fn: td.Distribution, x: Tensor) -> Tensor:
    """log P(Y >= x), as `log_at_most`; for counts x itself is included.

    Raises:
        SupportError: for a distribution without one.

    Example:
        >>> log_at_least(td.Poisson(torch.tensor(2.0)), torch.tensor(1.0)).exp()  # 1 - exp(-2)
        tensor(0.8647)
    """
    raise _unknown(fn)


def log_between(fn: td.Distribution, low: Tensor, high: Tensor) -> Tensor:
    """log P(low <= Y <= high), low < high both finite, from the tail in which they lie.

    Example:
        >>> log_between(td.Normal(0.0, 1.0), torch.tensor(30.0), torch.tensor(31.0))
        tensor(-454.3213)
    """
    below, above = low, high
    if fn.support.is_discrete:  # pyright: ignore
        below, above = low.ceil() - 1, high.floor() + 1
    at_most, at_least = log_at_most(fn, high), log_at_least(fn, low)
    left = at_most < at_least
    larger = torch.where(left, at_most, at_least)
    rest = torch.where(left, log_at_most(fn, below), log_at_least(fn, above))
    return larger + special.log1mexp((rest - larger).clamp(max=-torch.finfo(larger.dtype).tiny))


def check_known(fn: td.Distribution) -> None:
    """Refuse a distribution without any distribution function.

    Raises:
        SupportError: naming it, and how to add one.

    Example:
        >>> check_known(td.Normal(0.0, 1.0))
    """
    if all(f.dispatch(type(fn)) is f.dispatch(object) for f in (log_at_most, log_at_least)):
        raise _unknown(fn)


def _unknown(fn: td.Distribution) -> SupportError:
    name = type(fn).__name__
    return SupportError(
        f"{name} has no distribution function here, which censored entries need. Known: Normal, LogNormal, StudentT, "
        f"Poisson, NegativeBinomial. Register one with stochdyn.likelihoods.log_at_most.register({name}), and "
        "log_at_least."
    )


def _counted(k: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Counts in float64, at least `least`, and which were below it."""
    k = k.double()
    return k.clamp(min=least), k < least


@log_at_most.register(td.Normal)
def _(fn: td.Normal, x: Tensor) -> Tensor:
    return special.log_ndtr(((x - fn.loc) / fn.scale).double()).to(fn.loc.dtype)


@log_at_least.register(td.Normal)
def _(fn: td.Normal, x: Tensor) -> Tensor:
    return special.log_ndtr(((fn.loc - x) / fn.scale).double()).to(fn.loc.dtype)


@log_at_most.register(td.LogNormal)
def _(fn: td.LogNormal, x: Tensor) -> Tensor:
    never = x <= 0
    return log_at_most(fn.base_dist, torch.where(never, torch.ones_like(x), x).log()).masked_fill(
        never, -torch.inf
    )


@log_at_least.register(td.LogNormal)
def _(fn: td.LogNormal, x: Tensor) -> Tensor:
    always = x <= 0
    return log_at_least(fn.base_dist, torch.where(always, torch.ones_like(x), x).log()).masked_fill(
        always, 0.0
    )


@log_at_most.register(td.StudentT)
def _(fn: td.StudentT, x: Tensor) -> Tensor:
    return special.log_stdtr(((x - fn.loc) / fn.scale).double(), fn.df.double()).to(fn.loc.dtype)


@log_at_least.register(td.StudentT)
def _(fn: td.StudentT, x: Tensor) -> Tensor:
    return special.log_stdtr(((fn.loc - x) / fn.scale).double(), fn.df.double()).to(fn.loc.dtype)


@log_at_most.register(td.Poisson)
def _(fn: td.Poisson, x: Tensor) -> Tensor:
    k, never = _counted(x.floor(), 0)
    out = special.log_poisson_at_most(k, fn.rate.double())
    return out.masked_fill(never, -torch.inf).to(fn.rate.dtype)


@log_at_least.register(td.Poisson)
def _(fn: td.Poisson, x: Tensor) -> Tensor:
    k, always = _counted(x.ceil(), 1)
    return special.log_poisson_at_least(k, fn.rate.double()).masked_fill(always, 0.0).to(fn.rate.dtype)


@log_at_most.register(td.NegativeBinomial)
def _(fn: td.NegativeBinomial, x: Tensor) -> Tensor:
    k, never = _counted(x.floor(), 0)
    out = special.log_nbinom_at_most(k, fn.logits.double(), fn.total_count.double())
    return out.masked_fill(never, -torch.inf).to(fn.logits.dtype)


@log_at_least.register(td.NegativeBinomial)
def _(fn: td.NegativeBinomial, x: Tensor) -> Tensor:
    k, always = _counted(x.ceil(), 1)
    out = special.log_nbinom_at_least(k, fn.logits.double(), fn.total_count.double())
    return out.masked_fill(always, 0.0).to(fn.logits.dtype)
