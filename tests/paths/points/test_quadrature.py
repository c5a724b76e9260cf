import math

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.points.quadrature import integrate


def col(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def test_smooth_and_rough_integrands_to_the_tolerance():
    a, b = col(0.0, 1.0, 2.0), col(1.0, 2.0, 2.0)
    assert torch.allclose(integrate(lambda row, t: t.exp(), a, b), b.exp() - a.exp(), atol=1e-13)
    a, b = col(0.0, 0.0), col(1.0, 30.0)
    oscillates = integrate(lambda row, t: 1 + torch.sin(20 * t), a, b)
    assert torch.allclose(oscillates, b - (torch.cos(20 * b) - 1) / 20, atol=1e-8)
    kink = integrate(lambda row, t: (t - 1 / 3).abs(), col(0.0), col(1.0))
    assert float(kink) == pytest.approx(1 / 18 + 2 / 9, abs=1e-8)


def test_rows_are_those_of_their_interval():
    level = col(1.0, 10.0, 100.0)
    found = integrate(lambda row, t: level[row] * (1 + torch.sin(9 * t)), col(0, 0, 0), col(3, 3, 3))
    assert torch.allclose(found / found[0], level, rtol=1e-8)
    parts = integrate(lambda row, t: level[row] * (1 + torch.sin(9 * t)), col(0, 0, 0), col(3, 3, 3), chunk=1)
    assert torch.allclose(found, parts, rtol=1e-12)


def test_a_batch_and_its_gradient():
    rate = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    a, b = torch.zeros(1, 2).double(), torch.full((1, 2), 2.0).double()
    found = integrate(lambda row, t: (-rate * t).exp(), a, b)
    assert torch.allclose(found, (1 - (-2 * rate).exp()) / rate, atol=1e-12)
    (grad,) = torch.autograd.grad(found.sum(), rate)
    expected = (2 * rate * (-2 * rate).exp() - 1 + (-2 * rate).exp()) / rate**2
    assert torch.allclose(grad, expected, atol=1e-9)


def test_a_fixed_rule_would_miss_what_halving_finds():
    def narrow(row, t):
        return torch.exp(-0.5 * ((t - 7.3) / 0.05) ** 2) + 0.1

    expected = 0.05 * math.sqrt(2 * math.pi) + 1.0
    found = integrate(narrow, col(0.0), col(10.0))
    assert float(found) == pytest.approx(expected, abs=1e-8)
    loose = integrate(narrow, col(0.0), col(10.0), tolerance=10.0)
    assert abs(float(loose) - expected) > 1e-3


def test_narrow_mass_after_the_start_and_in_the_middle():
    for width in (1e-1, 1e-2, 1e-3):
        found = integrate(lambda row, t, w=width: 0.1 + 0.5 / w * (-t / w).exp(), col(0.0), col(99.0))
        assert float(found) == pytest.approx(9.9 + 0.5, abs=1e-8)

    def pulse(row, t):
        return 0.01 + 50 * torch.exp(-0.5 * (t - 430) ** 2)

    found = integrate(pulse, col(0.0), col(1000.0))
    assert float(found) == pytest.approx(10 + 50 * math.sqrt(2 * math.pi), abs=1e-6)


def test_what_cannot_be_integrated_is_named():
    with pytest.raises(sd.FieldError, match="before jump 1 is not known to 1e-09.*near time 1.5"):
        integrate(lambda row, t: (t - 1.5).abs().clamp_min(1e-12) ** -0.9, col(0.0, 1.0), col(1.0, 2.0))
    with pytest.raises(sd.FieldError, match="series 0: the intensity is -"):
        integrate(lambda row, t: torch.sin(t), col(0.0), col(6.0))
    with pytest.raises(sd.FieldError, match="the intensity is nan"):
        integrate(lambda row, t: t * float("nan"), col(0.0), col(6.0))


def test_single_precision_ends():
    a, b = torch.zeros(1, 1), torch.full((1, 1), 3.0)
    found = integrate(lambda row, t: 1 + torch.sin(9 * t), a, b)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(3 - (math.cos(27) - 1) / 9, abs=1e-5)
