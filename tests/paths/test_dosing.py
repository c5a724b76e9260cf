"""Doses as jumps of the state and of rates."""

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.dosing import as_schedule, on_state
from tests.hybrids import number


def test_infusions_end_and_resets_cut_them():
    doses = sd.Doses([sd.Dose(0.0, 6.0, rate=2.0), sd.Dose(1.0, reset=True), sd.Dose(2.0, 4.0, rate=4.0)])
    schedule = as_schedule(doses, number([0.0]), True)
    state, seen = number([5.0, 0.0]), {}
    for k, t in enumerate(schedule.times.tolist()):
        if t < torch.inf:
            state = schedule.jump_map(None, state, schedule.amounts[k])
            seen[t] = state.tolist()
    # The first infusion would end at 3, but the reset at 1 has ended it.
    assert seen[0.0] == [5.0, 2.0] and seen[1.0] == [0.0, 0.0]
    assert seen[2.0] == [0.0, 4.0] and seen[3.0] == [0.0, 0.0]


def test_users_functions_see_the_state_alone():
    shapes = []

    def see(t, z):
        shapes.append(z.shape[-1])
        return z

    lifted = on_state(sd.Trigger(lambda t, z: z.sum(-1), see), 2)
    state = number([1.0, 2.0, 7.0, 8.0])
    assert lifted.condition(number([0.0]), state) == 3.0
    assert lifted.jump_map(number([0.0]), state).tolist() == [1.0, 2.0, 7.0, 8.0] and shapes == [2]


@pytest.mark.parametrize(
    ("doses", "wanted"),
    [
        ([sd.Dose(0.0, 2.0, rate=1.0, reset=True)], [0.0, 1.0, 2.0, 2.0, 2.0]),
        ([sd.Dose(0.0, reset=True), sd.Dose(0.0, 2.0, rate=1.0)], [0.0, 1.0, 2.0, 2.0, 2.0]),
        ([sd.Dose(0.0, 2.0, rate=1.0), sd.Dose(0.0, reset=True)], [0.0, 1.0, 2.0, 2.0, 2.0]),
        ([sd.Dose(0.0, 2.0, rate=1.0), sd.Dose(2.0, reset=True)], [0.0, 1.0, 0.0, 0.0, 0.0]),
        ([sd.Dose(0.0, 4.0, rate=1.0), sd.Dose(2.0, reset=True)], [0.0, 1.0, 0.0, 0.0, 0.0]),
        ([sd.Dose(0.0, 2.0, duration=2.0), sd.Dose(5.0, reset=True)], [0.0, 1.0, 2.0, 0.0, 0.0]),
        (  # back to back, EVID 4
            [sd.Dose(0.0, 2.0, rate=1.0, reset=True), sd.Dose(2.0, 6.0, rate=2.0, reset=True)],
            [0.0, 1.0, 0.0, 6.0, 6.0],
        ),
    ],
)
def test_resets_at_the_ends_of_infusions(doses, wanted):
    """With a field of zero the state counts what has run in since the last reset."""
    z = sd.odeint(
        lambda t, z: 0 * z, number([0.0]), number([0.0, 1.0, 2.0, 5.0, 10.0]), jumps=[sd.Doses(doses)]
    )
    assert (z[:, 0] - number(wanted)).abs().max() < 1e-9


def test_a_lag_that_moves_an_infusion_to_a_reset():
    """It was given before the reset, which therefore ends it; nothing is subtracted later."""
    doses = sd.Doses([sd.Dose(0.0, 2.0, rate=1.0), sd.Dose(1.0, reset=True)]).adjusted(lag=number(1.0))
    z = sd.odeint(lambda t, z: 0 * z, number([5.0]), number([0.0, 1.0, 2.0, 5.0]), jumps=[doses])
    assert z[:, 0].tolist() == [5.0, 0.0, 0.0, 0.0]
