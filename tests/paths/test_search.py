"""Jumps of hybrid systems where they must be: closed forms, one series beside another, and every way to go wrong."""

import math

import pytest
import torch
import torchdiffeq

import stochdyn as sd
from tests.hybrids import GRAVITY, ball, bounce_times, bounces, floor, number, spin

SOLVERS = [sd.Dopri5(), sd.Tsit5(), sd.RungeKutta4(3), sd.Heun(2), sd.Verlet(), sd.Rosenbrock(2)]


def crossings(condition, direction=0, start=(0.0, 1.0), end=10.0, solver=sd.Dopri5(1e-10, 1e-11), **trigger):  # noqa: B008
    """Times and triggers on the circle x = sin t, or on another field's path."""
    field = trigger.pop("field", spin)
    trigger = sd.Trigger(condition, direction=direction, **trigger)
    ts = torch.linspace(0, end, 11, dtype=torch.float64)
    path, jumps = sd.odeint(field, number(start), ts, solver=solver, jumps=[trigger], return_jumps=True)
    return jumps.times, path


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: type(x).__name__)
def test_bounces_to_one_part_in_1e8(solver):
    """Oracle 2.14."""
    with torch.no_grad():
        path, jumps = bounces(number(10.0), GRAVITY, number(0.8), 9.5, solver=solver)
    wanted = number([1.4278431229, 3.7123921196, 5.5400313170, 7.0021426748, 8.1718317612, 9.1075830302])
    assert (jumps.times - wanted).abs().max() < 1e-8
    assert (jumps.times - bounce_times(number(10.0), GRAVITY, number(0.8), 6)).abs().max() < 1e-10
    assert jumps.counts == 6 and not jumps.stopped.isfinite() and (jumps.triggers == 0).all()
    assert (path[:, 0] > -1e-9).all()
    assert (jumps.times - wanted.roll(1)).abs().min() > 0.1  # would fail for other times


def test_apex_and_energy_after_each_bounce():
    """At the times halfway between bounces the ball is at h e^2k, without speed; the energy falls by e^2."""
    h, e = number(10.0), number(0.8)
    times = bounce_times(h, GRAVITY, e, 6)
    apex = torch.cat([number([0.0]), (times[1:] + times[:-1]) / 2])
    with torch.no_grad():
        path = sd.odeint(ball(GRAVITY), number([10.0, 0.0]), apex, jumps=[floor(e)])
    k = torch.arange(6, dtype=torch.float64)
    assert (path[:, 0] - 10.0 * 0.8 ** (2 * k)).abs().max() < 1e-8
    assert path[1:, 1].abs().max() < 1e-8
    energy = GRAVITY * path[:, 0] + path[:, 1].square() / 2
    assert (energy[1:] / energy[:-1] - 0.64).abs().max() < 1e-8


def test_zeno_has_a_name():
    """The bounces accumulate at 12.8505881063: a field of the jumps, or an error where nobody asked for them."""
    start = number([[10.0, 0.0], [10.0, 0.0]])
    ts, e = number([0.0, 5.0, 12.0, 12.8505, 12.86, 20.0]), number([0.8, 0.2])
    with torch.no_grad():
        path, jumps = sd.odeint(ball(GRAVITY), start, ts, jumps=[floor(e)], return_jumps=True)
        first = number(2 * 10.0 / 9.81).sqrt()
        wanted = first * (1 + 2 * e / (1 - e))
        assert wanted[0].item() == pytest.approx(12.8505881063, abs=1e-9)
        assert (jumps.accumulated - wanted).abs().max() < 1e-8
        assert (path[:, 4:].abs() < 1e-5).all() and (path[0, 2, 0] > 0.01)
        with pytest.raises(
            sd.JumpError, match=r"series 0: its jumps accumulate at time 12\.8505881\d+, .*Zeno"
        ):
            sd.odeint(ball(GRAVITY), start, ts, jumps=[floor(e)])
        alive = sd.odeint(ball(GRAVITY), start[:1], ts[:3], jumps=[floor(e[:1])], return_jumps=True)[1]
    assert not alive.accumulated.isfinite().any()  # many bounces are no accumulation


def test_each_series_jumps_at_its_own_times():
    """A batch gives what each series gives alone; the naive batch stops all at the first."""
    heights = torch.linspace(5, 15, 7, dtype=torch.float64)
    with torch.no_grad():
        path, jumps = bounces(heights, GRAVITY, number(0.8), 6.0)
        for k, h in enumerate(heights):
            alone, single = bounces(h, GRAVITY, number(0.8), 6.0)
            count = int(single.counts)
            assert jumps.counts[k] == count
            assert (jumps.times[k, :count] - single.times).abs().max() < 1e-11
            assert not jumps.times[k, count:].isfinite().any()
            assert (path[k] - alone).abs().max() < 1e-9

        def naive(t, z):
            return torch.stack([z[..., 1], -9.81 + 0 * z[..., 1]], -1)

        start = torch.stack([heights, 0 * heights], -1)
        time, _ = torchdiffeq.odeint_event(
            naive, start, number(0.0), event_fn=lambda t, z: z[..., 0].min(), atol=1e-9, rtol=1e-9
        )
    own = bounce_times(heights, GRAVITY, number(0.8), 1)[:, 0]
    assert (jumps.times[:, 0] - own).abs().max() < 1e-10
    assert time.numel() == 1 and (time - own).abs().max() > 0.5


def test_series_of_their_own_times_and_contexts():
    ts = number([[0.0, 1.0, 4.0, 4.0], [2.0, 2.5, 3.0, 9.0]])
    level = number([[0.5], [-2.0]])
    rise = sd.Trigger(lambda t, z, c: z[..., 0] - c[..., 0], lambda t, z, c: z - 1.0, direction=1)
    for solver in (sd.Dopri5(), sd.RungeKutta4(3)):
        path, jumps = sd.odeint(
            lambda t, z, c: torch.ones_like(z), number([[0.0], [-4.5]]), ts,
            jumps=[rise], return_jumps=True, context=level, solver=solver,
        )  # fmt: skip
        assert (jumps.times[0, :4] - number([0.5, 1.5, 2.5, 3.5])).abs().max() < 1e-12
        assert (jumps.times[1, :5] - number([4.5, 5.5, 6.5, 7.5, 8.5])).abs().max() < 1e-12
        assert (path[:, -1, 0] - number([0.0, -2.5])).abs().max() < 1e-12
        assert path[0, 2] == path[0, 3]


@pytest.mark.parametrize(
    ("condition", "direction", "wanted"),
    [
        (lambda t, z: z[..., 1], 0, [math.pi / 2, 3 * math.pi / 2, 5 * math.pi / 2]),
        (
            lambda t, z: z[..., 0],
            0,
            [math.pi, 2 * math.pi, 3 * math.pi],
        ),  # a start on the surface is no crossing
        (lambda t, z: z[..., 0], 1, [0.0, 2 * math.pi]),  # but for one that leaves it in the direction
        (lambda t, z: z[..., 0], -1, [math.pi, 3 * math.pi]),
        (lambda t, z: t - 3.0, 0, [3.0]),
        (lambda t, z: z[..., 0] - 1.0, 0, []),  # touches
        (lambda t, z: z[..., 0] - 1.0001, 0, []),
        (
            lambda t, z: z[..., 0] - 0.9999,
            0,
            [a + s for a in (math.pi / 2, 5 * math.pi / 2) for s in (-math.acos(0.9999), math.acos(0.9999))],
        ),
        (
            lambda t, z: (z[..., 0] - 0.5).sign(),
            0,
            [math.pi / 6, 5 * math.pi / 6, 13 * math.pi / 6, 17 * math.pi / 6],
        ),
    ],
)
@pytest.mark.parametrize(
    "solver", [sd.Dopri5(1e-9, 1e-10), pytest.param(sd.RungeKutta4(30), marks=pytest.mark.slow)]
)
def test_crossings_of_a_circle(condition, direction, wanted, solver):
    times, path = crossings(condition, direction, solver=solver)
    assert len(times) == len(wanted)
    if wanted:
        assert (times - number(wanted)).abs().max() < 2e-6
    assert (path[:, 0] - torch.linspace(0, 10, 11, dtype=torch.float64).sin()).abs().max() < 1e-6


def test_a_path_has_the_state_after_a_jump_at_its_time():
    _, path = crossings(lambda t, z: t - 3.0, field=lambda t, z: 0 * z, jump_map=lambda t, z: z + 1)
    assert path[:, 0].tolist() == [0.0] * 3 + [1.0] * 8


def test_a_start_on_the_floor():
    """Moving down it bounces at once; moving up it flies."""
    for speed, first in ((-3.0, 0.0), (3.0, 2 * 3.0 / 9.81)):
        _, jumps = sd.odeint(
            ball(GRAVITY),
            number([0.0, speed]),
            number([0.0, 0.7]),
            jumps=[floor(number(0.8))],
            return_jumps=True,
        )
        assert jumps.times[0].item() == pytest.approx(first, abs=1e-9)


def test_terminal_triggers_stop_their_series_only():
    half = sd.Trigger(lambda t, z: z[..., 0] - 0.5, direction=1, terminal=True)
    start = number([[0.0, 1.0], [0.0, 0.4]])
    path, jumps = sd.odeint(
        spin, start, torch.linspace(0, 10, 11, dtype=torch.float64), jumps=[half], return_jumps=True
    )
    assert jumps.stopped[0].item() == pytest.approx(math.pi / 6, abs=1e-6) and jumps.stopped[1].isinf()
    assert (path[0, 1:] - number([0.5, math.cos(math.pi / 6)])).abs().max() < 1e-6
    assert (path[1, :, 0] - 0.4 * torch.linspace(0, 10, 11, dtype=torch.float64).sin()).abs().max() < 1e-5


def test_a_thermostat_with_several_triggers_in_one_gap():
    """Heating on at 19 and off at 21: each phase is an exponential."""
    on = sd.Trigger(
        lambda t, z: z[..., 0] - 19, lambda t, z: torch.stack([z[..., 0], 0 * z[..., 1] + 1], -1), -1
    )
    off = sd.Trigger(lambda t, z: z[..., 0] - 21, lambda t, z: z * number([1.0, 0.0]), 1)
    wanted, time, warmth, heat = [], 0.0, 20.0, 0.0
    while time < 5.0:
        level, goal = 10 + 16 * heat, 21.0 if heat else 19.0
        time -= 2 * math.log((goal - level) / (warmth - level))
        wanted, warmth, heat = [*wanted, time], goal, 1 - heat
    _, jumps = sd.odeint(
        lambda t, z: torch.stack([-0.5 * (z[..., 0] - 10) + 8 * z[..., 1], 0 * z[..., 1]], -1),
        number([20.0, 0.0]), number([0.0, 5.0]), jumps=[on, off], return_jumps=True, solver=sd.Dopri5(1e-11, 1e-12),
    )  # fmt: skip
    assert (jumps.times - number(wanted[:-1])).abs().max() < 1e-8
    assert jumps.triggers.tolist() == [0, 1] * 4 + [0]


def test_a_corner_where_two_triggers_fire_together():
    """A ball in a box that runs into its corners: both walls turn it, in the order of the list."""

    def wall(axis, side):
        turn = number([1.0, 1.0, 1.0, 1.0])
        turn[2 + axis] = -1.0
        return sd.Trigger(
            lambda t, z: z[..., axis] if side == 0 else 1 - z[..., axis], lambda t, z: turn * z, -1
        )

    start = number([[0.5, 0.5, 1.0, 1.0], [0.2, 0.3, 0.7, -1.3]])
    ts = torch.linspace(0, 3, 7, dtype=torch.float64)
    walls = [wall(0, 1), wall(1, 1), wall(0, 0), wall(1, 0)]
    path, jumps = sd.odeint(
        lambda t, z: torch.cat([z[..., 2:], 0 * z[..., 2:]], -1), start, ts, jumps=walls, return_jumps=True
    )
    free = start[:, None, :2] + start[:, None, 2:] * ts[:, None]
    assert (path[..., :2] - (1 - ((free % 2) - 1).abs())).abs().max() < 1e-12
    assert jumps.triggers[0].tolist() == [0, 1, 2, 3, 0, 1]


def test_a_jump_does_not_fire_what_it_passes():
    up = sd.Trigger(lambda t, z: z[..., 0] - 1, lambda t, z: z + 5, 1)
    between = sd.Trigger(lambda t, z: z[..., 0] - 3, lambda t, z: 0 * z)
    path, jumps = sd.odeint(
        lambda t, z: torch.ones_like(z),
        number([0.0]),
        number([0.0, 2.0]),
        jumps=[up, between],
        return_jumps=True,
    )
    assert path[-1].item() == pytest.approx(7.0) and jumps.counts == 1


def test_single_precision():
    path, jumps = sd.odeint(
        ball(GRAVITY.float()), torch.tensor([10.0, 0.0]), torch.tensor([0.0, 5.0]), jumps=[floor(torch.tensor(0.8))],
        return_jumps=True,
    )  # fmt: skip
    assert path.dtype == torch.float32
    assert (jumps.times - number([1.4278431229, 3.7123921196])).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"condition": lambda t, z: z}, sd.ShapeError, r"condition of trigger 0 must return one number .* got shape \(3, 2\)"),
        ({"condition": lambda t, z: z[..., 0].sum()}, sd.FieldError, r"condition of trigger 0 must return a tensor"),
        ({"condition": lambda t, z: z[..., 0].log()}, sd.DivergedError, r"series 0, time 3\.\d+, trigger 0: the condition is NaN"),
        ({"jump_map": lambda t, z: z[..., :1]}, sd.FieldError, r"jump map of trigger 0 returned shape \(3, 1\)"),
        ({"jump_map": lambda t, z: z.float()}, sd.DtypeError, r"jump map of trigger 0 returned torch.float32"),
        ({"jump_map": lambda t, z: z / 0}, sd.DivergedError, r"series \d, time "),
        ({"max_jumps": 2}, sd.PaddingError, r"series 0, time 9.42478: more than max_jumps=2 jumps"),
        ({"max_jumps": 0}, sd.PaddingError, r"`max_jumps` must be an integer of at least 1"),
        ({"solver": sd.Dopri8()}, sd.FieldError, r"which Dopri8 cannot. Use sd.Dopri5"),
        ({"gradient": sd.Adjoint()}, sd.FieldError, r"not of Adjoint"),
        ({"jumps": "floor"}, sd.FieldError, r"`jumps\[0\]` must be an sd.Trigger"),
        ({"jumps": sd.Trigger(lambda t, z: z[..., 0])}, sd.FieldError, r"`jumps` must be a list"),
        ({"field": lambda t, z: z.square() + 1}, sd.DivergedError, r"series \d, time [01]\.\d+: the step became too small"),
    ],
)  # fmt: skip
def test_faults_have_names(change, error, message):
    trigger = {k: change.pop(k) for k in ("condition", "jump_map") if k in change}
    trigger = {"condition": lambda t, z: z[..., 0], "jump_map": lambda t, z: z} | trigger
    given = {"jumps": [sd.Trigger(**trigger)], "field": spin} | change
    with pytest.raises(error, match=message):
        sd.odeint(given.pop("field"), number([[0.0, 1.0]]).expand(3, 2), number([0.0, 4.0, 10.0]), **given)


@pytest.mark.parametrize("direction", [2, "up", True])
def test_directions_are_three(direction):
    with pytest.raises(sd.FieldError, match="`direction` must be -1"):
        sd.Trigger(lambda t, z: z[..., 0], direction=direction)


def test_a_field_that_no_step_can_follow_is_named():
    with pytest.raises(sd.DivergedError, match="more than 30 steps between two times"):
        crossings(lambda t, z: z[..., 0] - 5.0, solver=sd.Dopri5(1e-10, 1e-12, max_steps=30), end=1000.0)
