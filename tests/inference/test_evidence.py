import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from tests.problems import OU, OU_TIMES, OU_VALUES, within
from tests.programs import (
    F64,
    local_theta,
    normal,
    observe,
    ou,
    ou_evidence,
    ou_path,
    ou_series,
    own_times,
    rotating,
    rotating_evidence,
    rotating_series,
)


def oracle():
    return sd.Series(OU_TIMES, OU_VALUES[None])


def exact(model, data, **options):
    return sd.evidence((model, sd.AmortizedGuide(model)), data, **options)


def unbiased(log_estimates, log_expected, errors=4.0):
    """Whether the mean of exp(estimates - expected) is 1, up to standard errors."""
    return within((log_estimates - log_expected).exp(), 1.0, errors)


def test_the_exact_guide_needs_one_particle():
    found = exact(ou, oracle(), draws=1, particles=1)
    assert abs(found.total - ou_evidence(oracle())[0]) < 1e-8
    assert found.importance.shape == (1,)
    assert found.log_weights.tolist() == [0.0]


def test_own_times_holes_and_a_series_without_data():
    data = ou_series(5, own_times(5, 6), hold=[(0, 0), (1, 5), *((4, k) for k in range(6))])
    found = exact(ou, data, draws=2, particles=1)
    torch.testing.assert_close(found.per_series, ou_evidence(data), rtol=0, atol=1e-8)
    assert found.per_series[4] == pytest.approx(0.0, abs=1e-10)
    assert abs(found.total - ou_evidence(data).sum()) < 1e-8


def test_series_of_different_lengths():
    rows = [([0.0, 0.3, 1.1], [[0.5], [0.9], [0.2]]), ([0.4], [[-0.6]]), ([0.1, 2.0], [[1.0], [0.3]])]
    data = sd.Series.from_list([(torch.tensor(t).double(), torch.tensor(y).double()) for t, y in rows])
    found = exact(ou, data, draws=1, particles=1).per_series
    for i, (t, y) in enumerate(rows):
        alone = sd.Series(torch.tensor(t).double(), torch.tensor(y).double()[None])
        assert abs(found[i] - ou_evidence(alone)[0]) < 1e-8


def test_a_mini_batch_counts_once():
    data = ou_series(6, [0.0, 0.5, 2.0])
    guide = sd.AmortizedGuide(ou)
    guide(data)
    found = sd.evidence((ou, guide), data[:2], draws=2, particles=1)
    torch.testing.assert_close(found.per_series, ou_evidence(data)[:2], rtol=0, atol=1e-8)


def test_two_states_one_observed():
    data = rotating_series(3, [0.0, 0.7, 1.1, 2.0])
    found = exact(rotating, data, draws=1, particles=1)
    torch.testing.assert_close(found.per_series, rotating_evidence(data), rtol=0, atol=1e-8)


def noisier(batch):
    ou(batch, sigma=1.1 * OU["sigma"])


def test_a_guide_that_is_wrong_is_unbiased_all_the_same():
    """Messages learned from nothing, untrained; each draw is a particle filter of its own."""
    data = ou_series(3, own_times(3, 5), hold=[(0, 2)])
    for model, right in ((ou, True), (noisier, False)):
        guide = sd.AmortizedGuide(model, paths=sd.FreeMessage())
        guide(data)
        found = sd.evidence((model, guide), data, draws=1500, particles=30)
        assert found.log_likelihood.std(0).min() > 0.02
        assert unbiased(found.log_likelihood, ou_evidence(data)) == right


def two_latents(batch):
    theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.3, dtype=F64), 0.5))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-0.3, dtype=F64), 0.5))
    grid = sd.TimeGrid(batch.times, substeps=2)
    with batch.plate("series"):
        z = pyro.sample("z", ou_path(grid.ts, theta, OU["mu"], sigma))
        observe(grid, z, batch, OU["noise"])


def scalar_kalman(data, theta, sigma, substeps=2):
    """(*parameters, series): the evidence on a whole grid of parameters, by a filter of numbers."""
    out = []
    for i in range(len(data)):
        dts = sd.TimeGrid(data.times.expand(len(data), -1)[i], substeps=substeps).ts.diff()
        m, P, total = torch.full_like(theta, OU["mu"]), sigma**2 / (2 * theta), torch.zeros_like(theta)
        for k in range(len(dts) + 1):
            if k % substeps == 0 and data.mask[i, k // substeps, 0]:
                S, r = P + OU["noise"] ** 2, data.values[i, k // substeps, 0] - m
                total = total - 0.5 * (r**2 / S + S.log() + math.log(2 * math.pi))
                m, P = m + P / S * r, P - P**2 / S
            if k < len(dts):
                keep = 1 - theta * dts[k]
                m, P = OU["mu"] + keep * (m - OU["mu"]), keep**2 * P + sigma**2 * dts[k]
        out.append(total)
    return torch.stack(out, -1)


def test_the_filter_of_numbers():
    data = ou_series(2, own_times(2, 4), hold=[(1, 1)])
    theta, sigma = (torch.tensor(OU[name], dtype=F64) for name in ("theta", "sigma"))
    torch.testing.assert_close(scalar_kalman(data, theta, sigma), ou_evidence(data, substeps=2))


def test_parameters_are_integrated_out():
    data = ou_series(3, own_times(3, 6), hold=[(0, 2)])
    e = torch.linspace(-6, 6, 241, dtype=F64)
    theta, sigma = torch.meshgrid((0.3 + 0.5 * e).exp(), (-0.3 + 0.5 * e).exp(), indexing="ij")
    weight = -0.5 * (e[:, None] ** 2 + e**2) - math.log(2 * math.pi) + 2 * math.log(12 / 240)
    expected = torch.logsumexp((scalar_kalman(data, theta, sigma).sum(-1) + weight).flatten(), 0)
    guide = sd.AmortizedGuide(two_latents, latents=sd.FullRank(init_scale=1.0))
    found = sd.evidence((two_latents, guide), data, draws=4000, particles=1)
    assert unbiased(found.importance, expected)
    # 4000 draws from the prior: the relative standard error is .04.
    assert abs(found.total - expected) < 0.15
    assert not unbiased(found.importance + 0.2, expected)
    assert not unbiased(found.importance - found.log_weights + found.log_weights.mean() - 0.3, expected)


def test_a_rate_of_each_series_is_integrated_out_too():
    def model(batch):
        grid = sd.TimeGrid(batch.times, substeps=2)
        with batch.plate("series"):
            theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.3, dtype=F64), 0.5))
            z = pyro.sample("z", ou_path(grid.ts, theta, OU["mu"], OU["sigma"]))
            observe(grid, z, batch, OU["noise"])

    data = ou_series(3, own_times(3, 5))
    e = torch.linspace(-6, 6, 481, dtype=F64)
    theta = (0.3 + 0.5 * e).exp()
    weight = -0.5 * e**2 - 0.5 * math.log(2 * math.pi) + math.log(12 / 480)
    likelihood = scalar_kalman(data, theta, torch.full_like(theta, OU["sigma"]))
    expected = torch.logsumexp(likelihood + weight[:, None], 0)
    guide = sd.AmortizedGuide(model, latents=sd.FullRank(init_scale=1.0))
    found = sd.evidence((model, guide), data, draws=4000, particles=1)
    assert not found.log_weights.any()
    assert unbiased(found.log_likelihood, expected)
    torch.testing.assert_close(found.per_series, expected, rtol=0, atol=0.1)
    both = exact(local_theta, data, draws=10, particles=3)
    assert both.log_likelihood.shape == (10, 3)
    assert both.log_weights.std() > 0


ALPHA, BETA, GAMMA, DELTA, PROCESS, PELTS = 0.55, 0.027, 0.76, 0.023, 0.17, 0.11


def prey_drift(t, z):
    return torch.stack([ALPHA - BETA * z[..., 1].exp(), DELTA * z[..., 0].exp() - GAMMA], -1)


def prey_path(ts, process=PROCESS):
    start = dist.Normal(torch.tensor([10.0, 10.0], dtype=F64).log(), 1.0).to_event(1)
    noise = torch.full((2,), process, dtype=F64)
    return sd.SDEPath(prey_drift, noise, start, ts, solver=sd.GaussianStep(mean=sd.Heun()))


def prey(batch, process=PROCESS):
    grid = sd.TimeGrid(batch.times, substeps=5)
    with batch.plate("series"):
        z = pyro.sample("z", prey_path(grid.ts, process))
        seen = dist.LogNormal(grid.observed(z), PELTS)
        pyro.sample("pelts", seen.mask(batch.mask).to_event(2), obs=batch.values)


def bootstrap(data, runs, particles):
    values = data.values[0]

    def pelts(z, k):
        if k % 5:
            return None
        y = values[k // 5]
        w = (y.log() - z) / PELTS
        return (-0.5 * w.square() - math.log(PELTS * math.sqrt(2 * math.pi)) - y.log()).sum(-1)

    path = prey_path(sd.TimeGrid(data.times, substeps=5).ts).expand(torch.Size((runs,)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sd.particle_evidence(path, pelts, particles=particles)


def test_lynx_and_hare_against_a_long_bootstrap_filter():
    """Nonlinear, log-normal: two filters that share no proposal and no likelihood code."""
    data = sd.datasets.lynx_hare().to(F64)
    runs = bootstrap(data, runs=6, particles=20000)
    found = exact(prey, data, draws=20, particles=100).log_likelihood[:, 0]
    long, short = (x.exp().mean().log() for x in (runs - runs.mean(), found - runs.mean()))
    error = math.hypot(*((x - runs.mean()).exp().std() / math.sqrt(len(x)) for x in (runs, found)))
    assert error < 0.07
    assert abs(long - short) < min(0.1, 4 * error)
    # The guide's filter is the better one, with 200 times fewer particles; and another noise is seen.
    assert found.std() < 0.3
    wrong = exact(lambda batch: prey(batch, 0.2), data, draws=20, particles=100).total
    assert abs(wrong - runs.mean()) > 0.5


def test_the_seed_decides():
    data = ou_series(2, [0.0, 1.0])
    guide = sd.AmortizedGuide(ou, paths=sd.FreeMessage())
    guide(data)
    before = torch.get_rng_state()
    first, again, other = (
        sd.evidence((ou, guide), data, draws=2, particles=5, seed=s).total for s in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def with_likelihood(seen_of, before=None):
    def model(batch):
        grid = sd.TimeGrid(batch.times)
        extra = None if before is None else before()
        with batch.plate("series"):
            z = pyro.sample("z", ou_path(grid.ts, OU["theta"], OU["mu"], OU["sigma"]))
            seen_of(grid, z, batch, extra)

    return model


def two_paths(grid, z, batch, _):
    w = pyro.sample("w", ou_path(grid.ts, OU["theta"], OU["mu"], OU["sigma"]))
    observe(grid, z + w, batch, 0.2)


def first_time_only(grid, z, batch, _):
    pyro.sample("y", normal(grid.observed(z)[..., 0, 0], 0.2), obs=batch.values[:, 0, 0])


def running_mean(grid, z, batch, _):
    means = z.cumsum(-2) / torch.arange(1, z.shape[-2] + 1)[:, None]
    observe(grid, means, batch, 0.2)


def follows_the_path(grid, z, batch, _):
    gain = pyro.sample("gain", normal(z.mean((-2, -1)), 1.0))
    observe(grid, z * gain[..., None, None], batch, 0.2)


def masked_outside(grid, z, batch, _):
    with poutine.mask(mask=torch.tensor(True)):
        observe(grid, z, batch, 0.2)


def tempered(grid, z, batch, _):
    with poutine.scale(scale=0.5):
        observe(grid, z, batch, 0.2)


def coarse(grid, z, batch, _):
    seen = dist.Normal(z[..., :: z.shape[-2] // 3, :][..., :3, :], 0.2)
    pyro.sample("y", seen.mask(batch.mask).to_event(2), obs=batch.values)


@pytest.mark.parametrize(
    ("seen", "complaint"),
    [
        (two_paths, r"exactly one path .* got \['z', 'w'\]"),
        (first_time_only, r"site 'y': its log likelihood has shape .*time=3.*to_event\(2\)"),
        (running_mean, "what is observed last depends on more of path 'z'"),
        (follows_the_path, "latent 'gain' depends on more of path 'z'"),
        (masked_outside, "site 'y': masked by a handler"),
        (tempered, "site 'y': scaled by a handler"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_a_particle_filter_cannot_weigh(seen, complaint):
    with pytest.raises(sd.GuideError, match=complaint):
        exact(with_likelihood(seen), ou_series(2, [0.0, 0.5, 2.0]), draws=2, particles=2)


def test_a_grid_that_lacks_the_times():
    def model(batch):
        with batch.plate("series"):
            z = pyro.sample("z", ou_path(torch.linspace(0, 2, 8, dtype=F64), 1.0, 0.0, 0.5))
            coarse(None, z, batch, None)

    with pytest.raises(sd.GuideError, match="its grid lacks times of the data"):
        exact(model, ou_series(2, [0.0, 0.5, 2.0]), draws=2, particles=2)


def test_other_ways_to_write_the_same_likelihood():
    """A mask over times inside one to_event, correlated channels, series = times = channels."""
    series = ou_series(3, [0.0, 0.5, 2.0], hold=[(1, 1)])
    values, mask = series.values.expand(3, 3, 3), series.mask.expand(3, 3, 3)
    data = sd.Series([0.0, 0.5, 2.0], values, mask)
    eye = torch.eye(3, dtype=F64)

    def inner_mask(grid, z, batch, _):
        rows = dist.Normal(grid.observed(z), 0.2).expand([*z.shape[:-2], 3, 3]).to_event(1)
        pyro.sample("y", rows.mask(batch.mask[..., 0]).to_event(1), obs=batch.values)

    def correlated(grid, z, batch, _):
        rows = dist.MultivariateNormal(grid.observed(z).expand(*z.shape[:-2], 3, 3), scale_tril=0.2 * eye)
        pyro.sample("y", rows.mask(batch.mask[..., 0]).to_event(1), obs=batch.values)

    def plain(grid, z, batch, _):
        rows = dist.Normal(grid.observed(z).expand(*z.shape[:-2], 3, 3), 0.2)
        pyro.sample("y", rows.mask(batch.mask).to_event(2), obs=batch.values)

    def three_sites(grid, z, batch, _):
        rows = dist.Normal(grid.observed(z)[..., 0], 0.2)
        for c in range(3):
            pyro.sample(f"y{c}", rows.mask(batch.mask[..., c]).to_event(1), obs=batch.values[..., c])

    found = [
        exact(with_likelihood(seen), data, draws=1, particles=1).per_series
        for seen in (plain, inner_mask, correlated, three_sites)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-8)


def test_a_path_that_all_series_observe():
    def model(batch):
        grid = sd.TimeGrid(batch.times)
        z = pyro.sample("z", ou_path(grid.ts, OU["theta"], OU["mu"], OU["sigma"]))
        with batch.plate("series"):
            seen = dist.Normal(grid.observed(z), OU["noise"])
            pyro.sample("y", seen.mask(batch.mask).to_event(2), obs=batch.values)

    one = ou_series(1, [0.0, 0.5, 2.0])
    twice = sd.Series([0.0, 0.5, 2.0], one.values.expand(2, -1, -1))
    found = exact(model, twice, draws=1, particles=1)
    # Two equal readings are one reading with noise / sqrt(2), times a constant per time.
    sharp = ou_evidence(one, noise=OU["noise"] / math.sqrt(2))[0]
    constant = 3 * math.log(1 / (OU["noise"] * math.sqrt(2 * math.pi)) / math.sqrt(2))
    assert abs(found.total - sharp - constant) < 1e-8


def test_point_processes_have_no_path_to_integrate_out():
    jumps = sd.Jumps.from_list([[0.5], []], t1=1.0)

    def model(batch):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with batch.plate("series"):
            batch.observe("jumps", sd.PoissonProcess(rate, batch.t0, batch.t1))

    with pytest.raises(sd.GuideError, match="the jumps of a point process have none"):
        sd.evidence((model, sd.AmortizedGuide(model)), jumps)


def test_a_guide_of_another_model_is_refused():
    """The filter moves by the guide's own path: unnoticed, it would give the evidence of the guide's model."""
    batch = sd.Series(torch.arange(4.0, dtype=F64), torch.zeros(2, 4, 1, dtype=F64))

    def of(rate):
        def model(batch):
            grid = sd.TimeGrid(batch.times)
            with batch.plate("series"):
                start = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
                path = sd.SDEPath(lambda t, z: -rate * z, torch.tensor([0.5], dtype=F64), start, grid.ts)
                batch.observe("y", dist.Normal(grid.observed(pyro.sample("z", path)), 0.3))

        return model

    one, other = of(0.5), of(5.0)
    guide = sd.AmortizedGuide(one)
    with pytest.raises(sd.GuideError, match="path 'z' has another density in the model than in the guide"):
        sd.evidence((other, guide), batch, draws=1, particles=10)
    assert torch.isfinite(sd.evidence((of(0.5), guide), batch, draws=1, particles=10).total)
