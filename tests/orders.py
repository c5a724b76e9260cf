"""Orders of convergence: strong ones along given noise, weak ones by quadrature, without Monte Carlo."""

import math
from functools import cache

import numpy as np
import torch

import stochdyn as sd
from stochdyn.fields import as_diffusion

F64 = torch.float64
LEVELS = range(3, 9)
FINEST = 12


def slope(errors):
    """Least-squares order over halvings of the step."""
    x = torch.arange(len(errors), dtype=F64)
    y = -torch.log2(torch.stack([torch.as_tensor(e) for e in errors]).double())
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@cache
def finest_increments(paths, noises):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2**FINEST, paths, noises, dtype=F64, generator=generator) / 2 ** (FINEST / 2)


def increments(level, paths, noises=1):
    """Increments of 2^level steps on [0, 1] that belong to the same motions at every level."""
    return finest_increments(paths, noises).reshape(2**level, -1, paths, noises).sum(1)


def strong_errors(solver, drift, diffusion, exact, *, paths=1000, noises=1, levels=LEVELS):
    """Root mean square distance at time 1 to `exact`, made of the finest increments, from z = 1."""
    errors, wanted = [], exact(finest_increments(paths, noises))
    for level in levels:
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        z0 = torch.ones(paths, wanted.shape[-1], dtype=F64)
        z = sd.sdeint(drift, diffusion, z0, ts, solver=solver, noise=increments(level, paths, noises))
        errors.append((z[:, -1] - wanted).square().mean().sqrt())
    return errors


def gbm(dW, drift=0.3, sigma=0.5):
    """The exact solution of dz = drift z dt + sigma z dW at time 1 from 1."""
    return torch.exp(drift - 0.5 * sigma**2 + sigma * dW.sum(0))


def ou(dW, rate=1.5, sigma=0.8):
    """dz = -rate z dt + sigma dW at time 1 from 1, up to the finest increments: noise enters in their middle."""
    s = (torch.arange(len(dW), dtype=F64) + 0.5) / len(dW)
    return math.exp(-rate) + sigma * (torch.exp(-rate * (1 - s))[:, None, None] * dW).sum(0)


def weak_errors(solver, drift, diffusion, wanted, *, levels=LEVELS, nodes=3, width=1.0):
    """|E z_1^2 - wanted| from z = 1, by the backward equation u(z) = E u(z').

    u is kept at Chebyshev nodes around 0 within `width`: exact for steps that are linear in z, where u is a parabola.
    """
    x = torch.from_numpy(width * np.cos((2 * np.arange(nodes) + 1) * np.pi / (2 * nodes)))
    roots, weights = np.polynomial.hermite_e.hermegauss(11)
    roots, weights = torch.from_numpy(roots), torch.from_numpy(weights / weights.sum())
    noise, errors = as_diffusion(diffusion), []
    for level in levels:
        dt = torch.tensor([[2.0**-level]], dtype=F64)
        z = x.repeat_interleave(len(roots))[:, None]
        dW = roots.repeat(nodes)[:, None] * dt.sqrt()
        after = solver.along(drift, noise, torch.zeros(1, 1, dtype=F64), dt, z, dW)[:, 0]
        u = x.square()
        step = _interpolation(after, x, width).reshape(nodes, len(roots), nodes).mul(weights[:, None]).sum(1)
        for _ in range(2**level):
            u = step @ u
        errors.append((_interpolation(torch.ones(1, dtype=F64), x, width)[0] @ u - wanted).abs())
    return errors


def _interpolation(at, x, width):
    """Matrix from values at Chebyshev nodes to values of the polynomial through them."""
    basis = np.polynomial.chebyshev.chebvander(x.numpy() / width, len(x) - 1)
    return torch.from_numpy(
        np.polynomial.chebyshev.chebvander(at.numpy() / width, len(x) - 1) @ np.linalg.inv(basis)
    )
