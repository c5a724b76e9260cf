"""Decoders: a distribution for every channel at every time."""

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats as ss
import torch

import stochdyn as sd
from stochdyn.decoders import AbstractDecoder

F64 = torch.float64


def test_normal():
    net = torch.nn.Linear(4, 3).double()
    decoder = sd.NormalDecoder(net, obs_dim=3, scale=0.5).double()
    z, y = torch.randn(8, 20, 4, dtype=F64), torch.randn(8, 20, 3, dtype=F64)
    seen = decoder(z)
    assert (seen.batch_shape, seen.event_shape) == ((8, 20, 3), ())
    torch.testing.assert_close(seen.log_prob(y), dist.Normal(net(z), 0.5).log_prob(y), rtol=1e-6, atol=1e-6)
    assert decoder(torch.randn(5, 8, 20, 4, dtype=F64)).batch_shape == (5, 8, 20, 3)


def test_the_scale_of_a_channel_is_learned_or_not():
    learned = sd.NormalDecoder(torch.nn.Identity(), 2, scale=0.5)
    assert [name for name, _ in learned.named_parameters()] == ["log_scale"]
    fixed = sd.NormalDecoder(torch.nn.Identity(), 2, scale=0.25, learned=False)
    assert list(fixed.parameters()) == []
    learned.load_state_dict(fixed.state_dict())
    assert learned(torch.zeros(2)).scale.tolist() == [0.25, 0.25]
    with torch.no_grad():
        learned.log_scale[1] = 0.0
    assert learned(torch.zeros(2)).scale.tolist() == [0.25, 1.0]


def test_maximum_likelihood_finds_the_scale():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 2, dtype=F64, generator=generator) * torch.tensor([0.3, 2.0], dtype=F64)
    decoder = sd.NormalDecoder(torch.nn.Identity(), 2).double()
    optimiser = torch.optim.LBFGS(decoder.parameters(), max_iter=50)

    def closure():
        optimiser.zero_grad()
        loss = -decoder(torch.zeros_like(noise)).log_prob(noise).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    found = decoder.log_scale.detach().exp()
    torch.testing.assert_close(found, noise.square().mean(0).sqrt(), rtol=1e-3, atol=0)


def test_refused():
    with pytest.raises(sd.ShapeError, match="`scale` must be positive, got 0"):
        sd.NormalDecoder(torch.nn.Identity(), 2, scale=0)
    with pytest.raises(sd.ShapeError, match="returned 3 channels.*obs_dim.*2.*Change .* last layer"):
        sd.NormalDecoder(torch.nn.Identity(), 2)(torch.zeros(5, 3))
    with pytest.raises(sd.FieldError, match=r"scale\.requires_grad_\(False\)"):
        sd.NormalDecoder(torch.nn.Identity(), 2, scale=torch.nn.Linear(2, 2), learned=False)
    with pytest.raises(TypeError, match="abstract"):
        AbstractDecoder()


def test_one_of_your_own_serves_a_model():
    class Counts(AbstractDecoder):
        def forward(self, z):
            return dist.Poisson(z[..., :1].exp())

    batch = sd.Series(torch.linspace(0, 1, 4), torch.randint(0, 4, (3, 4, 1)).float())
    model = sd.LatentSDE(1, 2, hidden=4, decoder=Counts())
    fit = sd.fit(model, model.guide, batch, steps=3, progress=False)
    seen = sd.predict(fit, batch, draws=5).observations
    assert torch.equal(seen, seen.round())


def heads(dtype=F64):
    """Every decoder on two channels and a state of size 2, by name."""
    same = torch.nn.Identity()
    three = torch.nn.Linear(2, 6).to(dtype)
    made = {
        "normal": sd.NormalDecoder(same, 2, scale=[0.5, 2.0]),
        "state-dependent": sd.NormalDecoder(same, 2, scale=torch.nn.Linear(2, 2)),
        "student": sd.StudentTDecoder(same, 2, scale=0.5, df=[3.0, 8.0]),
        "poisson": sd.PoissonDecoder(same, 2, exposure=[1.0, 5.0]),
        "softplus": sd.PoissonDecoder(same, 2, link=torch.nn.functional.softplus),
        "negative binomial": sd.NegativeBinomialDecoder(same, 2, concentration=[0.7, 9.0]),
        "bernoulli": sd.BernoulliDecoder(same, 2),
        "categorical": sd.CategoricalDecoder(three, 2, classes=3),
    }
    return {name: decoder.to(dtype) for name, decoder in made.items()}


NAMES = list(heads())


def by_scipy(name, decoder, z, y):
    """log p(y | z) with scipy, in NumPy."""
    a, y = z.detach().numpy(), y.numpy()
    if name in ("normal", "state-dependent"):
        scale = [0.5, 2.0] if name == "normal" else decoder.log_scale(z).exp().detach().numpy()
        return ss.norm.logpdf(y, a, scale)
    if name == "student":
        return ss.t.logpdf(y, [3.0, 8.0], a, 0.5)
    if name == "poisson":
        return ss.poisson.logpmf(y, np.exp(a) * [1.0, 5.0])
    if name == "softplus":
        return ss.poisson.logpmf(y, np.logaddexp(0, a))
    if name == "negative binomial":
        r = np.array([0.7, 9.0])
        return ss.nbinom.logpmf(y, r, r / (r + np.exp(a)))
    if name == "bernoulli":
        return ss.bernoulli.logpmf(y, 1 / (1 + np.exp(-a)))
    logits = decoder.net(z).detach().numpy().reshape(*a.shape[:-1], 2, 3)
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, y.astype(int)[..., None], -1)[..., 0]


@pytest.mark.parametrize("name", NAMES)
def test_log_density_against_scipy(name):
    torch.manual_seed(0)
    decoder, z = heads()[name], torch.randn(4, 5, 2, dtype=F64)
    seen = decoder(z)
    assert (seen.batch_shape, seen.event_shape) == ((4, 5, 2), ())
    y = seen.sample().to(F64)
    expected = torch.as_tensor(by_scipy(name, decoder, z, y))
    torch.testing.assert_close(
        seen.log_prob(y), expected, rtol=1e-6, atol=1e-7
    )  # a scale starts in single precision
    other = torch.as_tensor(by_scipy(name, decoder, z.flip(0), y))
    assert name == "state-dependent" or not torch.allclose(seen.log_prob(y), other, atol=1e-2)
    assert decoder(torch.zeros(3, 4, 5, 2, dtype=F64)).batch_shape == (3, 4, 5, 2)


def test_moments_of_counts():
    z = torch.tensor([[1.0, 2.0]], dtype=F64)
    seen = heads()["negative binomial"](z)
    mean, r = z.exp(), torch.tensor([0.7, 9.0], dtype=F64)
    torch.testing.assert_close(seen.mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(seen.variance, mean + mean**2 / r, rtol=1e-6, atol=0)
    poisson = heads()["poisson"]
    torch.testing.assert_close(poisson(z).mean, mean * torch.tensor([1.0, 5.0], dtype=F64), rtol=1e-6, atol=0)
    varying = poisson(z.expand(4, 3, 2), torch.full((4, 3, 2), 2.0, dtype=F64))
    torch.testing.assert_close(varying.mean[0, 0], 2 * poisson(z).mean[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["poisson", "softplus", "negative binomial"])
def test_a_rate_that_underflows_keeps_a_gradient(name):
    z = torch.tensor([[-200.0, -1000.0]], requires_grad=True)
    heads(torch.float32)[name](z).log_prob(torch.ones(1, 2)).sum().backward()
    assert torch.isfinite(z.grad).all()
    with torch.no_grad():
        assert dist.Poisson(z.exp(), validate_args=False).log_prob(torch.ones(1, 2)).isinf().all()


def maximised(decoder, y, steps=60):
    optimiser = torch.optim.LBFGS(decoder.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = -decoder(torch.zeros(len(y), 0, dtype=F64)).log_prob(y).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    return decoder


class Level(torch.nn.Module):
    """Numbers that depend on nothing."""

    def __init__(self, size):
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(size, dtype=F64))

    def forward(self, z):
        return self.level.expand(*z.shape[:-1], -1)


def test_maximum_likelihood_recovers_the_parameters():
    """Within four standard errors of the truth, these from the observed information."""
    torch.manual_seed(0)
    n = 4000

    def check(decoder, truth, **parameters):
        y = truth.sample((n,)).to(F64)
        maximised(decoder, y)
        names = [name for name, _ in decoder.named_parameters()]
        assert set(names) == set(parameters)

        def loss(values):
            fn = torch.func.functional_call(
                decoder, dict(zip(names, values.split(1), strict=True)), (torch.zeros(n, 0, dtype=F64),)
            )
            return -fn.log_prob(y).sum()

        found = torch.cat([p.detach() for p in decoder.parameters()])
        errors = torch.linalg.inv(torch.func.hessian(loss)(found)).diagonal().sqrt()
        expected = torch.tensor([parameters[name] for name in names], dtype=F64)
        assert ((found - expected).abs() < 4 * errors).all(), (names, found, expected, errors)
        assert ((found - expected - 1.0).abs() > 4 * errors).all()  # the control: parameters a unit away

    one = torch.ones(1, dtype=F64)
    check(
        sd.StudentTDecoder(Level(1), 1, scale=1.0, df=10.0, learned_df=True).double(), dist.StudentT(4 * one, 0.7, 0.5),
        log_scale=np.log(0.5), log_df=np.log(2.0), **{"net.level": 0.7},
    )  # fmt: skip
    check(
        sd.PoissonDecoder(Level(1), 1, exposure=2.0).double(),
        dist.Poisson(6 * one),
        **{"net.level": np.log(3.0)},
    )
    check(
        sd.NegativeBinomialDecoder(Level(1), 1).double(), dist.NegativeBinomial(2 * one, logits=np.log(1.5) * one),
        log_concentration=np.log(2.0), **{"net.level": np.log(3.0)},
    )  # fmt: skip
    check(sd.BernoulliDecoder(Level(1), 1), dist.Bernoulli(logits=0.8 * one), **{"net.level": 0.8})


def test_classes_are_recovered():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 0.5]], dtype=F64)
    y = dist.Categorical(logits=logits).sample((4000,)).to(F64)
    decoder = maximised(sd.CategoricalDecoder(Level(6), 2, classes=3), y)
    found = decoder(torch.zeros(1, 0, dtype=F64)).probs[0]
    counts = torch.nn.functional.one_hot(y.long(), 3).double().mean(0)
    torch.testing.assert_close(found.detach(), counts, rtol=0, atol=1e-4)
    assert not torch.allclose(found, counts.flip(0), atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", NAMES)
def test_in_a_model(name, dtype):
    """Training, prediction, evidence, weights per series and export, with holes, in both precisions."""
    torch.manual_seed(0)
    decoder = heads(dtype)[name]
    with torch.no_grad():
        values = decoder(torch.randn(6, 5, 2, dtype=dtype)).sample().to(dtype)
    mask = torch.rand(6, 5, 2) > 0.2
    mask[:, 0] = True
    batch = sd.Series(torch.linspace(0, 1, 5), values, mask=mask)
    model = sd.LatentSDE(2, 2, hidden=4, decoder=decoder).to(dtype)
    model.guide.to(dtype)
    fit = sd.fit(model, model.guide, batch, steps=3, progress=False)
    assert np.isfinite(fit.losses).all()
    found = sd.predict(fit, batch, ts=[1.5], draws=6)
    assert found.observations.shape == (6, 6, 6, 2)
    assert decoder(torch.zeros(1, 2, dtype=dtype)).support.check(found.observations).all()
    assert torch.isfinite(sd.evidence(fit, batch, draws=2, particles=20).per_series).all()
    idata = sd.to_arviz(fit, batch, draws=6)
    assert idata["posterior_predictive"]["y"].dims == ("chain", "draw", "series", "time", "channel")
    assert np.isfinite(idata["log_likelihood"]["y"].values).all()
    fit = sd.fit(model, model.guide, batch, steps=2, objective=sd.IWAE(particles=3), progress=False)
    assert np.isfinite(fit.losses).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_filter_message_linearises_each(name):
    torch.manual_seed(0)
    decoder = heads(torch.float32)[name]
    with torch.no_grad():
        values = decoder(torch.randn(4, 4, 2)).sample().float()
    batch = sd.Series(torch.linspace(0, 1, 4), values)
    model = sd.LatentSDE(2, 2, hidden=4, decoder=decoder, paths=sd.FilterMessage(refine=2))
    fit = sd.fit(model, model.guide, batch, steps=3, progress=False)
    assert np.isfinite(fit.losses).all()


def test_the_place_of_a_bad_value_is_named():
    values = torch.zeros(2, 3, 2)
    values[1, 2, 0] = -1.0
    batch = sd.Series([0.0, 0.5, 1.0], values, channels=["a", "b"])
    model = sd.LatentSDE(2, 2, hidden=4, decoder=heads(torch.float32)["poisson"])
    with pytest.raises(
        sd.DataError, match=r"series 1, time 1, channel a: value is -1, and Poisson takes counts 0, 1"
    ):
        sd.fit(model, model.guide, batch, steps=1, progress=False)


def test_refused_by_the_others():
    same = torch.nn.Identity()
    with pytest.raises(sd.ShapeError, match=r"StudentTDecoder: `df` must be above 2, got 2"):
        sd.StudentTDecoder(same, 2, df=2.0)
    with pytest.raises(sd.ShapeError, match=r"PoissonDecoder: `exposure` must be positive, got \[1.0, 0.0\]"):
        sd.PoissonDecoder(same, 2, exposure=[1.0, 0.0])
    with pytest.raises(
        sd.ShapeError, match=r"`concentration` must be a number or \(2,\), one per channel, got \(3,\)"
    ):
        sd.NegativeBinomialDecoder(same, 2, concentration=[1.0, 2.0, 3.0])
    with pytest.raises(sd.ShapeError, match="`classes` must be at least 2, got 1"):
        sd.CategoricalDecoder(same, 2, classes=1)
    with pytest.raises(
        sd.ShapeError, match="returned 5 logits for obs_dim=2 channels of 3 classes, 6 together"
    ):
        sd.CategoricalDecoder(same, 2, classes=3)(torch.zeros(4, 5))
    for decoder in (
        sd.BernoulliDecoder(same, 2),
        sd.PoissonDecoder(same, 2),
        sd.NormalDecoder(same, 3, scale=same),
    ):
        with pytest.raises(sd.ShapeError, match="returned 5 channels"):
            decoder(torch.zeros(4, 5))


def test_anchored_predictions_start_at_the_last_value_and_widen_as_a_random_walk():
    torch.manual_seed(0)
    decoder, h = sd.AnchoredDecoder(4, 2, widths=()).double(), torch.randn(3, 4, dtype=F64)
    values, seen = torch.randn(3, 2, dtype=F64), torch.tensor([[1.0, 0.0]] * 3, dtype=F64)
    rate, log_scale, loc, log_width = decoder.net(h).chunk(4, -1)
    for elapsed in (0.0, 0.3, 1.2):
        found = decoder(h, sd.Memory(values, torch.full((3, 2), elapsed, dtype=F64), seen))
        torch.testing.assert_close(found.mean[:, 0], values[:, 0] + elapsed * rate[:, 0])
        torch.testing.assert_close(found.mean[:, 1], loc[:, 1])
        wide = elapsed**0.5 * log_scale[:, 0].exp()
        torch.testing.assert_close(found.stddev[:, 0], wide, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.stddev[:, 1], log_width[:, 1].exp())
        assert (found.stddev > 0).all()
