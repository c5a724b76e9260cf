"""Stratonovich steps: orders, the convention, and the drift that changes it."""

import pytest
import torch

import stochdyn as sd
from tests.orders import F64, gbm, increments, ou, slope, strong_errors, weak_errors
from tests.solvers.test_euler_maruyama import drift, linear_moment, spread

SOLVERS = [sd.StratonovichHeun(), sd.StratonovichMidpoint()]


@pytest.mark.parametrize("solver", SOLVERS)
def test_strong_orders(solver):
    """The Stratonovich drift of the same geometric motion is lower by sigma^2 / 2."""
    errors = strong_errors(solver, lambda t, z: 0.175 * z, lambda t, z: 0.5 * z, gbm)
    assert abs(slope(errors) - 1) < 0.15
    ito = strong_errors(solver, lambda t, z: 0.3 * z, lambda t, z: 0.5 * z, gbm)
    assert not abs(slope(ito) - 1) < 0.15
    additive = strong_errors(solver, lambda t, z: -1.5 * z, torch.tensor([0.8], dtype=F64), ou)
    assert abs(slope(additive) - 1) < 0.15


@pytest.mark.parametrize("solver", SOLVERS)
def test_weak_order_one(solver):
    wanted = linear_moment(f=(0.7 + 0.06, -0.9 + 0.08))
    assert abs(slope(weak_errors(solver, drift, spread, wanted)) - 1) < 0.2
    assert not abs(slope(weak_errors(solver, drift, spread, linear_moment())) - 1) < 0.2


def rotating(t, z):
    """Two noises that do not commute."""
    x, y = z[..., :1], z[..., 1:]
    one = torch.ones_like(x)
    return torch.stack([torch.cat([0.4 * one, 0.3 * x], -1), torch.cat([0.5 * y, 0.4 * one], -1)], -1)


@pytest.mark.parametrize("diffusion", [sd.MatrixDiffusion(rotating), lambda t, z: 0.3 + 0.2 * z.square()])
def test_the_ito_drift_gives_the_same_path(diffusion):
    """Euler along the Itô drift goes where Heun goes along the Stratonovich drift, as the step shrinks."""
    paths, f = 400, lambda t, z: -z

    def distance(level, rate):
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        z0, noise = torch.ones(paths, 2, dtype=F64), increments(level, paths, 2)
        euler = sd.sdeint(rate, diffusion, z0, ts, noise=noise)[:, -1]
        heun = sd.sdeint(f, diffusion, z0, ts, noise=noise, solver=sd.StratonovichHeun())[:, -1]
        return (euler - heun).square().mean().sqrt()

    ito = [distance(k, sd.ito_drift(f, diffusion)) for k in (5, 9)]
    assert ito[1] < 0.35 * ito[0]
    plain = [distance(k, f) for k in (5, 9)]
    assert plain[1] > 0.5 * plain[0]


def test_the_ito_drift_of_constant_noise_is_the_drift():
    z = torch.randn(3, 2)
    assert torch.equal(sd.ito_drift(lambda t, z: -z, torch.tensor([0.3, 0.1]))(torch.zeros(1), z), -z)
