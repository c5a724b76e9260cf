"""Features of time: periodic ones, learned periods, and fields that use them in paths."""

import math

import numpy as np
import pyro
import pytest
import torch

import stochdyn as sd
from stochdyn.fields import AbstractTimeFeatures

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_features_are_sines_and_cosines():
    features = sd.FourierTime((2.0, 0.7), terms=2, trend=True).double()
    t = torch.linspace(-3, 5, 9, dtype=F64)[:, None]
    phases = 2 * np.pi * np.concatenate([k * t.numpy() / p for p in (2.0, 0.7) for k in (1, 2)], -1)
    expected = np.concatenate([np.sin(phases), np.cos(phases), t.numpy()], -1)
    np.testing.assert_allclose(features(t).numpy(), expected, atol=1e-12)
    assert features.size == expected.shape[-1] == 9


def test_a_phase_keeps_its_digits_after_many_periods():
    features = sd.FourierTime(1.0, terms=4)
    t = 1000 + torch.linspace(0, 1, 50)[:, None]
    error = (features(t) - sd.FourierTime(1.0, terms=4).double()(t.double()).float()).abs().max()
    assert error < 4 * 2 * math.pi * 1e-6


@pytest.mark.parametrize("context_dim", [0, 3])
def test_a_field_of_them_equals_the_net_on_all_inputs(context_dim):
    time = sd.FourierTime(1.3, terms=2, trend=True)
    field = sd.NeuralField(2, hidden=(5,), context_dim=context_dim, time=time).double()
    z, t = torch.randn(6, 7, 2, dtype=F64), torch.randn(6, 1, 1, dtype=F64)
    c = torch.randn(6, 7, 3, dtype=F64) if context_dim else None
    inputs = torch.cat([x for x in (z, c, time(t).expand(6, 7, 5)) if x is not None], -1)
    torch.testing.assert_close(field(t, z, c), field.net(inputs))
    if c is not None:
        given, value = field.prepared(c)
        torch.testing.assert_close(value(t, z, given), field.net(inputs))


def test_periodic_fields_and_the_control():
    z, t = torch.randn(4, 2, dtype=F64), torch.tensor([0.4], dtype=F64)
    periodic = sd.NeuralField(2, hidden=(5,), time=sd.FourierTime(1.5)).double()
    torch.testing.assert_close(periodic(t + 30 * periodic.time.period, z), periodic(t, z))
    plain = sd.NeuralField(2, hidden=(5,), time=True).double()
    assert (plain(t + 30 * 1.5, z) - plain(t, z)).abs().min() > 1e-3


def test_scoring_a_path_equals_its_steps_and_its_draw():
    drift = sd.NeuralField(1, hidden=(5,), context_dim=1, time=sd.FourierTime(0.5, terms=2)).double()
    ts, context = torch.linspace(0, 1, 9, dtype=F64), torch.randn(3, 1, dtype=F64)
    path = sd.SDEPath(drift, torch.tensor([0.3], dtype=F64), torch.zeros(1, dtype=F64), ts, context=context)
    z, total = path.rsample().detach(), 0.0
    for k in range(8):
        mean = z[:, k] + drift(ts[k : k + 1], z[:, k], context) / 8
        total = total + torch.distributions.Normal(mean, 0.3 / 8**0.5).log_prob(z[:, k + 1]).sum(-1)
    torch.testing.assert_close(path.log_prob(z), total)
    torch.testing.assert_close(path.guided().log_prob(z), total)


def test_a_period_is_learned():
    """dz = a sin(2 pi t / 3) dt observed at once: regression on the increments finds the period."""
    ts = 0.05 * torch.arange(601, dtype=F64)
    drift = sd.NeuralField(1, hidden=(), time=sd.FourierTime(2.8, terms=1, learned=True)).double()
    noise, start = torch.tensor([0.05], dtype=F64), torch.zeros(1, dtype=F64)
    z = sd.SDEPath(lambda t, x: torch.sin(2 * math.pi * t / 3) - x, noise, start, ts).sample()
    optimiser = torch.optim.Adam(drift.parameters(), lr=0.02)
    for _ in range(250):
        optimiser.zero_grad()
        (-sd.SDEPath(drift, noise, start, ts).log_prob(z)).backward()
        optimiser.step()
    # Fisher information of the phase rate: sum dt a^2 t^2 / (2 g^2) over T = 30, so an sd of the period of 3^2 / 2 pi x.
    deviation = 9 / (2 * math.pi) / math.sqrt(30**3 / 12 / (2 * 0.05**2))
    assert abs(drift.time.period.item() - 3) < 5 * deviation
    assert 5 * deviation < 0.05 < abs(2.8 - 3)


def test_features_of_ones_own_and_random_weights():
    class Square(AbstractTimeFeatures):
        size = 1

        def forward(self, t):
            return t.square()

    drift = sd.bayesian(sd.NeuralField(2, hidden=(3,), time=Square()), "drift").double()
    t, z = torch.linspace(0, 1, 5, dtype=F64)[:, None, None], torch.zeros(5, 4, 2, dtype=F64)
    with pyro.plate("_draws", 6, dim=-2):
        drawn = sd.draw_weights(drift)
    many = drawn(t[:, None], z[:, None])
    assert many.shape == (5, 6, 4, 2)
    weights = drawn.net.layers
    for layer in weights:
        layer.weight, layer.bias = layer.weight[2, 0], layer.bias[2, 0]
    torch.testing.assert_close(drawn(t, z), many[:, 2])


def test_refused():
    for options in (
        {"period": 0.0},
        {"period": ()},
        {"period": (1.0, math.inf)},
        {"period": 1.0, "terms": 0},
    ):
        with pytest.raises(sd.FieldError, match="periods must be positive and `terms` at least 1"):
            sd.FourierTime(**options)
