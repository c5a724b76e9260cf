"""A control from the encoder beside the messages."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from tests.programs import F64, elbos, mean_and_error, rotating, rotating_evidence, rotating_series

DIFFUSION, NOISE, STEPS, END = 0.8, 0.2, 16, 1.5


def two_wells(t, z):
    return 4 * z * (1 - z.square())


def crossing(batch):
    """From the left well, seen in the right one at the end: when it crossed is open, so the path is far from normal."""
    grid = sd.TimeGrid(batch.times, substeps=STEPS)
    with batch.plate("series"):
        path = sd.SDEPath(two_wells, torch.tensor([DIFFUSION]), -torch.ones(1), grid.ts)
        z = pyro.sample("z", path)
        seen = dist.Normal(grid.observed(z), NOISE).mask(batch.mask).to_event(2)
        pyro.sample("y", seen, obs=batch.values)


def crossings(series, seed=0):
    values = 0.8 + 0.4 * torch.rand(series, 1, 1, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[False], [True]]).expand(series, 2, 1)
    return sd.Series(torch.tensor([0.0, END]), values.expand(series, 2, 1) * mask, mask=mask)


def guide_of(paths, batch, seed=1):
    torch.manual_seed(seed)
    guide = sd.AmortizedGuide(crossing, sd.GRUEncoder(1, 16), paths=paths, hidden=32)
    guide(batch)
    return guide


def sampled(guide, batch):
    torch.manual_seed(5)
    return poutine.trace(guide).get_trace(batch).nodes["z"]["value"]


@pytest.mark.parametrize("family", [sd.FreeMessage, sd.FilterMessage])
def test_it_starts_at_nothing(family):
    batch = crossings(4)
    bare, controlled = (guide_of(family(control=c), batch) for c in (None, (8,)))
    controlled.load_state_dict({**controlled.state_dict(), **bare.state_dict()})  # the control stays its own
    torch.testing.assert_close(sampled(controlled, batch), sampled(bare, batch))
    with torch.no_grad():
        controlled.paths["z"].control.net.net.layers[-1].bias.fill_(1.0)
    assert (sampled(controlled, batch) - sampled(bare, batch))[..., -1, :].abs().min() > 0.01


def test_it_learns_by_every_objective():
    batch = crossings(4)
    for objective in (sd.ELBO(), sd.ELBO(estimator=sd.AnalyticKL()), sd.IWAE(particles=3)):
        guide = guide_of(sd.FreeMessage(control=(8,)), batch)
        sd.fit(crossing, guide, batch, objective=objective, steps=2, progress=False)
        assert float(guide.paths["z"].control.net.net.layers[-1].weight.detach().abs().max()) > 0


def test_it_ends_with_the_observations():
    """After the last of them the path follows the prior."""
    batch = crossings(3)
    guide = guide_of(sd.FreeMessage(control=(8,)), batch)
    with torch.no_grad():
        guide.paths["z"].control.net.net.layers[-1].bias.fill_(3.0)
    times = torch.tensor([0.0, 1.0, 2.0])
    longer = sd.Series(
        times,
        torch.cat([batch.values, torch.zeros(3, 1, 1)], 1),
        mask=torch.cat([batch.mask, torch.zeros(3, 1, 1, dtype=torch.bool)], 1),
    )
    q = poutine.trace(guide).get_trace(longer).nodes["z"]["fn"]
    noise = q.chain.steps_of(q.rsample((400,)))[2].detach().mean((1, 2, 3))  # (step,)
    assert noise[:STEPS].mean() > 0.5
    assert noise[STEPS:].mean().abs() < 0.05


def test_saved_and_loaded():
    batch = crossings(4)
    guide = guide_of(sd.FreeMessage(control=(8, 4)), batch)
    with torch.no_grad():
        guide.paths["z"].control.net.net.layers[-1].weight.normal_()
    fresh = sd.AmortizedGuide(crossing, sd.GRUEncoder(1, 16), paths=sd.FreeMessage(control=(8, 4)), hidden=32)
    fresh.load_state_dict(guide.state_dict())
    torch.testing.assert_close(sampled(fresh, batch), sampled(guide, batch))


def test_it_needs_an_encoder():
    with pytest.raises(sd.GuideError, match=r"control=\(8,\) needs an encoder"):
        sd.AmortizedGuide(crossing, paths=sd.FreeMessage(control=(8,)))(crossings(2))


@pytest.mark.parametrize("control", [8, (8, 0), "wide"])
def test_what_is_no_widths_is_refused(control):
    with pytest.raises(sd.GuideError, match=r"Write control=\(32, 32\)"):
        sd.FilterMessage(control=control)


def test_a_control_is_learned():
    with pytest.raises(sd.GuideError, match="a control is learned, so it does not go with learned=False"):
        sd.FilterMessage(control=(8,), learned=False)


def test_a_state_of_another_family_is_refused():
    batch = crossings(2)
    with_control, without = (guide_of(sd.FreeMessage(control=c), batch) for c in ((8,), None))
    for guide, other in ((with_control, without), (without, with_control)):
        with pytest.raises(sd.GuideError, match="Make it with the same `paths`"):
            guide.load_state_dict(other.state_dict())


@pytest.mark.slow
def test_it_adds_what_the_messages_lack():
    """Diagonal messages cannot say that one state should move with the other; a control can. The evidence is exact."""
    times = torch.arange(8, dtype=F64) * 0.3
    train, fresh = rotating_series(60, times, seed=0), rotating_series(20, times, seed=1)
    exact, lost = float(rotating_evidence(fresh).sum()), {}
    for control in (None, (16,)):
        torch.manual_seed(0)
        paths = sd.FreeMessage(rank=0, control=control)
        guide = sd.AmortizedGuide(rotating, sd.GRUEncoder(1, hidden=16).double(), paths=paths)
        for lr in (1e-2, 5e-3, 2e-3):
            sd.fit(rotating, guide.train(), train, batch_size=20, steps=300, lr=lr, progress=False)
        value, error = mean_and_error(elbos(rotating, guide.eval(), fresh, draws=50))
        lost[control] = (exact - value) / len(fresh)
        assert lost[control] > -4 * error / len(fresh)
    assert lost[None] > 1
    assert lost[16,] < 0.5 * lost[None]
