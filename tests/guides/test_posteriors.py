"""What training reaches: posterior widths, and amortised posteriors of series never seen."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

import stochdyn as sd
from tests.models import (
    F64,
    elbos,
    mean_and_error,
    normal,
    ou,
    ou_evidence,
    ou_latent,
    ou_path,
    ou_series,
    trained,
)
from tests.problems import OU

POINTS, STEP = 60, 0.2
BATCH = ou_series(1, STEP * torch.arange(POINTS), seed=5)


def model(batch):
    ou_latent(batch, substeps=1)


def marginal():
    """The same model with the path integrated out: y is one multivariate normal."""
    theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.3, dtype=F64), 0.7))
    mu = pyro.sample("mu", normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-0.3, dtype=F64), 0.7))
    F, q, v = 1 - theta * STEP, sigma**2 * STEP, sigma**2 / (2 * theta)
    k = torch.arange(POINTS, dtype=F64)
    variance = F ** (2 * k) * v + q * (1 - F ** (2 * k)) / (1 - F**2)
    lag = (k[:, None] - k).abs()
    first = torch.minimum(k[:, None], k).long()
    covariance = F**lag * variance[first] + OU["noise"] ** 2 * torch.eye(POINTS, dtype=F64)
    pyro.sample("y", dist.MultivariateNormal(mu.expand(POINTS), covariance), obs=BATCH.values[0, :, 0])


def exact_sds():
    mcmc = MCMC(NUTS(marginal), num_samples=1500, warmup_steps=300, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    return torch.stack([draws["theta"].log().std(), draws["mu"].std(), draws["sigma"].log().std()])


def sds(guide):
    L = torch.diag(guide.joint.log_scale.exp()) + guide.joint.lower.tril(-1)
    return (L @ L.mT).diagonal().sqrt().detach()


def blind(guide):
    """A guide with the same messages, held where the other guide's medians have them."""
    new = sd.AmortizedGuide(model, message=sd.FreeMessage())
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
    exact = exact_sds()
    guide = sd.AmortizedGuide(model)
    trained(model, guide, BATCH, steps=400, lr=0.03, objective=sd.ELBO(particles=8))
    print("RATIO", sds(guide) / exact, exact)
    torch.testing.assert_close(sds(guide) / exact, torch.ones(3, dtype=F64), atol=0.1, rtol=0)
    other = blind(guide)
    trained(model, other, BATCH, steps=400, lr=0.01, objective=sd.ELBO(particles=8))
    print("BLIND", sds(other) / exact)
    assert (sds(other) / exact).min() < 0.9


@pytest.mark.slow
def test_an_amortised_guide_knows_new_series():
    times = torch.tensor([0.0, 0.3, 0.5, 1.1, 1.4, 2.0], dtype=F64)
    data, new = ou_series(200, times, seed=1), ou_series(100, times, seed=2)

    def short(batch):
        ou(batch, substeps=2)

    torch.manual_seed(0)
    guide = sd.AmortizedGuide(short, sd.GRUEncoder(1, hidden=32).double(), message=sd.FreeMessage())
    mean, error = gap(short, guide, new)
    assert mean - 4 * error > 0.5
    trained(short, guide, data, steps=1500, batch_size=50, lr=0.01)
    mean, error = gap(short, guide, new)
    print("GAP", mean, error)
    assert mean < 0.05
    assert mean > -4 * error


def gap(program, guide, series):
    """Evidence minus ELBO, per series, in evaluation."""
    guide.eval()
    mean, error = mean_and_error(elbos(program, guide, series, draws=100))
    guide.train()
    exact = ou_evidence(series, substeps=2).sum().item()
    return (exact - mean) / len(series), error / len(series)
