"""What the stable families promise, and that an ordinary net does not keep it."""

import pyro
import pytest
import torch

import stochdyn as sd

F64 = torch.float64
T = torch.zeros(1, dtype=F64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def wild(field):
    """Large random weights."""
    with torch.no_grad():
        for p in field.parameters():
            p.normal_(0, 2)
    return field


def eigenvalues(field, states, context=None):
    """Of the Jacobian at every state (states, state)."""
    rows = torch.zeros(len(states), 1, dtype=F64)

    def at(z):
        return field(rows, z) if context is None else field(rows, z, context)

    J = torch.autograd.functional.jacobian(lambda z: at(z).sum(0), states).movedim(1, 0)
    return torch.linalg.eigvals(J).real


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_no_direction_expands(damping):
    field = wild(sd.AntisymmetricField(5, context_dim=2, damping=damping, time=True).double())
    states, context = torch.randn(200, 5, dtype=F64), torch.randn(200, 2, dtype=F64)
    rates = eigenvalues(field, states, context)
    assert rates.max() <= 1e-9
    assert rates.min() >= -damping * field.log_speed.exp().max() - 1e-9
    assert rates.abs().max() < 1e-9 if damping == 0 else rates.min() < -1e-3
    control = wild(sd.NeuralField(5, hidden=(), final=torch.tanh).double())
    assert eigenvalues(control, states).max() > 1e-3


def test_its_speed_is_bounded_and_its_weights_may_be_random():
    field = wild(sd.AntisymmetricField(3).double())
    assert (field(T, 100 * torch.randn(500, 3, dtype=F64)).abs() <= field.log_speed.exp()).all()
    random = sd.bayesian(
        sd.AntisymmetricField(3, context_dim=1, time=sd.FourierTime(2.0, terms=1)), "drift"
    ).double()
    scales = {
        k: random._pyro_samples[k](random).base_dist.scale.flatten()[0].item() for k in random._pyro_samples
    }
    assert scales == pytest.approx({"weight": 6**-0.5, "given_weight": 3**-0.5, "bias": 1.0})
    z, c = torch.randn(5, 4, 3, dtype=F64), torch.randn(5, 4, 1, dtype=F64)
    with pyro.plate("_draws", 6, dim=-2):
        drawn = sd.draw_weights(random)
    out = drawn(T, z[:, None], c[:, None])
    assert out.shape == (5, 6, 4, 3)
    drawn.weight, drawn.given_weight, drawn.bias = (
        drawn.weight[1, 0],
        drawn.given_weight[1, 0],
        drawn.bias[1, 0],
    )
    torch.testing.assert_close(drawn(T, z, c), out[:, 1])


@torch.no_grad()
def trajectory(field, z, dt=0.02, steps=600, solver=None):
    out = [z]
    for k in range(steps):
        s = torch.full((1,), k * dt, dtype=F64)
        out.append(
            z + dt * field(s, z) if solver is None else solver.mean(field, s, torch.tensor(dt, dtype=F64), z)
        )
        z = out[-1]
    return torch.stack(out)


@pytest.mark.parametrize("solver", [None, sd.RungeKutta4()], ids=["euler", "rk4"])
def test_trajectories_stay_in_the_box_and_end_near_it(solver):
    bound = torch.tensor([1.0, 3.0], dtype=F64)
    field = sd.BoundedField(2, hidden=(8,), bound=(1.0, 3.0), time=True).double()
    wild(field.net)
    with torch.no_grad():
        field.log_decay.copy_(torch.tensor([0.2, -0.3]))
    start = 6 * torch.randn(300, 2, dtype=F64)
    z = trajectory(field, start, solver=solver)
    assert (z.abs() <= torch.maximum(start.abs(), bound) + 1e-12).all()
    t = 0.02 * torch.arange(601, dtype=F64)[:, None, None]
    faster = (
        torch.exp(-field.log_decay.exp() * t) if solver else (1 - 0.02 * field.log_decay.exp()) ** (t / 0.02)
    )
    assert (z.abs() <= bound + start.abs() * faster + 1e-7).all()
    assert (z[-1].abs() / bound).max() > 0.9  # the bound is nearly reached
    control = wild(sd.NeuralField(2, hidden=(8,)).double())
    assert (trajectory(control, start).abs() > torch.maximum(start.abs(), bound)).any()


def test_a_noisy_path_stays_in_the_tube_around_its_ornstein_uhlenbeck_path():
    field = sd.BoundedField(2, hidden=(8,), bound=1.5, context_dim=1).double()
    wild(field.net)
    ts, noise = torch.linspace(0, 10, 201, dtype=F64), torch.tensor([2.0, 0.5], dtype=F64)
    start, eps = torch.tensor([0.3, -1.0], dtype=F64), torch.randn(201, 100, 2, dtype=F64)
    context = torch.randn(100, 1, dtype=F64)
    decay = field.log_decay.exp().detach()

    def path(drift):
        return (
            sd.SDEPath(drift, noise, start.expand(100, 2), ts, context=context)
            .guided()
            .transport(eps)
            .detach()
        )

    gap = (path(field) - path(lambda t, z, c: -decay * z)).abs()
    assert gap.max() <= 1.5 + 1e-9
    assert gap.max() > 1.2
    net = wild(sd.NeuralField(2, hidden=(8,), context_dim=1).double())
    outside = (path(lambda t, z, c: torch.sin(net(t, z, c)) * 2) - path(lambda t, z, c: -decay * z)).abs()
    assert outside.max() > 1.5  # the control: another bounded drift without the pull


def test_the_context_apart():
    field = sd.BoundedField(2, hidden=(8,), bound=2.0, context_dim=3, time=True).double()
    z, c, t = (torch.randn(6, 7, n, dtype=F64) for n in (2, 3, 1))
    given, value = field.prepared(c)
    torch.testing.assert_close(value(t, z, given), field(t, z, c))
    torch.testing.assert_close(field.from_contribution(t, z, field.contribution(c)), field(t, z, c))
    random = sd.bayesian(sd.BoundedField(2, hidden=(4,), bound=2.0), "drift").double()
    path = sd.SDEPath(random, torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64), torch.linspace(0, 1, 5))
    assert torch.equal(path.log_prob(z0 := path.rsample()), path.log_prob(z0))


def test_refused():
    with pytest.raises(sd.FieldError, match="`damping` must be at least 0, got -1"):
        sd.AntisymmetricField(2, damping=-1)
    with pytest.raises(sd.FieldError, match="made for a context of size 0, got 3"):
        sd.AntisymmetricField(2)(torch.zeros(1), torch.zeros(2), torch.zeros(3))
    for options in ({"bound": (1.0, 0.0)}, {"decay": 0.0}):
        with pytest.raises(sd.FieldError, match="`bound` and `decay` must be positive"):
            sd.BoundedField(2, **options)
