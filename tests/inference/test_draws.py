import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from stochdyn.inference.draws import at_times, draw, evaluating, pair, replicated
from tests.programs import F64, local_theta, normal, ou, ou_latent, ou_series


def drawn(model, data, draws=7, guide=None):
    guide = guide or sd.AmortizedGuide(model)
    with evaluating(model, guide, seed=0):
        return draw((model, guide), data, draws)


def nested(batch):
    """Groups of two series, with everything that a site can be."""
    level = pyro.sample("level", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
    pyro.deterministic("twice", 2 * level)
    pyro.deterministic("constant", torch.ones(4))
    pyro.factor("bonus", -0.5 * level.square().sum(-1))
    values = batch.values.reshape(2, -1, *batch.values.shape[1:])
    groups = pyro.plate("group", 2, dim=-2)
    with groups:
        centre = pyro.sample("centre", normal(level[..., 0], 1.0))
    with groups, pyro.plate("member", values.shape[1], dim=-1):
        own = pyro.sample("own", normal(centre, 0.5))
        pyro.deterministic("sum", own + centre)
        seen = dist.Normal(own[..., None, None] + 0 * values, 1.0).to_event(2)
        pyro.sample("y", seen, obs=values)


def test_sites_of_nested_plates_have_their_own_dimensions():
    found = drawn(nested, ou_series(6, [0.0, 1.0, 2.0]))
    shapes = {n: (tuple(s.value.shape), tuple(s.log_prob.shape), s.plates) for n, s in found.latents.items()}
    assert shapes["level"] == ((7, 3), (7,), ())
    assert shapes["centre"] == ((7, 2, 1), (7, 2, 1), ("group", ""))
    assert shapes["own"] == ((7, 2, 3), (7, 2, 3), ("group", "member"))
    assert found.observed["y"].log_prob.shape == (7, 2, 3)
    assert set(found.observed) == {"y", "bonus"}
    assert set(found.replicable) == {"y"}
    assert replicated(found.observed["y"]).shape == (7, 2, 3, 3, 1)
    value, plates = found.deterministic["twice"]
    torch.testing.assert_close(value, 2 * found.latents["level"].value)
    assert plates == ()
    assert found.deterministic["constant"][0].shape == (7, 4)
    value, plates = found.deterministic["sum"]
    torch.testing.assert_close(value, found.latents["own"].value + found.latents["centre"].value)
    assert plates == ("group", "member")


def test_log_densities_are_those_of_a_plain_trace():
    """Each draw, replayed alone without the plate of draws."""
    data = ou_series(3, [0.0, 0.5, 2.0])
    found = drawn(local_theta, data, draws=4)
    for i in range(4):
        values = {name: site.value[i] for name, site in found.latents.items()}
        trace = poutine.trace(poutine.condition(local_theta, values)).get_trace(data)
        trace.compute_log_prob()
        for name, site in {**found.prior, **found.observed}.items():
            torch.testing.assert_close(site.log_prob[i], trace.nodes[name]["log_prob"])


def test_a_mini_batch_is_not_scaled_up():
    data = ou_series(6, [0.0, 0.5, 2.0])
    guide = sd.AmortizedGuide(ou)
    guide(data)
    whole, part = drawn(ou, data, guide=guide), drawn(ou, data[:2], guide=guide)
    z = part.latents["z"].value
    trace = poutine.trace(poutine.condition(ou, {"z": z[0]})).get_trace(data[:2])
    trace.compute_log_prob()
    assert trace.nodes["y"]["scale"] == 3
    torch.testing.assert_close(3 * part.observed["y"].log_prob[0], trace.nodes["y"]["log_prob"])
    assert whole.observed["y"].log_prob.shape == (7, 6)


def test_fewer_than_one_draw():
    with pytest.raises(sd.FitError, match="`draws` must be at least 1, got 0"):
        drawn(ou, ou_series(2, [0.0, 1.0]), draws=0)


def test_a_latent_that_the_guide_lacks():
    data = ou_series(2, [0.0, 1.0])
    guide = sd.AmortizedGuide(poutine.block(ou_latent, hide=["mu"]))
    with pytest.raises(sd.GuideError, match="latent 'mu' is in the model but not in the guide"):
        drawn(ou_latent, data, guide=guide)


def test_pair():
    fit = sd.Fit(ou, print)
    assert pair(fit) == pair((ou, print)) == (ou, print)
    for wrong in (ou, (ou,), (ou, 3), None):
        with pytest.raises(sd.FitError, match="Expected a Fit or a pair"):
            pair(wrong)


class Noisy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout().eval()
        self.fixed = torch.nn.Linear(1, 1)


def test_evaluating_puts_back_modes_gradients_and_random_state():
    program = Noisy().train()
    program.drop.eval()
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), evaluating(program, print, seed=3):
        1 // 0
    with evaluating(program, print, seed=3):
        assert not (program.training or program.fixed.training or torch.is_grad_enabled())
        torch.randn(5)
    assert program.training
    assert program.fixed.training
    assert not program.drop.training
    assert torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())


def test_states_at_times():
    ts = torch.linspace(0, 1, 5, dtype=F64)
    path = ts[:, None].expand(3, 2, 5, 1)
    times = torch.tensor([0.25, 1.0, 1.0], dtype=F64)
    assert at_times(path, ts, times).squeeze(-1).tolist() == [[[0.25, 1.0, 1.0]] * 2] * 3
    assert at_times(path, ts, times + 1e-9) is None
    assert at_times(path, ts, torch.tensor([0.5, 2.0], dtype=F64)) is None


def test_states_at_own_times():
    own = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.4, 0.4]], dtype=F64)
    grid = sd.TimeGrid(own, substeps=3)
    path = grid.ts[None, ..., None].expand(4, *grid.ts.shape, 1)
    assert torch.equal(at_times(path, grid.ts, own)[0].squeeze(-1), own)
    shared = sd.TimeGrid([0.0, 0.2, 0.4, 0.5, 1.0]).ts
    one = shared[None, :, None].expand(4, -1, 1)
    assert torch.equal(at_times(one, shared, own)[0].squeeze(-1), own)
    four = torch.cat([own, own])
    nested_ts = sd.TimeGrid(four, substeps=3).ts.reshape(2, 2, -1)
    path = nested_ts[None, ..., None]
    assert torch.equal(at_times(path, nested_ts, four).flatten(), four.flatten())


def test_a_tuple_of_data_is_spread():
    def model(y, scale):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, scale), obs=y)

    found = drawn(model, (torch.zeros(3, dtype=F64), torch.tensor(0.5, dtype=F64)), draws=5)
    assert found.latents["z"].value.shape == (5, 3)
