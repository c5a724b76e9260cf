"""The leapfrog: order, bounded energy, reversibility; each with what must fail."""

import pytest
import torch

import stochdyn as sd
from tests.orders import F64, slope


def pendulum(t, z):
    return torch.stack([z[..., 1], -z[..., 0].sin()], -1)


def energy(z):
    return 0.5 * z[..., 1].square() - z[..., 0].cos()


START = torch.tensor([2.0, 0.0], dtype=F64)


def test_order_two_without_friction_and_one_with():
    def order(field):
        exact = sd.odeint(field, START, torch.tensor([0.0, 1.0], dtype=F64), solver=sd.Dopri8(1e-12, 1e-13))[
            -1
        ]
        grids = [torch.linspace(0, 1, 2**k + 1, dtype=F64) for k in range(3, 9)]
        return slope(
            [(sd.odeint(field, START, ts, solver=sd.Verlet())[-1] - exact).abs().max() for ts in grids]
        )

    def friction(t, z):
        return pendulum(t, z) - torch.stack([torch.zeros_like(z[..., 1]), 0.5 * z[..., 1]], -1)

    assert abs(order(pendulum) - 2) < 0.2
    assert abs(order(friction) - 1) < 0.2


def test_energy_stays_bounded_for_a_thousand_periods():
    """The period from amplitude 2 is 8.3497529269; 200 steps in each, as published bounds are stated."""
    period, steps = 8.3497529269, 200
    ts = torch.arange(1000 * steps + 1, dtype=F64) * (period / steps)
    with torch.no_grad():
        leap = energy(sd.odeint(pendulum, START, ts[: 100 * steps + 1], solver=sd.Verlet()))
        euler = energy(sd.odeint(pendulum, START, ts[: 20 * steps + 1], solver=sd.Heun()))
    change = (leap / leap[0] - 1).abs()
    assert change.max() < 2.2e-3
    by_period = leap[:-1].reshape(100, steps).mean(1)
    assert (by_period - by_period[0]).abs().max() < 1e-8
    drift = euler[:-1].reshape(20, steps).mean(1)
    assert (drift - drift[0]).abs().max() > 1e-5


def test_back_and_forth_is_where_it_began():
    there = sd.odeint(pendulum, START, torch.linspace(0, 3, 31, dtype=F64), solver=sd.Verlet())[-1]
    turned = there * torch.tensor([1.0, -1.0], dtype=F64)
    back = sd.odeint(pendulum, turned, torch.linspace(0, 3, 31, dtype=F64), solver=sd.Verlet())[-1]
    assert (back * torch.tensor([1.0, -1.0], dtype=F64) - START).abs().max() < 1e-13
    heun = sd.odeint(pendulum, START, torch.linspace(0, 3, 31, dtype=F64), solver=sd.Heun())[-1]
    turned = heun * torch.tensor([1.0, -1.0], dtype=F64)
    back = sd.odeint(pendulum, turned, torch.linspace(0, 3, 31, dtype=F64), solver=sd.Heun())[-1]
    assert (back * torch.tensor([1.0, -1.0], dtype=F64) - START).abs().max() > 1e-6


def test_a_state_of_two_halves_is_asked_for():
    with pytest.raises(sd.ShapeError, match=r"two halves of one size, got 3 entries"):
        sd.odeint(lambda t, z: z, torch.ones(3), torch.linspace(0, 1, 3), solver=sd.Verlet())
