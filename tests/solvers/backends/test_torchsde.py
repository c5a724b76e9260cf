"""torchsde's steps: strong orders on our grid, and Brownian motions that keep their path."""

import math

import numpy as np
import pytest
import torch

import stochdyn as sd
from tests.orders import F64, slope

MULTIPLICATIVE = (lambda drift: lambda t, z: drift * z, lambda t, z: 0.5 * z)


def errors(solver, drift, diffusion, exact, levels=range(3, 9), paths=200):
    """Along one Brownian motion, asked at the finest level first."""
    motion = sd.BrownianMotion(0.0, 1.0, (paths, 1), seed=3, dtype=F64)
    fine = motion.increments(torch.linspace(0, 1, 2**8 + 1, dtype=F64))
    wanted, out = exact(fine), []
    for level in levels:
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        z = sd.sdeint(drift, diffusion, torch.ones(paths, 1, dtype=F64), ts, solver=solver, noise=motion)
        out.append((z[:, -1] - wanted).square().mean().sqrt())
    return out


def gbm(dW):
    return torch.exp(0.3 - 0.125 + 0.5 * dW.sum(0))


def test_strong_order_of_srk():
    found = errors(sd.SRK(), lambda t, z: 0.3 * z, lambda t, z: 0.5 * z, gbm)
    assert abs(slope(found) - 1.5) < 0.15
    wrong = errors(sd.SRK(), lambda t, z: 0.31 * z, lambda t, z: 0.5 * z, gbm)
    assert not abs(slope(wrong) - 1.5) < 0.15


def test_strong_order_of_reversible_heun():
    """Order 1/2 is guaranteed; a single noise commutes with itself, where it attains 1."""
    found = errors(sd.ReversibleHeun(), lambda t, z: 0.175 * z, lambda t, z: 0.5 * z, gbm)
    assert abs(slope(found) - 1) < 0.15
    ito = errors(sd.ReversibleHeun(), lambda t, z: 0.3 * z, lambda t, z: 0.5 * z, gbm)
    assert not abs(slope(ito) - 1) < 0.15


class Given:
    """In place of a Brownian motion over one step: its increment and integral at the nodes of a quadrature."""

    dtype, device, levy_area_approximation = F64, torch.device("cpu"), "space-time"

    def __init__(self, dt, nodes=12):
        x, w = np.polynomial.hermite_e.hermegauss(nodes)
        first, second = (torch.from_numpy(a).reshape(-1, 1) for a in np.meshgrid(x, x))
        self.weights = torch.from_numpy(np.outer(w, w) / w.sum() ** 2).reshape(-1)
        self.increment = math.sqrt(dt) * first
        self.integral = dt * (self.increment / 2 + math.sqrt(dt / 12) * second)
        self.motion = sd.BrownianMotion(0.0, dt, (nodes**2, 1), dtype=F64)
        self.motion.interval = self

    def __call__(self, start, end, return_U=False, return_A=False):
        return (self.increment, self.integral) if return_U else self.increment


def test_weak_order_of_srk():
    """E z^2 of geometric motion, whose step is a random factor: without Monte Carlo, and slow to reach 3/2."""

    def slope_of(drift):
        found = []
        for level in range(7, 13):
            given = Given(2.0**-level)
            ts, z0 = torch.tensor([0.0, 2.0**-level], dtype=F64), torch.ones(len(given.weights), 1, dtype=F64)
            z = sd.sdeint(
                lambda t, z: drift * z, lambda t, z: 0.5 * z, z0, ts, solver=sd.SRK(), noise=given.motion
            )
            second = (given.weights * z[:, -1, 0].square()).sum()
            found.append((second ** (2**level) - math.exp(2 * 0.3 + 0.25)).abs())
        return slope(found)

    assert abs(slope_of(0.3) - 1.5) < 0.2
    assert not abs(slope_of(0.31) - 1.5) < 0.2


def test_weak_order_of_reversible_heun():
    """E z^2 of geometric motion less that of the exact solution along the same motion."""

    def slope_of(ito):
        found, paths = [], 4000
        for level in range(3, 8):
            motion = sd.BrownianMotion(0.0, 1.0, (paths, 1), dtype=F64, seed=3)
            ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
            options = {"solver": sd.ReversibleHeun(), "noise": motion}
            z0 = torch.ones(paths, 1, dtype=F64)
            z = sd.sdeint(lambda t, z: 0.175 * z, lambda t, z: 0.5 * z, z0, ts, **options)[:, -1, 0]
            exact = (0.175 - 0.125 * ito + 0.5 * motion.increments(ts).sum(0)[:, 0]).exp()
            found.append((z.square() - exact.square()).mean().abs())
        return slope(found)

    assert abs(slope_of(False) - 1) < 0.2
    assert not abs(slope_of(True) - 1) < 0.2


def test_a_motion_keeps_its_path_and_its_law():
    motion = sd.BrownianMotion(0.0, 2.0, (4000, 1), seed=0, dtype=F64)
    coarse = motion.increments(torch.tensor([0.0, 1.0, 2.0], dtype=F64))
    fine = motion.increments(torch.linspace(0, 2, 9, dtype=F64))
    assert (fine.reshape(2, 4, 4000, 1).sum(1) - coarse).abs().max() < 1e-12
    assert (fine.std(1).square() / 0.25 - 1).abs().max() < 5 * (2 / 4000) ** 0.5
    assert torch.equal(coarse, motion.increments(torch.tensor([0.0, 1.0, 2.0], dtype=F64)))


def test_bad_motions_are_refused():
    with pytest.raises(sd.TimeError, match=r"needs t0 < t1"):
        sd.BrownianMotion(1.0, 1.0, (2, 1))
    with pytest.raises(sd.ShapeError, match=r"sizes >= 1"):
        sd.BrownianMotion(0.0, 1.0, ())
