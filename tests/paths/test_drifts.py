"""Drifts bound to their contexts: one by one equals all at once, with and without a prepared part."""

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.drifts import Drifts, in_blocks, in_time

F64 = torch.float64
STEPS, BATCH, STATE, CONTEXT = 4, 6, 2, 3


def field(kind):
    torch.manual_seed(0)
    net = sd.NeuralField(STATE, hidden=(5,), context_dim=CONTEXT, time=True).double()
    return net if kind == "prepared" else lambda t, z, c: net(t, z, c)


def inputs(context):
    generator = torch.Generator().manual_seed(1)
    t = torch.linspace(0, 1, STEPS, dtype=F64)[:, None, None]
    z = torch.randn(STEPS, BATCH, STATE, dtype=F64, generator=generator)
    rows = {"timed": STEPS, "static": 1}[context]
    return t, z, torch.randn(rows, BATCH, CONTEXT, dtype=F64, generator=generator)


@pytest.mark.parametrize("kind", ["prepared", "function"])
@pytest.mark.parametrize("context", ["timed", "static"])
def test_one_by_one_equals_at_once(kind, context):
    f, (t, z, c) = field(kind), inputs(context)
    drifts = Drifts(f, c, STEPS)
    steps = drifts.one_by_one()
    assert len(steps) == STEPS
    looped = torch.stack([step(s, x) for step, s, x in zip(steps, t, z, strict=True)])
    torch.testing.assert_close(drifts.at_once()(t, z), looped, rtol=0, atol=1e-13)
    plain = f(t, z, c.expand(STEPS, BATCH, CONTEXT))
    torch.testing.assert_close(looped, plain, rtol=0, atol=1e-13)
    shifted = f(t, z, c.expand(STEPS, BATCH, CONTEXT).roll(1, 0 if context == "timed" else 1))
    assert (looped - shifted).abs().max() > 1e-3


def test_without_context():
    t, z, _ = inputs("static")
    drifts = Drifts(lambda t, z: t * z.sin(), None, STEPS)
    looped = torch.stack([f(s, x) for f, s, x in zip(drifts.one_by_one(), t, z, strict=True)])
    assert torch.equal(looped, t * z.sin())
    assert torch.equal(drifts.at_once()(t, z), looped)
    assert drifts.shares() is None


@pytest.mark.parametrize("context", ["timed", "static"])
def test_shares_are_contributions_where_the_field_has_them(context):
    net, (_, _, c) = field("prepared"), inputs(context)
    assert torch.equal(Drifts(net, c, STEPS).shares(), net.contribution(c))
    assert Drifts(lambda t, z, c: z, c, STEPS).shares() is c


def test_the_context_is_prepared_once_for_all_steps(monkeypatch):
    net, (t, z, c) = field("prepared"), inputs("timed")
    calls, contribution = [], net.contribution
    monkeypatch.setattr(net, "contribution", lambda c: calls.append(c.shape) or contribution(c))
    steps = Drifts(net, c, STEPS).one_by_one()
    for step, s, x in zip(steps, t, z, strict=True):
        step(s, x)
    assert calls == [c.shape]


def test_an_unwritten_drift_is_named():
    def unwritten(t, z, c):
        raise NotImplementedError("later")

    t, z, c = inputs("timed")
    with pytest.raises(sd.FieldError, match="The drift raised NotImplementedError: later"):
        Drifts(unwritten, c, STEPS).one_by_one()[0](t[0], z[0])


def test_in_time():
    x = torch.arange(5.0)[:, None]
    assert torch.equal(in_time(x, 4), x[:4])
    assert in_time(x[:1], 4).shape == (1, 1)
    assert in_time(None, 4) is None


@pytest.mark.parametrize("kind", ["prepared", "function"])
@pytest.mark.parametrize("context", ["timed", "static"])
def test_blocks_change_nothing(kind, context, monkeypatch):
    """Values and gradients in blocks of times are those of one call; the blocks are really made."""
    f, (t, z, c) = field(kind), inputs(context)
    weights = torch.randn(z.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    found = []
    for rows in (10**6, 2 * BATCH, BATCH // 2):
        monkeypatch.setattr("stochdyn.paths.drifts._ROWS", rows)
        x, own = z.clone().requires_grad_(), c.clone().requires_grad_()
        value = Drifts(f, own, STEPS).at_once()(t, x)
        found.append((value, *torch.autograd.grad((value * weights).sum(), (x, own))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-13)
    calls = []
    monkeypatch.setattr("stochdyn.paths.drifts._ROWS", 2 * BATCH)
    in_blocks(lambda s, x, y: calls.append(x.shape[0]) or x, t, z, None)
    assert calls == [2, 2]


def test_blocks_of_a_field_that_returns_less():
    """A drift without time and batch gets them; how many numbers it returns stays its own affair."""
    z = torch.randn(5, 3000, 2)
    t = torch.arange(5.0)[:, None, None]
    assert in_blocks(lambda t, z, c: torch.ones(2), t, z, None).shape == z.shape
    one = in_blocks(lambda t, z, c: z[..., :1], t, z, None)
    assert torch.equal(one, z[..., :1])


def test_no_steps():
    assert in_blocks(lambda t, z, c: z, torch.zeros(0, 1, 1), torch.zeros(0, 3, 2), None).shape == (0, 3, 2)
