import pyro.distributions as dist
import pytest
import torch
from torch import nn

import stochdyn as sd

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_memory_keeps_the_last_exact_value_of_each_channel():
    memory = sd.Memory.empty(torch.zeros(2, 5), 3)
    memory = memory.later(torch.tensor([[0.5], [1.0]]))
    y, mask = torch.arange(6.0).reshape(2, 3), torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    memory = memory.updated(y, mask).later(torch.tensor([[2.0], [2.0]]))
    assert memory.values.tolist() == [[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]]
    assert memory.seen.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert memory.elapsed.tolist() == [[2.0, 2.5, 2.5], [3.0, 2.0, 3.0]]


def test_the_gated_flow_is_a_gru_cell_less_its_state():
    """dh/dt = GRU(h) - h with no input, the reset gate inside the candidate as in GRU-ODE."""
    flow, h = sd.GRUFlow(4).double(), torch.randn(3, 4, dtype=F64)
    (R, Z), (r, z) = flow.gates.weight.chunk(2), flow.gates.bias.chunk(2)
    reset, update = torch.sigmoid(h @ R.T + r), torch.sigmoid(h @ Z.T + z)
    candidate = torch.tanh((reset * h) @ flow.candidate.weight.T + flow.candidate.bias)
    expected = update * h + (1 - update) * candidate - h
    torch.testing.assert_close(flow(torch.zeros(1, dtype=F64), h), expected)
    slow = sd.GRUFlow(4, time_unit=10.0).double()
    slow.load_state_dict(flow.state_dict())
    torch.testing.assert_close(slow(torch.zeros(1, dtype=F64), h), expected / 10)


def test_the_gated_flow_stays_between_minus_one_and_one():
    flow = sd.GRUFlow(4).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(20)
    h = sd.odeint(flow, torch.ones(3, 4, dtype=F64), torch.linspace(0, 50, 20), solver=sd.RungeKutta4(20))
    assert h.abs().max() <= 1 + 1e-9


def test_a_memory_flow_sees_the_memory():
    flow, h = sd.MemoryFlow(4, 2, (8,), time=True), torch.randn(3, 4)
    memory, t = sd.Memory(torch.randn(3, 2), torch.rand(3, 2), torch.ones(3, 2)), torch.zeros(3, 1)
    out = flow(t, h, memory)
    changed = [
        flow(t + 1, h, memory),
        flow(t, h + 1, memory),
        flow(t, h, sd.Memory(memory.values + 1, memory.elapsed, memory.seen)),
        flow(t, h, sd.Memory(memory.values, memory.elapsed + 1, memory.seen)),
        flow(t, h, sd.Memory(memory.values, memory.elapsed, 0 * memory.seen)),
    ]
    assert all((other - out).abs().min() > 1e-6 for other in changed)
    timeless = sd.MemoryFlow(4, 2, (8,))
    assert torch.equal(timeless(t + 1, h, memory), timeless(t, h, memory))


JUMPS = {
    "gru": lambda **options: sd.GRUJump(2, 4, **options),
    "reset": lambda **options: sd.ResetJump(2, 4, **options),
}


@pytest.mark.parametrize("kind", JUMPS)
def test_what_stands_for_a_missing_value_is_not_read(kind):
    jump, h, t = JUMPS[kind](), torch.randn(3, 4), torch.zeros(3, 1)
    mask = torch.tensor([1.0, 0.0]).expand(3, 2)
    seen, y = dist.Normal(torch.randn(3, 2), 0.5), torch.randn(3, 2)
    out = jump(t, h, y, mask, seen)
    assert torch.equal(jump(t, h, y + torch.tensor([0.0, 9.0]), mask, seen), out)
    assert not torch.equal(jump(t, h, y + torch.tensor([9.0, 0.0]), mask, seen), out)
    assert not torch.equal(jump(t, h, y, torch.ones(3, 2), seen), out)
    assert not torch.equal(jump(t, h, y, -mask, seen), out)


def test_a_reset_forgets_and_a_gru_does_not():
    h, t, y, ones = torch.randn(3, 4), torch.zeros(3, 1), torch.randn(3, 2), torch.ones(3, 2)
    seen = dist.Normal(torch.zeros(3, 2), 1.0)
    reset, gru = JUMPS["reset"](), JUMPS["gru"]()
    assert torch.equal(reset(t, h, y, ones, seen), reset(t, h + 1, y, ones, seen))
    assert not torch.equal(gru(t, h, y, ones, seen), gru(t, h + 1, y, ones, seen))


def test_the_prediction_is_read():
    h, t, y, ones = torch.randn(3, 4), torch.zeros(3, 1), torch.randn(3, 2), torch.ones(3, 2)
    gru, plain = JUMPS["gru"](), JUMPS["gru"](prediction=False)
    narrow, wide = (dist.Normal(torch.zeros(3, 2), scale) for scale in (0.1, 2.0))
    assert not torch.equal(gru(t, h, y, ones, narrow), gru(t, h, y, ones, wide))
    assert torch.equal(plain(t, h, y, ones, None), plain(t, h, y, ones, wide))
    far = gru(t, h, y + 1e30, ones, narrow)
    assert torch.isfinite(far).all()
    classes = dist.Categorical(logits=torch.randn(3, 2, 5))
    assert torch.isfinite(gru(t, h, ones, ones, classes)).all()


@pytest.mark.parametrize("kind", JUMPS)
def test_a_transform_is_applied_to_observed_values_only(kind):
    jump = JUMPS[kind](transform=torch.log)
    h, t, mask = torch.randn(1, 4), torch.zeros(1, 1), torch.tensor([[1.0, 0.0]])
    out = jump(t, h, torch.tensor([[2.0, 0.0]]), mask, dist.LogNormal(torch.zeros(1, 2), 1.0))
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in jump.parameters())


def test_contexts_and_predictions_that_are_missing_are_named():
    h, t, y = torch.zeros(1, 4), torch.zeros(1, 1), torch.zeros(1, 2)
    with pytest.raises(sd.FieldError, match=r"GRUFlow was made for a context of size 3, got 0"):
        sd.GRUFlow(4, context_dim=3)(t, h)
    with pytest.raises(sd.FieldError, match=r"GRUJump was made for a context of size 0, got 1"):
        sd.GRUJump(2, 4, prediction=False)(t, h, y, y, None, t)
    with pytest.raises(sd.FieldError, match=r"GRUJump reads a prediction.*prediction=False"):
        sd.GRUJump(2, 4)(t, h, y, y, None)
    with pytest.raises(sd.TimeError, match="`time_unit` must be positive, got 0"):
        sd.GRUFlow(4, time_unit=0)
    assert isinstance(sd.MemoryFlow(4, 2, context_dim=1), nn.Module)
