"""Triggers, schedules and doses together in odeint, and beside its other options."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from tests.hybrids import GRAVITY, ball, floor, number


def test_no_jumps_change_nothing():
    ts = torch.linspace(0, 3, 7, dtype=torch.float64)
    plain = sd.odeint(ball(GRAVITY), number([10.0, 1.0]), ts, solver=sd.RungeKutta4(3))
    path, jumps = sd.odeint(
        ball(GRAVITY), number([10.0, 1.0]), ts, solver=sd.RungeKutta4(3), jumps=[], return_jumps=True
    )
    assert (path - plain).abs().max() < 1e-13 and jumps.values.shape == (0, 2)


def test_contexts_by_time_hold_from_their_row_on():
    ts, context = number([0.0, 1.0, 3.0]), number([[[1.0], [2.0], [9.0]]])
    up = sd.Trigger(lambda t, z, c: z[..., 0] - 4.0, lambda t, z, c: z - c)
    for solver in (sd.Dopri5(), sd.RungeKutta4(2)):
        z, jumps = sd.odeint(
            lambda t, z, c: c,
            number([[0.0]]),
            ts,
            context=context,
            jumps=[up],
            solver=solver,
            return_jumps=True,
        )
        assert (z[0, :, 0] - number([0.0, 1.0, 3.0])).abs().max() < 1e-12
        assert (jumps.times[0] - 2.5).abs().max() < 1e-12


def test_plates_and_vectorised_particles():
    """One ball per series, a restitution per particle: rsample shapes come out of the jump map alone."""
    seen = sd.odeint(
        ball(GRAVITY), number([[4.0, 0.0], [6.0, 0.0]]), number([0.0, 1.0, 1.5]), jumps=[floor(number(0.7))]
    )[..., :1]

    def model():
        e = pyro.sample("e", dist.Beta(number(5.0), number(3.0)))
        with pyro.plate("balls", 2):
            z = sd.odeint(
                ball(GRAVITY), number([[4.0, 0.0], [6.0, 0.0]]), number([0.0, 1.0, 1.5]), jumps=[floor(e)],
                solver=sd.RungeKutta4(),
            )  # fmt: skip
            pyro.sample("y", dist.Normal(z[..., :1], number(0.05)).to_event(2), obs=seen)

    pyro.clear_param_store()
    guide = pyro.infer.autoguide.AutoDelta(model)
    elbo = pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(40):
        svi.step()
    assert (guide.median()["e"] - 0.7).abs() < 0.02


def test_infusions_beside_triggers_and_schedules():
    """A pump runs into a tank that empties when full; the rate is no part of the user's state."""
    pump = sd.Doses([sd.Dose(1.0, 6.0, rate=2.0)])
    empty = sd.Trigger(lambda t, z: z[..., 0] - 3.0, lambda t, z: 0 * z, 1)
    halve = sd.Schedule(number([3.5]), lambda t, z: z / 2)
    z, jumps = sd.odeint(
        lambda t, z: 0 * z,
        number([0.0]),
        number([0.0, 2.0, 3.5, 5.0]),
        jumps=[pump, empty, halve],
        return_jumps=True,
    )
    assert (z[:, 0] - number([0.0, 2.0, 1.0, 2.0])).abs().max() < 1e-9
    assert (jumps.times - 2.5).abs().max() < 1e-9
    with pytest.raises(sd.FieldError, match="which Verlet does not see"):
        sd.odeint(ball(GRAVITY), number([0.0, 1.0]), number([0.0, 5.0]), jumps=[pump], solver=sd.Verlet())


@pytest.mark.parametrize(
    ("jump", "message"),
    [
        (sd.Doses([[sd.Dose(0.0, 1.0)]] * 3), r"times \(3,\), the path's is \(2,\).*doses\[batch.index\]"),
        (
            sd.Doses([sd.Dose(0.0, 1.0)]).adjusted(lag=number([0.1] * 3)),
            r"times \(\), lag_0 \(3,\), the path's",
        ),
        (
            sd.Schedule(number([0.5]), lambda t, z, a: z + a, number([[[1.0]]] * 3)),
            r"times \(\), amounts \(3,\), the path's",
        ),
    ],
)
def test_jumps_of_other_series_are_refused(jump, message):
    with pytest.raises(
        sd.ShapeError, match=r"`jumps\[0\]` is of other series than the path: batch shapes " + message
    ):
        sd.odeint(lambda t, z: z, number([[1.0], [2.0]]), number([0.0, 2.0]), jumps=[jump])
