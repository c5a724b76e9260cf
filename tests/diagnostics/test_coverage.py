import numpy as np
import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd
from stochdyn.diagnostics.coverage import Coverage, coverage
from stochdyn.inference.draws import draw, evaluating
from tests.programs import F64, normal, ou, ou_series, own_times


def of(model, guide, data, draws=200):
    with evaluating(model, guide, seed=0):
        found = draw((model, guide), data, draws)
    return coverage((model, guide), data, found, draws=draws, seed=0)


def covers(found, errors=3.5):
    return bool((np.abs(found.covered - [0.5, 0.9]) < errors * found.error).all())


def test_uniform_ranks_are_covered_and_series_are_the_units():
    u = np.random.default_rng(0).uniform(size=2000)
    found = Coverage.of(("y",), [u], how="hidden")
    assert covers(found) and found.points.tolist() == [2000]
    same = np.repeat(u[:50], 40)
    clustered = Coverage.of(("y",), [same], how="hidden", series=[np.arange(50).repeat(40)])
    assert clustered.error[0, 0] > 5 * Coverage.of(("y",), [same], how="hidden").error[0, 0]
    assert np.isnan(Coverage.of(("y",), [u[:0]], how="hidden").covered).all()


def test_readings_are_hidden_and_smoothing_is_not_mistaken_for_it():
    data = ou_series(40, own_times(40, 8), hold=[(0, 0), (3, 4)])
    found = of(ou, sd.AmortizedGuide(ou), data)
    assert found.how == "hidden" and covers(found)
    assert found.points.tolist() == [318]
    wrong = of(
        lambda batch: ou(batch, sigma=0.2), sd.AmortizedGuide(lambda batch: ou(batch, sigma=0.2)), data
    )
    assert not covers(wrong) and wrong.covered[0, 1] < 0.85


def test_a_guide_that_refuses_other_data_is_reweighted_or_called_smoothing():
    data = ou_series(20, own_times(20, 8))
    guide = sd.AmortizedGuide(ou)
    sd.fit(ou, guide, data, steps=2, progress=False)
    assert of(ou, guide, data).how in ("reweighted", "seen")


def noisy_level(batch):
    with batch.plate("series"):
        level = pyro.sample("level", normal(0.0, 1.0))
        seen = dist.Normal(level[..., None, None].expand(*level.shape, 6, 1), 0.5).mask(batch.mask)
        pyro.sample("y", seen.to_event(2), obs=batch.values)


def levels(number=60):
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(number, 1, 1, generator=generator, dtype=F64)
    noise = torch.randn(number, 6, 1, generator=generator, dtype=F64)
    return sd.Series(torch.arange(6.0), level + 0.5 * noise)


def deaf(data, shift=0.0):
    """The exact posterior of all readings, whatever the batch says."""
    precision = 1 + 6 / 0.25

    def guide(batch):
        with batch.plate("series"):
            loc = data.values.sum((1, 2)) / 0.25 / precision
            pyro.sample("level", dist.Normal(loc + shift, precision**-0.5))

    return guide


def test_reweighting_leaves_readings_out_of_a_guide_that_does_not_listen():
    data = levels()
    found = of(noisy_level, deaf(data), data, draws=400)
    assert found.how == "reweighted" and covers(found)
    assert not covers(of(noisy_level, deaf(data, shift=0.5), data, draws=400))


def test_counts_break_ties_at_random():
    def model(batch):
        with batch.plate("series"):
            pyro.sample("y", dist.Poisson(batch.values * 0 + 1.0).to_event(2), obs=batch.values)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = sd.Series(torch.arange(5.0), torch.poisson(torch.ones(200, 5, 1)))
    assert covers(of(model, lambda batch: None, data))


def test_censored_and_masked_values_do_not_count():
    def model(batch):
        with batch.plate("series"):
            batch.observe("y", dist.Normal(batch.values * 0, 1.0))

    values = torch.randn(50, 4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    data = sd.Series(torch.arange(4.0), values, lower=[-1.0, -9.0])
    found = of(model, lambda batch: None, data)
    assert found.points.tolist() == [int((values[..., 0] > -1).sum()), 200]


def test_hidden_values_are_filled_with_what_the_likelihood_can_produce():
    def model(batch):
        with batch.plate("series"):
            level = pyro.sample("level", normal(0.0, 1.0))
            loc = level[..., None, None].expand(*level.shape, 6, 1)
            pyro.sample("y", dist.LogNormal(loc, 0.5).mask(batch.mask).to_event(2), obs=batch.values)

    def guide(batch):
        count = batch.mask.sum((1, 2)) / 0.25
        with batch.plate("series"):
            loc = (batch.values.log() * batch.mask).sum((1, 2)) / 0.25 / (1 + count)
            pyro.sample("level", dist.Normal(loc, (1 + count) ** -0.5))

    found = of(model, guide, sd.Series(torch.arange(6.0), levels().values.exp()))
    assert found.how == "hidden" and covers(found)


def test_plain_tensors():
    def model(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0), obs=y)

    y = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert covers(of(model, lambda y: None, y))
    assert not covers(of(model, lambda y: None, 2 * y))
