"""Groups in mini-batches: unbiased with the encodings of absent members, and no bound with a rescaled part."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import stochdyn as sd
from stochdyn.errors import GuideError
from stochdyn.guides.pooling import Summaries
from tests.hierarchies import LOWER, NOISE, TOP, by_site, evidence, member_messages, simulated, three_levels
from tests.programs import F64, elbos, mean_and_error

PLATES = {"theta": "subject", "mu": "site"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(model, data, steps=0):
    guide = sd.AmortizedGuide(model, sd.SetEncoder(1, 8).double(), amortize=PLATES)
    guide(data)
    if steps:
        sd.fit(model, guide, data, steps=steps, lr=0.02, progress=False)
    with torch.no_grad():
        for parameter in guide.amortized.parameters():  # every head reads everything that it sees
            parameter += 0.05 * torch.randn_like(parameter)
    guide(data)
    return guide


@pytest.mark.parametrize("training", [True, False])
def test_mini_batches_are_unbiased(training):
    data = simulated(4, seed=0)
    guide = made(three_levels, data, steps=60).train(training)
    guide(data)
    full, error = mean_and_error(elbos(three_levels, guide, data, draws=4000))
    parts, square = [], 0.0
    for index in torch.arange(12).reshape(3, 4).mT:  # a third of each of three groups, or none of it
        mean, se = mean_and_error(elbos(three_levels, guide, data[index], draws=2000))
        parts.append(mean)
        square += se**2 / 16
    assert abs(sum(parts) / 4 - full) < 4 * (square + error**2) ** 0.5
    assert max(abs(part - full) for part in parts) > 1


def rescaled(batch):
    """The exact posterior, were the series at hand all there are, each as often as the plate says."""
    h, J = (x.sum() * batch.population / len(batch) for x in member_messages(batch, LOWER))
    precision = 1 / TOP**2 + J
    with batch.group_plate("site"):
        mu = pyro.sample("mu", dist.Normal(h / precision, precision.rsqrt()))
    with batch.plate("subject"):
        number = batch.mask.sum((1, 2)).double()
        precision = 1 / LOWER**2 + number / NOISE**2
        total = (batch.values * batch.mask).sum((1, 2))
        mean = (mu[..., batch.groups["site"]] / LOWER**2 + total / NOISE**2) / precision
        pyro.sample("theta", dist.Normal(mean, precision.rsqrt()))


def test_a_rescaled_part_of_a_group_is_no_bound():
    """One of 100 members at a time: the control for the caching of the others."""
    data = simulated(1, seed=0, members=100)
    exact = evidence(data)
    guide = made(by_site, data, steps=150)
    wrong, right = [], []
    for i in range(100):
        wrong.append(elbos(by_site, rescaled, data[[i]], draws=20).mean())
        right.append(elbos(by_site, guide, data[[i]], draws=20))
    wrong, spread = torch.stack(wrong), torch.stack(right).mean(0)
    mean, error = mean_and_error(spread)
    assert mean - 4 * error < exact
    assert wrong.mean() > exact + 40


def test_absent_members_that_were_never_at_hand_are_an_error():
    data = simulated(3, seed=0)
    guide = sd.AmortizedGuide(by_site, sd.SetEncoder(1, 8).double(), amortize=PLATES)
    with pytest.raises(GuideError, match=r"holds 2 of 9 series.*7 of the others.*once on the whole data"):
        guide(data[:2])
    guide(data)
    guide(data[:2])
    new = simulated(3, seed=1)
    with pytest.raises(GuideError, match="no encoding yet"):
        guide(new[:2])  # of the same size, and other data
    guide.eval()
    with pytest.raises(GuideError, match="no encoding yet"):
        guide(new[:2])
    guide(new)
    guide(new[:2])
    guide(data[:2])  # what training knows is still there
    assert torch.equal(guide.amortized.summaries.rows, guide.encoder(data)[:, 0])


def test_training_renews_the_encodings_of_its_members():
    data = simulated(3, seed=0)
    guide = made(by_site, data)
    before = guide.amortized.summaries.rows.clone()
    with torch.no_grad():
        for parameter in guide.encoder.parameters():
            parameter += 0.1
    guide(data[[4, 2]])
    assert (guide.amortized.summaries.rows != before).any(-1).nonzero()[:, 0].tolist() == [2, 4]
    guide(simulated(5, seed=1))  # another population to train on
    assert guide.amortized.summaries.rows.shape == (15, 8)


def levels(batch):
    """`by_site` with known scatter of the series: latents of groups only."""
    with batch.group_plate("site"):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=F64), TOP))
    with batch.plate("subject"):
        seen = dist.Normal(mu[..., batch.groups["site"], None, None], LOWER).mask(batch.mask).to_event(2)
        pyro.sample("y", seen, obs=batch.values)


def test_a_groups_message_trains_the_encoder_on_whole_data_only():
    """In a mini-batch that gradient would be biased: an encoding counts when its own likelihood does."""
    data = simulated(2, seed=0)
    guide = sd.AmortizedGuide(levels, sd.SetEncoder(1, 8).double(), amortize={"mu": "site"})
    sd.fit(levels, guide, data, steps=3, lr=0.02, progress=False)
    for batch, trains in ((data[[0]], False), (data, True)):
        guide.zero_grad()
        Trace_ELBO().differentiable_loss(levels, guide, batch).backward()
        assert guide.amortized.sites["mu"].head.inner.weight.grad.abs().max() > 0
        reached = [p.grad is not None and bool(p.grad.any()) for p in guide.encoder.parameters()]
        assert any(reached) == trains


def test_gradients_of_mini_batches_add_up():
    """With the same draws: the heads' mean gradient over mini-batches is that of the whole data."""
    data = simulated(3, seed=0)
    guide = sd.AmortizedGuide(levels, sd.SetEncoder(1, 8).double(), amortize={"mu": "site"})
    guide(data)
    gradients = []
    for batch in (data, data[:3], data[3:6], data[6:]):
        guide.zero_grad()
        torch.manual_seed(1)
        Trace_ELBO().differentiable_loss(levels, guide, batch).backward()
        gradients.append(guide.amortized.sites["mu"].head.outer.weight.grad.clone())
    torch.testing.assert_close(sum(gradients[1:]) / 3, gradients[0])
    assert (gradients[1] - gradients[0]).abs().max() > 1e-3


def test_rows_of_the_population():
    data = simulated(3, seed=0)
    rows = torch.arange(9.0, dtype=F64)[:, None]
    store = Summaries.begin(9, rows)
    assert torch.equal(store.whole(data, rows), rows)
    assert torch.equal(store.whole(data[[5, 1]], rows[[5, 1]] + 10), rows)
    assert torch.equal(
        store.whole(data[[5, 1]], rows[[5, 1]] + 10)[:, 0],
        rows[:, 0] + 10 * torch.tensor([0, 1, 0, 0, 0, 1, 0, 0, 0]),
    )
    twice = data[[3, 3]]
    assert store.whole(twice, rows[[3, 3]]).shape == (9, 1)
    order = torch.tensor([8, 0, 1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(store.whole(data[order], rows[order]), rows)
    state = store.state_dict()
    twin = Summaries.of_state(state)
    twin.load_state_dict(state)
    assert torch.equal(twin.whole(data[[0]], rows[[0]]), rows)
