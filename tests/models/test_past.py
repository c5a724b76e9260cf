"""States between observations, against a loop over one series that knows nothing of rows and batches."""

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from tests.linear_filters import F64, ragged


@pytest.fixture
def past():
    torch.manual_seed(0)
    model = sd.ObservationJumpODE(2, 4, anchored=True, solver=sd.Heun(2)).double()
    return model, ragged().extend([1.5, 3.3, 3.31])


def by_hand(model, batch, i, until):
    """State and memory at a time, all observations until then included."""
    jumps = model._past(batch).jumps
    h, memory, t = model.start[None], sd.Memory.empty(model.start[None], 2), batch.times[i, :1, None]
    for k in range(int(batch.lengths[i])):
        now, mask = batch.times[i, k, None, None], batch.mask[i, k][None].double()
        if float(now) > until:
            break
        if not mask.any():
            continue
        h, memory = jumps.between(t, now - t, h, memory)
        seen = model.decoder(h, memory)
        h, memory, t = model.jump(now, h, batch.values[i, k][None] * mask, mask, seen), memory, now
        memory = memory.updated(batch.values[i, k][None], mask)
    return jumps.between(t, until - t, h, memory)


def test_states_at_any_time(past):
    model, batch = past
    ts = torch.tensor([[1.5, 2.0, 3.305, 9.0], [3.3, 1.0, 2.2, 1.6], [8.0, 1.2, 1.3, 1.9]], dtype=F64)
    h, memory = model._past(batch).until(ts)
    for i in range(3):
        for j, t in enumerate(ts[i]):
            state, known = by_hand(model, batch, i, float(t))
            torch.testing.assert_close(h[i, j], state[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(memory.elapsed[i, j], known.elapsed[0], rtol=0, atol=1e-12)
            assert torch.equal(memory.values[i, j], known.values[0])


def test_states_just_before_each_time(past):
    model, batch = past
    h, memory = model._past(batch).before()
    for i in range(3):
        for k in range(int(batch.lengths[i])):
            state, known = by_hand(model, batch, i, float(batch.times[i, k]) - 1e-9)
            torch.testing.assert_close(h[i, k], state[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(memory.elapsed[i, k], known.elapsed[0].clamp_min(0), rtol=0, atol=1e-6)


def test_the_loop_goes_through_what_was_observed_alone(past):
    model, batch = past
    found = model._past(batch)
    seen = batch.mask.any(-1)
    seen[:, 0] = True
    assert found.rows.times.shape[1] == int(seen.sum(1).max()) < batch.times.shape[1]
    real = torch.arange(batch.times.shape[1]) < batch.lengths[:, None]
    assert torch.equal(found.holes, real & ~seen)


def test_holes_have_no_gradient_and_observations_have_one(past):
    model, batch = past
    found = model._past(batch)
    h = found.before()[0]
    assert bool(found.holes.any())
    (slope,) = torch.autograd.grad(h[found.holes].sum(), model.start, retain_graph=True)
    assert not slope.any()
    seen = batch.mask.any(-1)
    (slope,) = torch.autograd.grad(h[seen].sum(), model.start)
    assert slope.any()


class Certain(torch.nn.Module):
    def forward(self, h):
        return dist.Normal(h[..., :2].sin(), 1e-12)


def test_a_forecast_feeds_back_what_it_drew(past):
    """With next to no noise in it, a draw is what the model says of a series in which it had been observed."""
    torch.manual_seed(0)
    model = sd.ObservationJumpODE(
        2, 4, decoder=Certain(), jump=sd.ResetJump(2, 4), solver=sd.Heun(2)
    ).double()
    batch = past[1].extend([6.0, 6.5, 8.0])
    with torch.no_grad():
        y = model._past(batch).draw(3)
        real = torch.arange(batch.times.shape[1]) < batch.lengths[:, None]
        ahead = real & (batch.times > batch.last_observed[:, None])
        filled = batch._with(
            values=torch.where(ahead[..., None], y[0], batch.values), mask=batch.mask | ahead[..., None]
        )
        expected = model.one_step_ahead(filled).mean
        left = model.one_step_ahead(batch).mean
    assert y.shape == (3, *batch.values.shape)
    torch.testing.assert_close(y[:, ahead], expected[ahead].expand(3, -1, -1), rtol=0, atol=1e-8)
    assert (y[0] - left)[ahead].abs().max() > 1e-3
