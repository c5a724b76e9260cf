import math

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

import stochdyn as sd
from stochdyn.errors import FitError, GuideError
from tests.programs import F64, local_theta, normal, ou, ou_evidence, ou_latent, ou_series, own_times

mpl.use("Agg")
TIMES = torch.linspace(0, 4, 9, dtype=F64)
NOISE = 0.3


def kernel():
    return (-(TIMES[:, None] - TIMES).abs() / 0.7).exp()


def walk(batch):
    """A Gaussian process per series, observed with noise."""
    with batch.plate("series"):
        x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(len(TIMES), dtype=F64), kernel()))
        seen = dist.Normal(x[..., None], NOISE).mask(batch.mask).to_event(2)
        pyro.sample("y", seen, obs=batch.values)


def exact_walk(shrink=1.0, shift=0.0):
    """The exact posterior given what is observed, its standard deviation times `shrink`."""

    def guide(batch):
        precision = kernel().inverse() + torch.diag_embed(batch.mask[..., 0].to(F64)) / NOISE**2
        covariance = precision.inverse()
        loc = (covariance @ (batch.values * batch.mask) / NOISE**2)[..., 0] + shift
        with batch.plate("series"):
            root = torch.linalg.cholesky(covariance)
            pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=shrink * root))

    return guide


def walks(number=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(number, len(TIMES), 1, generator=generator, dtype=F64)
    noise = torch.randn(e.shape, generator=generator, dtype=F64)
    return sd.Series(TIMES, torch.linalg.cholesky(kernel()) @ e + NOISE * noise)


def mean_of(y):
    mu = pyro.sample("mu", normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mean_guide(shrink):
    def guide(y):
        pyro.sample("mu", normal(y.sum() / (len(y) + 1), shrink / math.sqrt(len(y) + 1)))

    return guide


def levels(found):
    return {v.check: v.level for v in found.verdicts}


def test_an_exact_guide_of_a_path_loses_nothing():
    data = ou_series(30, own_times(30, 8))
    found = sd.diagnose((ou, sd.AmortizedGuide(ou)), data, draws=200, particles=5)
    assert found.ok, str(found)
    assert np.abs(found.gap_per_series.value).max() < 1e-8
    assert abs(found.gap.value) < 1e-6
    assert found.evidence.value == pytest.approx(ou_evidence(data).sum().item(), abs=1e-6)
    assert np.allclose(found.elbo_per_series.value, ou_evidence(data).numpy(), atol=1e-6)
    assert "exact in all 30 series" in found.verdict("k-hat").found
    assert found.coverage.how == "hidden"
    assert (np.abs(found.coverage.covered - [0.5, 0.9]) < 3 * found.coverage.error).all()
    assert levels(found) == {
        "gap": "good",
        "k-hat": "good",
        "latents": "good",
        "coverage": "good",
        "training": "-",
    }


def test_a_guide_that_has_learned_nothing_loses_evidence():
    data = ou_series(5, own_times(5, 8))
    guide = sd.AmortizedGuide(ou, paths=sd.FreeMessage())
    guide(data)
    found = sd.diagnose((ou, guide), data, draws=200, particles=30)
    assert found.verdict("gap").level == "bad"
    expected = ou_evidence(data).numpy() - found.elbo_per_series.value
    assert found.worst_series == data.ids[int(expected.argmax())]
    assert repr(found.worst_series) in found.verdict("gap").found
    assert (np.abs(found.gap_per_series.value - expected) < 5 * found.gap_per_series.error + 0.2).all()


@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_half_the_spread_is_seen_by_weights_and_hidden_readings(shrink):
    found = sd.diagnose((walk, exact_walk(shrink)), walks(), draws=400)
    right = "good" if shrink == 1 else "bad"
    assert levels(found)["k-hat"] == levels(found)["coverage"] == right, str(found)
    assert found.ok == (shrink == 1)
    assert found.coverage.how == "hidden"
    assert levels(found)["gap"] == "-" and "exactly one path" in found.no_evidence


def test_half_the_spread_of_one_parameter():
    y = torch.randn(30, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = sd.diagnose((mean_of, mean_guide(1.0)), y, draws=1000)
    assert exact.ok and exact.k_hat.exact
    assert exact.latents[0].ratio == pytest.approx(1 / math.sqrt(31), rel=0.1)
    for draws in (400, 1000):
        narrow = sd.diagnose((mean_of, mean_guide(0.5)), y, draws=draws)
        assert not narrow.ok and narrow.verdict("k-hat").level == "bad"
        assert sd.diagnose((mean_of, mean_guide(0.9)), y, draws=draws).verdict("k-hat").level == "good"


def test_a_collapsed_latent_is_named():
    def prior(batch):
        with batch.plate("series"):
            loc = torch.zeros(len(TIMES), dtype=F64)
            pyro.sample("x", dist.MultivariateNormal(loc, kernel()))

    found = sd.diagnose((walk, prior), walks(), draws=200)
    assert found.collapsed == ("x",) and not found.ok
    assert found.verdict("latents").level == "bad" and found.verdict("latents").found.endswith("x")
    assert sd.diagnose((walk, exact_walk()), walks(), draws=100).collapsed == ()


@pytest.mark.parametrize("width", [1.0, 30.0])
def test_a_wide_latent_that_has_collapsed_is_named_too(width):
    def wide(y):
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", dist.Normal(torch.zeros(8, dtype=F64), width).to_event(1))
            pyro.sample("y", dist.Normal(x[..., 0] / width, 1.0), obs=y)

    def posterior(y, informed=False):
        with pyro.plate("rows", len(y)):
            first = torch.eye(8, dtype=F64)[0] * informed
            loc, spread = width * y[:, None] / 2 * first, width * (1 - first / 2).sqrt()
            pyro.sample("x", dist.Normal(loc, spread).to_event(1))

    y = torch.linspace(-2, 2, 6, dtype=F64)
    found = sd.diagnose((wide, posterior), y, draws=400)
    assert found.collapsed == ("x",) and found.verdict("latents").level == "bad"
    assert sd.diagnose((wide, lambda y: posterior(y, True)), y, draws=400).latents[0].active == 1


def test_a_latent_on_which_the_data_say_nothing_is_no_failure():
    def with_idle(program):
        def both(batch):
            pyro.sample("idle", normal(0.0, 1.0))
            return program(batch)

        return both

    pair = with_idle(walk), with_idle(exact_walk())
    found = sd.diagnose(pair, walks(10), draws=400)
    assert found.ok and found.verdict("latents").level == "fair"
    assert found.verdict("latents").found == "posterior = prior: idle"


def test_a_discrete_latent_is_taken_as_it_is():
    def switch(y, share=0.5):
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([1 - share, share], dtype=F64)))
            pyro.sample("y", dist.Normal(k.to(F64), 1.0), obs=y)

    def right(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("k", dist.Categorical(logits=torch.stack([-(y**2), -((y - 1) ** 2)], -1) / 2))

    y = torch.tensor([0.0, 1.0, 2.5], dtype=F64)
    found = sd.diagnose((switch, right), y, draws=200)
    assert found.verdict("k-hat").level == "good"
    share = torch.sigmoid(y - 0.5)
    expected = (share * (1 - share)).sqrt() / 0.5
    assert found.latents[0].ratio == pytest.approx(expected.median().item(), rel=0.15)


class OnlyScored(dist.TorchDistribution):
    """A likelihood that someone wrote for its density alone."""

    arg_constraints = {}  # noqa: RUF012
    support = torch.distributions.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape)

    def expand(self, batch_shape, _instance=None):
        return OnlyScored(self.loc.expand(batch_shape))

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).log_prob(value)


@pytest.mark.parametrize("series", [False, True])
def test_a_likelihood_that_cannot_be_drawn_costs_its_line_alone(series):
    def scored(y):
        mu = pyro.sample("mu", normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            value = y.values[:, 0, 0] if series else y
            pyro.sample("y", OnlyScored(mu + 0 * value), obs=value)

    def exact(y):
        value = y.values[:, 0, 0] if series else y
        pyro.sample("mu", normal(value.sum() / (len(y) + 1), 1 / math.sqrt(len(y) + 1)))

    y = torch.linspace(-1, 2, 12, dtype=F64)
    found = sd.diagnose((scored, exact), sd.Series([0.0], y[:, None, None]) if series else y, draws=100)
    assert levels(found)["k-hat"] == "good" and levels(found)["coverage"] == "-"


def test_a_point_estimate_is_no_posterior():
    y = torch.randn(30, dtype=F64, generator=torch.Generator().manual_seed(0))
    guide = AutoDelta(mean_of)
    guide(y)
    found = sd.diagnose((mean_of, guide), y)
    assert not found.ok and levels(found)["k-hat"] == "-"
    assert found.verdict("latents").found == "no spread, a point estimate: mu"


def test_training_that_had_not_ended():
    y = torch.randn(30, dtype=F64, generator=torch.Generator().manual_seed(0)) + 3

    def fitted(steps):
        pyro.clear_param_store()  # Pyro's guides of the same name share their parameters
        guide = AutoNormal(mean_of, init_loc_fn=lambda site: torch.tensor(-3.0, dtype=F64), init_scale=0.02)
        return sd.diagnose(sd.fit(mean_of, guide, y, steps=steps, lr=0.01, progress=False), y)

    early = fitted(200)
    assert early.verdict("training").level == "bad" and not early.ok
    assert "Not settled" in early.verdict("training").advice
    assert fitted(2000).verdict("training").level == "good"


def poisson(batch):
    rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0))
    with batch.plate("sequence"):
        pyro.sample("y", sd.PoissonProcess(rate, batch.t0, batch.t1), obs=batch.values)


def hawkes(batch):
    mu = pyro.sample("mu", dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0))
    alpha = pyro.sample("alpha", dist.LogNormal(torch.tensor(-0.5, dtype=F64), 0.5))
    with batch.plate("sequence"):
        pyro.sample("y", sd.Hawkes(mu, alpha, 2 * alpha, batch.t0, batch.t1), obs=batch.values)


@pytest.mark.parametrize(("model", "right"), [(hawkes, True), (poisson, False)])
def test_jumps_that_cluster_are_no_poisson_process(model, right):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        data = sd.Jumps(sd.Hawkes(0.5, 0.8, 1.6, 0.0, 50.0).sample((20,)), 0.0, 50.0)
    fit = sd.fit(model, sd.AmortizedGuide(model), data, steps=150, lr=0.05, progress=False)
    found = sd.diagnose(fit, data, draws=100)
    assert (found.verdict("jumps").level == "good") == right, str(found)
    assert found.coverage is None and "jumps of a point process" in found.no_evidence
    assert right or not found.ok
    assert len(sd.plot_diagnosis(found)) == 2


def jump_diffusion(batch):
    sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-1.0), 0.3))
    grid = sd.TimeGrid(batch.times, substeps=2)
    with batch.plate("series"):
        jumps = sd.CompoundPoisson(torch.tensor(0.5), sd.NormalJump(torch.zeros(1), torch.ones(1)))
        start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        path = sd.JumpDiffusionPath(lambda t, z: -z, sigma[..., None], jumps, start, grid.ts)
        z = pyro.sample("z", path)
        seen = dist.Normal(grid.observed(z), 0.2).mask(batch.mask).to_event(2)
        pyro.sample("y", seen, obs=batch.values)


def grouped(batch):
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with batch.group_plate("clinic"):
        clinic = pyro.sample("clinic_level", dist.Normal(level, 0.3))
    with batch.plate("patient"):
        rate = pyro.sample("rate", dist.Normal(clinic[..., batch.groups["clinic"]], 0.4))
        seen = dist.Normal(rate[..., None, None].expand(*rate.shape, 4, 1), 0.3).mask(batch.mask)
        pyro.sample("y", seen.to_event(2), obs=batch.values)


def ready(name):
    model = {
        "sde": lambda: sd.LatentSDE(1, 2, hidden=8),
        "ode": lambda: sd.LatentODE(1, 2, hidden=8),
        "jumps at observations": lambda: sd.ObservationJumpODE(1, 8),
        "known first": lambda: sd.ObservationJumpODE(1, 8, given_first=True),
    }[name]()
    return model, model.guide


@pytest.mark.parametrize("name", ["sde", "ode", "jumps at observations", "known first"])
def test_ready_models(name):
    torch.manual_seed(0)
    y = torch.randn(6, 4, 1)
    mask = torch.ones_like(y, dtype=torch.bool)
    mask[0, 2:] = mask[1, 1] = False
    data = sd.Series(torch.linspace(0, 1, 4), y, mask=mask, ids=list("abcdef"))
    model, guide = ready(name)
    fit = sd.fit(model, guide, data, steps=3, progress=False)
    found = sd.diagnose(fit, data, draws=30, particles=3)
    assert found.verdict("training").found.startswith("the fit has 3 losses")
    assert found.coverage.how == "hidden"
    assert found.coverage.points[0] == int(mask.sum()) - (6 if name == "known first" else 0)
    assert (found.gap_per_series is not None) == (name == "sde")
    assert found.ids == tuple("abcdef")
    assert found.to_xarray().sizes["channel"] == 1


def test_jump_diffusions_and_groups():
    torch.manual_seed(0)
    data = sd.Series(torch.linspace(0, 1, 4), torch.randn(6, 4, 1), groups={"clinic": list("aabbcc")})
    found = sd.diagnose((jump_diffusion, sd.AmortizedGuide(jump_diffusion)), data, draws=30, particles=3)
    assert [latent.name for latent in found.latents] == ["sigma", "z"]
    assert found.gap_per_series.value.shape == (6,) and found.k_hat is not None
    found = sd.diagnose((grouped, sd.AmortizedGuide(grouped)), data, draws=30)
    assert {latent.name: latent.local for latent in found.latents} == {
        "level": False,
        "clinic_level": False,
        "rate": True,
    }
    assert found.k_hat is not None and found.k_hat_per_series is None


def test_parameters_and_paths_split_the_gap():
    data = ou_series(4, own_times(4, 6))
    found = sd.diagnose((ou_latent, sd.AmortizedGuide(ou_latent)), data, draws=50, particles=3)
    assert "in the latents that series share" in found.verdict("gap").found
    guide = sd.AmortizedGuide(local_theta, sd.GRUEncoder(1, 8).double(), amortize={"theta": "series"})
    found = sd.diagnose((local_theta, guide), data, draws=50, particles=3)
    assert {latent.name for latent in found.latents} == {"level", "theta", "z"}


def test_a_guide_for_another_model_gives_no_evidence():
    found = sd.diagnose(
        (lambda batch: ou(batch), sd.AmortizedGuide(ou)), ou_series(3, [0.0, 0.5, 1.0]), draws=30
    )
    assert "another model" in found.no_evidence


def test_what_is_refused():
    data = ou_series(2, [0.0, 0.5])
    with pytest.raises(FitError, match="at least 25"):
        sd.diagnose((ou, sd.AmortizedGuide(ou)), data, draws=10)
    with pytest.raises(FitError, match="particles"):
        sd.diagnose((ou, sd.AmortizedGuide(ou)), data, particles=0)
    with pytest.raises(FitError, match="pair"):
        sd.diagnose(ou, data)
    with pytest.raises(GuideError, match="not in the guide"):
        sd.diagnose((ou, lambda batch: None), data)


def test_the_seed_decides_and_the_random_state_stays():
    data = walks(5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = sd.diagnose((walk, exact_walk(0.9)), data, draws=50)
    assert torch.equal(before, torch.get_rng_state())
    assert str(first) == str(sd.diagnose((walk, exact_walk(0.9)), data, draws=50))
