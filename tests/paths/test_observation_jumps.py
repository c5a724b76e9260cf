import pytest
import torch
from torch import nn

import stochdyn as sd
from stochdyn.paths.observation_jumps import ObservationJumps, Readings

F64 = torch.float64


class Own(sd.AbstractMemoryFlow):
    """dh/dt = the time since the last observation."""

    def forward(self, t, h, memory, context=None):
        return memory.elapsed.expand(h.shape)


class Clock(nn.Module):
    def forward(self, t, h):
        return t.expand(h.shape)


def rows(mask=(1.0, 0.0, 1.0), times=(0.0, 1.0, 3.0)):
    return Readings(
        torch.tensor([times], dtype=F64),
        torch.ones(1, 3, 1).double(),
        torch.tensor([mask]).double()[..., None],
    )


def add(t, h, y, mask, seen):
    return h + 10 * y


def test_times_in_the_wrong_unit_are_named():
    seconds = rows(times=(0.0, 3600.0, 86400.0))
    with pytest.raises(sd.TimeError, match="gap of 82800 would be cut into 82800 pieces of at most dt=1"):
        ObservationJumps(Clock(), add, sd.Euler(), dt=1.0).run(torch.zeros(1, 1, dtype=F64), seconds)


@pytest.mark.parametrize("mask", [(1.0, 0.0, 1.0), (1.0, 1.0, 1.0)])
def test_it_flows_by_time_and_memory_and_jumps_where_observed(mask):
    start = torch.zeros(1, 1, dtype=F64)
    found = ObservationJumps(Clock(), add, sd.RungeKutta4()).run(start, rows(mask))
    second = 10 + 0.5
    third = second + 10 * mask[1] + 4.0
    assert found.before.flatten().tolist() == pytest.approx([0.0, second, third])
    assert found.after.flatten().tolist() == pytest.approx([10.0, second + 10 * mask[1], third + 10])
    found = ObservationJumps(Own(), add, sd.RungeKutta4()).run(start, rows(mask))
    area = 2.0 if mask[1] else 4.0  # of the time since, from 1 to 3
    assert found.before.flatten().tolist() == pytest.approx([0.0, 10.5, 10.5 + 10 * mask[1] + area])
    assert found.memory_before.elapsed.flatten().tolist() == [0.0, 1.0, 2.0 if mask[1] else 3.0]
    assert found.memory_after.elapsed.flatten().tolist() == [0.0, 0.0 if mask[1] else 1.0, 0.0]


def test_gaps_of_calendar_time_keep_their_precision():
    """A gap is the difference of two float64 times, also where the state is in single precision."""
    late = 1e9
    readings = rows(times=(late, late + 0.001, late + 0.002))
    single = readings.apply(lambda x: x if x.dtype == F64 and x.max() > 10 else x.float())
    flow = sd.DecayFlow(1, push=1.0)
    found = ObservationJumps(flow, lambda t, h, y, mask, seen: h, sd.Heun()).run(torch.zeros(1, 1), single)
    assert found.before.flatten().tolist() == pytest.approx([0.0, 0.001, 0.002], rel=1e-4)
    found = ObservationJumps(lambda t, h: torch.ones_like(h), lambda t, h, y, mask, seen: h, sd.Heun()).run(
        torch.zeros(1, 1), single
    )
    assert found.before.flatten().tolist() == pytest.approx([0.0, 0.001, 0.002], rel=1e-4)


def test_the_context_of_a_row_acts_after_it():
    readings = rows()
    readings = Readings(
        readings.times, readings.values, readings.mask, torch.tensor([[[1.0], [5.0], [7.0]]]).double()
    )
    contexts = []

    def jump(t, h, y, mask, seen, context):
        contexts.append(float(context))
        return h

    found = ObservationJumps(lambda t, h, context: context, jump, sd.Euler()).run(
        torch.zeros(1, 1).double(), readings
    )
    assert found.before.flatten().tolist() == [0.0, 1.0, 11.0]
    assert contexts == [1.0, 5.0, 7.0]


def test_pieces_are_no_longer_than_dt_and_end_with_each_gap():
    gaps = torch.tensor([[0.0], [0.25], [0.3], [1.0]], dtype=F64)
    parts = ObservationJumps(Clock(), add, sd.Euler(), dt=0.25)._pieces(gaps, None)
    lengths = torch.stack([b - a for a, b in parts])[..., 0].T
    expected = [[0.0] * 4, [0.25, 0, 0, 0], [0.25, 0.05, 0, 0], [0.25] * 4]
    torch.testing.assert_close(lengths, torch.tensor(expected, dtype=F64))
    whole = list(ObservationJumps(Clock(), add, sd.Euler())._pieces(gaps, None))
    assert len(whole) == 1 and torch.equal(whole[0][1], gaps)
    assert len(list(ObservationJumps(Clock(), add, sd.Euler(), dt=0.1)._pieces(gaps[2:3], 0.3))) == 3


def test_closed_forms_and_solvers_agree():
    flow, readings = sd.DecayFlow(3).double(), rows()
    start = torch.randn(1, 3, dtype=F64)
    exact = ObservationJumps(flow, add, sd.Euler()).run(start, readings).before
    solved = ObservationJumps(lambda t, h: flow(t, h), add, sd.RungeKutta4(40)).run(start, readings).before
    torch.testing.assert_close(solved, exact, rtol=0, atol=1e-5)
