import math

import pytest
import torch

import stochdyn as sd
from stochdyn.fields.jumps import one_hot

ZERO = torch.zeros(1, dtype=torch.float64)


def test_the_closed_form_of_a_decay_solves_its_equation():
    flow = sd.DecayFlow(3, 1, push=-0.7).double()
    z = torch.tensor([0.4, 1.0, 2.0], dtype=torch.float64)
    ts = torch.tensor([0.0, 1.5], dtype=torch.float64)
    solved = sd.odeint(flow, z, ts, solver=sd.RungeKutta4(100))[-1]
    decay, shift = flow.over(ZERO, ts[1:])
    assert torch.allclose(decay * z + shift, solved, atol=1e-8)
    first, then = flow.over(ZERO, ts[1:] / 3), flow.over(ts[1:] / 3, ts[1:] * 2 / 3)
    assert torch.allclose(then[0] * (first[0] * z + first[1]) + then[1], solved, atol=1e-8)


def test_scales_of_time_stay_in_their_bounds():
    flow = sd.DecayFlow(4, 1, shortest=0.2, longest=8.0)
    with torch.no_grad():
        flow.place.copy_(torch.tensor([-100.0, 0.0, 100.0]))
    assert torch.allclose(flow.rate, torch.tensor([0.0, 5.0, (5 / 8) ** 0.5, 1 / 8]))


def test_decay_flows_take_parameters_of_every_series():
    flow = sd.DecayFlow(2)
    del flow.push
    flow.push = torch.tensor([[1.0], [2.0], [3.0]])
    assert flow.over(torch.zeros(1), torch.tensor([2.0]))[1].tolist() == [[2.0, 0.0], [4.0, 0.0], [6.0, 0.0]]


def test_jump_maps_read_the_class():
    jump = sd.AdditiveJump(2, classes=3).double()
    with torch.no_grad():
        jump.sizes.copy_(torch.arange(6.0).reshape(3, 2))
    z = torch.ones(4, 2, dtype=torch.float64)
    marks = torch.tensor([[0.0], [1.0], [2.0], [1.0]], dtype=torch.float64)
    assert jump(ZERO, z, marks).tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [3.0, 4.0]]
    neural = sd.NeuralJump(2, (8,), classes=3).double()
    assert neural(ZERO, z, marks).shape == (4, 2)
    assert not torch.allclose(neural(ZERO, z, marks)[0], neural(ZERO, z, marks)[1])
    assert torch.equal(neural(ZERO, z, marks)[1], neural(ZERO, z, marks)[3])
    assert one_hot(marks, 3, z).sum(-1).tolist() == [1.0] * 4


def test_the_intensity_starts_at_its_rate_and_holds_the_families():
    intensity = sd.JumpIntensity(3, kinds=2, rate=0.6).double()
    z = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.5, 2.0]], dtype=torch.float64)
    assert float(intensity(ZERO, z)[0].sum().detach()) == pytest.approx(0.6)
    with torch.no_grad():
        intensity.slope.copy_(torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.0, -1.0]]))
        intensity.log_rise.copy_(torch.tensor([[0.5, 0.25], [2.0, 1.0]]).log())
    power = 0.3 / (2.0 + 5.0**0.5)  # exp(-asinh(2)), of a coordinate that decays
    expected = torch.tensor([0.3 * torch.tensor(-0.2).exp() + 0.75, power + 3.0])
    assert torch.allclose(intensity(ZERO, z)[1], expected.double(), atol=1e-6)
    assert sd.JumpIntensity(3, ()).net is None


def test_a_larger_burst_is_no_catastrophe():
    """Ten times the jumps multiply the intensity by ten to the slope, not by exp(ten): only the integrator does that."""
    intensity = sd.JumpIntensity(2, (), rate=1.0).double()
    with torch.no_grad():
        intensity.slope.copy_(torch.tensor([[1.0, 1.5]]))
        intensity.log_rise.fill_(-40.0)
    for far, ratio in (([0.0, 1000.0], 10**1.5), ([100.0, 0.0], math.exp(90.0))):
        z = torch.tensor(far, dtype=torch.float64)
        found = intensity(ZERO, z) / intensity(ZERO, z / 10)
        assert found.item() == pytest.approx(ratio, rel=1e-3)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(sd.FieldError, match="shortest < longest"):
        sd.DecayFlow(2, shortest=3.0, longest=1.0)
    with pytest.raises(sd.FieldError, match="integrators <= state_dim"):
        sd.DecayFlow(2, 3)
    with pytest.raises(sd.FieldError, match="`rate` and `kinds` must be positive"):
        sd.JumpIntensity(2, rate=0.0)
