"""Motion in a learned energy: the written-out gradient, conservation and dissipation."""

import math

import pyro
import pytest
import torch

import stochdyn as sd
from stochdyn.fields.hamiltonian import SLOPES, gradient

F64 = torch.float64
T = torch.zeros(1, dtype=F64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sharp(state_dim=2, **options):
    """Three times the weights of a fresh one, so that the motion turns quickly."""
    field = sd.HamiltonianField(state_dim, hidden=(16, 16), activation=torch.tanh, **options).double()
    with torch.no_grad():
        for layer in field.net.layers:
            layer.weight.mul_(3)
    return field


@torch.no_grad()
def flow(field, z, steps, span=4.0, solver=sd.RungeKutta4()):  # noqa: B008
    out, dt = [z], torch.tensor(span / steps, dtype=F64)
    for _ in range(steps):
        z = solver.mean(field, T, dt, z)
        out.append(z)
    return torch.stack(out)


@pytest.mark.parametrize("activation", list(SLOPES), ids=lambda f: f.__name__)
def test_the_gradient_is_the_gradient(activation):
    net, x = (
        sd.MLP(4, 1, (6, 5), activation=activation).double(),
        torch.randn(7, 4, dtype=F64, requires_grad=True),
    )
    exact = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    own = gradient(net, x)
    torch.testing.assert_close(own, exact)
    inputs = [x, *net.parameters()]
    second = [torch.autograd.grad(g.square().sum(), inputs, allow_unused=True) for g in (own, exact)]
    for a, b in zip(*second, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(gradient(net, x), exact)
    assert torch.func.vmap(lambda row: gradient(net, row))(x).shape == (7, 4)


def test_the_field_is_the_symplectic_gradient():
    field, z = sharp(4, friction=0.3), torch.randn(5, 4, dtype=F64, requires_grad=True)
    dq, dp = torch.autograd.grad(field.energy(z).sum(), z)[0].chunk(2, -1)
    torch.testing.assert_close(field(T, z), torch.cat([dp, -dq - 0.3 * dp], -1))


def test_the_energy_is_conserved_to_the_order_of_the_solver():
    field, z = sharp(), torch.randn(20, 2, dtype=F64)
    drift = [(field.energy(flow(field, z, n)) - field.energy(z)).abs().max().item() for n in (40, 80, 160)]
    assert drift[0] / drift[1] > 2**3.5
    assert drift[1] / drift[2] > 2**3.5
    assert drift[2] < 1e-5
    moved = flow(field, z, 160)
    assert (moved[-1] - moved[0]).norm(dim=-1).median() > 0.5  # it does move
    control = sd.NeuralField(2, hidden=(16, 16), activation=torch.tanh).double()
    changes = (field.energy(flow(control, z, 160)) - field.energy(z)).abs().max()
    assert changes > 100 * drift[2]


def test_friction_takes_energy_and_no_friction_gives_any():
    z = torch.randn(20, 4, dtype=F64)
    field = sharp(4, friction=0.5)
    energy = field.energy(flow(field, z, 400))
    assert (energy.diff(dim=0) <= 1e-10).all()
    assert (energy[0] - energy[-1]).min() > 1e-3
    # dH/dt = -friction |dH/dp|^2, integrated by Simpson's rule over the trajectory.
    path = flow(field, z, 400).requires_grad_()
    dp = torch.autograd.grad(field.energy(path).sum(), path)[0][..., 2:]
    weight = torch.ones(401, dtype=F64)
    weight[1:-1:2], weight[2:-1:2] = 4, 2
    lost = (0.5 * dp.square().sum(-1) * weight[:, None]).sum(0) * (4.0 / 400) / 3
    torch.testing.assert_close(energy[0] - energy[-1], lost, rtol=0, atol=1e-5)


def test_learned_friction_context_and_state():
    field = sd.HamiltonianField(4, hidden=(8,), context_dim=2, friction=0.2, learned=True).double()
    assert field.friction.tolist() == pytest.approx([0.2, 0.2])
    z, c = torch.randn(3, 5, 4, dtype=F64), torch.randn(5, 2, dtype=F64)
    field(T, z, c).square().sum().backward()
    assert field.log_friction.grad.abs().min() > 0
    other = sd.HamiltonianField(4, hidden=(8,), context_dim=2, friction=0.2, learned=True).double()
    other.load_state_dict(field.state_dict())
    assert torch.equal(other(T, z, c), field(T, z, c))
    with pytest.raises(sd.FieldError, match="made for a context of size 2, got 0"):
        field(T, z)


def test_random_weights():
    field = sd.bayesian(sd.HamiltonianField(2, hidden=(4, 3)), "energy").double()
    z = torch.randn(5, 6, 2, dtype=F64)
    with pyro.plate("_draws", 7, dim=-2):
        drawn = sd.draw_weights(field)
    out = drawn(T, z[:, None])
    assert out.shape == (5, 7, 6, 2)
    for layer in drawn.net.layers:
        layer.weight, layer.bias = layer.weight[4, 0], layer.bias[4, 0]
    torch.testing.assert_close(drawn(T, z), out[:, 4])


def test_as_the_drift_of_a_path_with_noise_on_the_momentum():
    field, ts = sharp(friction=0.3), torch.linspace(0, 1, 11, dtype=F64)
    path = sd.SDEPath(
        field, sd.MatrixDiffusion(torch.tensor([[0.0], [0.2]], dtype=F64)), torch.ones(2, dtype=F64), ts
    )
    z = path.rsample().detach()
    mean = z[:-1] + 0.1 * field(T, z[:-1])
    torch.testing.assert_close(z[1:, 0], mean[:, 0])
    steps = torch.distributions.Normal(mean[:, 1], 0.2 * math.sqrt(0.1)).log_prob(z[1:, 1])
    torch.testing.assert_close(path.log_prob(z), steps.sum())


def test_refused():
    for options, message in (
        ({"state_dim": 3}, "must be even"),
        ({"state_dim": 2, "friction": -1.0}, "at least 0, and positive where it is learned, got -1.0"),
        ({"state_dim": 2, "learned": True}, "got 0.0"),
        ({"state_dim": 2, "activation": torch.relu}, "one of torch's softplus, tanh, sin, sigmoid"),
    ):
        with pytest.raises(sd.FieldError, match=message):
            sd.HamiltonianField(**options)
