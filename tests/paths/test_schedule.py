"""Jumps at known times."""

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.schedule import check_window, on_grid
from tests.hybrids import number


@pytest.mark.parametrize("solver", [sd.Dopri5(1e-9, 1e-11), sd.RungeKutta4(60)])
def test_interventions_at_times_of_their_own(solver):
    """dz = -z dt, doubled or set at known times, on the grid and off it."""
    ts = number([[0.0, 1.0, 2.0], [0.0, 0.5, 3.0]])
    double = sd.Schedule(number([[0.3, 1.0], [2.0, torch.inf]]), lambda t, z: 2 * z)
    reset = sd.Schedule(
        number([[1.5], [0.5]]), lambda t, z, level: level.expand(z.shape), number([[[3.0]], [[4.0]]])
    )
    z = sd.odeint(lambda t, z: -z, number([1.0]), ts, jumps=[double, reset], solver=solver)[..., 0]
    d = (-number([0.0, 1.0, 0.5, 2.5])).exp()
    wanted = torch.stack([torch.stack([d[0], 4 * d[1], 3 * d[2]]), torch.stack([d[0], 4 * d[0], 8 * d[3]])])
    assert (z - wanted).abs().max() < 1e-6
    ignored = sd.odeint(lambda t, z: -z, number([1.0]), ts, solver=solver)[..., 0]
    assert (ignored - wanted).abs().max() > 1  # a solver that does not see the schedule


def test_the_gradient_by_a_time_is_exact():
    """z(T) = 2 exp(-k1 s) exp(-k2 (T - s)) with a rate that changes at s: d/ds = (k2 - k1) z, twice too."""
    s = number(0.7).requires_grad_()
    change = sd.Schedule(s[None], lambda t, z: torch.stack([2 * z[..., 0], 0 * z[..., 1] + 3.0], -1))
    z = sd.odeint(
        lambda t, z: torch.stack([-z[..., 0] * z[..., 1], 0 * z[..., 1]], -1), number([1.0, 0.5]), number([0.0, 1.0, 2.0]),
        jumps=[change], solver=sd.Dopri5(1e-11, 1e-12),
    )[-1, 0]  # fmt: skip
    (first,) = torch.autograd.grad(z, s, create_graph=True)
    (second,) = torch.autograd.grad(first, s)
    assert (first - 2.5 * z).abs() < 1e-8 and (second - 6.25 * z).abs() < 1e-6


def test_with_a_trigger_beside_it():
    """A tank that is filled at known times and drained when it is full."""
    full = sd.Trigger(lambda t, z: z[..., 0] - 10.0, lambda t, z: 0 * z, 1)
    fill = sd.Schedule(number([1.0, 2.0]), lambda t, z: z + 5.0)
    z, jumps = sd.odeint(
        lambda t, z: torch.ones_like(z),
        number([0.0]),
        number([0.0, 1.5, 2.0, 4.0]),
        jumps=[full, fill],
        return_jumps=True,
    )
    assert z[:, 0].tolist() == [0.0, 6.5, 12.0, 14.0] and jumps.counts == 0  # carried over, not crossed
    z, jumps = sd.odeint(
        lambda t, z: torch.ones_like(z), number([0.0]), number([0.0, 1.5, 4.0, 6.0]), jumps=[full, sd.Schedule(
            number([1.0]), lambda t, z: z + 5.0)], return_jumps=True,
    )  # fmt: skip
    assert (jumps.times - 5.0).abs().max() < 1e-12 and z[-1].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("times", "amounts", "error", "message"),
    [
        (
            number([[0.0, 1.0], [1.0, 0.5]]),
            None,
            sd.TimeError,
            r"series 1, jump 1: time 0.5 is not at or after",
        ),
        (number([0.0, torch.nan]), None, sd.TimeError, r"series 0, jump 1: time nan"),
        ([0.0], None, sd.ShapeError, r"`times` must be a floating tensor"),
        (
            number([0.0, 1.0]),
            [[1.0], [2.0]],
            sd.ShapeError,
            r"`amounts` must be a floating tensor .*, got list",
        ),
        (
            number([[0.0, 1.0]] * 2),
            number([[[1.0], [2.0]]] * 3),
            sd.ShapeError,
            r"schedule_times \(2,\), schedule_amounts \(3,\)",
        ),
        (
            number([0.0, 1.0]),
            number([1.0]),
            sd.ShapeError,
            r"`amounts` must be a floating tensor .*amount\), got \(1,\)",
        ),
    ],
)
def test_faults_have_names(times, amounts, error, message):
    with pytest.raises(error, match=message):
        sd.Schedule(times, lambda t, z, *a: z, amounts)


def test_jumps_outside_the_path_are_refused():
    for time, where in ((3.0, "after"), (-1.0, "before")):
        schedule = sd.Schedule(number([[time]]), lambda t, z: z)
        with pytest.raises(
            sd.TimeError, match=rf"jumps\[0\]: series 0, jump 0: time {time:g} is {where} the path"
        ):
            sd.odeint(lambda t, z: z, number([1.0]), number([0.0, 2.0]), jumps=[schedule])
    check_window("doses", number([0.0, 2.0, torch.inf]), number([0.0, 2.0]))


def test_a_map_of_another_shape_is_refused():
    with pytest.raises(sd.FieldError, match=r"jump map of schedule 0 returned shape \(3,\)"):
        sd.odeint(
            lambda t, z: z,
            number([1.0, 2.0]),
            number([0.0, 2.0]),
            jumps=[sd.Schedule(number([1.0]), lambda t, z: number([1.0] * 3))],
        )


def test_maps_that_write_into_their_state_reach_no_other_series():
    def clear(t, z):
        z[..., 0] = 0.0
        return z

    start = number([[1.0], [2.0]])
    at = sd.Schedule(number([[0.5], [torch.inf]]), clear)
    z = sd.odeint(lambda t, z: torch.ones_like(z), start, number([0.0, 1.0]), jumps=[at])
    assert (z[..., 0] - number([[1.0, 0.5], [2.0, 3.0]])).abs().max() < 1e-9 and start[:, 0].tolist() == [
        1.0,
        2.0,
    ]


def test_a_map_that_returns_nan_is_named():
    fine, bad = sd.Schedule(number([0.2]), lambda t, z: z), sd.Schedule(number([0.5]), lambda t, z: z / 0)
    with pytest.raises(
        sd.DivergedError, match=r"series 0, time 0\.5, schedule 1: the jump map returned \[nan, inf\]"
    ):
        sd.odeint(lambda t, z: 0 * z, number([0.0, 1.0]), number([0.0, 1.0]), jumps=[fine, bad])


def test_a_single_path_is_series_0():
    with pytest.raises(sd.TimeError, match=r"jumps\[0\]: series 0, jump 0: time 3 is after the path"):
        sd.odeint(
            lambda t, z: z,
            number([1.0]),
            number([0.0, 2.0]),
            jumps=[sd.Schedule(number([3.0]), lambda t, z: z)],
        )


def test_times_off_a_coarse_grid_stay_and_gradients_pass():
    times = number([0.3, 0.7, 0.7000001, torch.inf]).requires_grad_()
    ts = torch.tensor([[0.0, 0.7], [0.3, 0.9]])
    moved = on_grid(times, ts.double(), ts.dtype)
    assert moved[0].tolist() == [0.3, ts[0, 1].item(), 0.7000001, torch.inf]
    assert moved[1].tolist() == [ts[1, 0].item(), 0.7, 0.7000001, torch.inf]
    assert torch.autograd.grad(moved[0, :3].sum(), times)[0].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert on_grid(times, ts.double(), torch.float64) is times
