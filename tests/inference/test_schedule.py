"""Schedules at their corners."""

import math

import pytest

from stochdyn.errors import FitError
from stochdyn.inference.schedule import Constant, Cyclical, Decay, Linear, value_at


def test_constant():
    assert {Constant(0.1)(step) for step in (0, 1, 10**6)} == {0.1}


def test_linear_starts_ends_and_stays():
    ramp = Linear(0.2, 1.0, steps=8)
    assert [ramp(step) for step in (0, 4, 8, 9)] == pytest.approx([0.2, 0.6, 1.0, 1.0])


def test_decay_is_constant_then_exponential_then_constant():
    decay = Decay(2.0, steps=300)
    assert decay(0) == decay(200) == 2.0
    ratios = [decay(step + 1) / decay(step) for step in range(200, 300)]
    assert ratios == pytest.approx([0.01 ** (1 / 100)] * 100)
    assert decay(300) == decay(10**6) == pytest.approx(0.02)


def test_cycles_rise_and_stay():
    cycle = Cyclical(10, rise=0.4)
    assert [cycle(step) for step in (0, 2, 4, 9, 10, 12)] == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]


def test_decay_over_one_step():
    assert Decay(1.0, steps=1)(0) == 1.0


@pytest.mark.parametrize(
    "make",
    [lambda: Linear(0.0, 1.0, 0), lambda: Decay(1.0, 0), lambda: Decay(1.0, 5, 0.0), lambda: Cyclical(0)],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(FitError, match=r"steps|final|period"):
        make()


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_unusable_values_name_the_schedule_and_the_step(value):
    with pytest.raises(FitError, match=r"lr at step 7: .* >= 0, got .*Constant"):
        value_at(Constant(value), 7, "lr")


def test_zero_is_usable():
    assert value_at(Linear(0.0, 1.0, 10), 0, "kl_weight") == 0.0
