"""NeuralSDE: a module that returns a path, with parts that can be replaced."""

import copy

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import stochdyn as sd

F64 = torch.float64
TS = torch.linspace(0, 1, 6, dtype=F64)


class Pendulum(nn.Module):
    """Known physics with one unknown number."""

    def __init__(self):
        super().__init__()
        self.damping = nn.Parameter(torch.tensor(0.3))

    def forward(self, t, z):
        return torch.stack([z[..., 1], -z[..., 0].sin() - self.damping * z[..., 1]], -1)


class Matrix(nn.Module):
    """A diffusion matrix that depends on the state."""

    def __init__(self):
        super().__init__()
        self.net = sd.NeuralField(2, 4, hidden=(3,))

    def forward(self, t, z):
        return 0.1 * self.net(t, z).unflatten(-1, (2, 2)) + torch.eye(2)


def steps(process, z, drift=None):
    """The log density of a path, by explicit Euler steps."""
    total = process.initial().log_prob(z[..., 0, :])
    for k, dt in enumerate(TS.diff()):
        x, t = z[..., k, :], TS[k][None]
        mean = x + (drift or process.drift)(t, x) * dt
        total = total + dist.Normal(mean, process.diffusion(t, x) * dt.sqrt()).log_prob(z[..., k + 1, :]).sum(
            -1
        )
    return total


@pytest.mark.parametrize("time", [False, True])
def test_is_the_path_of_its_networks(time):
    process = sd.NeuralSDE(2, 8, time=time).double()
    path = process(TS)
    assert isinstance(path, sd.SDEPath)
    z = path.rsample((5,))
    torch.testing.assert_close(path.log_prob(z), steps(process, z), rtol=0, atol=1e-10)
    assert (path.log_prob(z) - steps(process, z, lambda t, x: x)).abs().min() > 1e-3
    torch.autograd.backward(path.log_prob(z.detach()).sum())
    assert all(p.grad is not None for p in process.parameters())


def test_own_times_and_contexts_make_the_batch():
    process = sd.NeuralSDE(2, (8, 4), context_dim=3).double()
    ts = TS * torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)
    for context in (torch.randn(3, 3, dtype=F64), torch.randn(3, 6, 3, dtype=F64)):
        path = process(ts, context)
        assert (path.batch_shape, path.event_shape) == ((3,), (6, 2))
        z = path.rsample()
        assert (path.log_prob(z) - process(ts, context + 1).log_prob(z)).abs().min() > 1e-6


def test_hidden_widths():
    net = sd.NeuralSDE(2, (8, 4))
    assert [tuple(layer.weight.shape) for layer in net.drift.net.layers] == [(8, 2), (4, 8), (2, 4)]
    assert net.diffusion.weight.shape == (2, 4)
    assert [tuple(layer.weight.shape) for layer in sd.NeuralSDE(2, 8).drift.net.layers][1] == (8, 8)


def test_known_physics_in_place_of_the_network():
    process = sd.NeuralSDE(2, drift=Pendulum(), diffusion=torch.tensor([0.1, 0.2], dtype=F64)).double()
    assert {name for name, _ in process.named_parameters()} == {
        "drift.damping",
        "start_loc",
        "start_log_scale",
    }
    path = process(TS)
    z = path.rsample()
    plain = sd.SDEPath(Pendulum().double(), torch.tensor([0.1, 0.2], dtype=F64), process.initial(), TS)
    torch.testing.assert_close(path.log_prob(z), plain.log_prob(z))


def test_a_matrix_diffusion_and_another_solver():
    noise = sd.MatrixDiffusion(torch.tensor([[0.5, 0.1], [0.2, 0.6]], dtype=F64))
    solver = sd.GaussianStep(mean=sd.Heun())
    process = sd.NeuralSDE(2, drift=Pendulum(), diffusion=noise, solver=solver).double()
    path = process(TS)
    z = path.rsample()
    plain = sd.SDEPath(process.drift, noise, process.initial(), TS, solver=solver)
    torch.testing.assert_close(path.log_prob(z), plain.log_prob(z))
    euler = sd.SDEPath(process.drift, noise, process.initial(), TS)
    assert (path.log_prob(z) - euler.log_prob(z)).abs() > 1e-4


def test_a_diffusion_moves_with_the_process_and_is_learned():
    fixed = sd.NeuralSDE(2, 4, diffusion=torch.tensor([0.1, 0.2]))
    assert fixed.double()(TS).rsample().dtype == F64
    assert "diffusion" in fixed.state_dict()
    for given in (Matrix(), nn.Parameter(torch.eye(2))):
        process = sd.NeuralSDE(2, 4, diffusion=sd.MatrixDiffusion(given))
        owned = {name for name, _ in process.named_parameters() if name.startswith("diffusion_field")}
        assert owned
        path = process(TS.float())
        path.log_prob(path.rsample().detach()).backward()
        assert all(p.grad is not None for p in process.parameters())
    scale = sd.NeuralSDE(2, 4, diffusion=nn.Parameter(torch.ones(2)))
    assert "diffusion" in dict(scale.named_parameters())


def test_another_start():
    process = sd.NeuralSDE(2, 8).double()
    at = torch.tensor([0.3, -0.2], dtype=F64)
    assert torch.equal(process(TS, initial=at).rsample()[0], at)
    start = dist.Normal(at, 1e-6).to_event(1)
    assert (process(TS, initial=start).rsample()[0] - at).abs().max() < 1e-4


def test_copies_share_nothing_and_load():
    first, second = sd.NeuralSDE(2, 8), sd.NeuralSDE(2, 8)
    for other in (second, copy.deepcopy(first)):
        mine = {id(p) for p in first.parameters()}
        assert not mine & {id(p) for p in other.parameters()}
    second.load_state_dict(first.state_dict())
    z = first(TS.float()).rsample()
    torch.testing.assert_close(second(TS.float()).log_prob(z), first(TS.float()).log_prob(z))


def test_contexts_that_do_not_fit():
    with pytest.raises(sd.FieldError, match="NeuralSDE: made for a context of size 0, got 3"):
        sd.NeuralSDE(2, 8)(TS.float(), torch.zeros(3))
    with pytest.raises(sd.FieldError, match="NeuralSDE: made for a context of size 3, got 0"):
        sd.NeuralSDE(2, 8, context_dim=3)(TS.float())
