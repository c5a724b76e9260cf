"""Log distribution functions against scipy, against sums on a log scale, and their gradients."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch.autograd import gradcheck, gradgradcheck

from stochdyn.likelihoods import special

F64 = torch.float64
COUNTS = torch.tensor([0, 1, 2, 5, 10, 50, 100, 199, 200, 201, 300, 1000, 3000], dtype=F64)


def tensor(x):
    return torch.as_tensor(x, dtype=F64)


def agrees(got, expected, tolerance=1e-10):
    """Relative where the logarithm is large, absolute where it is small; scipy's underflow left out."""
    got, expected = got.numpy(), np.broadcast_to(expected, got.shape)
    known = np.isfinite(expected)
    gap = np.abs(got - np.where(known, expected, 0)) / np.maximum(1, np.abs(np.where(known, expected, 0)))
    return known.sum() > 2 and np.isfinite(got).all() and bool((gap[known] < tolerance).all())


@pytest.mark.parametrize("df", [0.5, 2.1, 4.0, 10.0, 300.0])
def test_student(df):
    t = tensor(np.concatenate([-np.logspace(-8, 6, 40), [0.0], np.logspace(-8, 6, 40)]))
    with np.errstate(divide="ignore"):
        expected = np.log(scipy.special.stdtr(df, t.numpy()))
    assert agrees(special.log_stdtr(t, tensor(df)), expected)
    assert not agrees(special.log_stdtr(t, tensor(df * 1.001)), expected)


def test_students_tail_is_a_power():
    """log F(t) - log F(10 t) tends to df log 10, where scipy's F underflows."""
    far = special.log_stdtr(tensor([-1e30, -1e31]), tensor(15.0))
    torch.testing.assert_close(far[0] - far[1], tensor(15 * np.log(10)), rtol=1e-12, atol=0)
    assert scipy.special.stdtr(15.0, -1e30) == 0


@pytest.mark.parametrize("rate", [0.01, 1.0, 10.0, 200.0, 900.0])
def test_poisson(rate):
    k, rates = COUNTS, tensor(rate).expand_as(COUNTS)
    with np.errstate(divide="ignore"):
        at_most = np.log(scipy.special.gammaincc(k.numpy() + 1, rate))
        at_least = np.log(scipy.special.gammainc(k.numpy() + 1, rate))
    assert agrees(special.log_poisson_at_most(k, rates), at_most)
    assert agrees(special.log_poisson_at_least(k + 1, rates), at_least)
    assert not agrees(special.log_poisson_at_least(k + 1, rates), at_most)


@pytest.mark.parametrize("k", [0, 3, 20])
def test_poisson_far_in_both_tails(k):
    """Against the sums of the terms, added on a log scale; scipy underflows here."""
    rate, j = tensor(3000.0), torch.arange(0.0, k + 1, dtype=F64)
    terms = torch.distributions.Poisson(rate).log_prob(j)
    torch.testing.assert_close(
        special.log_poisson_at_most(tensor(k), rate), terms.logsumexp(0), rtol=1e-12, atol=0
    )
    rate, j = tensor(1e-4), torch.arange(k + 200.0, k + 260.0, dtype=F64)
    terms = torch.distributions.Poisson(rate).log_prob(j)
    got = special.log_poisson_at_least(tensor(k + 200.0), rate)
    torch.testing.assert_close(got, terms.logsumexp(0), rtol=1e-12, atol=0)
    assert got < -2000 and scipy.special.gammainc(k + 200.0, 1e-4) == 0


@pytest.mark.parametrize(("mean", "r"), [(0.1, 0.5), (5.0, 2.0), (50.0, 1.3), (1000.0, 20.0), (1000.0, 1e4)])
def test_negative_binomial(mean, r):
    logits, p = tensor(np.log(mean / r)), mean / (mean + r)
    k = COUNTS[100 * (1 + mean) > COUNTS]
    with np.errstate(divide="ignore"):
        at_most = np.log(scipy.special.betainc(r, k.numpy() + 1, 1 - p))
        at_least = np.log(scipy.special.betainc(k.numpy() + 1, r, p))
    assert agrees(special.log_nbinom_at_most(k, logits, tensor(r)), at_most)
    assert agrees(special.log_nbinom_at_least(k + 1, logits, tensor(r)), at_least)


def test_negative_binomial_far_in_its_tail():
    r, logits, j = tensor(3.0), tensor(-4.0), torch.arange(400.0, 700.0, dtype=F64)
    terms = torch.distributions.NegativeBinomial(r, logits=logits).log_prob(j)
    got = special.log_nbinom_at_least(tensor(400.0), logits, r)
    torch.testing.assert_close(got, terms.logsumexp(0), rtol=1e-11, atol=0)
    assert got < -1000


def leaf(values):
    return tensor(values).requires_grad_()


def test_first_derivatives_and_second_ones():
    t, df = leaf([[-30.0, -0.5], [0.2, 5.0]]), leaf([3.0, 7.0])
    k, rate, logits, r = (
        tensor([0.0, 3.0, 40.0]),
        leaf([0.5, 8.0, 10.0]),
        leaf([0.5, -1.0, 2.0]),
        leaf([0.5, 8.0, 100.0]),
    )
    assert gradcheck(special.log_stdtr, (t, df))
    assert gradgradcheck(lambda t: special.log_stdtr(t, df.detach()), (t,))
    assert gradgradcheck(special.log_ndtr, (t,))
    for f in (special.log_poisson_at_most, special.log_poisson_at_least):
        assert gradcheck(lambda x, f=f: f(k + 1, x), (rate,))
        assert gradgradcheck(lambda x, f=f: f(k + 1, x), (rate,))
    for f in (special.log_nbinom_at_most, special.log_nbinom_at_least):
        assert gradcheck(lambda u, r, f=f: f(k + 1, u, r), (logits, r))
        assert gradgradcheck(lambda u, f=f: f(k + 1, u, r.detach()), (logits,))


def test_the_slope_of_students_curvature_in_df():
    """What training a FilterMessage asks for: curvature in t first, then its derivative by df."""
    t, df = leaf([-2.0, 0.3, 4.0]), leaf([5.0])

    def curvature(df):
        slope = torch.autograd.grad(special.log_stdtr(t, df).sum(), t, create_graph=True)[0]
        return torch.autograd.grad(slope.sum(), t, create_graph=True)[0]

    (got,) = torch.autograd.grad(curvature(df).sum(), df)
    step = 1e-4
    expected = (curvature(df + step) - curvature(df - step)).sum() / (2 * step)
    torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=0)


def test_a_second_derivative_by_a_shape_raises():
    df = leaf([5.0])
    (slope,) = torch.autograd.grad(special.log_stdtr(tensor([1.0]), df).sum(), df, create_graph=True)
    with pytest.raises(NotImplementedError, match="implemented once"):
        slope.sum().backward()


def test_normal():
    x = tensor([-1e6, -1e3, -40.0, -30.001, -29.999, -5.0, 0.0, 5.0, 30.0])
    assert agrees(special.log_ndtr(x), scipy.stats.norm.logcdf(x.numpy()), 1e-14)
    assert gradcheck(special.log_ndtr, (leaf([-35.0, -1.0, 3.0]),))


def test_the_curvature_of_the_normal_one_stays_right_where_torchs_is_lost():
    x = leaf([-1e8, -1e4, -100.0, -30.001, -29.999, 0.0, 40.0, 1e3])

    def curvature(f):
        (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.sum(), x)[0]

    got = curvature(special.log_ndtr)
    known = tensor([-1 + 1e-16, -1 + 1e-8, -1 + 1e-4 - 6e-8])  # -1 + 1 / x^2 - 6 / x^4 + ...
    torch.testing.assert_close(got[:3], known, rtol=1e-10, atol=0)
    torch.testing.assert_close(got[3], got[4], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[5:], tensor([-2 / np.pi, 0.0, 0.0]), rtol=1e-12, atol=1e-12)
    assert (curvature(torch.special.log_ndtr)[:2] + 1).abs().min() > 0.1


def test_log1mexp():
    x = tensor([-1e-20, -1e-3, -np.log(2), -1.0, -40.0])
    expected = tensor(
        [-20 * np.log(10), -6.908255237315471, -np.log(2), np.log1p(-np.exp(-1.0)), -np.exp(-40.0)]
    )
    torch.testing.assert_close(special.log1mexp(x), expected, rtol=1e-12, atol=0)
    naive = (1 - x.exp()).log()
    assert naive[0].isinf() and naive[-1] != special.log1mexp(x)[-1]
