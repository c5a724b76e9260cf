"""Mutual information against quadrature and closed forms; active units; what cannot be compared."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import stochdyn as sd
from stochdyn.errors import FitError
from stochdyn.inference.collapse import PosteriorCollapse, mutual_information, unconstrained
from stochdyn.inference.draws import draw, draw_prior, evaluating
from stochdyn.inference.local import Layout
from tests.programs import F64, local_theta, normal, ou, ou_path, ou_series, own_times

SLOPE, NOISE = 1.5, 0.8


@pytest.fixture(autouse=True)
def _seed():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def model(x):
    shift = pyro.sample("shift", normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        a = pyro.sample("a", normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b + shift, 1.0), obs=x)


def guide(x):
    """b follows a and nothing else, so all the information is in a."""
    shift = pyro.sample("shift", normal(0.0, 0.5))
    with pyro.plate("rows", len(x)):
        a = pyro.sample("a", dist.Normal(SLOPE * x + shift, NOISE))
        pyro.sample("b", dist.Normal(0.5 * a, 0.3))


def estimate(x, draws, shifts):
    with torch.no_grad():
        found = [
            mutual_information(guide, (x,), Layout("rows", 1), draws=1, shifts=shifts) for _ in range(draws)
        ]
    values = torch.tensor([value for value, _ in found], dtype=F64)
    return values.mean().item(), values.std().item() / math.sqrt(draws)


def by_quadrature(x, points=60):
    nodes, weights = (torch.as_tensor(a, dtype=F64) for a in np.polynomial.hermite_e.hermegauss(points))
    weights = weights / weights.sum()
    a = SLOPE * x[:, None] + NOISE * nodes
    every = dist.Normal(SLOPE * x, NOISE).log_prob(a[..., None])
    own = dist.Normal(SLOPE * x[:, None], NOISE).log_prob(a)
    return ((own - every.logsumexp(-1) + math.log(len(x))) * weights).sum(-1).mean().item()


def test_mutual_information_is_that_of_quadrature():
    x = torch.randn(12, dtype=F64)
    exact = by_quadrature(x)
    mean, error = estimate(x, draws=200, shifts=11)
    assert abs(mean - exact) < 4 * error
    assert abs(mean - exact - 0.05) > 4 * error  # control
    assert 0 < exact < math.log(12)


def test_mutual_information_of_a_linear_gaussian_guide():
    x = torch.randn(600, dtype=F64)
    x = (x - x.mean()) / x.std()
    mean, error = estimate(x, draws=10, shifts=599)
    closed = 0.5 * math.log(1 + SLOPE**2 / NOISE**2)
    # The finite number of series takes the place of a normal population.
    assert abs(mean - closed) < 4 * error + 3 / math.sqrt(2 * 600)
    few, _ = estimate(x, draws=10, shifts=60)
    assert abs(few - closed) < 0.15
    assert abs(mean - 1.5 * closed) > 0.3  # control


def test_what_is_measured():
    x = torch.linspace(-1, 1, 20, dtype=F64)
    found = sd.posterior_collapse((model, guide), x, draws=400)
    assert found.mutual_information == pytest.approx(by_quadrature(x), abs=0.15)
    assert found.limit == math.log(20)
    assert found.active_units == {"a": 1, "b": 1}
    shift_kl = torch.distributions.kl_divergence(normal(0.0, 0.5), normal(0.0, 1.0)).item()
    assert found.kl["shift"] == pytest.approx(shift_kl, abs=0.1)
    by_hand = 0.5 * (NOISE**2 + (SLOPE * x).square().mean() + 0.25 - 1) - math.log(NOISE)
    assert found.kl["a"] == pytest.approx(by_hand.item(), abs=0.1)
    lines = str(found).splitlines()
    assert lines[1].split() == ["site", "units", "active", "KL"]
    assert [line.split()[0] for line in lines[2:]] == ["shift", "a", "b"]
    assert lines[2].endswith("in all")


def test_a_collapsed_guide():
    def prior(x):
        pyro.sample("shift", normal(0.0, 0.5))
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    found = sd.posterior_collapse((model, prior), torch.randn(30, dtype=F64), draws=400)
    assert abs(found.mutual_information) < 1e-9
    assert found.active_units == {"a": 0, "b": 0}
    assert abs(found.kl["a"]) < 1e-9


def test_series_that_are_the_same_share_their_paths():
    one = ou_series(1, torch.linspace(0, 2, 6))
    same = sd.Series(one.times, one.values.expand(5, -1, -1))
    with torch.no_grad():
        found = mutual_information(sd.AmortizedGuide(ou), (same,), Layout("series", 1), draws=1, shifts=4)
    assert abs(found[0]) < 1e-8
    differing = ou_series(5, torch.linspace(0, 2, 6))
    found = sd.posterior_collapse((ou, sd.AmortizedGuide(ou)), differing, draws=30)
    assert 1 < found.mutual_information <= math.log(5) + 1e-9
    assert found.active_units["z"] > 15


def test_latents_before_the_path_count_too():
    batch = ou_series(4, torch.linspace(0, 2, 5))
    found = sd.posterior_collapse((local_theta, sd.AmortizedGuide(local_theta)), batch, draws=3)
    assert 0.5 < found.mutual_information <= math.log(4) + 1e-9
    assert set(found.active_units) == {"theta", "z"}
    assert set(found.kl) == {"level", "theta", "z"}


def test_pyros_own_guides():
    x = torch.randn(10, dtype=F64)
    auto = AutoNormal(model, init_scale=0.3)
    found = sd.posterior_collapse((model, auto), x, draws=20)
    assert found.mutual_information >= 0
    assert set(found.kl) == {"shift", "a", "b"}


def test_what_cannot_be_compared():
    own = ou_series(3, own_times(3, 5))
    with pytest.raises(FitError, match="path 'z': the series have times of their own"):
        sd.posterior_collapse((ou, sd.AmortizedGuide(ou)), own, draws=2)
    with pytest.raises(FitError, match="plate 'series' has 1 member"):
        sd.posterior_collapse((ou, sd.AmortizedGuide(ou)), ou_series(1, [0.0, 1.0]), draws=2)
    with pytest.raises(FitError, match="no plate over series"):
        sd.posterior_collapse((lambda x: None, lambda x: None), torch.zeros(3), draws=2)


def test_own_times_do_not_matter_without_paths():
    def level(batch):
        with batch.plate("series"):
            a = pyro.sample("a", normal(0.0, 1.0))
            seen = dist.Normal(a[..., None, None], 1.0).mask(batch.mask).to_event(2)
            pyro.sample("y", seen, obs=batch.values)

    found = sd.posterior_collapse((level, sd.AmortizedGuide(level)), ou_series(3, own_times(3, 5)), draws=5)
    assert found.active_units == {"a": 0}


def test_known_starts():
    def known(batch):
        grid = sd.TimeGrid(batch.times, substeps=2)
        with batch.plate("series"):
            start = batch.values[:, 0]
            path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.5], dtype=F64), start, grid.ts)
            z = pyro.sample("z", path)
            pyro.sample(
                "y", dist.Normal(grid.observed(z), 0.3).mask(batch.mask).to_event(2), obs=batch.values
            )

    with pytest.raises(FitError, match="compares the latents of different series"):
        sd.posterior_collapse((known, sd.AmortizedGuide(known)), ou_series(3, [0.0, 1.0, 2.0]), draws=2)


def test_a_path_outside_plates_has_its_own_units():
    def one_path(batch):
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0, dtype=F64), 0.5))
        grid = sd.TimeGrid(batch.times, substeps=2)
        z = pyro.sample("z", ou_path(grid.ts, 1.0, 0.0, sigma))
        with batch.plate("series"):
            seen = dist.Normal(grid.observed(z), 0.3).mask(batch.mask).to_event(2)
            pyro.sample("y", seen, obs=batch.values)

    pair, data = (one_path, sd.AmortizedGuide(one_path)), ou_series(3, [0.0, 1.0, 2.0])
    with evaluating(*pair, seed=0):
        found = draw(pair, data, 20)
        prior = draw_prior(pair, data, found)
    for site in (found.prior["z"], found.latents["z"], prior["z"]):
        assert unconstrained(site).shape == (20, 1, 5)
    assert unconstrained(prior["sigma"]).std().item() == pytest.approx(0.5, rel=0.5)


def test_the_table_is_plain_text():
    site = PosteriorCollapse.Site("loading", local=True, units=12, active=3, kl=1.25)
    assert str(PosteriorCollapse(0.5, 3.0, (site,))).splitlines()[-1] == (
        "loading     12       3     1.250  per series"
    )
