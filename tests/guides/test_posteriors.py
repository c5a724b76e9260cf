"""What training reaches: posterior widths, and amortised posteriors of series never seen."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from tests.guides.test_sites import factor_of
from tests.problems import OU, euler_linear, kalman_log_evidence
from tests.programs import (
    F64,
    elbos,
    mean_and_error,
    ou,
    ou_evidence,
    ou_latent,
    ou_path,
    ou_priors,
    ou_series,
    trained,
)

POINTS, STEP = 60, 0.2
BATCH = ou_series(1, STEP * torch.arange(POINTS, dtype=F64), seed=5)


def model(batch):
    ou_latent(batch, substeps=1)


def marginal():
    """The same model with the path integrated out: y is one multivariate normal."""
    theta, mu, sigma = ou_priors()
    F, q, v = (x[..., None] for x in (1 - theta * STEP, sigma**2 * STEP, sigma**2 / (2 * theta)))
    k = torch.arange(POINTS, dtype=F64)
    variance = F ** (2 * k) * v + q * (1 - F ** (2 * k)) / (1 - F**2)
    first, lag = torch.minimum(k[:, None], k).long(), (k[:, None] - k).abs()
    covariance = F[..., None] ** lag * variance[..., first] + OU["noise"] ** 2 * torch.eye(POINTS, dtype=F64)
    loc = mu[..., None].expand(*mu.shape, POINTS)
    pyro.sample("y", dist.MultivariateNormal(loc, covariance), obs=BATCH.values[0, :, 0])


def test_the_path_is_integrated_out():
    values = [torch.tensor(x, dtype=F64) for x in (1.2, 0.3, 0.7)]
    held = poutine.condition(marginal, dict(zip(("theta", "mu", "sigma"), values, strict=True)))
    trace = poutine.trace(held).get_trace()
    trace.compute_log_prob()
    exact = ou_evidence(BATCH, *(x.item() for x in values), substeps=1).sum().item()
    assert trace.nodes["y"]["log_prob"].item() == pytest.approx(exact, abs=1e-9)


@torch.no_grad()
def exact_sds(guide, draws=10000, wider=1.5):
    """Of the posterior, by importance sampling from a wider copy of a guide for the marginal model."""
    L = factor_of(guide.joint)
    proposal = dist.MultivariateNormal(guide.joint.loc, scale_tril=wider * L)
    u = proposal.sample((draws,))
    log_w = []
    for part in u.split(1000):
        values = {"theta": part[:, 0].exp(), "mu": part[:, 1], "sigma": part[:, 2].exp()}
        with pyro.plate("draws", len(part)):
            trace = poutine.trace(poutine.condition(marginal, values)).get_trace()
        trace.compute_log_prob()
        log_p = sum(trace.nodes[name]["log_prob"] for name in ("theta", "mu", "sigma", "y"))
        log_w.append(log_p + part[:, 0] + part[:, 2] - proposal.log_prob(part))
    w = torch.softmax(torch.cat(log_w), 0)
    assert 1 / w.square().sum() > draws / 5
    mean = w @ u
    return (w @ (u - mean).square()).sqrt()


def sds(guide):
    L = factor_of(guide.joint)
    return (L @ L.mT).diagonal().sqrt().detach()


def blind(guide):
    """A guide with the same messages, held where the other guide's medians have them."""
    new = sd.AmortizedGuide(model, paths=sd.FreeMessage())
    new(BATCH)
    loc = guide.joint.loc.detach()
    grid = sd.TimeGrid(BATCH.times, substeps=1)
    path = ou_path(grid.ts, loc[0].exp(), loc[1], loc[2].exp()).expand((1,))
    message = sd.information_filter(path, sd.Message.observed(grid, BATCH.values, BATCH.mask, OU["noise"]))
    h, J = message.information.detach(), message.precision[..., 0].detach()
    site = new.paths["z"]
    with torch.no_grad():
        site.numbers[..., :1] = J.sqrt().mul(site.unit).log()
        site.numbers[..., 1:] = (h / J - site.around) / site.unit
        for name, parameter in new.joint.named_parameters():
            parameter.copy_(getattr(guide.joint, name))
    return new


@pytest.mark.slow
def test_messages_that_see_the_latents_give_their_posterior_widths():
    options = {"steps": 400, "lr": 0.03, "objective": sd.ELBO(particles=8)}
    best = sd.AmortizedGuide(marginal)
    trained(marginal, best, (), **options)
    torch.manual_seed(0)
    exact = exact_sds(best)
    guide = sd.AmortizedGuide(model)
    trained(model, guide, BATCH, **options)
    torch.testing.assert_close(sds(guide) / exact, torch.ones(3, dtype=F64), atol=0.1, rtol=0)
    other = blind(guide)
    trained(model, other, BATCH, **options)
    assert (sds(other) / exact).min() < 0.9


@pytest.mark.slow
def test_an_amortised_guide_knows_new_series():
    times = torch.tensor([0.0, 0.3, 0.5, 1.1, 1.4, 2.0], dtype=F64)
    data, new = ou_series(200, times, seed=1), ou_series(100, times, seed=2)

    def short(batch):
        ou(batch, substeps=2)

    torch.manual_seed(0)
    guide = sd.AmortizedGuide(short, sd.GRUEncoder(1, hidden=32).double(), paths=sd.FreeMessage())
    mean, error = gap(short, guide, new)
    assert mean - 4 * error > 0.5
    trained(short, guide, data, steps=1500, batch_size=50, lr=0.01)
    mean, error = gap(short, guide, new)
    assert mean < 0.05
    assert mean > -4 * error


def gap(program, guide, series):
    """Evidence minus ELBO, per series, in evaluation."""
    guide.eval()
    mean, error = mean_and_error(elbos(program, guide, series, draws=100))
    guide.train()
    exact = ou_evidence(series, substeps=2).sum().item()
    return (exact - mean) / len(series), error / len(series)


def wide_priors():
    """As `ou_priors`, with a wide prior of theta: the posterior is curved and skewed."""
    theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.4, dtype=F64), 0.7))
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-0.3, dtype=F64), 0.7))
    return theta, mu, sigma


@torch.no_grad()
def wide_sds(guide, draws=40000):
    """Of the posterior with wide priors, by importance sampling from a Student t around a guide."""
    L = factor_of(guide.joint)
    proposal = dist.MultivariateStudentT(torch.tensor(4.0, dtype=F64), guide.joint.loc.detach(), 1.3 * L)
    u = proposal.sample((draws,))
    u = u[(u[:, 0].exp() * STEP < 1.8) & (u[:, 0] > -4) & (u[:, 2].abs() < 4)]  # where the scheme is stable
    log_w = []
    for part in u.split(1000):
        values = {"theta": part[:, 0].exp(), "mu": part[:, 1], "sigma": part[:, 2].exp()}
        with pyro.plate("draws", len(part)):
            trace = poutine.trace(poutine.condition(marginal, values)).get_trace()
        trace.compute_log_prob()
        log_p = sum(trace.nodes[name]["log_prob"] for name in ("theta", "mu", "sigma", "y"))
        log_w.append(log_p + part[:, 0] + part[:, 2] - proposal.log_prob(part))
    w = torch.softmax(torch.cat(log_w), 0)
    assert 1 / w.square().sum() > draws / 5
    mean = w @ u
    return (w @ (u - mean).square()).sqrt()


@pytest.mark.slow
def test_a_flow_gives_the_widths_of_a_curved_posterior(monkeypatch):
    monkeypatch.setattr("tests.programs.ou_priors", wide_priors)
    monkeypatch.setitem(globals(), "ou_priors", wide_priors)
    torch.manual_seed(0)
    full = sd.AmortizedGuide(marginal)
    trained(marginal, full, (), steps=400, lr=0.03, objective=sd.ELBO(particles=8))
    torch.manual_seed(0)
    exact = wide_sds(full)
    assert (sds(full) / exact)[:2].max() < 0.88  # a normal is too narrow
    guide = sd.AmortizedGuide(model, latents=sd.Flow())
    trained(model, guide, BATCH, steps=450, lr=0.02, objective=sd.ELBO(particles=16))
    with torch.no_grad():
        u = guide.joint.inverse(torch.randn(20000, 3, dtype=F64))
    torch.testing.assert_close(u.std(0) / exact, torch.ones(3, dtype=F64), atol=0.1, rtol=0)


RATE_TIMES, RATE_SPREAD, RATE_NOISE = torch.linspace(0, 4, 21, dtype=F64), 0.3, 0.1


def rates(batch):
    """A rate for every series, spread around a common level; paths fall from 2 to 0 at that rate."""
    level = pyro.sample("level", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
    grid = sd.TimeGrid(batch.times, substeps=1)
    with batch.plate("subject"):
        theta = pyro.sample("theta", dist.LogNormal(level, RATE_SPREAD))
        start = dist.Normal(torch.full((1,), 2.0, dtype=F64), 0.1).to_event(1)
        z = pyro.sample("z", ou_path(grid.ts, theta, 0.0, 0.3, start=start))
        pyro.sample("y", dist.Normal(grid.observed(z), RATE_NOISE).to_event(2), obs=batch.values)


def rate_series(number, seed):
    torch.manual_seed(seed)
    blank = sd.Series(RATE_TIMES, torch.zeros(number, len(RATE_TIMES), 1, dtype=F64))
    held = poutine.condition(poutine.uncondition(rates), {"level": torch.tensor(0.2, dtype=F64)})
    return sd.Series(RATE_TIMES, poutine.trace(held).get_trace(blank).nodes["y"]["value"])


def rate_posterior(series, level):
    """Mean and sd of log theta of one series, by quadrature; the path is integrated out by a Kalman filter."""
    one = torch.ones(1, 1, dtype=F64)
    u = torch.linspace(-2, 2, 121, dtype=F64)
    observed = {k: series.values[0, k] for k in range(len(RATE_TIMES))}
    log_p = []
    for theta in u.exp():
        start = {"m": 2 * one[0], "P": 0.01 * one, "H": one, "R": RATE_NOISE**2 * one}
        linear = euler_linear(-theta * one, 0 * one[0], 0.3 * one, RATE_TIMES.diff(), **start)
        log_p.append(kalman_log_evidence(linear, observed))
    log_p = torch.tensor(log_p, dtype=F64) + dist.Normal(level, RATE_SPREAD).log_prob(u)
    w = torch.softmax(log_p, 0)
    mean = (w * u).sum()
    return mean, (w * (u - mean).square()).sum().sqrt()


@pytest.mark.slow
def test_amortised_rates_of_paths_have_the_posterior_of_series_never_seen():
    data, new = rate_series(2000, seed=1), rate_series(6, seed=2)
    torch.manual_seed(0)
    guide = sd.AmortizedGuide(rates, sd.GRUEncoder(1, 32).double(), amortize={"theta": "subject"})
    trained(rates, guide, data, steps=400, lr=0.01, batch_size=100)
    guide.eval()
    level = guide.joint.loc[0].detach()
    with torch.no_grad():
        q = poutine.trace(poutine.condition(guide, {"level": level})).get_trace(new).nodes["theta"]["fn"]
    exact = torch.tensor([rate_posterior(new[[i]], level) for i in range(len(new))], dtype=F64)
    ratio, shift = q.factor[:, 0] / exact[:, 1], (q.loc[:, 0] - exact[:, 0]) / exact[:, 1]
    torch.testing.assert_close(ratio, torch.ones(6, dtype=F64), atol=0.1, rtol=0)
    assert shift.square().mean().sqrt() < 0.3
    assert (exact[:, 1] / RATE_SPREAD).max() < 0.8  # the prior is wider
