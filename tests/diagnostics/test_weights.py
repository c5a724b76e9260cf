import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from stochdyn.diagnostics.weights import (
    integrated,
    is_local,
    joint_weights,
    log_mean,
    mean,
    series_count,
    series_plates,
    tails,
)
from stochdyn.inference.draws import draw
from stochdyn.inference.evidence import Evidence

F64 = torch.float64


def model(y):
    level = pyro.sample("level", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(level, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide(y):
    level = pyro.sample("level", dist.Normal(torch.tensor(0.1, dtype=F64), 0.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal((y + level) / 2, math.sqrt(0.5)))


def drawn(y, draws=50):
    torch.manual_seed(0)
    with torch.no_grad():
        return draw((model, guide), y, draws)


def test_what_belongs_to_series_and_what_is_shared():
    y = torch.tensor([0.3, -1.0, 2.0], dtype=F64)
    found = drawn(y)
    assert series_count(found, y) == 3
    plates = series_plates(found, 3)
    assert plates == {("rows",)} and series_plates(found, 4) == set()
    assert [is_local(found.prior[name], plates) for name in ("level", "z")] == [False, True]
    weights = joint_weights(found, 3)
    level = found.latents["level"].value
    expected = dist.Normal(level[:, None], math.sqrt(2.0)).log_prob(y)  # z's guide is exact given the level
    np.testing.assert_allclose(weights.series, expected.numpy(), atol=1e-12)
    shared = dist.Normal(0.0, 1.0).log_prob(level) - dist.Normal(0.1, 0.5).log_prob(level)
    np.testing.assert_allclose(weights.shared, shared.numpy(), atol=1e-6)
    np.testing.assert_allclose(weights.joint, (expected.sum(1) + shared).numpy(), atol=1e-6)


def test_readings_in_a_plate_of_their_own_belong_to_their_series():
    y = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.2, -0.5]], dtype=F64)  # (time, series)

    def repeated(y):
        with pyro.plate("rows", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            with pyro.plate("time", 2, dim=-2):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def exact(y):
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("z", dist.Normal(y.sum(0) / 3, math.sqrt(1 / 3)))

    torch.manual_seed(0)
    with torch.no_grad():
        weights = joint_weights(draw((repeated, exact), y, 20), 3)
    cov = torch.eye(2, dtype=F64) + 1
    expected = dist.MultivariateNormal(torch.zeros(2, dtype=F64), cov).log_prob(y.T)
    np.testing.assert_allclose(weights.series, expected.expand(20, 3).numpy(), atol=1e-6)
    np.testing.assert_allclose(weights.shared, 0.0)


def test_channels_as_many_as_series_are_no_series():
    y = torch.zeros(3, 3, dtype=F64)

    def spread(y):
        with pyro.plate("channels", 3):
            s = pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("rows", 3):
            noise = dist.Normal(torch.zeros((), dtype=F64), s.unsqueeze(-2)).to_event(1)
            pyro.sample("y", noise, obs=y)

    def narrow(y):
        with pyro.plate("channels", 3):
            pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=F64), 0.1))

    torch.manual_seed(0)
    with torch.no_grad():
        found = draw((spread, narrow), y, 20)
    assert series_plates(found, 3) == {("rows",)}
    s, y_prob = found.prior["s"], found.observed["y"].log_prob
    lost = (s.log_prob - found.latents["s"].log_prob).sum(1)
    np.testing.assert_allclose(joint_weights(found, 3).shared, lost.numpy())
    np.testing.assert_allclose(joint_weights(found, 3).series, y_prob.numpy())


def test_without_series_everything_is_shared():
    found = drawn(torch.zeros(3, dtype=F64))
    assert joint_weights(found, None).series is None
    np.testing.assert_allclose(joint_weights(found, None).joint, joint_weights(found, 3).joint)


def test_the_path_integrated_out():
    found = integrated(Evidence(torch.ones(10, 3), torch.full((10,), 2.0)))
    assert found.joint.tolist() == [5.0] * 10


def test_a_gap_and_its_error():
    """For q = N(0, s^2) of N(0, 1) the gap is the divergence, (s^2 - 1)/2 - log s."""
    rng, s, off = np.random.default_rng(0), 0.8, []
    for _ in range(200):
        z = s * rng.normal(size=1000)
        gap = log_mean(*2 * [-(z**2) / 2 + (z / s) ** 2 / 2 + math.log(s)])
        off.append((gap.value - (s**2 - 1) / 2 + math.log(s)) / gap.error)
    assert abs(np.mean(off)) < 0.5
    assert 0.7 < np.std(off) < 1.3
    both = log_mean(np.zeros((10, 2)), less=np.ones((10, 2)))
    assert both.value.tolist() == [-1.0, -1.0] and both.error.tolist() == [0.0, 0.0]
    assert mean(np.ones((10, 2))).value.tolist() == [1.0, 1.0]


def test_weights_that_are_not_finite_have_no_tail():
    good, bad = tails(np.stack([np.random.default_rng(0).normal(size=100), np.full(100, -np.inf)], 1))
    assert np.isfinite(good.k) and np.isnan(bad.k) and not bad.good
