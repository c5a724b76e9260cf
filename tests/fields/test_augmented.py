"""A further dimension that starts at zero: a flow z -> -z, which no flow of one dimension makes."""

import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd

F64 = torch.float64


def flow(field, z, steps=20):
    """The state at time 1 from z at time 0."""
    dt = torch.tensor(1 / steps, dtype=F64)
    for k in range(steps):
        z = sd.RungeKutta4().mean(field, torch.full((1,), k / steps, dtype=F64), dt, z)
    return z


def fitted(extra, rounds):
    """The error of a flow of 1 + extra dimensions, trained to take x to -x, and the field."""
    torch.manual_seed(0)
    field = sd.NeuralField(1 + extra, hidden=(16,), activation=torch.tanh, time=True).double()
    x = torch.linspace(-1, 1, 21, dtype=F64)[:, None]
    start = torch.nn.functional.pad(x, (0, extra))
    optimiser = torch.optim.Adam(field.parameters(), lr=0.02)
    for _ in range(rounds):
        optimiser.zero_grad()
        loss = (flow(field, start, steps=4)[:, :1] + x).square().mean()
        loss.backward()
        optimiser.step()
    return loss.item(), field


def test_one_more_dimension_turns_the_line_around():
    """Trajectories of one dimension do not cross: the order of points stays, and the best such map is 0."""
    x = torch.linspace(-1, 1, 21, dtype=F64)[:, None]
    best_without = x.square().mean().item()  # of all increasing maps
    loss, field = fitted(extra=1, rounds=120)
    assert loss < 0.01 * best_without
    with torch.no_grad():
        assert (flow(field, torch.nn.functional.pad(x, (0, 1)))[:, 0].diff() < 0).all()
    alone, field = fitted(extra=0, rounds=120)
    assert alone > 0.95 * best_without
    with torch.no_grad():
        assert (flow(field, x)[:, 0].diff() > 0).all()


def test_a_path_with_an_unobserved_state_from_zero():
    """A random start padded with zeros is a known start: the density is that of the start and of the steps."""
    field = sd.NeuralField(2, hidden=(4,)).double()
    noise, ts = torch.tensor([0.2, 0.2], dtype=F64), torch.linspace(0, 1, 6, dtype=F64)

    def model():
        z0 = pyro.sample("z0", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
        z = pyro.sample("z", sd.SDEPath(field, noise, torch.nn.functional.pad(z0, (0, 1)), ts))
        pyro.sample("y", dist.Normal(z[..., :1], 0.1).to_event(2))

    with pyro.plate("_draws", 4, dim=-1):
        trace = pyro.poutine.trace(model).get_trace()
    z = trace.nodes["z"]["value"]
    assert z.shape == (4, 6, 2)
    assert torch.equal(z[:, 0, :1], trace.nodes["z0"]["value"])
    assert not z[:, 0, 1].any()
    assert z[:, -1, 1].abs().min() > 0
    mean = z[:, :-1] + 0.2 * field(torch.zeros(1, dtype=F64), z[:, :-1])
    steps = dist.Normal(mean, 0.2 * 0.2**0.5).log_prob(z[:, 1:]).sum((-2, -1))
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], steps)
    assert trace.nodes["y"]["value"].shape == (4, 6, 1)


def test_order_is_kept_in_one_dimension_whatever_the_weights():
    for seed in range(5):
        torch.manual_seed(seed)
        field = sd.NeuralField(1, hidden=(16,), activation=torch.tanh, time=True).double()
        with torch.no_grad():
            for p in field.parameters():
                p.mul_(2)
            out = flow(field, torch.linspace(-1, 1, 21, dtype=F64)[:, None], steps=100)
        assert out[:, 0].diff().min() > 0
