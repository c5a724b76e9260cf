"""Steps whose length each series chooses."""

import math

import pytest

import stochdyn as sd
from stochdyn.solvers.pairs import stepper
from tests.hybrids import number


def error_of_a_step(solver, h):
    t = number([[0.3], [1.0]])
    z = (-t.sin()).exp()
    f = -z * t.cos()
    end, slope, error = stepper(solver).step(lambda t, z: -z * t.cos(), t, number(h).expand(2, 1), z, f)
    assert (slope + end * (t + h).cos()).abs().max() < 1e-14
    return (end - (-(t + h).sin()).exp()).abs().max().item(), error


@pytest.mark.parametrize(
    ("solver", "order"), [(sd.Dopri5(), 6), (sd.Tsit5(), 6), (sd.RungeKutta4(), 5), (sd.Heun(), 3)]
)
def test_local_orders(solver, order):
    coarse, fine = error_of_a_step(solver, 0.2)[0], error_of_a_step(solver, 0.1)[0]
    assert math.log2(coarse / fine) > order - 1


@pytest.mark.parametrize("kind", [sd.Dopri5, sd.Tsit5])
def test_error_estimates_are_of_each_series(kind):
    """Of order 5, above the error of the step itself, in units of the tolerance."""
    true, size = error_of_a_step(kind(1e-6, 1e-8), 0.2)
    _, fine = error_of_a_step(kind(1e-6, 1e-8), 0.1)
    assert size.shape == (2,) and (size * 1e-6 > true / 3).all()
    assert ((size / fine).log2() > 4).all()
    assert error_of_a_step(sd.Heun(), 0.1)[1] is None


def test_others_are_refused():
    with pytest.raises(sd.FieldError, match="which Radau cannot"):
        stepper(sd.Radau())
