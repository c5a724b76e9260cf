"""Doses as jumps of the state and of rates."""

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
