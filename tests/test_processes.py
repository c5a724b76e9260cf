"""NeuralSDE and NeuralJumpODE: modules that return paths, with parts that can be replaced."""

import copy

import pyro
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


# Jump ODEs.


def sequences(count=40, end=20.0):
    torch.manual_seed(0)
    return sd.Jumps(sd.Hawkes(0.5, 0.8, 1.6, 0.0, end).sample((count,)), 0.0, end)


class JumpModel(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.process = sd.NeuralJumpODE(2, (8,), **options).double()

    def forward(self, batch):
        with batch.plate("series"):
            batch.observe("jumps", self.process(batch))


def test_a_jump_ode_starts_as_a_poisson_process_nearly():
    jumps = sequences()
    process = sd.NeuralJumpODE(3, (8,), rate=0.9).double()
    process.intensity.log_rise.data.fill_(-50.0)
    expected = sd.PoissonProcess(0.9, 0.0, 20.0).log_prob(jumps.values)
    assert torch.allclose(process(jumps).log_prob(jumps.values), expected, atol=1e-9)


def test_fit_trains_a_jump_ode_on_mini_batches():
    jumps = sequences()
    model = JumpModel(rate=0.5, step=1.0)
    guide = sd.AmortizedGuide(model)
    sd.fit(model, guide, jumps, steps=120, lr=0.05, batch_size=20, progress=False)
    with torch.no_grad():
        found = model.process(jumps).log_prob(jumps.values).sum()
    rate = float(jumps.counts.sum()) / 800
    constant = sd.PoissonProcess(rate, 0.0, 20.0).log_prob(jumps.values).sum()
    known = sd.Hawkes(0.5, 0.8, 1.6, 0.0, 20.0).log_prob(jumps.values).sum()
    assert float(constant) + 0.8 * float(known - constant) < float(found) < float(known) + 12
    fresh = JumpModel(step=1.0)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.process(jumps).log_prob(jumps.values).sum(), found)


@pytest.mark.parametrize("svi", [True, False])
def test_pyros_own_training_moves_a_jump_ode(svi):
    pyro.clear_param_store()
    jumps, model = sequences(4), JumpModel()
    guide = sd.AmortizedGuide(model)
    before = copy.deepcopy(model.process.state_dict())
    if svi:
        pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()).step(jumps)
    else:
        loss = pyro.infer.Trace_ELBO()(model, guide)
        loss(jumps).backward()
        torch.optim.Adam(model.parameters(), lr=0.01).step()
    pyro.clear_param_store()
    after = model.process.state_dict()
    assert not torch.equal(before["intensity.base"], after["intensity.base"])
    assert not torch.equal(before["flow.place"], after["flow.place"])


def test_the_jump_ode_of_the_paper_and_its_marks():
    jumps = sd.Jumps.from_list([([0.4, 1.1], [1, 0]), ([], []), ([0.2], [2])], t0=0.0, t1=3.0, classes=3)
    kinds = sd.NeuralJumpODE(3, 8, marks=3).double()
    assert kinds(jumps).intensities([0.5, 1.5], jumps).shape == (3, 2, 3)
    paper = sd.NeuralJumpODE(
        3, 8, marks=3, flow=sd.NeuralField(3, hidden=(8,)), jump_map=sd.NeuralJump(3, (8,), classes=3)
    ).double()
    total = paper(jumps).log_prob(jumps.values).sum()
    gradients = torch.autograd.grad(total, list(paper.parameters()), allow_unused=True)
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    sizes = sd.Jumps(torch.cat([jumps.values[..., :1], 0.5 + jumps.values[..., 1:]], -1), 0.0, 3.0)
    net = nn.Linear(3, 1).double()
    quantities = sd.NeuralJumpODE(3, 8, marks=lambda t, z: dist.LogNormal(net(z)[..., 0], 1.0)).double()
    assert isinstance(quantities.jump_map, sd.NeuralJump)
    assert bool(torch.isfinite(quantities(sizes).log_prob(sizes.values)).all())


def test_a_jump_ode_has_subjects():
    jumps = sequences(3)
    process = sd.NeuralJumpODE(2, (8,), context_dim=2).double()
    # The net starts at 0, where it reads nothing.
    nn.init.normal_(process.intensity.net.layers[-1].weight)
    context = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]], dtype=F64)
    whole = process(jumps, context).log_prob(jumps.values)
    alone = process(jumps[[1]], context[[1]]).log_prob(jumps.values[[1]])
    assert torch.allclose(whole[1], alone[0])
    assert not torch.allclose(process(jumps, context.flip(-1)).log_prob(jumps.values), whole)
    with pytest.raises(sd.FieldError, match="NeuralJumpODE: made for a context of size 2, got 0"):
        process(jumps)
    draws = process(jumps, context, max_jumps=400).sample((2,))
    assert draws.shape == (2, 3, 400, 1)
