"""Kernels: strong orders, the order of their mean, their transition densities; each order with a control."""

import math
from dataclasses import dataclass
from functools import cache

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.solvers import AbstractKernel

F64 = torch.float64
LEVELS = range(3, 8)


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def slope(errors):
    """Least-squares order over halvings of the step."""
    x = torch.arange(len(errors), dtype=F64)
    y = -torch.log2(torch.stack([torch.as_tensor(e) for e in errors]).double())
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@cache
def finest_noise(paths):
    return torch.randn(2**12, paths, 1, dtype=F64, generator=torch.manual_seed(0))


def brownian(level, paths):
    """Noise of 2^level steps on [0, 1] that belongs to the same motions at every level, and the finest."""
    finest = finest_noise(paths)
    eps = finest.reshape(2**level, -1, paths, 1)
    return eps.sum(1) / math.sqrt(eps.shape[1]), finest


def strong_errors(drift, diffusion, exact, solver=sd.EulerMaruyama(), paths=1000):  # noqa: B008
    errors = []
    for level in LEVELS:
        eps, finest = brownian(level, paths)
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        path = sd.SDEPath(drift, diffusion, torch.ones(paths, 1, dtype=F64), ts, solver=solver)
        z = path.guided().transport(torch.cat([eps[:1], eps]))[:, -1]
        errors.append((z - exact(finest / 64)).square().mean().sqrt())
    return errors


def test_strong_order_of_euler_maruyama_with_multiplicative_noise():
    def gbm(dW):
        return torch.exp(0.5 - 0.125 + 0.5 * dW.sum(0))

    errors = strong_errors(lambda t, z: 0.5 * z, lambda t, z: 0.5 * z, gbm)
    assert abs(slope(errors) - 0.5) < 0.15
    stratonovich = strong_errors(lambda t, z: 0.375 * z, lambda t, z: 0.5 * z, gbm)
    assert not abs(slope(stratonovich) - 0.5) < 0.15


@pytest.mark.parametrize(
    "solver", [sd.EulerMaruyama(), sd.GaussianStep(mean=sd.Heun())], ids=["euler", "heun"]
)
def test_strong_order_with_additive_noise(solver):
    def ou(dW):
        """Exact up to the finest increments: the noise enters in the middle of each."""
        s = (torch.arange(2**12, dtype=F64) + 0.5) / 2**12
        return math.exp(-1.5) + 0.8 * (torch.exp(-1.5 * (1 - s))[:, None, None] * dW).sum(0)

    order = slope(strong_errors(lambda t, z: -1.5 * z, tensor(0.8), ou, solver))
    assert abs(order - 1.0) < 0.15
    wrong = slope(strong_errors(lambda t, z: -1.5 * z, tensor(0.85), ou, solver))
    assert not abs(wrong - 1.0) < 0.15


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (sd.EulerMaruyama(), 1),
        (sd.GaussianStep(), 2),
        (sd.GaussianStep(mean=sd.Heun()), 2),
        (sd.GaussianStep(mean=sd.RungeKutta4()), 4),
        (sd.GaussianStep(mean=sd.RungeKutta4(substeps=2)), 4),
    ],
    ids=["euler", "default", "heun", "rk4", "rk4x2"],
)
def test_order_of_the_mean_where_the_noise_is_tiny(solver, order):
    """z' = z (cos t - z), a Bernoulli equation, with time in the drift; solved by quadrature."""

    def answer(t):
        s = torch.linspace(0, t, 200001, dtype=F64)
        return math.exp(math.sin(t)) / (2 + float(torch.trapezoid(s.sin().exp(), s)))

    def error(drift, level):
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        path = sd.SDEPath(drift, tensor(1e-15), tensor(0.5), ts, solver=solver)
        torch.manual_seed(0)
        return (path.rsample()[-1, 0] - answer(1.0)).abs()

    errors = [error(lambda t, z: z * (t.cos() - z), k) for k in range(2, 6)]
    assert abs(slope(errors) - order) < 0.2
    wrong = [error(lambda t, z: z * ((t + 1e-2).cos() - z), k) for k in range(2, 6)]
    assert not abs(slope(wrong) - order) < 0.2


@pytest.mark.parametrize("solver", [sd.EulerMaruyama(), sd.GaussianStep()], ids=["euler", "heun"])
@pytest.mark.parametrize("kind", ["diagonal", "one scale", "square", "wide"])
def test_transition_is_the_step_of_a_path(solver, kind):
    M = torch.tensor([[0.5, 0.1, 0.2], [0.2, 0.6, -0.1]], dtype=F64)
    noise = {
        "diagonal": tensor(0.3, 0.5),
        "one scale": tensor(0.3),
        "square": sd.MatrixDiffusion(lambda t, z: M[:, :2] * (1 + z[..., :1, None].square())),
        "wide": sd.MatrixDiffusion(M),
    }[kind]

    def drift(t, z):
        return z.sin() * (1 + t)

    path = sd.SDEPath(
        drift,
        noise,
        torch.randn(3, 2, dtype=F64, generator=torch.manual_seed(0)),
        tensor(0.3, 0.5),
        solver=solver,
    )
    torch.manual_seed(0)
    z = path.rsample()
    step = solver.transition(drift, noise, tensor(0.3), tensor(0.2), z[:, 0])
    assert step.batch_shape == (3,)
    assert step.event_shape == (2,)
    assert (step.log_prob(z[:, 1]) - path.log_prob(z)).abs().max() < 1e-10
    shorter = solver.transition(
        drift, noise, torch.tensor(0.3, dtype=F64), torch.tensor(0.1, dtype=F64), z[:, 0]
    )
    assert (shorter.log_prob(z[:, 1]) - path.log_prob(z)).abs().max() > 1e-2


def test_transition_with_a_batch_of_diffusions_only():
    noise = torch.rand(5, 2, dtype=F64) + 0.1
    step = sd.EulerMaruyama().transition(lambda t, z: -z, noise, tensor(0.0), tensor(0.1), tensor(0.0, 1.0))
    assert isinstance(step, dist.Independent)
    assert step.batch_shape == (5,)


def test_transitions_without_a_density():
    args = (tensor(0.0), tensor(0.1), tensor(0.0, 1.0))
    tall = sd.MatrixDiffusion(tensor(0.0, 1.0)[:, None])
    with pytest.raises(sd.DiffusionError, match=r"1 noises for 2 states: .* Use SDEPath"):
        sd.EulerMaruyama().transition(lambda t, z: z, tall, *args)
    singular = sd.MatrixDiffusion(torch.zeros(2, 2, dtype=F64))
    with pytest.raises(sd.DiffusionError, match=r"matrix is singular"):
        sd.EulerMaruyama().transition(lambda t, z: z, singular, *args)


def test_solvers_are_values():
    assert sd.EulerMaruyama() == sd.EulerMaruyama()
    assert sd.GaussianStep() == sd.GaussianStep(mean=sd.Heun())
    assert sd.GaussianStep(mean=sd.RungeKutta4(2)) != sd.GaussianStep(mean=sd.RungeKutta4())
    assert {sd.EulerMaruyama(), sd.EulerMaruyama()} == {sd.EulerMaruyama()}
    for bad in (0, -1, 1.5):
        with pytest.raises(sd.TimeError, match=r"`substeps` must be an integer of at least 1"):
            sd.RungeKutta4(substeps=bad)


@pytest.mark.parametrize(
    "solver", [sd.EulerMaruyama(), sd.GaussianStep(), sd.GaussianStep(mean=sd.RungeKutta4(3))]
)
def test_a_step_of_no_length_stays(solver):
    z = tensor(0.3, 0.4)
    assert torch.equal(solver.advance(lambda t, z: z.exp(), tensor(0.3), tensor(0.0), z), z)


@dataclass(frozen=True)
class LocallyLinear(AbstractKernel):
    """Exact for a linear drift: its noise depends on the drift's slope, so it cannot be shared."""

    def step(self, drift, diffusion, t, dt, z, context):
        slope = drift(t, torch.ones_like(z)) - drift(t, torch.zeros_like(z))
        scale = ((2 * slope * dt).expm1() / (2 * slope)).sqrt()
        return self.advance(drift, t, dt, z), diffusion(t, z, context) * scale

    def advance(self, drift, t, dt, z):
        slope = drift(t, torch.ones_like(z)) - drift(t, torch.zeros_like(z))
        return z * (slope * dt).exp()


def test_a_kernel_whose_noise_depends_on_the_drift_is_sampled_from_its_own_law():
    torch.manual_seed(0)
    ts = torch.linspace(0, 2, 3, dtype=torch.float64)
    g = torch.full((1,), 0.7, dtype=torch.float64)
    path = sd.SDEPath(lambda t, z: -2 * z, g, torch.zeros(1).double(), ts, solver=LocallyLinear())
    xi = path.chain.steps_of(path.rsample((4000,)))[2]
    assert abs(xi.std().item() - 1) < 4 / (2 * 8000) ** 0.5
