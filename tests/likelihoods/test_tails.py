"""Probabilities of half-lines and intervals against scipy, for every distribution that has them."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats as ss
import torch

import stochdyn as sd
from stochdyn.likelihoods import log_at_least, log_at_most, log_between

F64 = torch.float64


def tensor(x):
    return torch.as_tensor(x, dtype=F64)


CONTINUOUS = {
    "normal": (dist.Normal(tensor(1.0), tensor(2.0)), ss.norm(1.0, 2.0)),
    "lognormal": (dist.LogNormal(tensor(0.3), tensor(0.5)), ss.lognorm(0.5, scale=np.exp(0.3))),
    "student": (dist.StudentT(tensor(3.0), tensor(1.0), tensor(2.0)), ss.t(3.0, 1.0, 2.0)),
}
COUNTS = {
    "poisson": (dist.Poisson(tensor(4.0)), ss.poisson(4.0)),
    "negative binomial": (
        dist.NegativeBinomial(tensor(2.5), logits=tensor(0.4)),
        ss.nbinom(2.5, 1 / (1 + np.exp(0.4))),
    ),
}
X = tensor([0.2, 0.7, 1.0, 2.0, 3.0, 9.0])


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous(name):
    fn, reference = CONTINUOUS[name]
    same = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(log_at_most(fn, X), tensor(reference.logcdf(X)), **same)
    torch.testing.assert_close(log_at_least(fn, X), tensor(reference.logsf(X)), **same)
    expected = tensor(np.log(reference.cdf(X + 0.5) - reference.cdf(X)))
    torch.testing.assert_close(log_between(fn, X, X + 0.5), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_include_both_ends(name):
    fn, reference = COUNTS[name]
    k, same = tensor([0.0, 1.0, 2.0, 7.0]), {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(log_at_most(fn, k), tensor(reference.logcdf(k)), **same)
    torch.testing.assert_close(log_at_least(fn, k), tensor(reference.logsf(k - 1)), **same)
    expected = tensor(np.log(reference.cdf(k + 2) - reference.cdf(k - 1)))
    torch.testing.assert_close(log_between(fn, k, k + 2), expected, **same)
    assert not torch.allclose(log_at_least(fn, k), tensor(reference.logsf(k)))  # the control: P(Y > k)


@pytest.mark.parametrize("name", COUNTS)
def test_limits_between_counts(name):
    fn, _ = COUNTS[name]
    assert log_at_most(fn, tensor(2.5)) == log_at_most(fn, tensor(2.0))
    assert log_at_least(fn, tensor(2.5)) == log_at_least(fn, tensor(3.0))
    between, whole = log_between(fn, tensor(1.5), tensor(4.5)), log_between(fn, tensor(2.0), tensor(4.0))
    assert between == whole
    assert log_at_most(fn, tensor(-1.0)) == -np.inf
    assert log_at_least(fn, tensor(-1.0)) == 0


@pytest.mark.parametrize("name", CONTINUOUS | COUNTS)
def test_a_line_adds_up_to_one(name):
    fn, _ = (CONTINUOUS | COUNTS)[name]
    step = 1 if name in COUNTS else 0
    parts = [
        log_at_most(fn, tensor(1.0)),
        log_between(fn, tensor(1.0 + step), tensor(3.0)),
        log_at_least(fn, tensor(3.0 + step)),
    ]
    torch.testing.assert_close(torch.stack(parts).exp().sum(), tensor(1.0), rtol=1e-12, atol=0)


def test_an_interval_far_in_either_tail():
    for side in (-1.0, 1.0):
        ends = sorted([side * 30.0, side * 31.0])
        got = log_between(dist.Normal(tensor(0.0), 1.0), *map(tensor, ends))
        torch.testing.assert_close(got, tensor(ss.norm.logcdf(-30.0)), rtol=1e-12, atol=0)
        assert ss.norm.cdf(ends[1]) - ss.norm.cdf(ends[0]) in (0, ss.norm.cdf(-30.0) - ss.norm.cdf(-31.0))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtypes(dtype):
    one = torch.ones(3, dtype=dtype)
    for fn in (
        dist.Normal(one, one), dist.LogNormal(one, one), dist.StudentT(3 * one, one, one), dist.Poisson(one),
        dist.NegativeBinomial(one, logits=one),
    ):  # fmt: skip
        for out in (log_at_most(fn, 2 * one), log_at_least(fn, 2 * one), log_between(fn, one, 2 * one)):
            assert out.dtype == dtype and out.shape == (3,)


def test_one_of_your_own():
    class Mine(torch.distributions.Exponential):
        pass

    fn = Mine(tensor(2.0))
    with pytest.raises(
        sd.SupportError, match=r"Mine has no distribution function here.*log_at_most.register\(Mine\)"
    ):
        log_at_most(fn, tensor(1.0))
    log_at_least.register(Mine)(lambda fn, x: -fn.rate * x)
    assert log_at_least(fn, tensor(1.0)) == -2


@pytest.mark.parametrize("k", [1e5, 1e6, 1e7, 1e8])
@pytest.mark.parametrize("shift", [-40.0, -3.0, 0.0, 3.0, 40.0])
def test_poisson_tails_of_large_counts(k, shift):
    """Against the sum of all terms that count."""
    rate, width = k + shift * k**0.5, int(60 * k**0.5)

    def total(start, stop):
        n = torch.arange(start, stop, dtype=F64)
        return torch.logsumexp(n * math.log(rate) - rate - torch.lgamma(n + 1), 0).item()

    fn, at = dist.Poisson(tensor(rate)), tensor(k)
    for got, wanted in (
        (log_at_most(fn, at), total(int(k) - width, int(k) + 1)),
        (log_at_least(fn, at), total(int(k), int(k) + width)),
    ):
        assert abs(got.item() - wanted) < 1e-4 * max(1, abs(wanted))
