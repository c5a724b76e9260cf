"""Noisy sines at shared times, with holes, and the loss of a model on them."""

import torch
from pyro.infer import Trace_ELBO

import stochdyn as sd


def waves(series=8, points=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    times = torch.linspace(0, 2, points)
    phase = 6 * torch.rand(series, 1, generator=generator)
    clean = torch.stack([torch.sin(3 * times + phase), torch.cos(3 * times + phase)], -1)
    values = clean + 0.1 * torch.randn(clean.shape, generator=generator)
    mask = torch.rand(values.shape, generator=generator) > 0.2
    mask[:, -1] = True
    return sd.Series(times, values, mask=mask)


def loss_of(model, batch, draws=20):
    torch.manual_seed(2)
    with torch.no_grad():
        return sum(Trace_ELBO().loss(model, model.guide, batch) for _ in range(draws)) / draws
