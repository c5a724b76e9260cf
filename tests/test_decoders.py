"""Decoders: a distribution for every channel at every time."""

import pyro.distributions as dist
import pytest
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
