"""The linearly implicit method on stiff systems, alone and as the mean of a step."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import stochdyn as sd
from stochdyn.solvers.rosenbrock import derivatives
from tests.orders import F64, slope


def van_der_pol(t, z):
    x, v = z[..., 0], z[..., 1]
    return torch.stack([v, 1000 * ((1 - x.square()) * v) - x], -1)


def test_van_der_pol_against_scipy():
    """On the slow branch, where an explicit step of the same length explodes."""
    ts = torch.linspace(0, 100, 401, dtype=F64)
    z = sd.odeint(van_der_pol, torch.tensor([2.0, 0.0], dtype=F64), ts, solver=sd.Rosenbrock())
    wanted = solve_ivp(
        lambda t, y: [y[1], 1000 * ((1 - y[0] ** 2) * y[1]) - y[0]],
        (0, 100), [2.0, 0.0], "Radau", rtol=1e-10, atol=1e-12,
    )  # fmt: skip
    assert wanted.success
    assert abs(z[-1, 0].item() - wanted.y[0, -1]) < 1e-5
    with pytest.raises(sd.DivergedError, match=r"series 0, time 0\.\d+ \(step \d+\): the path is not finite"):
        sd.odeint(van_der_pol, torch.tensor([2.0, 0.0], dtype=F64), ts, solver=sd.RungeKutta4())


def test_order_stays_for_a_stiff_linear_field_with_time():
    """z' = -1000 (z - cos t): the exact solution after the layer is near cos t; no step may follow the layer."""
    lam, t = 1000.0, np.pi / 3
    exact = (lam**2 * np.cos(t) + lam * np.sin(t)) / (lam**2 + 1)
    z0 = torch.tensor([lam**2 / (lam**2 + 1)], dtype=F64)

    def error(solver, steps):
        ts = torch.linspace(0, t, steps + 1, dtype=F64)
        return abs(sd.odeint(lambda t, z: -lam * (z - t.cos()), z0, ts, solver=solver)[-1, 0].item() - exact)

    errors = [error(sd.Rosenbrock(), n) for n in (10, 20, 40, 80)]
    assert slope(errors) > 1.8  # a little better than 2 at these steps, where the layer still counts
    assert error(sd.Heun(), 10) > 1e6


def test_derivatives_are_those_of_autograd():
    A = torch.randn(3, 3, dtype=F64, generator=torch.manual_seed(0))

    def field(t, z):
        return (A @ z.sin()[..., None])[..., 0] * (1 + t.square())

    t, z = torch.tensor([[0.7]], dtype=F64), torch.randn(4, 3, dtype=F64)
    f, J, f_t = derivatives(field, t, z)
    assert (f - field(t, z)).abs().max() < 1e-14
    expected = torch.stack([torch.autograd.functional.jacobian(lambda x: field(t[0], x), row) for row in z])
    assert (J - expected).abs().max() < 1e-13
    assert (f_t - 2 * 0.7 / (1 + 0.49) * f).abs().max() < 1e-13


def test_as_a_mean_it_makes_a_stiff_path_stable():
    rate, ts = torch.tensor(500.0, dtype=F64, requires_grad=True), torch.linspace(0, 1, 21, dtype=F64)

    def path(solver):
        return sd.SDEPath(
            lambda t, z: -rate * (z - 1), torch.tensor([1.0], dtype=F64), torch.zeros(50, 1, dtype=F64), ts,
            solver=solver,
        )  # fmt: skip

    torch.manual_seed(0)
    z = path(sd.GaussianStep(mean=sd.Rosenbrock())).rsample()
    assert (z[:, -1] - 1).abs().max() < 2
    z.sum().backward()
    assert torch.isfinite(rate.grad)
    wild = path(sd.EulerMaruyama()).rsample()
    assert wild.abs().max() > 1e6
