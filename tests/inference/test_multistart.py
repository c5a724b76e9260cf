"""The best of many starts: the right mode where one start ends in a wrong one, and what it cannot do."""

import signal

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import DivergedError, FitError

TIMES = torch.linspace(0, 10, 30)
TRUTH = 2.6
Y = (6.28318 * TIMES / TRUTH).sin()


@pytest.fixture(autouse=True)
def _seed():
    pyro.clear_param_store()
    torch.manual_seed(0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    pyro.clear_param_store()


def periodic(y):
    """The likelihood of a period has a mode for every number of turns."""
    period = pyro.sample("period", dist.LogNormal(torch.tensor(0.0), 0.7))
    phase = pyro.sample("phase", dist.Normal(torch.tensor(0.0), 0.3))
    pyro.sample(
        "y",
        dist.Normal((6.28318 * TIMES / period[..., None] + phase[..., None]).sin(), 0.2).to_event(1),
        obs=y,
    )


STARTS = sd.Multistart(draws=60, finalists=3, steps=25)


def fitted(model=periodic, starts=STARTS, guide=None, data=Y, steps=80, **options):
    guide = guide or sd.AmortizedGuide(model)
    return sd.fit(model, guide, data, steps=steps, lr=0.03, multistart=starts, progress=False, **options)


def period(fit):
    return fit.guide(Y)["period"].item()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(sd.FullRank(), id="full rank"),
        pytest.param(sd.Flow(transforms=1, hidden=(8,)), id="flow", marks=pytest.mark.slow),
    ],
)
def test_it_finds_the_mode_that_one_start_misses(family):
    """Its control is the fit without it."""
    alone = fitted(starts=None, guide=sd.AmortizedGuide(periodic, latents=family))
    assert abs(period(alone) - TRUTH) > 0.1 and alone.starts == []
    fit = fitted(guide=sd.AmortizedGuide(periodic, latents=family))
    assert abs(period(fit) - TRUTH) < 0.15
    assert fit.starts == sorted(fit.starts) and len(fit.starts) == 3
    assert fit.elbo > alone.elbo + 50


def test_the_fit_itself_takes_its_own_steps_and_records_no_others():
    fit = fitted(steps=30, objective=sd.ELBO(particles=16))
    assert fit.step == 30 and len(fit.losses) == 30 and fit.inner == 0
    assert abs(sum(fit.losses[:5]) / 5 - fit.starts[0]) < 40


def test_the_same_seed_gives_the_same_fit():
    first, again = fitted(steps=10, seed=3), fitted(steps=10, seed=3)
    assert first.starts == again.starts and first.losses == again.losses
    assert fitted(steps=10, seed=4).starts != first.starts


def test_what_is_not_searched_begins_where_it_would():
    """With one start, the guide's own, and one step of it, networks and latents in plates move by that step only."""

    def levels(batch):
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 0.5))
        with batch.plate("series"):
            own = pyro.sample("own", dist.Normal(torch.tensor(0.0), scale))
            pyro.sample("y", dist.Normal(own[..., None], 0.5).to_event(1), obs=batch.values[..., 0])

    series = sd.Series(torch.arange(3.0), torch.randn(6, 3, 1))
    guide = sd.AmortizedGuide(levels, sd.GRUEncoder(1, 4), amortize={"own": "series"})
    guide(series)
    before = {name: p.clone() for name, p in guide.named_parameters()}
    fit = sd.fit(
        levels,
        guide,
        series,
        steps=1,
        lr=1e-6,
        multistart=sd.Multistart(draws=20, finalists=3, steps=2),
        progress=False,
    )
    moved = {n: (p - before[n]).abs().max().item() for n, p in guide.named_parameters()}
    joint = [n for n in moved if n.startswith("joint")]
    assert joint and max(moved[n] for n in joint) > 0.01
    assert max(m for n, m in moved.items() if n not in joint) < 1e-4
    assert len(fit.starts) == 3


def test_mini_batches_go_on_where_the_search_left_them():
    def levels(batch):
        level = pyro.sample("level", dist.Normal(torch.tensor(0.0), 10.0))
        with batch.plate("series"):
            pyro.sample("y", dist.Normal(level[..., None], 0.5).to_event(1), obs=batch.values[..., 0])

    series = sd.Series(torch.arange(3.0), 4 + torch.randn(12, 3, 1))
    guide = sd.AmortizedGuide(levels)
    starts = sd.Multistart(draws=10, finalists=2, steps=5)
    fit = sd.fit(levels, guide, series, steps=60, lr=0.05, batch_size=4, multistart=starts, progress=False)
    assert abs(guide(series)["level"].item() - 4) < 1 and len(fit.starts) == 2


def test_starts_that_diverge_are_passed_over():
    def model(y):
        rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0), 1.0))
        if rate > 0.3:
            raise DivergedError("the state at time 1 is not finite.")
        pyro.sample("y", dist.Normal(rate, 0.1), obs=y)

    fit = fitted(model, data=torch.tensor(-0.5), steps=20)
    assert abs(fit.guide(torch.tensor(-0.5))["rate"].item() + 0.5) < 0.3


def test_no_start_that_works_is_an_error():
    def model(y):
        if pyro.sample("rate", dist.Normal(torch.tensor(0.0), 1.0)).isfinite() and y > 0:
            raise DivergedError("the state at time 1 is not finite.")

    guide = sd.AmortizedGuide(model)
    guide(torch.tensor(-1.0))
    with pytest.raises(
        FitError, match=r"none of 60 draws of the prior has a finite loss\. Narrow the priors"
    ):
        fitted(model, guide=guide, data=torch.tensor(1.0))


def test_ctrl_c_while_searching_returns_what_there_is():
    calls = []

    def model(y):
        calls.append(1)
        if len(calls) == 60:
            signal.raise_signal(signal.SIGINT)
        periodic(y)

    fit = fitted(model)
    assert fit.interrupted and fit.step == 0 and len(calls) < 70
    assert period(fit) > 0


@pytest.mark.parametrize("name", ["draws", "finalists", "steps"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(FitError, match=f"Multistart: {name} must be at least 1, got 0"):
        sd.Multistart(**{name: 0})


def test_guides_without_a_prior_to_draw_from_are_refused():
    with pytest.raises(FitError, match="needs an AmortizedGuide.* this guide is AutoNormal"):
        fitted(guide=pyro.infer.autoguide.AutoNormal(periodic))
    with pytest.raises(FitError, match="no latents outside plates with a joint posterior"):
        fitted(guide=sd.AmortizedGuide(periodic, latents=sd.MeanField()))


def test_a_first_run_or_a_training_that_diverges_is_named():
    def never(y):
        pyro.sample("rate", dist.Normal(torch.tensor(0.0), 1.0))
        raise DivergedError("the state at time 1 is not finite.")

    with pytest.raises((FitError, DivergedError), match="time 1 is not finite"):
        fitted(never, data=torch.tensor(1.0))

    def unstable(y):
        rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0), 1.0))
        if torch.is_grad_enabled():
            raise DivergedError("the state at time 1 is not finite.")
        pyro.sample("y", dist.Normal(rate, 1.0), obs=y)

    with pytest.raises(FitError, match="training diverged from each of 3 finalists"):
        fitted(unstable, data=torch.tensor(1.0))
