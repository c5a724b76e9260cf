"""Adaptive methods: their tables, their orders, their tolerance."""

import itertools

import torch
import torchdiffeq

import stochdyn as sd
from stochdyn.solvers.backends import torchdiffeq as backend
from tests.orders import F64


def tableau():
    c = torch.tensor((0.0, *backend.TSIT5_NODES), dtype=F64)
    A = torch.zeros(7, 7, dtype=F64)
    for i, row in enumerate(backend.TSIT5_STAGES, 1):
        A[i, : len(row)] = torch.tensor(row, dtype=F64)
    return A, torch.tensor(backend.TSIT5_WEIGHTS, dtype=F64), c


def conditions(A, b, c):
    """The seventeen conditions of order 5, as (got, wanted)."""
    Ac, Ac2, one = A @ c, A @ c**2, torch.ones_like(c)
    trees = [
        (one, 1), (c, 2), (c**2, 3), (Ac, 6), (c**3, 4), (c * Ac, 8), (Ac2, 12), (A @ Ac, 24),
        (c**4, 5), (c**2 * Ac, 10), (c * Ac2, 15), (c * (A @ Ac), 30), (Ac**2, 20), (A @ c**3, 20), (A @ (c * Ac), 40),
        (A @ Ac2, 60), (A @ A @ Ac, 120),
    ]  # fmt: skip
    return [(b @ tree, 1 / n) for tree, n in trees]


def test_tsitouras_table_is_of_order_five_and_its_middle_of_order_four():
    A, b, c = tableau()
    assert (A.sum(1) - c).abs().max() < 1e-14
    assert max(abs(got - wanted) for got, wanted in conditions(A, b, c)) < 1e-13
    middle = torch.tensor(backend.TSIT5_MIDDLE, dtype=F64)
    powers = (1, 2, 3, 3, 4, 4, 4, 4)
    found = [(got, wanted / 2**p) for (got, wanted), p in zip(conditions(A, middle, c), powers, strict=False)]
    assert max(abs(got - wanted) for got, wanted in found) < 1e-12
    error = torch.tensor(backend.TSIT5_ERROR, dtype=F64)
    four = list(itertools.islice(conditions(A, b - error, c), 8))
    assert max(abs(got - wanted) for got, wanted in four) < 1e-13
    five = conditions(A, b - error, c)[8:]
    assert max(abs(got - wanted) for got, wanted in five) > 1e-5


def test_errors_follow_the_tolerance():
    """The error of a method with error control shrinks like its tolerance; the control is a looser one."""
    z0, ts = torch.tensor([0.5], dtype=F64), torch.tensor([0.0, 2.0], dtype=F64)

    def field(t, z):
        return z * (t.cos() - z)

    exact = sd.odeint(field, z0, ts, solver=sd.Dopri8(1e-13, 1e-14))[-1]
    for method in (sd.Dopri5, sd.Tsit5, sd.Dopri8):
        errors = [
            (sd.odeint(field, z0, ts, solver=method(10.0**-k, 10.0**-k))[-1] - exact).abs().max()
            for k in (4, 7, 10)
        ]
        assert all(e < 10 * 10.0**-k for e, k in zip(errors, (4, 7, 10), strict=True))
        assert errors[0] > 10 * errors[2]


def test_times_between_steps_are_not_interpolated():
    """The library's interpolation is of order 4, whatever the method's own: it limits a tight tolerance."""
    z0, ts = torch.tensor([1.0, 0.0], dtype=F64), torch.linspace(0, 6, 4, dtype=F64)

    def field(t, z):
        return torch.stack([z[..., 1], -z[..., 0]], -1)

    exact = torch.stack([ts.cos(), -ts.sin()], -1)
    ours = sd.odeint(field, z0, ts, solver=sd.Dopri8(1e-10, 1e-11))
    library = torchdiffeq.odeint(field, z0, ts, method="dopri8", rtol=1e-10, atol=1e-11)
    assert (ours - exact).abs().max() < 1e-8
    assert (library - exact).abs().max() > 10 * (ours - exact).abs().max()
