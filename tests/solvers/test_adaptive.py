"""Adaptive solvers as values."""

import pytest

import stochdyn as sd


def test_they_are_values_with_checked_tolerances():
    assert sd.Dopri5() == sd.Dopri5(1e-6, 1e-8)
    assert sd.Dopri5() != sd.Tsit5()
    assert sd.Dopri5(rtol=1e-3) != sd.Dopri5()
    for bad in ({"rtol": 0.0}, {"atol": -1.0}, {"max_steps": 0}):
        with pytest.raises(sd.TimeError, match=r"Dopri5: needs rtol > 0, atol > 0 and max_steps >= 1"):
            sd.Dopri5(**bad)
