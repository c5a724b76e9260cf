import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate

import stochdyn as sd
from tests.jumps import END, LOG_LINEAR_LOG_PROB, TIMES, value
from tests.problems import within

F64 = torch.float64


def grid(*times):
    return torch.tensor(times, dtype=F64)


def test_a_line_is_the_log_linear_process():
    ts = grid(0.0, 0.7, 1.1, 3.0, END)
    process = sd.CoxProcess(-0.3 + 0.4 * ts, ts)
    assert float(process.log_prob(value())) == pytest.approx(LOG_LINEAR_LOG_PROB, abs=1e-10)
    flat = sd.CoxProcess(torch.full((2,), math.log(1.5), dtype=F64), grid(0.0, END))
    assert float(flat.log_prob(value())) == pytest.approx(8 * math.log(1.5) - 6.0, abs=1e-12)
    assert float(flat.log_prob(value([]))) == pytest.approx(-6.0, abs=1e-12)


def test_sequences_each_on_a_grid_of_its_own():
    ts = torch.stack([grid(0.0, 0.9, 2.0, 3.3, END), grid(0.0, 0.1, 1.7, END, END)])
    level = torch.tensor([[0.2, -2.0, 1.5, 1.5, 0.0], [1.0, 0.5, -3.0, 0.7, 0.7]], dtype=F64)
    found = sd.CoxProcess(level, ts).log_prob(value())
    for k in range(2):
        line = lambda t, k=k: float(_interpolated(t, ts[k], level[k]))  # noqa: E731
        expected = sum(line(t) for t in TIMES)
        inner = ts[k][1:-1].unique().tolist()
        expected -= integrate.quad(lambda t: math.exp(line(t)), 0, END, points=inner, epsabs=1e-12)[0]  # noqa: B023
        assert float(found[k]) == pytest.approx(expected, abs=1e-9)
    # The control: with the grids exchanged it is another number.
    assert (sd.CoxProcess(level, ts.flip(0)).log_prob(value()) - found).abs().min() > 0.1


def _interpolated(t, ts, level):
    k = min(int(torch.searchsorted(ts, t, right=True)) - 1, len(ts) - 2)
    length = float(ts[k + 1] - ts[k])
    return level[k] + (0.0 if length == 0 else (t - ts[k]) / length * (level[k + 1] - level[k]))


def test_gradients_of_every_level_also_where_the_line_is_flat():
    ts = grid(0.0, 0.7, 1.5, 1.6, END)
    level = grid(0.3, 0.3, -1.0, -1.0, 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sd.CoxProcess(x, ts).log_prob(value()), level)


def test_draws_have_their_law():
    torch.manual_seed(0)
    ts = torch.linspace(0.0, 40.0, 81, dtype=F64)
    level = 1.5 * torch.sin(ts)
    process = sd.CoxProcess(level, ts, max_jumps=200)
    drawn = process.sample((60,))
    assert not sd.time_rescaling(process, drawn).rejects()
    assert sd.time_rescaling(sd.CoxProcess(level.roll(8), ts), drawn).rejects()
    whole = process.compensator([40.0], drawn)[..., 0]
    assert within(torch.isfinite(drawn[..., 0]).sum(-1).double() - whole, 0.0)


def test_a_sampled_path_in_a_plate_with_particles():
    visits = sd.Jumps.from_list([[0.4, 1.1], [], [2.2]], t0=0.0, t1=4.0)
    ts = torch.linspace(0.0, 4.0, 9, dtype=F64)

    def model(batch):
        slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        with batch.plate("series"):
            start = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
            z = pyro.sample("z", sd.SDEPath(lambda t, z: -z, torch.ones(1, dtype=F64), start, ts))
            batch.observe("jumps", sd.CoxProcess(slope[..., None] * z[..., 0], ts))

    with pyro.plate("particles", 4, dim=-2):
        trace = pyro.poutine.trace(model).get_trace(visits)
    trace.compute_log_prob()
    found = trace.nodes["jumps"]["log_prob"]
    assert found.shape == (4, 3)
    z, slope = (torch.as_tensor(trace.nodes[name]["value"]) for name in ("z", "slope"))
    one = sd.CoxProcess(slope[2, 0] * z[2, 1, :, 0], ts).log_prob(visits.values[1])
    torch.testing.assert_close(found[2, 1], one)


def test_a_path_in_single_precision_keeps_the_digits_of_the_times():
    ts = torch.linspace(0.0, 4.0, 9, dtype=F64)
    level = torch.linspace(0.0, 1.0, 9)
    low = sd.CoxProcess(level, ts).log_prob(value())
    torch.testing.assert_close(low, sd.CoxProcess(level.double(), ts).log_prob(value()), atol=1e-7, rtol=0)


def test_a_grid_may_go_on_after_the_window():
    ts = torch.stack([grid(0.0, 0.9, 2.0, END), grid(0.0, 0.1, END, END)])
    level = torch.tensor([[0.2, -2.0, 1.5, 0.3], [1.0, 0.5, 0.7, 0.7]], dtype=F64)
    longer, further = (
        torch.cat([ts, ts[:, -1:] + grid(3.0, 5.0)], 1),
        torch.cat([level, grid(9.0, 9.0).expand(2, 2)], 1),
    )
    whole = sd.CoxProcess(level, ts).log_prob(value())
    torch.testing.assert_close(
        sd.CoxProcess(further, longer, t1=END).log_prob(value()), whole, atol=1e-12, rtol=0
    )
    torch.manual_seed(0)
    drawn = sd.CoxProcess(further, longer, t1=grid(END, END), max_jumps=60).sample((400,))
    assert drawn[drawn.isfinite()].max() <= END
    count = torch.isfinite(drawn[..., 0]).sum(-1).double()
    assert all(within(count[:, k], float(sd.CoxProcess(level, ts).cumulative[k, -1])) for k in range(2))
    with pytest.raises(sd.TimeError, match="series 1: the window ends at t1 = 5, the grid at 4"):
        sd.CoxProcess(level, torch.stack([ts[0] + grid(0, 0, 0, 2), ts[1]]), t1=5.0)


@pytest.mark.parametrize(
    ("level", "ts", "error", "words"),
    [
        (torch.zeros(3), grid(0.0, 1.0), sd.ShapeError, "grid times"),
        ([0.0, 0.0], grid(0.0, 1.0), sd.ShapeError, "must be a tensor .*, got list"),
        (torch.zeros(2, 3), grid(0.0, 2.0, 1.0), sd.TimeError, "does not increase after time 2"),
        (torch.tensor([[0.0, 0.0], [0.0, math.inf]]), grid(0.0, 1.0), sd.FieldError, "series 1, time 1"),
    ],
)
def test_what_is_wrong_is_named(level, ts, error, words):
    with pytest.raises(error, match=words):
        sd.CoxProcess(level, ts)
