import math

import pytest
import torch

import stochdyn as sd
from stochdyn.data.jump_checks import check_classes, check_jumps, faults


def say(first):
    return f"series {'AB'[first[0]]}"


def rows(*times):
    return torch.tensor([[[0.3], [0.4]], [[t] for t in times]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        ((0.7, 0.5), sd.TimeError, r"series B, jump 1: time 0.5 comes after 0.7. Sort"),
        ((0.5, 0.5), sd.TimeError, r"series B, jump 1: time 0.5 is there twice.*mark"),
        (
            (0.5, 1.5),
            sd.TimeError,
            r"series B, jump 1: time 1.5 is outside the window \[0, 1\].*set t0 and t1",
        ),
        ((-0.5, 0.5), sd.TimeError, r"series B, jump 0: time -0.5 is outside"),
        ((math.inf, 0.5), sd.TimeError, r"series B, jump 1: time 0.5 comes after an unused row.*from_list"),
        ((0.5, math.nan), sd.TimeError, r"series B, jump 1: time is nan.*drop it"),
        ((-math.inf, 0.5), sd.TimeError, r"series B, jump 0: time is -inf"),
    ],
)
def test_every_fault_of_times_is_named(times, error, message):
    with pytest.raises(error, match=message):
        check_jumps(rows(*times), torch.zeros(2), torch.ones(2), say)


def test_what_is_right_passes():
    for times in ((0.5, 0.7), (0.0, 1.0), (0.5, math.inf), (math.inf, math.inf)):
        values = rows(*times)
        check_jumps(values, torch.zeros(2), torch.ones(2), say)
        assert not any(bool(f.any()) for f in faults(values, torch.zeros(2), torch.ones(2)).values())
    check_jumps(torch.zeros(2, 0, 1), torch.zeros(2), torch.ones(2), say)


def test_windows_of_each_series_count():
    values = rows(0.5, 1.5)
    check_jumps(values, torch.zeros(2), torch.tensor([1.0, 2.0]), say)
    with pytest.raises(sd.TimeError, match="series B"):
        check_jumps(values, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]), say)


def test_marks():
    values = torch.tensor([[[0.3, 1.0], [0.5, math.nan]]])
    with pytest.raises(sd.DataError, match=r"series A, jump 1, time 0.5: mark is \[nan\]"):
        check_jumps(values, torch.zeros(1), torch.ones(1), say)
    real = torch.tensor([[True, True, False]])
    times = torch.tensor([[0.1, 0.2, math.inf]])
    check_classes(torch.tensor([[0.0, 2.0, 9.0]]), real, 3, times, say)
    for wrong in (3.0, -1.0, 0.5):
        with pytest.raises(sd.DataError, match=rf"jump 1, time 0.2: mark is {wrong:g}, .*0, 1, ... 2"):
            check_classes(torch.tensor([[0.0, wrong, 9.0]]), real, 3, times, say)
