"""Guides of latent jump diffusions: calibrated untrained, jumps found, and a volatility that jumps do not inflate."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.guides.jumps import check_family, corrected
from stochdyn.paths.mixture_message import MixtureMessage, jump_filter
from tests.paths.test_mixture_message import problem

F64 = torch.float64
SIGMA, NOISE, RATE, JUMP = 0.5, 0.1, 0.1, 2.0  # jumps of 4 sigma


@pytest.fixture(autouse=True)
def _seed():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def simulate(number, points=13, substeps=20):
    """Series, the states at the observations, and the number of jumps in every gap."""
    times = torch.arange(float(points), dtype=F64)
    counts = torch.poisson(torch.full((number, points - 1), RATE, dtype=F64))
    steps = SIGMA * torch.randn_like(counts) + JUMP * counts.sqrt() * torch.randn_like(counts)
    first = 0.1 * torch.randn(number, 1, dtype=F64)
    states = torch.cat([first, first + steps.cumsum(1)], 1)
    return sd.Series(times, (states + NOISE * torch.randn_like(states))[..., None]), states, counts


def model(batch, sigma=None, jumps=True):
    if sigma is None:
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0))
    sigma = torch.as_tensor(sigma, dtype=F64)
    grid = sd.TimeGrid(batch.times, substeps=2)

    def spread(t, z):
        return sigma[..., None] + 0 * z

    with batch.plate("series"):
        start = dist.Normal(torch.zeros(1, dtype=F64), 0.1).to_event(1)
        if jumps:
            poisson = sd.CompoundPoisson(RATE, sd.NormalJump(0.0, JUMP))
            path = sd.JumpDiffusionPath(lambda t, z: 0 * z, spread, poisson, start, grid.ts)
        else:
            path = sd.SDEPath(lambda t, z: 0 * z, spread, start, grid.ts)
        z = pyro.sample("z", path)
        pyro.sample("y", dist.Normal(grid.observed(z), NOISE).to_event(2), obs=batch.values)


def known(batch):
    model(batch, SIGMA)


def loss(program, guide, series):
    return sd.ELBO(particles=50).loss(program, guide, series).item()


def area_under_curve(score, positive):
    """Of the receiver operating characteristic: the probability that a positive scores above a negative."""
    ranks = score.argsort().argsort().double() + 1
    n, m = positive.sum(), (~positive).sum()
    return ((ranks[positive].sum() - n * (n + 1) / 2) / (n * m)).item()


def test_untrained_the_bound_is_nearly_the_evidence_and_no_latent_is_left_out():
    series, *_ = simulate(6, 6)
    guide = sd.AmortizedGuide(known, paths=sd.FilterMessage(learned=False))
    losses = torch.tensor([loss(known, guide, series) for _ in range(8)])
    with torch.no_grad():
        w = []
        for _ in range(40):
            trace = pyro.poutine.trace(guide).get_trace(series)
            replayed = pyro.poutine.trace(pyro.poutine.replay(known, trace)).get_trace(series)
            replayed.compute_log_prob()
            trace.compute_log_prob()
            z, y = replayed.nodes["z"]["unscaled_log_prob"], replayed.nodes["y"]["unscaled_log_prob"]
            w.append(z + y - trace.nodes["z"]["unscaled_log_prob"])
        evidence = (torch.logsumexp(torch.stack(w), 0) - math.log(40)).sum()
    assert evidence + losses.mean() < 0.05 * 6
    assert losses.std() < 1.0


def test_probabilities_of_jumps_and_their_sizes():
    series, _, counts = simulate(30)
    reading = sd.read_jumps((known, sd.AmortizedGuide(known)), series, draws=50)
    probability = torch.from_numpy(reading.probability)
    assert probability.shape == (30, 12) and reading.size.shape == (30, 12, 1)
    jumped = counts > 0
    # Calibrated: as many jumps as the probabilities add up to.
    excess = (probability.sum() - jumped.sum()) / (probability * (1 - probability)).sum().sqrt()
    assert abs(excess) < 4
    big = (series.values[:, 1:, 0] - series.values[:, :-1, 0]).abs() > 6 * SIGMA
    assert (probability[big] > 0.95).all() and big.sum() > 5
    moved = (series.values[:, 1:, 0] - series.values[:, :-1, 0])[big]
    assert (torch.from_numpy(reading.size)[..., 0][big] - moved).abs().max() < 1.5


@pytest.mark.parametrize("encoder", [False, True], ids=["tables", "encoder"])
def test_the_correction_is_learned_and_stored(encoder):
    series, *_ = simulate(4, 5)
    net = sd.GRUEncoder(1, 4).double() if encoder else None
    guide = sd.AmortizedGuide(model, net)
    fit = sd.fit(model, guide, series, steps=3, lr=0.01, progress=False)
    assert len(fit.losses) == 3 and all(map(math.isfinite, fit.losses))
    other = sd.AmortizedGuide(model, sd.GRUEncoder(1, 4).double() if encoder else None)
    other.load_state_dict(guide.state_dict())
    found = []
    for g in (guide, other, sd.AmortizedGuide(model, net)):
        pyro.set_rng_seed(3)
        found.append(loss(model, g.eval(), series))
    assert abs(found[0] - found[1]) < 1e-6 < abs(found[0] - found[2])


def test_a_correction_of_nothing_changes_nothing():
    _, path, potential = problem()
    base = path.filtered(potential)
    numbers, unit = torch.zeros(7, 2, dtype=F64), torch.ones(1, dtype=F64)
    around = torch.full((7, 1), 0.3, dtype=F64)
    same = corrected(base, sd.FilterMessage(), numbers, unit, around)
    z = torch.linspace(-3, 3, 7, dtype=F64)[:, None]
    assert (same.log_value(z) - base.log_value(z)).abs().max() < 1e-9
    moved = corrected(base, sd.FilterMessage(), numbers + 0.1, unit, around)
    assert (moved.log_value(z) - base.log_value(z)).abs().max() > 1e-3


def dragged(batch):
    """Two states, of which the second jumps and the first, which follows it, is seen."""
    grid = sd.TimeGrid(batch.times, substeps=2)

    def drift(t, z):
        return torch.stack([2 * (z[..., 1] - z[..., 0]), 0 * z[..., 1]], -1)

    with batch.plate("series"):
        start = dist.Normal(torch.zeros(2, dtype=F64), 0.3).to_event(1)
        jumps = sd.CompoundPoisson(0.2, sd.NormalJump(0.0, torch.tensor([0.0, 4.0], dtype=F64)))
        spread = torch.tensor([0.1, 0.2], dtype=F64)
        z = pyro.sample("z", sd.JumpDiffusionPath(drift, spread, jumps, start, grid.ts))
        batch.observe("y", dist.Normal(grid.observed(z)[..., :1], NOISE))


def test_a_hidden_state_that_jumps_is_found_through_the_one_that_it_drags(monkeypatch):
    """What an observation does not tell must be remembered: merged, the messages lose nats."""
    y = torch.tensor([0.0, 0.1, 0.1, 3.4, 4.0, 4.1], dtype=F64)[None, :, None]
    series = sd.Series(torch.arange(6.0, dtype=F64), y)
    guide = sd.AmortizedGuide(dragged)
    evidence = sd.evidence((dragged, guide), series, draws=1, particles=2000).total.item()
    untrained = loss(dragged, guide, series)
    assert -0.05 < evidence + untrained < 0.3
    reading = sd.read_jumps((dragged, guide), series, draws=200)
    size = reading.size[0].sum(0)
    assert reading.probability[0, 1:3].sum() > 0.95 and reading.probability[0, 3:].max() < 0.2
    assert abs(size[0]) < 1e-6 and abs(size[1] - 4) < 1
    sd.fit(dragged, guide, series, steps=10, lr=0.01, objective=sd.ELBO(particles=8), progress=False)
    assert loss(dragged, guide.eval(), series) < untrained + 0.3
    forgets = partial(jump_filter, memory=0)
    monkeypatch.setattr(
        "stochdyn.paths.jump_diffusion.jump_filter",
        lambda path, seen, around, count, memory: forgets(path, seen, around, count),
    )
    assert evidence + loss(dragged, sd.AmortizedGuide(dragged), series) > 1


def test_a_correction_of_nothing_changes_nothing_for_several_states():
    base = MixtureMessage(
        torch.randn(4, 3, dtype=F64),
        torch.randn(4, 3, 2, dtype=F64),
        torch.eye(2, dtype=F64).expand(4, 3, 2, 2),
    )
    numbers, unit = torch.zeros(4, 6, dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    around, z = torch.randn(4, 2, dtype=F64), torch.randn(4, 2, dtype=F64)
    same, moved = (corrected(base, sd.FilterMessage(), x, unit, around) for x in (numbers, numbers + 0.1))
    assert (same.log_value(z) - base.log_value(z)).abs().max() < 1e-9
    assert (moved.log_value(z) - base.log_value(z)).abs().max() > 1e-3


def test_double_exponential_jumps_of_a_latent_path():
    y = torch.tensor([0.0, 0.1, 0.1, 3.4, 3.3, 3.5], dtype=F64)[None, :, None]
    series = sd.Series(torch.arange(6.0, dtype=F64), y)

    def own(batch):
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor(-0.7, dtype=F64), 0.5))[..., None]
        grid = sd.TimeGrid(batch.times, substeps=2)
        with batch.plate("series"):
            start = dist.Normal(torch.zeros(1, dtype=F64), 0.3).to_event(1)
            jumps = sd.CompoundPoisson(0.2, sd.DoubleExponentialJump(0.5, rate, rate))
            spread = torch.tensor([0.3], dtype=F64)
            z = pyro.sample("z", sd.JumpDiffusionPath(lambda t, z: 0 * z, spread, jumps, start, grid.ts))
            batch.observe("y", dist.Normal(grid.observed(z), NOISE))

    guide = sd.AmortizedGuide(own, paths=sd.FilterMessage(learned=False))
    fit = sd.fit(own, guide, series, steps=60, lr=0.05, objective=sd.ELBO(particles=8), progress=False)
    after = loss(own, guide.eval(), series)
    evidence = sd.evidence(fit, series, draws=30, particles=200).total.item()
    assert -0.1 < evidence + after < 0.4
    reading = sd.read_jumps(fit, series, draws=100)
    assert reading.probability[0, 2] > 0.99 and reading.probability[0, [0, 1, 3, 4]].max() < 0.4
    assert abs(reading.size[0, 2, 0] - 3.3) < 0.5


def test_families_without_a_form_for_jumps_are_refused():
    series, *_ = simulate(3, 4)
    with pytest.raises(
        sd.GuideError, match=r"path site 'z' is a jump diffusion, for which a guide has FilterMessage"
    ):
        sd.AmortizedGuide(known, paths=sd.FreeMessage())(series)
    with pytest.raises(sd.GuideError, match="without a control"):
        check_family(sd.FilterMessage(control=(4,)), "z")


@pytest.mark.slow
def test_intervals_cover_jumps_are_found_over_200_replicates():
    """A target of this library: 90 % intervals cover .85 to .95, area under the curve at least .95."""
    series, states, counts = simulate(200)
    guide = sd.AmortizedGuide(known, paths=sd.FilterMessage(learned=False))
    z = sd.predict((known, guide), series, draws=100).states[..., 0]
    low, high = z.quantile(0.05, 0), z.quantile(0.95, 0)
    covered = ((states >= low) & (states <= high)).double().mean()
    assert 0.85 < covered < 0.95
    narrow = ((states >= z.quantile(0.2, 0)) & (states <= z.quantile(0.8, 0))).double().mean()
    assert not 0.85 < narrow < 0.95
    reading = sd.read_jumps((known, guide), series, draws=100)
    probability = torch.from_numpy(reading.probability)
    fours = counts.bool() & ((states.diff(dim=1)).abs() >= 4 * SIGMA)
    rest = ~counts.bool()
    chosen = fours | rest
    assert area_under_curve(probability[chosen], fours[chosen]) > 0.95
    assert area_under_curve(torch.rand_like(probability[chosen]), fours[chosen]) < 0.8


@pytest.mark.slow
def test_a_learned_volatility_is_not_inflated_by_jumps_and_a_diffusion_s_is():
    series, *_ = simulate(40)
    found = {}
    for jumps in (True, False):
        pyro.set_rng_seed(1)

        def own(batch, jumps=jumps):
            model(batch, jumps=jumps)

        guide = sd.AmortizedGuide(own, paths=sd.FilterMessage(learned=False))
        fit = sd.fit(own, guide, series, steps=80, lr=0.05, progress=False)
        draws = sd.predict(fit, series, draws=200).latents["sigma"]
        found[jumps] = draws.mean().item(), draws.std().item()
    assert abs(found[True][0] - SIGMA) < 4 * found[True][1] and found[True][1] < 0.05
    assert found[False][0] > 1.3 * SIGMA


def test_training_does_not_lose_what_the_filter_knows():
    """Two gaps in one: the correction acts around each component's own centre, not between them."""
    times = torch.arange(5.0, dtype=F64)
    y = torch.tensor([0.0, 0.1, 0.0, 4.0, 4.2], dtype=F64)[None, :, None]
    series = sd.Series(times, y, torch.tensor([True, True, False, True, True])[None, :, None])

    def own(batch):
        grid = sd.TimeGrid(batch.times, substeps=2)
        poisson = sd.CompoundPoisson(0.2, sd.NormalJump(0.0, 3.0))
        with batch.plate("series"):
            start = torch.zeros(1, dtype=F64)
            path = sd.JumpDiffusionPath(
                lambda t, z: 0 * z, torch.tensor([0.3], dtype=F64), poisson, start, grid.ts
            )
            z = pyro.sample("z", path)
            pyro.sample(
                "y", dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2), obs=batch.values
            )

    guide = sd.AmortizedGuide(own)
    before = sum(loss(own, guide, series) for _ in range(20)) / 20
    sd.fit(own, guide, series, steps=40, lr=0.03, objective=sd.ELBO(particles=8), progress=False)
    after = sum(loss(own, guide.eval(), series) for _ in range(20)) / 20
    assert after < before + 0.1
    reading = sd.read_jumps((own, guide), series, draws=50)
    assert reading.probability[0, [0, 1, 3]].max() > 0.99 and reading.probability.shape == (1, 4)
    evidence = sd.evidence((own, guide), series, draws=1, particles=2000).total.item()
    assert -0.05 < evidence + after < 0.3
