"""Gradients as values: three ways to the same number; what an adjoint would lose is refused."""

import pytest
import torch
import torchdiffeq
from torch import nn

import stochdyn as sd
from tests.orders import F64


class Predation(nn.Module):
    """Lotka-Volterra whose rates are a parameter and a context."""

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.0, 0.5], dtype=F64))

    def forward(self, t, z, context):
        x, y = z[..., 0], z[..., 1]
        c = context[..., 0]
        return torch.stack([self.rates[0] * x - x * y, c * x * y - self.rates[1] * y], -1)


def gradients(gradient, solver, ts, timed=False):
    """Of a weighted sum of all states by start, context and parameters, with the solution itself."""
    torch.manual_seed(0)
    field, context = Predation(), torch.tensor([[0.6], [0.8], [0.7]], dtype=F64)
    if timed:
        context = context[:, None] + 0.1 * torch.randn(3, ts.shape[-1], 1, dtype=F64)
    z0 = torch.tensor([[1.0, 0.5], [0.7, 0.9], [1.2, 1.0]], dtype=F64, requires_grad=True)
    context.requires_grad_()
    z = sd.odeint(field, z0, ts, solver=solver, gradient=gradient, context=context)
    weights = torch.randn(z.shape, dtype=F64)
    found = torch.autograd.grad((weights * z).sum(), [z0, context, *field.parameters()])
    return z.detach(), found


SHARED = torch.linspace(0, 4, 21, dtype=F64)
OWN = torch.stack([SHARED, 0.7 * SHARED + 0.3, torch.cat([SHARED[:15], SHARED[14].expand(6)])])


RK4, TSIT5 = sd.RungeKutta4(4), sd.Tsit5(1e-9, 1e-10)


@pytest.mark.parametrize(
    ("solver", "ts", "timed"),
    [
        pytest.param(RK4, SHARED, False, id="rk4-shared-static"),
        pytest.param(RK4, SHARED, True, id="rk4-shared-timed"),
        pytest.param(RK4, OWN, False, id="rk4-own times-static"),
        pytest.param(RK4, OWN, True, id="rk4-own times-timed"),
        pytest.param(TSIT5, SHARED, False, id="tsit5-shared-static"),
        pytest.param(TSIT5, SHARED, True, id="tsit5-shared-timed", marks=pytest.mark.slow),
        pytest.param(TSIT5, OWN, False, id="tsit5-own times-static", marks=pytest.mark.slow),
        pytest.param(TSIT5, OWN, True, id="tsit5-own times-timed"),
    ],
)
def test_the_three_agree(solver, ts, timed):
    z, direct = gradients(sd.Direct(), solver, ts, timed)
    again = (
        1e-13 if isinstance(solver, sd.RungeKutta4) else 1e-6
    )  # an adaptive one starts anew in each segment
    for gradient, tolerance in (
        (sd.Checkpointed(), again),
        (sd.Checkpointed(3), again),
        (sd.Adjoint(), 1e-6),
    ):
        same, found = gradients(gradient, solver, ts, timed)
        assert (same - z).abs().max() < 10 * again
        for a, b in zip(direct, found, strict=True):
            assert a.abs().max() > 1e-3
            assert (a - b).abs().max() < tolerance * (1 + a.abs().max())


def test_the_adjoint_of_a_coarse_grid_is_that_of_the_flow_only():
    """The control of the agreement above: at a large step the two differ by the solver's error."""
    ts = torch.linspace(0, 4, 9, dtype=F64)
    direct = gradients(sd.Direct(), sd.Heun(), ts)[1]
    adjoint = gradients(sd.Adjoint(), sd.Heun(), ts)[1]
    assert (direct[0] - adjoint[0]).abs().max() > 1e-3
    better = gradients(sd.Adjoint(sd.RungeKutta4(20)), sd.Heun(50), ts)[1]
    exact = gradients(sd.Direct(), sd.Heun(50), ts)[1]
    assert (exact[0] - better[0]).abs().max() < 1e-3


def test_a_captured_latent_is_refused_by_the_adjoint_where_the_library_loses_it():
    k, z0 = torch.tensor([0.7], requires_grad=True), torch.ones(1, requires_grad=True)
    ts = torch.tensor([0.0, 1.0])
    lost = torchdiffeq.odeint_adjoint(lambda t, z: -k * z, z0, ts, adjoint_params=())
    lost[-1].sum().backward()
    assert k.grad is None
    with pytest.raises(sd.FieldError, match=r"reads a tensor that needs a gradient .* Pass it as `context=`"):
        sd.odeint(lambda t, z: -k * z, z0, ts, gradient=sd.Adjoint())
    sd.odeint(lambda t, z: -k * z, z0, ts, gradient=sd.Checkpointed())[-1].sum().backward()
    assert (k.grad + (-k).exp()).abs().max() < 1e-5


def test_a_tensor_made_of_the_field_s_own_parameter_is_refused_too():
    """It would be counted twice, or not at all."""

    class Captures(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.tensor([0.7]))
            self.cache = [self.k * 2]

        def forward(self, t, z):
            return -self.k * z + self.cache[0]

    with pytest.raises(sd.FieldError, match=r"neither one of its parameters nor the context"):
        sd.odeint(Captures(), torch.ones(1), torch.tensor([0.0, 1.0]), gradient=sd.Adjoint())


def test_no_gradient_asked_is_no_error():
    z = sd.odeint(lambda t, z: -z, torch.ones(1), torch.tensor([0.0, 1.0]), gradient=sd.Adjoint())
    assert not z.requires_grad
    with pytest.raises(sd.FieldError, match=r"`segments` must be at least 1"):
        sd.Checkpointed(0)


def test_an_implicit_solver_has_the_adjoint_s_gradient_and_no_silent_one():
    k = torch.tensor([50.0], dtype=F64, requires_grad=True)
    ts, z0 = torch.tensor([0.0, 0.05, 0.1], dtype=F64), torch.ones(1, dtype=F64)
    z = sd.odeint(
        lambda t, z, k: -k * z, z0, ts, solver=sd.Radau(1e-9, 1e-11), gradient=sd.Adjoint(), context=k
    )
    z[-1].backward()
    assert (k.grad + 0.1 * torch.exp(-0.1 * k)).abs().max() < 1e-7
    with pytest.raises(sd.FieldError, match=r"Radau has no gradient of its own"):
        sd.odeint(lambda t, z, k: -k * z, z0, ts, solver=sd.Radau(), context=k)


def test_a_checkpointed_solve_keeps_few_tensors():
    """Bytes that the graph keeps between forward and backward; a direct solve keeps every step's."""
    net, ts = sd.MLP(2, 2, (64,)), torch.linspace(0, 1, 257)

    def kept(gradient):
        total = 0

        def count(x):
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            sd.odeint(lambda t, z: net(z), torch.ones(32, 2), ts, solver=sd.RungeKutta4(), gradient=gradient)
        return total

    assert kept(sd.Checkpointed()) < kept(sd.Direct()) / 16
    assert kept(sd.Checkpointed(256)) > kept(sd.Checkpointed())


@pytest.mark.parametrize("solver", [sd.Rosenbrock(4), sd.Verlet(4)])
def test_a_solver_that_cannot_go_backwards_is_refused_and_another_may_do_it(solver):
    k, ts = torch.tensor([1.3], dtype=F64, requires_grad=True), torch.linspace(0, 2, 9, dtype=F64)
    z0 = torch.tensor([1.0, 0.2], dtype=F64)

    def field(t, z, k):
        return torch.cat([z[..., 1:], -k * z[..., :1]], -1)

    def slope(gradient):
        return torch.autograd.grad(
            sd.odeint(field, z0, ts, solver=solver, gradient=gradient, context=k)[-1, 0], k
        )[0]

    with pytest.raises(
        sd.FieldError, match=r"cannot solve the equation backwards.*sd\.Adjoint\(sd\.RungeKutta4\(4\)\)"
    ):
        slope(sd.Adjoint())
    assert (slope(sd.Checkpointed()) - slope(sd.Direct())).abs() < 1e-12
    assert (slope(sd.Adjoint(sd.RungeKutta4(8))) - slope(sd.Direct())).abs() < 1e-2


@pytest.mark.parametrize("gradient", [sd.Direct(), sd.Checkpointed(2)])
def test_an_implicit_solver_loses_no_gradient_of_a_start(gradient):
    z0 = torch.ones(1, dtype=F64, requires_grad=True)
    with pytest.raises(sd.FieldError, match=r"Radau has no gradient of its own"):
        sd.odeint(
            lambda t, z: torch.ones_like(z), z0, torch.linspace(0, 1, 6), solver=sd.Radau(), gradient=gradient
        )
