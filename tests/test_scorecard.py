"""The reliability that the package promises, end to end, against exact answers; each with a control that must fail."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import stochdyn as sd
from tests.problems import OU, ou_discretised
from tests.programs import (
    F64,
    elbos,
    mean_and_error,
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

pytestmark = pytest.mark.slow


def joint_posterior(y, seen, times, substeps, noise=OU["noise"]):
    """Mean and covariance of the states at the observation times of the discretised OU process, by dense algebra."""
    dts = sd.TimeGrid(times, substeps=substeps).ts.diff()
    linear = ou_discretised(dts, OU["theta"], OU["mu"], OU["sigma"], noise)
    n = len(dts) + 1
    mean, cov = torch.zeros(n, dtype=F64), torch.zeros(n, n, dtype=F64)
    mean[0], cov[0, 0] = linear.m[0], linear.P[0, 0]
    for k in range(n - 1):
        a = float(linear.F[k])
        mean[k + 1] = a * mean[k] + linear.b[k][0]
        cov[k + 1, : k + 1] = cov[: k + 1, k + 1] = a * cov[k, : k + 1]
        cov[k + 1, k + 1] = a * a * cov[k, k] + float(linear.Q[k])
    at = torch.arange(len(times)) * substeps
    prior_mean, prior = mean[at], cov[at][:, at]
    H = torch.eye(len(times), dtype=F64)[seen]
    S = H @ prior @ H.mT + noise**2 * torch.eye(len(H), dtype=F64)
    K = prior @ H.mT @ torch.linalg.inv(S)
    return prior_mean + K @ (y[seen] - prior_mean[seen]), prior - K @ H @ prior


class TestEvidence:
    """After amortised training the bound is the evidence, per series, of series that it never saw."""

    def test_ou(self):
        train = ou_series(100, own_times(100, 6))
        fresh = ou_series(20, own_times(20, 6, seed=8), seed=9, hold=[(3, 2), (5, 5)])
        guide = sd.AmortizedGuide(ou, sd.GRUEncoder(1, hidden=16).double())
        sd.fit(ou, guide, train, batch_size=20, steps=300, lr=1e-3, progress=False)
        value, error = mean_and_error(elbos(ou, guide.eval(), fresh, draws=50))
        gap = (float(ou_evidence(fresh).sum()) - value) / 20
        assert -4 * error / 20 - 1e-8 < gap < 0.01

    def test_coupled_ou(self):
        train, fresh = (
            rotating_series(n, torch.arange(8, dtype=F64) * 0.3, seed=s) for n, s in ((60, 0), (20, 1))
        )
        guide = sd.AmortizedGuide(rotating, sd.GRUEncoder(1, hidden=16).double())
        sd.fit(rotating, guide, train, batch_size=20, steps=200, lr=1e-3, progress=False)
        value, error = mean_and_error(elbos(rotating, guide.eval(), fresh, draws=50))
        gap = (float(rotating_evidence(fresh).sum()) - value) / 20
        assert -4 * error / 20 - 1e-8 < gap < 0.01
        diagonal = sd.AmortizedGuide(
            rotating, sd.GRUEncoder(1, hidden=16).double(), paths=sd.FreeMessage(rank=0)
        )
        sd.fit(rotating, diagonal, train, batch_size=20, steps=200, lr=1e-2, progress=False)
        value, _ = mean_and_error(elbos(rotating, diagonal.eval(), fresh, draws=50))
        assert (float(rotating_evidence(fresh).sum()) - value) / 20 > 0.05


class Sigma(nn.Module):
    """An OU process whose diffusion is learned."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.log_sigma = noise, nn.Parameter(torch.tensor(0.5, dtype=F64).log())

    def forward(self, batch):
        grid = sd.TimeGrid(batch.times, substeps=5)
        sigma = self.log_sigma.exp()
        start = dist.Normal(
            torch.full((1,), OU["mu"], dtype=F64), OU["sigma"] / math.sqrt(2 * OU["theta"])
        ).to_event(1)
        with batch.plate("series"):
            z = pyro.sample("z", ou_path(grid.ts, OU["theta"], OU["mu"], sigma, start=start))
            observe(grid, z, batch, self.noise)


def best_sigma(score):
    grid = np.linspace(0.2, 1.2, 401)
    return float(grid[np.argmax([score(s) for s in grid])])


def scalar_evidence(sigma, noise, values, steps):
    """The log evidence of one OU series by a scalar Kalman filter; `steps` are (keep, variance) from one time to the next."""
    m, P, total = OU["mu"], OU["sigma"] ** 2 / (2 * OU["theta"]), 0.0
    for k, y in enumerate(values):
        for keep, variance in steps if k else ():
            m, P = OU["mu"] + (m - OU["mu"]) * keep, P * keep**2 + sigma**2 * variance
        S = P + noise**2
        total -= 0.5 * ((y - m) ** 2 / S + math.log(2 * math.pi * S))
        m, P = m + P / S * (y - m), P - P * P / S
    return total


def same_diffusion_gap(sigma, noise, count, substeps, dt):
    """What the best guide with the prior's diffusion misses: sum (rho - 1 - log rho) / 2 over the steps."""
    J, gap, keep = 0.0, 0.0, 1 - OU["theta"] * dt
    for k in range((count - 1) * substeps, 0, -1):
        J += 1 / noise**2 if k % substeps == 0 else 0.0
        rho = 1 + sigma**2 * dt * J
        gap += 0.5 * (rho - 1 - math.log(rho))
        J = keep**2 * J / rho
    return gap


@pytest.mark.parametrize(("noise", "loss"), [(0.05, 0.39), (0.2, 0.17)])
def test_learned_diffusion(noise, loss):
    """400 observations, spacing .1: sigma within 3 % of maximum likelihood; a guide of the same diffusion is far off."""
    torch.manual_seed(0)
    spacing, substeps = 0.1, 5
    times = torch.arange(400, dtype=F64) * spacing
    fine = sd.TimeGrid(times, substeps=20)
    x = fine.observed(ou_path(fine.ts, OU["theta"], OU["mu"], OU["sigma"]).sample((1,)))
    batch = sd.Series(times, x + noise * torch.randn_like(x))
    values = batch.values[0, :, 0].tolist()
    keep, dt = math.exp(-OU["theta"] * spacing), spacing / substeps
    exact = [(keep, (1 - keep**2) / (2 * OU["theta"]))]
    euler = [(1 - OU["theta"] * dt, dt)] * substeps
    best = best_sigma(lambda s: scalar_evidence(s, noise, values, exact))
    model = Sigma(noise)
    guide = sd.AmortizedGuide(model)
    sd.fit(model, guide, batch, steps=120, lr=0.05, progress=False)
    assert abs(float(model.log_sigma.exp().detach()) / best - 1) < 0.03

    biased = best_sigma(
        lambda s: scalar_evidence(s, noise, values, euler) - same_diffusion_gap(s, noise, 400, substeps, dt)
    )
    assert biased / best - 1 == pytest.approx(-loss, abs=0.05)


def test_smoothing():
    """Mean within .02 sd, sd within 2 % of the exact smoother."""
    batch = ou_series(2, torch.arange(8, dtype=F64) * 0.4, seed=2, hold=[(0, 3)])
    guide = sd.AmortizedGuide(ou, sd.GRUEncoder(1, hidden=8).double())
    fit = sd.fit(ou, guide, batch, steps=20, lr=1e-3, progress=False)
    states = sd.predict(fit, batch, draws=40000).states[..., 0]
    for i in range(2):
        mean, cov = joint_posterior(batch.values[i, :, 0], batch.mask[i, :, 0], batch.times, 5)
        scale = cov.diagonal().sqrt()
        assert ((states[:, i].mean(0) - mean) / scale).abs().max() < 0.02
        assert (states[:, i].std(0) / scale - 1).abs().max() < 0.02


def test_two_samples():
    """Draws of the guide and of the exact joint posterior of eight states cannot be told apart; narrower ones can."""
    batch = ou_series(1, torch.arange(8, dtype=F64) * 0.4, seed=2)
    guide = sd.AmortizedGuide(ou, sd.GRUEncoder(1, hidden=8).double())
    fit = sd.fit(ou, guide, batch, steps=20, lr=1e-3, progress=False)
    states = sd.predict(fit, batch, draws=4000).states[:, 0, :, 0]
    mean, cov = joint_posterior(batch.values[0, :, 0], batch.mask[0, :, 0], batch.times, 5)
    torch.manual_seed(0)
    exact = mean + torch.randn(4000, 8, dtype=F64) @ torch.linalg.cholesky(cov).mT
    assert sd.c2st(states, exact).accuracy <= 0.53
    assert sd.c2st(mean + 0.8 * (states - mean), exact).accuracy > 0.55


def rates(batch, substeps=3):
    """Every series an OU process with a rate of its own."""
    grid = sd.TimeGrid(batch.times, substeps=substeps)
    with batch.plate("series"):
        theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.3, dtype=F64), 0.3))
        start = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
        z = pyro.sample("z", ou_path(grid.ts, theta, 0.0, OU["sigma"], start=start))
        observe(grid, z, batch, OU["noise"])


TIMES = torch.arange(6, dtype=F64) * 0.3


def simulate_rates(number, seed):
    """Parameters, states at the observation times, and data, from the model itself."""
    blank = sd.Series(TIMES, torch.zeros(number, 6, 1, dtype=F64))
    with torch.random.fork_rng():
        pyro.set_rng_seed(seed)
        trace = pyro.poutine.trace(pyro.poutine.uncondition(rates)).get_trace(blank)
    nodes = trace.nodes
    z = sd.TimeGrid(TIMES, substeps=3).observed(nodes["z"]["value"])
    return nodes["theta"]["value"], z[..., 0], nodes["y"]["value"]


def log_likelihood(states, y):
    return dist.Normal(states, OU["noise"]).log_prob(y[..., 0]).sum(-1)


@pytest.fixture(scope="module")
def rates_guide():
    torch.manual_seed(0)
    data = sd.Series(TIMES, simulate_rates(2000, 1)[2])
    guide = sd.AmortizedGuide(rates, sd.GRUEncoder(1, hidden=32).double(), amortize={"theta": "series"})
    sd.fit(rates, guide, data, batch_size=100, steps=800, lr=3e-3, progress=False)
    return guide.eval()


class TestCalibration:
    """A thousand simulations in one pass of the amortised guide."""

    def ranks(self, guide, shrink=1.0, blind=False):
        def simulate(rng):
            theta, states, y = simulate_rates(1000, int(rng.integers(2**31)))
            return {"theta": theta, "last": states[:, -1], "log_lik": log_likelihood(states, y)}, y

        def infer(y):
            if blind:
                theta, states, _ = (
                    torch.stack(x)
                    for x in zip(*(simulate_rates(1000, 10 + k) for k in range(99)), strict=True)
                )
                return {"theta": theta, "last": states[..., -1], "log_lik": log_likelihood(states, y)}
            found = sd.predict((rates, guide), sd.Series(TIMES, y), draws=99)
            theta, states = found.latents["theta"], found.states[..., 0]
            centre = theta.log().mean(0)
            theta = (centre + shrink * (theta.log() - centre)).exp()
            return {"theta": theta, "last": states[..., -1], "log_lik": log_likelihood(states, y)}

        return sd.sbc(simulate, infer, simulations=1000, progress=False)

    def test_calibrated(self, rates_guide):
        result = self.ranks(rates_guide)
        assert result.passed(alpha=0.01), str(result)
        for name in result.ranks:
            assert 0.872 <= result.coverage(name, 0.9) <= 0.928

    def test_narrow_posteriors_are_rejected(self, rates_guide):
        assert not self.ranks(rates_guide, shrink=0.8).passed(alpha=0.01)

    def test_a_missing_likelihood_is_rejected(self, rates_guide):
        """Draws of the prior pass for the parameters; the log likelihood gives them away."""
        result = self.ranks(rates_guide, blind=True)
        assert result.p_value("theta") > 0.001
        assert result.p_value("log_lik") < 0.001
