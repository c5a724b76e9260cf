"""Conditions and jump maps: how they are read."""

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.trigger import Trigger, read_triggers, slope_along


@pytest.mark.parametrize("batch", [(), (5,), (2,), (4, 3)])
@pytest.mark.parametrize(
    ("condition", "flat"),
    [
        (lambda t, z: z[..., 0], True),
        (lambda t, z: z[..., :1], False),
        (lambda t, z: t - 1, False),
        (lambda t, z: t[..., 0] - 1, True),
        (lambda t, z: z.square().sum(-1) - 1, True),
    ],
)
def test_one_number_for_each_series_in_either_shape(batch, condition, flat):
    conditions, found = read_triggers([Trigger(condition)], torch.zeros(1), torch.ones(*batch, 2), None)
    assert conditions.flat == (flat,)
    assert found[0].shape == (*batch, 1)
    t, z = torch.zeros(*batch, 1), torch.ones(*batch, 2)
    assert conditions(t, z).shape == (*batch, 1)


@pytest.mark.parametrize("batch", [(), (5,), (2,)])
@pytest.mark.parametrize("condition", [lambda t, z: z, lambda t, z: z[:, 0], lambda t, z: z.sum()])
def test_other_shapes_are_refused(batch, condition):
    with pytest.raises((sd.ShapeError, sd.FieldError), match="condition of trigger 0"):
        read_triggers([Trigger(condition)], torch.zeros(1), torch.ones(*batch, 2), None)


def test_parameters_of_conditions_and_maps_make_a_batch():
    """Particles of a level alone: field and start know nothing of them."""
    level = torch.tensor([0.5, 1.0, 1.5])[:, None]
    up = sd.Trigger(lambda t, z: z[..., 0] - level, lambda t, z: 0 * z, 1)
    path, jumps = sd.odeint(
        lambda t, z: torch.ones_like(z),
        torch.zeros(2, 1),
        torch.tensor([0.0, 2.0]),
        jumps=[up],
        return_jumps=True,
    )
    assert path.shape == (3, 2, 2, 1)
    assert (jumps.times[..., 0] - level).abs().max() < 1e-6


def test_slopes_along_the_flow():
    z, t = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    f = torch.randn_like(z).requires_grad_()
    _, slope = slope_along(lambda t, z: (z[..., 0] * z[..., 1]).sin() + t[..., 0] ** 2, t, z, f)
    wanted = (z[:, 0] * z[:, 1]).cos() * (f[:, 0] * z[:, 1] + f[:, 1] * z[:, 0]) + 2 * t[:, 0]
    assert (slope - wanted).abs().max() < 1e-12 and slope.requires_grad
    assert slope_along(lambda t, z: torch.ones(4), t, z, f)[1].tolist() == [0.0] * 4


def test_maps_that_write_into_their_state_reach_no_other_series():
    """A ramp to 1 that is set to 0: the second series starts too low to get there, and z0 is the user's."""

    def clear(t, z):
        z[..., 0] = 0.0
        return z

    up = sd.Trigger(lambda t, z: z[..., 0] - 1.0, clear, 1)
    start = torch.tensor([[0.5], [-5.0]], dtype=torch.float64)
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
    z = sd.odeint(lambda t, z: torch.ones_like(z), start, ts, jumps=[up])
    assert (z[:, -1, 0] - torch.tensor([0.5, -4.0])).abs().max() < 1e-9
    assert start[:, 0].tolist() == [0.5, -5.0] and (z[:, 0, 0] == start[:, 0]).all()


@pytest.mark.parametrize("solver", [sd.Dopri5(), sd.RungeKutta4(4)])
def test_a_map_that_returns_nan_is_named(solver):
    far = sd.Trigger(lambda t, z: z[..., 0] - 9.0, lambda t, z: z)
    bad = sd.Trigger(lambda t, z: z[..., 0] - 1.0, lambda t, z: (1 - 2 * z).sqrt(), 1)
    start, ts = torch.tensor([[-5.0], [0.5]], dtype=torch.float64), torch.tensor([0.0, 1.0])
    with pytest.raises(
        sd.DivergedError,
        match=r"series 1, time 0\.5, trigger 1: the jump map returned \[nan\] for the state \[1\.0\]",
    ):
        sd.odeint(lambda t, z: torch.ones_like(z), start, ts, jumps=[far, bad], solver=solver)
