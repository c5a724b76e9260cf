from dataclasses import replace

import pytest
import torch

import stochdyn as sd
from stochdyn.encoders import Rows

F64 = torch.float64


@pytest.fixture
def net():
    torch.manual_seed(0)
    return sd.SetEncoder(2, 6).double()


def rows(number=5):
    elapsed = torch.rand(3, number, dtype=F64).cumsum(1)
    return Rows(torch.randn(3, number, 4, dtype=F64), torch.zeros_like(elapsed), elapsed)


def test_an_entry_decodes_mean_and_number_of_what_follows(net):
    times, values = torch.tensor([0.0, 0.5, 2.0, 2.5], dtype=F64), torch.randn(1, 4, 2, dtype=F64)
    got = net(sd.Series(times, values))[0]
    elapsed = (2.5 - times)[:, None]
    embedded = net.embed(torch.cat([values[0], torch.ones(4, 2, dtype=F64), elapsed], -1))
    for k in range(4):
        number = torch.tensor([4.0 - k], dtype=F64)
        expected = net.decode(torch.cat([embedded[k:].mean(0), number.log(), elapsed[k]]))
        torch.testing.assert_close(got[k], expected, rtol=0, atol=1e-12)


def shuffled(given, order):
    return replace(given, inputs=given.inputs[:, order], elapsed=given.elapsed[:, order])


def differs(encode, given):
    """How far the summary of the whole moves when all but the first observation change places."""
    order = torch.tensor([3, 1, 0, 2, 4])
    return (encode(shuffled(given, order)) - encode(given))[:, -1].abs().max()


def test_the_summary_of_the_whole_does_not_know_the_order(net):
    given = rows()
    assert differs(net.encode, given) < 1e-12
    gru = sd.GRUEncoder(2, 6).double()
    assert differs(gru.encode, given) > 1e-3


def test_two_copies_of_every_observation_are_not_one(net):
    given = rows()
    twice = Rows(*(x.repeat_interleave(2, 1) for x in (given.inputs, given.gap, given.elapsed)))
    assert (net.encode(twice)[:, -1] - net.encode(given)[:, -1]).abs().min() > 1e-4


def test_it_learns_an_exact_pooled_posterior():
    """mu ~ N(0, 1), y_k ~ N(mu, 1): the posterior mean given n values is their mean times n / (n + 1)."""
    torch.manual_seed(0)

    def draw():
        number = torch.randint(1, 13, (128, 1))
        mask = (torch.arange(12) < number)[..., None]
        y = torch.randn(128, 1, 1, dtype=F64) + torch.randn(128, 12, 1, dtype=F64)
        truth = torch.where(mask, y, torch.zeros_like(y)).sum(1) / (number + 1)
        return sd.Series(torch.arange(12.0), y, mask=mask), truth

    net = sd.SetEncoder(1, 16, time_unit=12.0).double()
    head = torch.nn.Linear(16, 1).double()
    optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 500)
    for _ in range(500):
        batch, truth = draw()
        loss = (head(net(batch)[:, 0]) - truth).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        scheduler.step()
    batch, truth = draw()
    error = (head(net(batch)[:, 0]) - truth).square().mean()
    y, number = batch.values * batch.mask, batch.mask.sum(1)
    mean = y.sum(1) / number
    slope = (mean * truth).sum() / (mean * mean).sum()
    without_number = (slope * mean - truth).square().mean()  # the best that the mean alone can do
    assert error < 0.5 * without_number
