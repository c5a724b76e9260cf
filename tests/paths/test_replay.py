"""Gradients through the times of jumps: against closed forms, first and second order, and where there are none."""

import pytest
import torch

import stochdyn as sd
from tests.hybrids import ball, bounce_times, bounces, floor, number, spin


def physics():
    return [number(x).requires_grad_() for x in (10.0, 9.81, 0.8)]


@pytest.mark.parametrize("solver", [sd.Dopri5(), sd.RungeKutta4(3)], ids=lambda x: type(x).__name__)
def test_gradients_of_the_bounces(solver):
    """By height, gravity and restitution, to 1e-6: d t_k / dh, dg, de in closed form."""
    h, g, e = physics()
    _, jumps = bounces(h, g, e, 9.5, solver=solver)
    exact = bounce_times(h, g, e, 6)
    for k in range(6):
        found = torch.autograd.grad(jumps.times[k], (h, g, e), retain_graph=True)
        wanted = torch.autograd.grad(exact[k], (h, g, e), retain_graph=True)
        assert all((a - b).abs() < 1e-6 for a, b in zip(found, wanted, strict=True))
    assert wanted[2].abs() > 1  # what a time without its gradient would miss


def test_second_derivatives_are_right():
    h, g, e = physics()
    _, jumps = bounces(h, g, e, 6.0)
    exact = bounce_times(h, g, e, 3)[-1]
    found, wanted = (
        torch.autograd.grad(torch.autograd.grad(t, e, create_graph=True)[0], (h, g, e), retain_graph=True)
        for t in (jumps.times[2], exact)
    )
    assert all((a - b).abs() < 1e-6 for a, b in zip(found, wanted, strict=True))
    assert wanted[2].abs() > 1


@pytest.mark.slow
def test_gradients_of_the_path_and_of_the_accumulation():
    """By finite differences of the path, and in closed form for the Zeno time."""
    h, g, e = physics()
    path, jumps = bounces(h, g, e, 20.0)
    limit = (2 * h / g).sqrt() * (1 + 2 * e / (1 - e))
    found = torch.autograd.grad(jumps.accumulated, (h, g, e), retain_graph=True)
    wanted = torch.autograd.grad(limit, (h, g, e))
    assert all((a - b).abs() < 1e-4 * b.abs() for a, b in zip(found, wanted, strict=True))
    (slope,) = torch.autograd.grad(path[2, 0], e)
    with torch.no_grad():
        ends = [bounces(h, g, e + s, 20.0)[0][2, 0] for s in (1e-5, -1e-5)]
    assert (slope - (ends[0] - ends[1]) / 2e-5).abs() < 1e-6


@pytest.mark.slow
def test_by_a_level_a_start_and_a_network_in_the_condition():
    """gradcheck: each entry of the Jacobian against finite differences."""

    def solve(start, level, bend):
        up = sd.Trigger(
            lambda t, z: z[..., 0] - level - bend * z[..., 1] * t[..., 0], lambda t, z: z * (1 + level), 1
        )
        out = sd.odeint(
            spin, start, number([0.0, 1.0, 4.0]), jumps=[up], return_jumps=True, solver=sd.RungeKutta4(20)
        )
        return out[0], out[1].times[:, :1]

    start = number([[0.0, 1.0], [0.0, 1.3]]).requires_grad_()
    parts = [number(x).requires_grad_() for x in (0.4, 0.1)]
    assert torch.autograd.gradcheck(solve, (start, *parts), atol=1e-6)


def test_the_replay_is_the_search():
    """The same numbers with and without gradients."""
    _, g, e = physics()
    heights = torch.linspace(3, 12, 9, dtype=torch.float64)
    path, jumps = bounces(heights, g, e, 7.0, solver=sd.Dopri5(1e-9, 1e-11))
    with torch.no_grad():
        same, times = bounces(heights, g, e, 7.0, solver=sd.Dopri5(1e-9, 1e-11))
    assert path.requires_grad and not same.requires_grad
    assert (path - same).abs().max() < 1e-11 and jumps.counts.equal(times.counts)
    assert (jumps.values - times.values).nan_to_num(0.0).abs().max() < 1e-11


def test_a_step_in_the_condition_has_no_gradient():
    speed = number(1.0).requires_grad_()
    switch = sd.Trigger(lambda t, z: (z[..., 0] - 0.5).sign())
    with pytest.raises(sd.JumpError, match=r"series 0, trigger 0: the condition has no slope"):
        sd.odeint(lambda t, z: speed + 0 * z, number([0.0]), number([0.0, 1.0]), jumps=[switch])
    with torch.no_grad():
        sd.odeint(lambda t, z: speed + 0 * z, number([0.0]), number([0.0, 1.0]), jumps=[switch])


@pytest.mark.slow
def test_learning_a_restitution():
    """Adam finds e and g from three heights: the times of the bounces must have their gradient."""
    h, g, e = number([4.0, 6.0, 9.0]), number(9.81), number(0.7)
    start = torch.stack([h, 0 * h], -1)
    ts = torch.linspace(0, 2.4, 13, dtype=torch.float64)
    data = sd.odeint(ball(g), start, ts, jumps=[floor(e)]).detach()[..., 0]
    guess = [number(x).requires_grad_() for x in (9.0, 0.6)]
    optimiser = torch.optim.Adam(guess, lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        path = sd.odeint(ball(guess[0]), start, ts, jumps=[floor(guess[1])], solver=sd.RungeKutta4())
        (path[..., 0] - data).square().mean().backward()
        optimiser.step()
    assert (guess[1] - 0.7).abs() < 0.02 and (guess[0] - 9.81).abs() < 0.2


def test_the_naive_gradient_is_wrong():
    """Without the correction of the time (a search whose times are constants) d t / dh would be zero."""
    h, g, e = physics()
    _, jumps = bounces(h, g, e, 3.0)
    (right,) = torch.autograd.grad(jumps.times[0], h)
    assert (right - 0.5 * (2 / (h * g)).sqrt()).abs() < 1e-10 and right > 0.05
