"""Euler-Maruyama and its tamed form: strong and weak orders, and a drift that Euler cannot take."""

import math

import pytest
import torch

import stochdyn as sd
from tests.orders import F64, gbm, increments, ou, slope, strong_errors, weak_errors


def linear_moment(f=(0.7, -0.9), g=(0.3, 0.4)):
    """E z^2 at time 1 from 1 of dz = (f0 + f1 z) dt + (g0 + g1 z) dW, Itô."""
    A = torch.tensor(
        [[0, 0, 0], [f[0], f[1], 0], [g[0] ** 2, 2 * f[0] + 2 * g[0] * g[1], 2 * f[1] + g[1] ** 2]], dtype=F64
    )
    return (torch.linalg.matrix_exp(A) @ torch.ones(3, dtype=F64))[2]


def drift(t, z):
    return 0.7 - 0.9 * z


def spread(t, z):
    return 0.3 + 0.4 * z


@pytest.mark.parametrize("solver", [sd.EulerMaruyama(), sd.TamedEuler()], ids=["euler", "tamed"])
def test_strong_orders(solver):
    noisy = strong_errors(solver, lambda t, z: 0.3 * z, lambda t, z: 0.5 * z, gbm, paths=2000)
    assert abs(slope(noisy) - 0.5) < 0.15
    stratonovich = strong_errors(solver, lambda t, z: 0.175 * z, lambda t, z: 0.5 * z, gbm, paths=2000)
    assert not abs(slope(stratonovich) - 0.5) < 0.15
    additive = strong_errors(solver, lambda t, z: -1.5 * z, torch.tensor([0.8], dtype=F64), ou)
    assert abs(slope(additive) - 1.0) < 0.15


@pytest.mark.parametrize(
    "solver", [sd.EulerMaruyama(), sd.GaussianStep(), sd.Milstein()], ids=["euler", "heun mean", "milstein"]
)
def test_weak_order_one(solver):
    wanted = linear_moment()
    assert abs(slope(weak_errors(solver, drift, spread, wanted)) - 1) < 0.2
    other = linear_moment(f=(0.7 + 0.06, -0.9 + 0.08))
    assert not abs(slope(weak_errors(solver, drift, spread, other)) - 1) < 0.2


def test_weak_order_of_the_tamed_step_with_a_cubic_drift():
    def cubic(t, z):
        return -(z**3)

    sigma, settings = torch.tensor([0.5], dtype=F64), {"nodes": 40, "width": 3.0}
    solver = sd.GaussianStep(mean=sd.RungeKutta4())
    coarse, fine = weak_errors(solver, cubic, sigma, 0.0, levels=[10, 11], **settings)
    fine = 2 * fine - coarse
    errors = weak_errors(sd.TamedEuler(), cubic, sigma, fine, **settings)
    assert abs(slope(errors) - 1) < 0.2
    wrong = weak_errors(sd.TamedEuler(), lambda t, z: cubic(t, z) + 0.01, sigma, fine, **settings)
    assert not abs(slope(wrong) - 1) < 0.2


def test_strong_order_of_the_tamed_step_where_euler_explodes():
    """dz = -z^5 dt + .5 dW from 4: an explicit step of 1/8 multiplies the state by more than thirty."""
    levels, paths = range(3, 9), 500

    def run(solver, level):
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        z0 = torch.full((paths, 1), 4.0, dtype=F64)
        noise = increments(level, paths)
        return sd.sdeint(
            lambda t, z: -(z**5), torch.tensor([0.5], dtype=F64), z0, ts, solver=solver, noise=noise
        )

    reference = run(sd.TamedEuler(), 12)[:, -1]
    errors = [(run(sd.TamedEuler(), k)[:, -1] - reference).square().mean().sqrt() for k in levels]
    assert errors[-1] < 0.1 * errors[0]
    with pytest.raises(sd.DivergedError, match=r"series \d+, time 0\.\d+ \(step \d+\).*TamedEuler"):
        run(sd.EulerMaruyama(), 3)


def test_stationary_law_of_the_double_well():
    """E z^2 of dz = (z - z^3) dt + .7 dW is .8322329813; Euler's would do too at this step, so the start is far."""
    torch.manual_seed(0)
    ts, z0 = torch.linspace(0, 20, 1001, dtype=F64), torch.linspace(-6, 6, 4000, dtype=F64)[:, None]
    z = sd.sdeint(lambda t, z: z - z**3, torch.tensor([0.7], dtype=F64), z0, ts, solver=sd.TamedEuler())
    square = z[:, 500::100, 0].square().mean(1)
    error = square.std() / math.sqrt(len(square))
    assert abs(square.mean() - 0.8322329813) < 4 * error + 0.01
    assert abs(square.mean() - 0.8934649696) > 4 * error + 0.01  # that of a diffusion of 1


@pytest.mark.parametrize("solver", [sd.EulerMaruyama(), sd.TamedEuler()], ids=["euler", "tamed"])
def test_parameters_may_have_more_dimensions_than_the_state(solver):
    theta = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    z, t, dt = torch.ones(2, dtype=F64), torch.tensor(0.0, dtype=F64), torch.tensor(0.1, dtype=F64)

    def step(rate):
        return solver.transition(lambda t, z: -rate * z[..., :1], torch.ones(2, dtype=F64), t, dt, z).mean

    batch = step(theta[:, None])
    assert batch.shape == (3, 2)
    for row, rate in zip(batch, theta, strict=True):
        assert torch.equal(row, step(rate.expand(1)))
