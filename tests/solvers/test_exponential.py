"""Exponential Euler: exact in law for linear equations, stable for stiff ones, orders for the rest."""

import math

import pytest
import torch

import stochdyn as sd
from tests.orders import F64, gbm, ou, slope, strong_errors, weak_errors
from tests.solvers.test_euler_maruyama import drift, linear_moment, spread


def test_one_step_is_the_exact_law_of_ou():
    rate, mu, sigma, gap = torch.tensor([-1.5], dtype=F64), 0.5, 0.8, torch.tensor([0.7], dtype=F64)
    step = sd.ExponentialEuler(rate).transition(
        lambda t, z: rate * (z - mu), torch.tensor([sigma], dtype=F64), torch.zeros(1, dtype=F64), gap,
        torch.tensor([2.0], dtype=F64),
    )  # fmt: skip
    mean = mu + 1.5 * math.exp(-1.05)
    variance = sigma**2 * (1 - math.exp(-2 * 1.05)) / 3
    assert abs(step.mean.item() - mean) < 1e-14
    assert abs(step.variance.item() - variance) < 1e-14
    euler = sd.EulerMaruyama().transition(
        lambda t, z: rate * (z - mu), torch.tensor([sigma], dtype=F64), torch.zeros(1, dtype=F64), gap,
        torch.tensor([2.0], dtype=F64),
    )  # fmt: skip
    assert abs(euler.variance.item() - variance) > 0.1


def test_one_step_of_a_matrix_is_exact():
    """Underdamped Langevin, its transition over .5 known in closed form, with noise on the velocity and a trace on x."""
    A = torch.tensor([[0.0, 1.0], [-4.0, -1.0]], dtype=F64)
    g = torch.tensor([[1e-9, 0.0], [0.0, 0.7]], dtype=F64)
    z, gap = torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([0.5], dtype=F64)
    step = sd.ExponentialEuler(A, matrix=True).transition(
        lambda t, z: (A @ z[..., None])[..., 0], sd.MatrixDiffusion(g), torch.zeros(1, dtype=F64), gap, z
    )
    F = torch.linalg.matrix_exp(0.5 * A)
    assert (step.mean - F @ z).abs().max() < 1e-13
    stationary = torch.diag(torch.tensor([0.7**2 / 8, 0.7**2 / 2], dtype=F64))
    Q = stationary - F @ stationary @ F.T
    assert (step.covariance_matrix - Q).abs().max() < 1e-9
    assert (step.covariance_matrix - 0.5 * g @ g.T).abs().max() > 1e-2


def test_stiff_path_and_its_gradient():
    rate = torch.tensor([-1e4], dtype=F64, requires_grad=True)
    path = sd.SDEPath(
        lambda t, z: rate * (z - 1), torch.tensor([100.0], dtype=F64), torch.zeros(100, 1, dtype=F64),
        torch.linspace(0, 1, 5, dtype=F64), solver=sd.ExponentialEuler(rate),
    )  # fmt: skip
    torch.manual_seed(0)
    z = path.rsample()
    assert abs(z[:, 1:].std().item() * math.sqrt(2) - 1) < 0.15
    path.log_prob(z.detach()).sum().backward()
    assert torch.isfinite(rate.grad).all()
    assert not sd.SDEPath(
        lambda t, z: -1e4 * (z - 1), torch.tensor([100.0], dtype=F64), torch.zeros(1, dtype=F64),
        torch.linspace(0, 1, 5, dtype=F64),
    ).rsample().abs().max() < 1e6  # fmt: skip


def test_orders_with_a_rest():
    """The linear part given is not the whole drift, so the rest is stepped."""
    solver = sd.ExponentialEuler(torch.tensor([-1.0], dtype=F64))
    noisy = strong_errors(solver, lambda t, z: 0.3 * z, lambda t, z: 0.5 * z, gbm, paths=2000)
    assert abs(slope(noisy) - 0.5) < 0.15
    additive = strong_errors(solver, lambda t, z: -1.5 * z, torch.tensor([0.8], dtype=F64), ou)
    assert abs(slope(additive) - 1) < 0.15
    wrong = strong_errors(solver, lambda t, z: -1.5 * z, torch.tensor([0.85], dtype=F64), ou)
    assert not abs(slope(wrong) - 1) < 0.15
    assert abs(slope(weak_errors(solver, drift, spread, linear_moment())) - 1) < 0.2


def test_padding_does_not_move_and_the_wrong_kind_of_noise_is_refused():
    A = -torch.eye(2, dtype=F64)
    ts = torch.tensor([0.0, 0.5, 0.5], dtype=F64)
    noise = sd.MatrixDiffusion(torch.eye(2, dtype=F64))
    path = sd.SDEPath(
        lambda t, z: -z, noise, torch.ones(2, dtype=F64), ts, solver=sd.ExponentialEuler(A, matrix=True)
    )
    z = path.rsample()
    assert torch.equal(z[1], z[2])
    assert torch.isfinite(path.log_prob(z))
    with pytest.raises(sd.DiffusionError, match=r"matrix `linear` mixes the noises"):
        sd.SDEPath(
            lambda t, z: -z, torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), ts,
            solver=sd.ExponentialEuler(A, matrix=True),
        ).rsample()  # fmt: skip
    with pytest.raises(sd.DiffusionError, match=r"rates of single states need noise of single states"):
        sd.SDEPath(
            lambda t, z: -z, noise, torch.ones(2, dtype=F64), ts,
            solver=sd.ExponentialEuler(-torch.ones(2, dtype=F64)),
        ).rsample()  # fmt: skip
    with pytest.raises(sd.ShapeError, match=r"`linear` must be"):
        sd.ExponentialEuler(torch.ones(2, 3), matrix=True)


def test_the_gradient_by_a_rate_is_finite_where_series_are_padded():
    rate, ts = (
        torch.tensor([-1.0], dtype=F64, requires_grad=True),
        torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=F64),
    )
    path = sd.SDEPath(
        lambda t, z: rate * z,
        torch.tensor([0.3], dtype=F64),
        torch.ones(1, dtype=F64),
        ts,
        solver=sd.ExponentialEuler(rate),
    )
    z = path.rsample()
    for value in (z.sum(), path.log_prob(z.detach())):
        assert torch.autograd.grad(value, rate, retain_graph=True)[0].isfinite().all()
