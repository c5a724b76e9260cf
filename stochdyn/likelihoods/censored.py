"""A distribution of which some entries are known to lie in an interval only."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.device import readable
from stochdyn.errors import ShapeError, SupportError
from stochdyn.likelihoods.tails import check_known, log_at_least, log_at_most, log_between


class Censored(dist.TorchDistribution):
    """Observations of `base`, some of them known only to lie in [low, high].

    log_prob(y) = log p(y) where low = -inf and high = inf (an exact value); else log P(low <= Y <= high), and the
    value there is ignored. Draws are draws of `base`: the truth, as if nothing had been censored.
    `batch.observe` makes one where a `Series` has censored entries.

    Args:
        base: a distribution over scalars: Normal, LogNormal, StudentT, Poisson, NegativeBinomial, or one that was
            registered with `stochdyn.likelihoods.log_at_most`.
        low: lower ends, -inf where there is none; broadcast with the batch shape of `base`.
        high: upper ends, inf where there is none.

    Raises:
        ShapeError: if `base` is no distribution over scalars.
        SupportError: where `base` has no distribution function, or an exact value is outside its support.

    References:
        Tobin, "Estimation of relationships for limited dependent variables", Econometrica 1958,
        https://doi.org/10.2307/1907382
        Beal, "Ways to fit a PK model with some data below the quantification limit", Journal of
        Pharmacokinetics and Pharmacodynamics 2001, https://doi.org/10.1023/A:1012299115260

    Example:
        >>> import stochdyn as sd
        >>> low, high = torch.tensor([-torch.inf, -torch.inf]), torch.tensor([torch.inf, 0.0])
        >>> sd.Censored(dist.Normal(0.0, 1.0), low, high).log_prob(torch.zeros(2)).exp()  # a density, and P(Y <= 0)
        tensor([0.3989, 0.5000])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, base: Any, low: Tensor, high: Tensor, validate_args: bool | None = None) -> None:
        if base.event_shape:
            raise ShapeError(
                f"Censored: `base` must be a distribution over scalars, got event_shape {tuple(base.event_shape)}. "
                "Write .to_event(2) after it."
            )
        check_known(base)
        shape = torch.broadcast_shapes(base.batch_shape, low.shape, high.shape)
        checked = base._validate_args if validate_args is None else validate_args
        self.base = base.expand(shape)
        self.base._validate_args = False  # it also meets limits, which may be outside its support
        self.low, self.high = low, high
        super().__init__(shape, validate_args=False)
        self._validate_args = checked

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """As the base has."""
        return self.base.has_rsample

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Of exact values."""
        return self.base.support

    @property
    def mean(self) -> Tensor:
        """Of the truth."""
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        """Of the truth."""
        return self.base.variance

    @property
    def censored(self) -> Tensor:
        """Which entries are."""
        return self.low.isfinite() | self.high.isfinite()

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Censored":
        return Censored(self.base.expand(batch_shape), self.low, self.high, self._validate_args)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._check(value)
        # What stands in for a censored value need not be in the support; 1 is in that of all known distributions.
        value = torch.where(self.censored, torch.ones_like(value), value)
        out = self.base.log_prob(value)
        below, above = self.high.isfinite(), self.low.isfinite()
        if _some(left := below & ~above):
            tail = log_at_most(self.base, torch.where(left, self.high, value))
            out = torch.where(left, tail, out)
        if _some(right := above & ~below):
            tail = log_at_least(self.base, torch.where(right, self.low, value))
            out = torch.where(right, tail, out)
        if _some(both := above & below):
            low, high = torch.where(both, self.low, value), torch.where(both, self.high, value + 1)
            out = torch.where(both, log_between(self.base, low, high), out)
        return out

    def _check(self, value: Tensor) -> None:
        bad = ~(self.base.support.check(value) | self.censored)
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            got = float(value.expand(bad.shape)[at])
            raise SupportError(
                f"Censored({type(self.base).__name__}): the exact value {got:g} at {at} is outside the support. "
                "Change it, or mask it."
            )


def _some(which: Tensor) -> bool:
    """Whether there are any; yes where that may not be looked at."""
    return not readable(which) or bool(which.any())
