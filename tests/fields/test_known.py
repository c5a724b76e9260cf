"""Known physics plus a network: it starts at the physics, finds a missing term, and reads it out."""

import copy
import math

import pyro
import pytest
import torch

import stochdyn as sd
from stochdyn.fields import evaluate

F64 = torch.float64
T = torch.zeros(1, dtype=F64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Decay(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))

    def forward(self, t, z):
        return -self.rate * z


def randomised(net):
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    return net


def test_it_starts_at_the_known_field_and_can_leave_it():
    field, z = sd.Residual(Decay(), sd.NeuralField(3, hidden=(8, 8))).double(), torch.randn(5, 3, dtype=F64)
    assert torch.equal(field(T, z), field.known(T, z))
    assert torch.equal(field.learned(T, z), torch.zeros(5, 3, dtype=F64))
    field(T, z).square().sum().backward()
    assert field.known.rate.grad.abs() > 0
    assert field.network.net.layers[-1].weight.grad.abs().min() > 0
    plain = sd.Residual(Decay(), sd.NeuralField(3, hidden=(8, 8)), start=False).double()
    assert plain.learned(T, z).abs().min() > 0


def test_it_sees_and_moves_the_states_that_were_chosen():
    net = randomised(sd.NeuralField(2, 1, hidden=(4,)).double())
    field = sd.Residual(Decay(), net, states=(2, 0), outputs=(1,), start=False)
    z = torch.randn(6, 5, 3, dtype=F64)
    learned = field.learned(T, z)
    torch.testing.assert_close(learned[..., 1:2], net(T, torch.stack([z[..., 2], z[..., 0]], -1)))
    assert not learned[..., [0, 2]].any()
    torch.testing.assert_close(field(T, z), -0.5 * z + learned)
    J = torch.autograd.functional.jacobian(lambda x: field.learned(T, x), z[0, 0])
    assert not J[[0, 2]].any()
    assert J[1, 1] == 0
    assert J[1, [0, 2]].abs().min() > 0


@pytest.mark.parametrize("known", ["with", "without"])
@pytest.mark.parametrize("size", [0, 2])
def test_the_context_goes_to_whom_it_concerns(known, size):
    physics = {"with": lambda t, z, c: -z + c.sum(-1, keepdim=True), "without": lambda t, z: -z}[known]
    net = randomised(sd.NeuralField(3, hidden=(4,), context_dim=size).double())
    field = sd.Residual(physics, net, start=False)
    z, c = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    expected = (physics(T, z, c) if known == "with" else physics(T, z)) + (
        net(T, z, c) if size else net(T, z)
    )
    torch.testing.assert_close(evaluate("drift", field, T, z, c), expected)


def test_scoring_a_path_equals_its_steps():
    net = randomised(sd.NeuralField(1, 1, hidden=(4,), context_dim=2, time=True).double())
    field = sd.Residual(lambda t, z: -z, net, states=(0,), outputs=(1,), start=False)
    ts, context = torch.linspace(0, 1, 6, dtype=F64), torch.randn(4, 6, 2, dtype=F64)
    noise, start = torch.tensor([0.3, 0.4], dtype=F64), torch.zeros(2, dtype=F64)
    path = sd.SDEPath(field, noise, start, ts, context=context)
    z, dt = path.rsample().detach(), 0.2
    total = 0.0
    for k in range(5):
        mean = z[:, k] + dt * field(ts[k : k + 1], z[:, k], context[:, k])
        total = total + torch.distributions.Normal(mean, noise * math.sqrt(dt)).log_prob(z[:, k + 1]).sum(-1)
    torch.testing.assert_close(path.log_prob(z), total)


def test_copies_do_not_share_and_states_load():
    field = sd.Residual(Decay(), sd.NeuralField(2, 1, hidden=(4,)), outputs=(0,)).double()
    other = copy.deepcopy(field)
    randomised(other)
    z = torch.randn(5, 2, dtype=F64)
    assert not torch.equal(field(T, z), other(T, z))
    field.load_state_dict(other.state_dict())
    assert torch.equal(field(T, z), other(T, z))


def missing_term(drift, rounds=300):
    """Fit a drift to an exactly observed path of dz = (-z + sin 2z) dt + 0.3 dW; the error of the drift it finds."""
    ts = 0.05 * torch.arange(2001, dtype=F64)
    noise = torch.tensor([0.3], dtype=F64)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        z = sd.SDEPath(lambda t, x: -x + torch.sin(2 * x), noise, torch.zeros(1, dtype=F64), ts).sample()
    optimiser = torch.optim.Adam(drift.parameters(), lr=0.01)
    for _ in range(rounds):
        optimiser.zero_grad()
        (-sd.SDEPath(drift, noise, torch.zeros(1, dtype=F64), ts).log_prob(z)).backward()
        optimiser.step()
    return z[:, 0].quantile(torch.linspace(0.1, 0.9, 9, dtype=F64))[:, None]


def test_the_missing_term_is_found():
    field = sd.Residual(lambda t, z: -z, sd.NeuralField(1, hidden=(16,), activation=torch.tanh)).double()
    at = missing_term(field)
    # The error of a drift at a place with local time L is 0.3 / sqrt(L): 100 units of time over nine places.
    tolerance = 4 * 0.3 / math.sqrt(100 / 9)
    truth = torch.sin(2 * at)
    assert (field.learned(T, at) - truth).abs().max() < tolerance
    assert truth.abs().max() > tolerance  # the control: without the network the term would be missed


def test_a_random_network_starts_at_its_prior():
    network = sd.bayesian(sd.NeuralField(2, 1, hidden=(4,)), "missing").double()
    drift = sd.Residual(Decay(), network, outputs=(1,))
    path = sd.SDEPath(drift, torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64), torch.linspace(0, 1, 4))
    trace = pyro.poutine.trace(lambda: pyro.sample("z", path)).get_trace()
    value = trace.nodes["z"]["value"]
    assert torch.equal(path.log_prob(value), path.log_prob(value))
    assert path.chain.drift.learned(T, value)[..., 1].abs().min() > 0


def test_refused():
    net = sd.NeuralField(2)
    for states in ((0, 0), (), (-1,), (0.5,)):
        with pytest.raises(sd.FieldError, match="`states` must be different integers from 0"):
            sd.Residual(Decay(), net, states=states)
    for network in (
        sd.NeuralField(2, final=torch.sigmoid),
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()),
    ):
        with pytest.raises(sd.FieldError, match=r"does not end in a linear layer.*start=False"):
            sd.Residual(Decay(), network)
    with pytest.raises(
        sd.FieldError, match=r"returned 2 numbers, expected 1, .*outputs=\(1,\). Set its outputs=1"
    ):
        sd.Residual(Decay(), net, outputs=(1,))(torch.zeros(1), torch.zeros(2))


@pytest.mark.parametrize("network", [sd.AntisymmetricField(2), sd.ElementwiseField(2), sd.BoundedField(2)])
def test_a_network_that_cannot_begin_at_zero_is_refused(network):
    with pytest.raises(sd.FieldError, match=r"cannot be set to zero.*start=False"):
        sd.Residual(lambda t, z: 0 * z, network)
    assert (
        sd.Residual(lambda t, z: 0 * z, network, start=False)
        .learned(torch.zeros(1), torch.ones(2))
        .abs()
        .sum()
        > 0
    )


def test_a_hamiltonian_begins_at_zero():
    drift = sd.Residual(lambda t, z: -z, sd.HamiltonianField(2, hidden=(8,)))
    z = torch.randn(5, 2)
    assert torch.equal(drift(torch.zeros(1), z), -z)
