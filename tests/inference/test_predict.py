import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from tests.problems import OU, OU_TIMES, OU_VALUES
from tests.programs import F64, local_theta, normal, observe, ou, ou_path, ou_series, own_times

DRAWS = 4000
AHEAD = [3.4, 4.0]


def smoothed(times, values, seen, substeps=5):
    """Mean and covariance of the discretised chain at all times given what was seen, from dense Gaussians."""
    ts = sd.TimeGrid(times, substeps=substeps).ts
    dts, n = ts.diff(), len(ts)
    A, b = torch.eye(n, dtype=F64), torch.zeros(n, dtype=F64)
    variance = torch.cat(
        [torch.tensor([OU["sigma"] ** 2 / (2 * OU["theta"])], dtype=F64), OU["sigma"] ** 2 * dts]
    )
    b[0], b[1:] = OU["mu"], OU["theta"] * OU["mu"] * dts
    A[torch.arange(1, n), torch.arange(n - 1)] = -(1 - OU["theta"] * dts)
    inverse = torch.linalg.inv(A)
    mean, cov = inverse @ b, inverse @ torch.diag(variance) @ inverse.mT
    at = torch.arange(len(times)) * substeps
    mean, cov = mean[at], cov[at][:, at]
    S = cov[seen][:, seen] + OU["noise"] ** 2 * torch.eye(int(seen.sum()), dtype=F64)
    gain = cov[:, seen] @ torch.linalg.inv(S)
    return mean + gain @ (values[seen] - mean[seen]), cov - gain @ cov[seen]


def moments(found, seen=None, i=0, substeps=5):
    """Mean and variance at the real times of a series, given all that was seen of it or a part."""
    n = int(found.data.lengths[i])
    rows = found.times.expand(len(found.data), -1)[i, :n], found.data.values[i, :n, 0]
    mean, cov = smoothed(*rows, found.data.mask[i, :n, 0] if seen is None else seen, substeps)
    return mean, cov.diagonal()


def agrees(draws, mean, variance, errors=4.0):
    """(draw, time): the mean and the variance, each within standard errors of independent normal draws."""
    n = len(draws)
    off_mean = (draws.mean(0) - mean).abs() / (variance / n).sqrt()
    off_variance = (draws.var(0) - variance).abs() / (variance * math.sqrt(2 / n))
    return bool((off_mean < errors).all()), bool((off_variance < errors).all())


def oracle(mask=None):
    return sd.Series(OU_TIMES, OU_VALUES[None], mask=mask)


def exact(data, **options):
    return sd.predict((ou, sd.AmortizedGuide(ou)), data, draws=DRAWS, **options)


def test_smoothing_forecast_and_imputation_are_those_of_the_chain():
    """At the data, in gaps (.5, 2.2), past the end; with two of the data missing."""
    mask = torch.ones(1, 8, 1, dtype=torch.bool)
    mask[:, [2, 5]] = False
    data = oracle(mask)
    found = exact(data, ts=[0.5, 2.2, *AHEAD])
    assert found.times.tolist() == [0.1, 0.25, 0.5, 0.7, 0.75, 1.5, 1.9, 2.2, 2.6, 3.0, 3.4, 4.0]
    seen, (mean, variance) = found.data.mask[0, :, 0], moments(found)
    assert agrees(found.states[:, 0, :, 0], mean, variance) == (True, True)
    assert agrees(found.observations[:, 0, :, 0], mean, variance + OU["noise"] ** 2) == (True, True)
    # The controls: the filter's answer without the later data; observations without their noise.
    blind = seen & (torch.arange(len(seen)) < 5)
    assert agrees(found.states[:, 0, :, 0], *moments(found, blind)) == (False, False)
    assert not agrees(found.observations[:, 0, :, 0], mean, variance)[1]


def test_smoothing_on_a_fine_grid_is_the_continuous_answer():
    """The numbers of the continuous-time smoother; 40 steps per gap leave .005."""
    found = sd.predict((fine, sd.AmortizedGuide(fine)), oracle(), draws=1500)
    mean = torch.tensor([0.8160405962, 0.6925777619, 0.3004282745, 0.3349427771, 0.6226429555, 0.9719068642, 0.4038917617, 0.0946177422], dtype=F64)  # fmt: skip
    spread = torch.tensor([0.1684938797, 0.1654609528, 0.1515825203, 0.1527278933, 0.1774082074, 0.1772436859, 0.1772615512, 0.1787776986], dtype=F64)  # fmt: skip
    states = found.states[:, 0, :, 0]
    assert ((states.mean(0) - mean).abs() < 4 * spread / math.sqrt(1500) + 0.005).all()
    assert ((states.std(0) - spread).abs() < 4 * spread / math.sqrt(3000) + 0.005).all()
    assert found.last_observed.tolist() == [3.0]


def fine(batch):
    ou(batch, substeps=40)


def test_a_forecast_runs_on_from_the_last_state_by_itself():
    """Given the last state of each draw, what follows is the chain's own prediction: no message reaches it."""
    found = exact(oracle(), ts=AHEAD)
    states = found.states[:, 0, :, 0]
    last = states[:, 7]
    for k, (start, end) in enumerate(((3.0, 3.4), (3.4, 4.0))):
        dt = (end - start) / 5
        keep = (1 - OU["theta"] * dt) ** 5
        before = last if k == 0 else states[:, 8]
        mean = OU["mu"] + keep * (before - OU["mu"])
        variance = OU["sigma"] ** 2 * dt * sum((1 - OU["theta"] * dt) ** (2 * j) for j in range(5))
        rest = states[:, 8 + k] - mean
        zero, spread = torch.zeros((), dtype=F64), torch.tensor(variance, dtype=F64)
        assert agrees(rest, zero, spread) == (True, True)
        # Uncorrelated with the state before.
        assert abs(torch.corrcoef(torch.stack([rest, before]))[0, 1]) < 4 / math.sqrt(DRAWS)
    mean, variance = moments(found)
    assert agrees(states[:, 8:], mean[8:], variance[8:]) == (True, True)
    # The control: a path that saw one more observation is narrower.
    told = found.data.mask[0, :, 0].clone()
    told[8] = True
    assert moments(found, told)[1][8] < 0.5 * variance[8]
    assert not agrees(states, *moments(found, told))[1]


def test_ragged_series_at_their_own_times():
    data = sd.Series.from_list(
        [
            (torch.tensor([0.0, 0.3, 1.1], dtype=F64), torch.tensor([[0.5], [0.9], [0.2]], dtype=F64)),
            (torch.tensor([0.4], dtype=F64), torch.tensor([[-0.6]], dtype=F64)),
        ]
    )
    found = exact(data, ts=[0.8, 2.0])
    assert found.observations.shape == (DRAWS, 2, 5, 1)
    assert found.grids["z"].shape == (2, 21)
    for i, times in enumerate(([0.0, 0.3, 0.8, 1.1, 2.0], [0.4, 0.8, 2.0])):
        n = len(times)
        assert found.times[i, :n].tolist() == times
        assert agrees(found.states[:, i, :n, 0], *moments(found, i=i)) == (True, True)


def test_quantiles():
    found = exact(oracle(), ts=AHEAD)
    for q in (0.0, 0.137, 0.5, 1.0):
        torch.testing.assert_close(found.quantile(q), found.observations.quantile(q, 0))
    with pytest.raises(sd.DataError, match="probability is between"):
        found.quantile(90)


def test_quantiles_of_counts_and_of_more_than_torch_takes():
    counts = torch.arange(11)[:, None, None, None].expand(11, 1, 1, 1)
    series = sd.Series([0.0], [[[1.0]]])
    assert sd.Prediction(series, counts, None, {}, {}).quantile(0.25).item() == 2.5
    many = torch.zeros(2, 1, 2**23 + 1, 1)
    assert not sd.Prediction(series, many, None, {}, {}).quantile(0.5).any()


def test_the_seed_decides_and_the_random_state_stays():
    data, guide = oracle(), sd.AmortizedGuide(ou)
    before = torch.get_rng_state()
    first, again, other = (sd.predict((ou, guide), data, ts=AHEAD, draws=5, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.observations, again.observations)
    assert not torch.equal(first.observations, other.observations)
    free = [sd.predict((ou, guide), data, draws=5, seed=None).observations for _ in range(2)]
    assert not torch.equal(*free)
    assert not torch.equal(before, torch.get_rng_state())


def test_training_modes_are_kept():
    data, guide = oracle(), sd.AmortizedGuide(ou)
    fit = sd.fit(ou, guide, data, steps=2, progress=False)
    for training in (True, False):
        guide.train(training)
        state = {name: x.clone() for name, x in guide.state_dict().items()}
        sd.predict(fit, data, ts=AHEAD, draws=3)
        assert guide.training == training
        assert all(torch.equal(x, state[name]) for name, x in guide.state_dict().items())


def test_latents_of_series():
    data = ou_series(4, own_times(4, 5))
    found = sd.predict((local_theta, sd.AmortizedGuide(local_theta)), data, ts=[5.0], draws=6)
    shapes = {name: tuple(value.shape) for name, value in found.latents.items()}
    assert shapes == {"level": (6,), "theta": (6, 4), "z": (6, 4, 16, 1)}
    assert found.observations.shape == found.states.shape == (6, 4, 6, 1)
    assert len(found.times) == 4


def amortised(batch):
    ou(batch, substeps=2)


def test_an_encoder_forecasts_series_never_seen():
    train, new = ou_series(8, own_times(8, 5)), ou_series(3, own_times(3, 7, seed=5), seed=5)
    guide = sd.AmortizedGuide(amortised, sd.GRUEncoder(1, 8).double())
    fit = sd.fit(amortised, guide, train, steps=3, progress=False)
    end = float(new.times.max()) + 1
    found = sd.predict(fit, new, ts=[end], draws=DRAWS)
    for i in range(3):
        mean, variance = moments(found, i=i, substeps=2)
        states = found.states[:, i, : len(mean), 0]
        # Three steps moved the messages a little; the exact start is within .02.
        assert ((states.mean(0) - mean).abs() < 0.1).all()
        assert (states.std(0) / variance.sqrt() - 1).abs().max() < 0.1
    without = sd.AmortizedGuide(amortised)
    fit = sd.fit(amortised, without, train, steps=1, progress=False)
    with pytest.raises(sd.GuideError, match=r"encoder=sd\.GRUEncoder"):
        sd.predict(fit, new, draws=3)


GRID = sd.TimeGrid(OU_TIMES, substeps=5)


def grid_from_outside(batch):
    with batch.plate("series"):
        z = pyro.sample("z", ou_path(GRID.ts, OU["theta"], OU["mu"], OU["sigma"]))
        observe(GRID, z, batch, OU["noise"])


def last_states_from_outside(batch):
    """Fails nowhere by itself: the observations have the right shape on any batch."""
    with batch.plate("series"):
        z = pyro.sample("z", ou_path(GRID.ts, OU["theta"], OU["mu"], OU["sigma"]))
        seen = dist.Normal(z[..., -1:, :].expand(*z.shape[:-2], *batch.values.shape[1:]), 0.1)
        pyro.sample("y", seen.mask(batch.mask).to_event(2), obs=batch.values)


def test_a_grid_from_outside_is_named():
    fit = grid_from_outside, sd.AmortizedGuide(grid_from_outside)
    sd.predict(fit, oracle(), draws=2)
    for ts in (AHEAD, [0.5]):
        with pytest.raises(sd.GuideError, match="grid closed over.*build it inside the model"):
            sd.predict(fit, oracle(), ts=ts, draws=2)
    fit = last_states_from_outside, sd.AmortizedGuide(last_states_from_outside)
    with pytest.raises(sd.GuideError, match="path 'z' ends at 3, the data at 4"):
        sd.predict(fit, oracle(), ts=AHEAD, draws=2)


def test_a_model_that_fails_by_itself_says_so_itself():
    def model(batch):
        pyro.sample("mu", normal(0.0, 1.0))
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="^my own mistake"):
        sd.predict((model, model), oracle(), draws=2)


def test_a_model_that_observes_something_else():
    def model(batch):
        with batch.plate("series"):
            mu = pyro.sample("mu", normal(0.0, 1.0))
            pyro.sample("first", normal(mu, 1.0), obs=batch.values[:, 0, 0])

    with pytest.raises(sd.GuideError, match=r"observes {'first': \(1,\)}, none of .*\(1, 8, 1\)"):
        sd.predict((model, sd.AmortizedGuide(model)), oracle(), draws=2)


def test_fewer_than_one_draw():
    with pytest.raises(sd.FitError, match="at least 1, got 0"):
        sd.predict((ou, sd.AmortizedGuide(ou)), oracle(), draws=0)


@pytest.mark.parametrize("family", ["counts", "positive"])
def test_likelihoods_on_a_part_of_the_line(family):
    """Missing values, own times and an extension stay in the support of the likelihood."""

    def model(batch):
        grid = sd.TimeGrid(batch.times)
        with batch.plate("series"):
            z = grid.observed(pyro.sample("z", ou_path(grid.ts, 1.0, 1.0, 0.5)))
            seen = dist.Poisson(z.exp()) if family == "counts" else dist.LogNormal(z, 0.1)
            pyro.sample("y", seen.mask(batch.mask).to_event(2), obs=batch.values)

    times = own_times(3, 4)
    values = torch.tensor([2.0, 5.0, 1.0, 3.0], dtype=F64).expand(3, 4)[..., None].clone()
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[0, 0] = mask[1, 2] = False
    mask[2] = False
    values[~mask] = math.nan
    found = sd.predict(
        (model, sd.AmortizedGuide(model)), sd.Series(times, values, mask), ts=[0.01, 9.0], draws=50
    )
    y = found.observations
    assert y.shape == (50, 3, 6, 1)
    assert torch.isfinite(y).all()
    assert (y >= 0).all()
    assert bool((y == y.round()).all()) == (family == "counts")
    assert found.last_observed[0] == times[0, 3]


def test_states_of_a_path_that_all_series_share():
    def model(batch):
        grid = sd.TimeGrid([0.0, 0.5, 1.0, 2.0])
        z = pyro.sample("z", ou_path(grid.ts, 1.0, 0.0, 0.5))
        with batch.plate("series"):
            row = z[..., 5::5, :]
            pyro.sample("y", dist.Normal(row, 0.1).mask(batch.mask).to_event(2), obs=batch.values)

    data = sd.Series(torch.tensor([0.5, 1.0, 2.0], dtype=F64), torch.ones(4, 3, 1, dtype=F64))
    found = sd.predict((model, sd.AmortizedGuide(model)), data, draws=9)
    assert found.states.shape == (9, 4, 3, 1)
    assert torch.equal(found.states[:, 0], found.latents["z"][:, 5::5])


def test_deterministic_values_come_along():
    def model(batch):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.1))
        pyro.deterministic("half_life", math.log(2) / rate)
        with batch.plate("series"):
            centre = rate[..., None, None].expand(*rate.shape[:-1], *batch.values.shape)
            pyro.sample("y", dist.Normal(centre, 1.0).to_event(2), obs=batch.values)

    found = sd.predict((model, sd.AmortizedGuide(model)), oracle(), draws=9)
    torch.testing.assert_close(found.latents["half_life"], math.log(2) / found.latents["rate"])
    assert found.states is None


def level_model(batch):
    level = pyro.sample("level", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
    grid = sd.TimeGrid(batch.times, substeps=3)
    with batch.plate("series"):
        start = dist.Normal(torch.zeros(1, dtype=torch.float64), 5.0).to_event(1)
        noise = torch.full((1,), 0.5, dtype=torch.float64)
        z = pyro.sample("z", sd.SDEPath(lambda t, z: level[..., None] - z, noise, start, grid.ts))
        pyro.sample("y", dist.Normal(grid.observed(z), 0.2).mask(batch.mask).to_event(2), obs=batch.values)


@pytest.mark.parametrize("message", [sd.FreeMessage(), sd.FilterMessage()], ids=["free", "filter"])
def test_further_times_leave_the_smoothed_past_alone(message):
    values = 4 + torch.randn(2, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3
    data = sd.Series([0.0, 1.0, 2.0, 3.0], values)
    guide = sd.AmortizedGuide(level_model, paths=message)
    fit = sd.fit(level_model, guide, data, steps=40, lr=0.05, progress=False)
    plain = sd.predict(fit, data, draws=400).states
    error = plain.std(0) / 400**0.5
    for ts in ([3.5, 4.0], [0.25]):
        ahead = sd.predict(fit, data, ts=ts, draws=400)
        known = [k for k, t in enumerate(ahead.times.tolist()) if t in (0.0, 1.0, 2.0, 3.0)]
        assert ((ahead.states[:, :, known].mean(0) - plain.mean(0)).abs() < 6 * error + 0.02).all()


def test_a_latent_on_the_wrong_dimension_is_refused_whatever_the_number_of_draws():
    def model(batch):
        theta = pyro.sample("theta", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
        grid = sd.TimeGrid(batch.times)
        with batch.plate("series"):
            start = dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1)
            noise = torch.ones(1, dtype=torch.float64)
            z = pyro.sample("z", sd.SDEPath(lambda t, z: -theta * z, noise, start, grid.ts))
            pyro.sample(
                "y", dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2), obs=batch.values
            )

    data = sd.Series([0.0, 1.0], torch.zeros(6, 2, 1, dtype=torch.float64))
    fit = sd.fit(model, sd.AmortizedGuide(model), data, steps=1, progress=False)
    for draws in (6, 10):
        with pytest.raises(sd.GuideError, match=r"fails on 3 at once.*theta\[\.\.\., None\]"):
            sd.predict(fit, data, draws=draws)


def test_one_series_without_a_plate():
    def model(batch):
        grid = sd.TimeGrid(batch.times)
        start = dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1)
        noise = torch.ones(1, dtype=torch.float64)
        z = pyro.sample("z", sd.SDEPath(lambda t, z: -z, noise, start, grid.ts))
        seen = dist.Normal(grid.observed(z), 0.1).mask(batch.mask[0]).to_event(2)
        pyro.sample("y", seen, obs=batch.values[0])

    data = sd.Series([0.0, 1.0], torch.zeros(1, 2, 1, dtype=torch.float64))
    found = sd.predict((model, sd.AmortizedGuide(model)), data, ts=[2.0], draws=5)
    assert found.observations.shape == (5, 1, 3, 1)
