"""Censored data through models: the exact evidence, what a limit taken for a value does, encoders and predictions."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats as ss
import torch

import stochdyn as sd
from stochdyn.guides.signature import series_signature
from tests.problems import OU, OU_TIMES, OU_VALUES
from tests.programs import F64, normal, ou_evidence, ou_path, ou_series

INF = float("inf")
LIMIT, AT = 0.45, 2  # of the values only the third is below


def ou_censored(batch, sigma=OU["sigma"], substeps=5):
    grid = sd.TimeGrid(batch.times, substeps=substeps)
    with batch.plate("series"):
        z = pyro.sample("z", ou_path(grid.ts, OU["theta"], OU["mu"], sigma))
        batch.observe("y", dist.Normal(grid.observed(z), OU["noise"]))


def one_censored():
    """The readings of the exact problem; the third is only known to be at or below the limit."""
    low, high = torch.full((1, 8, 1), torch.nan), torch.full((1, 8, 1), torch.nan)
    low[0, AT, 0], high[0, AT, 0] = -INF, LIMIT
    return sd.Series(OU_TIMES, OU_VALUES[None], between=(low, high))


@functools.cache
def exact_evidence(**parameters):
    """log of the integral over y <= limit of the Kalman evidence, by quadrature."""

    def density(y):
        values = OU_VALUES[None].clone()
        values[0, AT, 0] = y
        return float(ou_evidence(sd.Series(OU_TIMES, values), **parameters)[0].exp())

    mass, _ = scipy.integrate.quad(density, -4.0, LIMIT, epsabs=1e-12, epsrel=1e-9)
    return math.log(mass)


def dense_evidence():
    """The same by a multivariate normal: the density of the others times the conditional probability."""
    chain = torch.arange(8)
    basis = torch.eye(8, dtype=F64)

    def pair(values):
        return float(ou_evidence(sd.Series(OU_TIMES, values[None, :, None]))[0])

    at_mean = torch.full((8,), OU["mu"], dtype=F64)
    top = pair(at_mean)
    single = [top - pair(at_mean + basis[i]) for i in chain]
    precision = torch.tensor(
        [
            [
                2 * single[i] if i == j else top - pair(at_mean + basis[i] + basis[j]) - single[i] - single[j]
                for j in chain
            ]
            for i in chain
        ],
        dtype=F64,
    )
    others = [i for i in range(8) if i != AT]
    r = OU_VALUES[:, 0] - OU["mu"]
    variance = 1 / precision[AT, AT]
    mean = OU["mu"] - variance * (precision[AT, others] @ r[others])
    rest = ss.multivariate_normal(cov=torch.linalg.inv(precision)[others][:, others].numpy()).logpdf(
        r[others].numpy()
    )
    return rest + ss.norm.logcdf(LIMIT, float(mean), float(variance.sqrt()))


def test_the_exact_answers_agree():
    assert exact_evidence() == pytest.approx(dense_evidence(), abs=1e-6)


@pytest.mark.parametrize("paths", [sd.FilterMessage(), sd.FreeMessage()], ids=["filter", "prior"])
def test_the_evidence_with_one_censored_value(paths):
    """The guided particle filter against quadrature, within Monte-Carlo error; the limit taken for a value is elsewhere."""
    torch.manual_seed(0)
    pair = (ou_censored, sd.AmortizedGuide(ou_censored, paths=paths))
    runs = torch.stack(
        [sd.evidence(pair, one_censored(), draws=1, particles=100, seed=s).total for s in range(8)]
    )
    ratios = (runs - exact_evidence()).exp()
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(len(ratios))
    assert ratios.std() < (0.05 if isinstance(paths, sd.FilterMessage) else 1.0)
    values = OU_VALUES[None].clone()
    values[0, AT, 0] = LIMIT
    wrong = ou_evidence(sd.Series(OU_TIMES, values))[0]
    assert abs((wrong - exact_evidence()).exp() - 1) > 8 * ratios.std() / math.sqrt(len(ratios))


def test_the_elbo_stays_below_and_a_message_for_a_tail_comes_near():
    torch.manual_seed(0)
    guide = sd.AmortizedGuide(ou_censored, paths=sd.FilterMessage())
    batch = one_censored()
    guide(batch)
    elbo = pyro.infer.Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        found = -elbo.loss(ou_censored, guide, batch)
    assert -0.1 < found - exact_evidence() < 0.01


def below(values, limit):
    """The same values with all at or below a limit censored; with the limit for them; with half of it; without them."""
    low = values.values <= limit
    swap = lambda x: sd.Series(values.times, torch.where(low, x, values.values))  # noqa: E731
    return {
        "censored": sd.Series(values.times, values.values, lower=limit),
        "limit": swap(torch.tensor(limit, dtype=F64)),
        "ignored": sd.Series(values.times, values.values, mask=~low),
    }


def best_sigma(batch):
    """The maximum-likelihood diffusion under FilterMessage, by the particle evidence on a grid of values."""
    sigmas = torch.linspace(0.3, 1.1, 17, dtype=F64)
    out = []
    for sigma in sigmas:
        model = lambda b, s=sigma: ou_censored(b, s, substeps=2)  # noqa: E731
        pair = (model, sd.AmortizedGuide(model, paths=sd.FilterMessage()))
        out.append(float(sd.evidence(pair, batch, draws=1, particles=50).per_series.sum()))
    return float(sigmas[int(np.argmax(out))])


@pytest.mark.slow
def test_the_diffusion_is_found_with_a_third_of_the_values_censored():
    data = ou_series(60, torch.linspace(0, 3, 13), seed=3)
    limit = float(data.values.quantile(0.35))
    found = {name: best_sigma(batch) for name, batch in below(data, limit).items()}
    full = best_sigma(data)
    assert abs(found["censored"] - full) <= 0.1
    assert found["limit"] < full - 0.15
    assert found["ignored"] < full - 0.15


def test_encoders_are_told_what_is_censored():
    values = torch.tensor([[[0.1], [0.5], [2.0]]])
    exact = sd.Series([0.0, 1.0, 2.0], values)
    censored = sd.Series([0.0, 1.0, 2.0], values, lower=0.1)
    assert torch.equal(exact.values, censored.values)
    for encoder in (sd.GRUEncoder(1, 4), sd.SetEncoder(1, 4), sd.ConvEncoder(1, 4), sd.ODERNNEncoder(1, 4)):
        inputs = encoder._inputs(censored)
        assert inputs[0].tolist() == [[pytest.approx(0.1), -1.0], [0.5, 1.0], [2.0, 1.0]]
        assert not torch.allclose(encoder(exact)[:, 0], encoder(censored)[:, 0])
        torch.testing.assert_close(encoder(exact)[:, 1:], encoder(censored)[:, 1:])


def test_a_table_of_messages_knows_censored_data_from_exact():
    values = torch.tensor([[[0.1], [0.5], [2.0]]])
    plain, censored = sd.Series([0.0, 1.0, 2.0], values), sd.Series([0.0, 1.0, 2.0], values, lower=0.1)
    assert series_signature(plain) != series_signature(censored)
    assert series_signature(censored) == series_signature(censored.extend([3.0]))


DECODERS = {
    "normal": lambda: sd.NormalDecoder(torch.nn.Identity(), 2, scale=0.5),
    "student": lambda: sd.StudentTDecoder(torch.nn.Identity(), 2, scale=0.5, learned_df=True),
    "poisson": lambda: sd.PoissonDecoder(torch.nn.Identity(), 2),
    "negative binomial": lambda: sd.NegativeBinomialDecoder(torch.nn.Identity(), 2),
}


@pytest.mark.parametrize("paths", [sd.FreeMessage(), sd.FilterMessage(refine=1)], ids=["free", "filter"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_latent_sde_of_censored_data(name, paths):
    torch.manual_seed(0)
    decoder = DECODERS[name]()
    with torch.no_grad():
        values = decoder(torch.randn(8, 5, 2)).sample()
    lower, upper = (0.0, 2.0) if "normal" in name or "student" in name else (0.0, 3.0)
    mask = torch.rand(8, 5, 2) > 0.2
    mask[:, 0] = True
    batch = sd.Series(torch.linspace(0, 1, 5), values, mask=mask, lower=lower, upper=upper)
    assert 0 < batch.censored.sum() < mask.sum()
    model = sd.LatentSDE(2, 2, hidden=4, decoder=decoder, paths=paths)
    fit = sd.fit(model, model.guide, batch, steps=3, batch_size=4, progress=False)
    assert np.isfinite(fit.losses).all()
    found = sd.predict(fit, batch, ts=[1.5], draws=200)
    assert found.observations.shape == (200, 8, 6, 2)
    assert (found.observations > upper).any()  # the truth, not what would be recorded
    assert torch.isfinite(sd.evidence(fit, batch, draws=1, particles=20).per_series).all()
    if isinstance(paths, sd.FilterMessage):
        return
    idata = sd.to_arviz(fit, batch, draws=6)
    assert np.isfinite(idata["log_likelihood"]["y"].values).all()
    recorded = idata["observed_data"]["y"].values[batch.mask.numpy()]
    assert recorded.min() >= lower and recorded.max() <= upper
    fit = sd.fit(model, model.guide, batch, steps=2, objective=sd.IWAE(particles=3), progress=False)
    assert np.isfinite(fit.losses).all()


def test_a_decoder_without_a_distribution_function_refuses():
    batch = sd.Series([0.0, 1.0], torch.tensor([[[0.0], [1.0]]]), lower=0.0)
    model = sd.LatentSDE(1, 1, hidden=4, decoder=sd.BernoulliDecoder(torch.nn.Identity(), 1))
    with pytest.raises(
        sd.SupportError, match="Bernoulli has no distribution function here, which censored entries need"
    ):
        model(batch)


def test_a_censored_level_is_learned_without_bias():
    """Tobit: many readings of one normal, half of them below the limit; maximum likelihood against scipy."""
    torch.manual_seed(0)
    y = 1.0 + 0.8 * torch.randn(2000, 1, 1, dtype=F64)
    batch = sd.Series([0.0], y, lower=1.0)
    loc, log_scale = (
        torch.zeros(1, dtype=F64, requires_grad=True),
        torch.zeros(1, dtype=F64, requires_grad=True),
    )

    def loss(batch):
        with batch.plate("series"):
            trace = pyro.poutine.trace(batch.observe).get_trace(
                "y", normal(loc, log_scale.exp()).expand(batch.values.shape)
            )
        return -trace.log_prob_sum()

    def best(batch):
        with torch.no_grad():
            loc.zero_(), log_scale.zero_()
        optimiser = torch.optim.LBFGS([loc, log_scale], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            value = loss(batch)
            value.backward()
            return value

        optimiser.step(closure)
        return loc.item(), log_scale.exp().item()

    censored = int(batch.censored.sum())
    exact = y[y > 1.0].numpy()
    reference = scipy.optimize.minimize(
        lambda p: -ss.norm.logpdf(exact, p[0], np.exp(p[1])).sum() - censored * ss.norm.logcdf(1.0, p[0], np.exp(p[1])),
        [0.5, 0.0], tol=1e-10,
    ).x  # fmt: skip
    assert best(batch) == pytest.approx((reference[0], np.exp(reference[1])), abs=1e-4)
    level, scale = best(sd.Series([0.0], y.clamp(min=1.0)))
    assert level > 1.2 and scale < 0.6  # the control: the limit as a value
