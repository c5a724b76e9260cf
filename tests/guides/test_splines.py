"""Splines with a context: the identity at the start, monotone, with a right inverse and linear tails."""

import pytest
import torch
from torch.distributions import Distribution

from stochdyn.guides.splines import ConditionalSplines, Warp, spline_layer, univariate
from tests.programs import F64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def moved(size, transforms=2):
    splines = ConditionalSplines(size, (8, 8), 6, transforms, 3).double()
    with torch.no_grad():
        for parameter in splines.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return splines


@pytest.mark.parametrize("size", [1, 3])
def test_they_begin_as_the_identity(size):
    splines = ConditionalSplines(size, (8,), 6, 2, 3).double()
    w, context = 4 * torch.randn(50, size, dtype=F64), torch.randn(50, 3, dtype=F64)
    z, ladj = splines(w, context)
    assert (z - w).abs().max() < 1e-12
    assert (splines.inverse(w, context) - w).abs().max() < 1e-12
    assert ladj.abs().max() < 1e-12


@pytest.mark.parametrize("size", [1, 3])
def test_inverse_and_jacobian(size):
    splines, context = moved(size), torch.randn(40, 3, dtype=F64)
    z = 2 * torch.randn(40, size, dtype=F64)
    w = splines.inverse(z, context)
    back, ladj = splines(w, context)
    torch.testing.assert_close(back, z)
    jacobian = torch.autograd.functional.jacobian(lambda x: splines(x, context[0])[0], w[0])
    assert not jacobian.triu(1).any()
    torch.testing.assert_close(jacobian.diagonal().log(), ladj[0])
    assert (w - z).abs().max() > 0.1
    assert (splines(w, context.roll(1, 0))[0] - z).abs().max() > 0.1


def test_tails_are_the_identity():
    w, context = torch.tensor([[-40.0], [-5.5], [5.5], [1e3]], dtype=F64), torch.randn(4, 3, dtype=F64)
    z, ladj = moved(1)(w, context)
    assert torch.equal(z, w)
    assert not ladj.any()


def test_a_warp_expands_and_its_score_is_frozen():
    splines, context = moved(2), torch.randn(4, 3, dtype=F64, requires_grad=True)
    warp = Warp.of(splines, context, context.detach()).expand(torch.Size((5, 4)))
    w = warp.noise(torch.randn(5, 4, 2, dtype=F64)).detach()
    free, held = warp.normal(w), warp.scored(w)
    torch.testing.assert_close(free[0], held[0])
    torch.testing.assert_close(free[1], held[1])
    assert free[1].requires_grad
    assert not held[1].requires_grad


def test_a_warp_remembers_which_parameters_were_frozen():
    splines, context = moved(2), torch.randn(4, 3, dtype=F64)
    free = Warp.of(splines, context, context)
    splines.requires_grad_(False)
    held = Warp.of(splines, context, context)
    splines.requires_grad_(True)
    w = torch.randn(4, 2, dtype=F64)
    assert free.normal(w)[1].requires_grad
    assert not held.normal(w)[1].requires_grad


def test_torchs_validation_stays_as_it_was():
    for status in (True, False):
        Distribution.set_default_validate_args(status)
        layer = spline_layer(1, (8,), 4)
        assert Distribution._validate_args == status
    Distribution.set_default_validate_args(True)
    w = torch.randn(3, 1)
    torch.testing.assert_close(univariate(layer, w)(w), w)
