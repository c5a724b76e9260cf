"""A better mean: its strong order, and the order of the mean where the noise is tiny."""

import pytest
import torch

import stochdyn as sd
from tests.orders import F64, gbm, ou, slope, strong_errors


def test_strong_orders():
    solver = sd.GaussianStep(mean=sd.Heun())
    noisy = strong_errors(solver, lambda t, z: 0.3 * z, lambda t, z: 0.5 * z, gbm, paths=2000)
    assert abs(slope(noisy) - 0.5) < 0.15
    additive = strong_errors(solver, lambda t, z: -1.5 * z, torch.tensor([0.8], dtype=F64), ou)
    assert abs(slope(additive) - 1.0) < 0.15
    wrong = strong_errors(solver, lambda t, z: -1.5 * z, torch.tensor([0.85], dtype=F64), ou)
    assert not abs(slope(wrong) - 1.0) < 0.15


@pytest.mark.parametrize(
    ("mean", "order"), [(sd.Heun(), 2), (sd.RungeKutta4(), 4), (sd.Rosenbrock(), 2), (sd.Verlet(), 2)]
)
def test_without_noise_it_is_its_mean(mean, order):
    def field(t, z):
        return torch.stack([z[..., 1], -z[..., 0].sin()], -1)

    z0 = torch.tensor([1.0, 0.3], dtype=F64)
    exact = sd.odeint(field, z0, torch.tensor([0.0, 1.0], dtype=F64), solver=sd.Dopri8(1e-12, 1e-14))[-1]
    noise = torch.zeros(1, dtype=F64)
    grids = [torch.linspace(0, 1, 2**k + 1, dtype=F64) for k in range(2, 7)]
    paths = [sd.sdeint(field, noise, z0, ts, solver=sd.GaussianStep(mean=mean)) for ts in grids]
    assert abs(slope([(z[-1] - exact).abs().max() for z in paths]) - order) < 0.2
    euler = [sd.sdeint(field, noise, z0, ts) for ts in grids]
    assert abs(slope([(z[-1] - exact).abs().max() for z in euler]) - 1) < 0.2
