"""Explicit one-step methods: orders with a control, exactness on polynomials, pieces."""

import pytest
import torch

import stochdyn as sd
from tests.orders import F64, slope


def bernoulli():
    """z' = z (cos t - z) from .5 at the quarters of [0, 2], by quadrature."""
    s = torch.linspace(0, 2, 400001, dtype=F64)
    integral = torch.cumulative_trapezoid(s.sin().exp(), s)[99999::100000]
    return s[100000::100000].sin().exp() / (2 + integral)


METHODS = [
    (sd.Euler(), 1), (sd.Heun(), 2), (sd.Midpoint(), 2), (sd.RungeKutta4(), 4), (sd.RungeKutta4(2), 4),
    (sd.Heun(3), 2), (sd.Rosenbrock(), 2),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "order"), METHODS, ids=lambda x: repr(x))
def test_order(solver, order):
    """Time in the field; levels where the asymptotic regime has begun and rounding has not."""
    levels = {1: range(3, 9), 2: range(3, 9), 4: range(2, 7)}[order]

    def errors(field):
        out = []
        for k in levels:
            ts = torch.linspace(0, 2, 2 ** (k + 1) + 1, dtype=F64)
            z = sd.odeint(field, torch.tensor([0.5], dtype=F64), ts, solver=solver)[:, 0]
            quarters = z[2 ** (k - 1) :: 2 ** (k - 1)]
            out.append((quarters - bernoulli()).square().mean().sqrt())
        return out

    assert abs(slope(errors(lambda t, z: z * (t.cos() - z))) - order) < 0.2
    assert not abs(slope(errors(lambda t, z: z * ((t + 1e-2).cos() - z))) - order) < 0.2


@pytest.mark.parametrize("solver", [sd.Euler(4), sd.Heun(4), sd.Midpoint(4), sd.RungeKutta4(4), sd.Verlet(4)])
def test_pieces_are_steps_of_a_finer_grid(solver):
    def field(t, z):
        return torch.stack([z[..., 1], -z[..., 0].sin() + t[..., 0]], -1)

    z0 = torch.tensor([1.0, 0.3], dtype=F64)
    coarse = sd.odeint(field, z0, torch.linspace(0, 1, 3, dtype=F64), solver=solver)
    fine = sd.odeint(field, z0, torch.linspace(0, 1, 9, dtype=F64), solver=type(solver)())
    assert (coarse - fine[::4]).abs().max() < 1e-14
    assert (coarse - fine[::4].flip(0)).abs().max() > 0.1


def test_pieces_are_checked():
    for bad in (0, -1, 1.5, True):
        with pytest.raises(sd.TimeError, match=r"`substeps` must be an integer of at least 1"):
            sd.Heun(substeps=bad)
