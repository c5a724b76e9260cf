"""The compiled loop: the same numbers, and a plain loop where it cannot."""

import warnings

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.paths.compiled import step_chunk

F64 = torch.float64
TS = torch.linspace(0, 1, 8, dtype=F64)


def path(context=None):
    torch.manual_seed(0)
    drift = sd.NeuralField(2, hidden=(4,), context_dim=0 if context is None else 3).double()
    start = dist.Normal(torch.zeros(3, 2, dtype=F64), 1.0).to_event(1)
    return sd.SDEPath(drift, sd.ElementwiseField(2, 4).double(), start, TS, context=context)


def message():
    return sd.Message(torch.ones(3, 8, 2, dtype=F64), torch.full((3, 8, 2), 0.5, dtype=F64))


def draw(p, loop, **options):
    """A path, and the gradient of a function of it by the drift's parameters."""
    q = p.guided(loop=loop, **options)
    torch.manual_seed(1)
    z = q.rsample()
    q.recall()
    value = z.square().sum() + q.log_prob(z).sum()
    return z, torch.autograd.grad(value, list(p.chain.drift.parameters()))


def same(first, second):
    torch.testing.assert_close(first[0], second[0])
    for a, b in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile that returns what it is given: the chunks run as plain code."""
    calls = []

    def compile_(fn, **options):
        calls.append(fn)
        return fn

    monkeypatch.setattr(torch, "compile", compile_)
    return calls


@pytest.mark.parametrize("kind", ["none", "message", "context"])
def test_chunks_give_what_the_loop_gives(uncompiled, kind):
    p = path(torch.randn(3, 8, 3, dtype=F64) if kind == "context" else None)
    options = {"message": message()} if kind == "message" else {}
    loop = sd.Compiled(chunk=3)
    same(draw(p, None, **options), draw(p, loop, **options))
    assert len(uncompiled) == 1  # two whole chunks share one; the last step runs as it is
    draw(p, loop, **options)
    assert len(uncompiled) == 1
    assert loop.seconds > 0


def test_other_shapes_are_compiled_anew(uncompiled):
    loop = sd.Compiled(chunk=7)
    p = path()
    draw(p, loop)
    p.expand((2, 3)).guided(loop=loop).rsample()
    assert len(uncompiled) == 2


def test_one_warning_where_the_compiler_fails(monkeypatch):
    def broken(fn, **options):
        def run(*_):
            raise RuntimeError("no g++ here\nand more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    p, loop = path(), sd.Compiled(chunk=2)
    with pytest.warns(RuntimeWarning, match=r"torch.compile failed \(RuntimeError: no g\+\+ here\)") as caught:
        found = draw(p, loop)
    assert len(caught) == 1
    same(found, draw(p, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(draw(p, loop), found)


def test_what_it_cannot_compile_runs_as_it_is(uncompiled):
    loop = sd.Compiled(chunk=2)
    start = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
    plain = sd.SDEPath(lambda t, z: -z, torch.full((2,), 0.3, dtype=F64), start, TS)
    plain.guided(loop=loop).rsample()
    p = path()
    full = sd.Message(torch.ones(3, 8, 2, dtype=F64), torch.eye(2, dtype=F64).expand(3, 8, 2, 2))
    same(draw(p, None, message=full), draw(p, loop, message=full))
    control = {"control": lambda t, z: z.sin()}
    same(draw(p, None, **control), draw(p, loop, **control))
    assert not uncompiled


def test_errors_of_a_field_are_its_own(monkeypatch):
    class Broken(torch.nn.Module):
        broken = False

        def forward(self, t, z):
            if self.broken:
                raise ZeroDivisionError
            return -z

    def compile_(fn, **options):
        return fn

    monkeypatch.setattr(torch, "compile", compile_)
    drift = Broken()
    start = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
    q = sd.SDEPath(drift, torch.full((2,), 0.3, dtype=F64), start, TS).guided(loop=sd.Compiled(chunk=2))
    drift.broken = True
    with pytest.raises(ZeroDivisionError):
        q.rsample()


def test_chunk_size():
    with pytest.raises(sd.FieldError, match="`chunk` must be at least 1, got 0"):
        sd.Compiled(chunk=0)
    assert step_chunk(lambda t, z: -z, path().chain.diffusion, sd.EulerMaruyama())


@pytest.mark.slow
def test_the_compiler_itself():
    p, loop = path(), sd.Compiled(chunk=2)
    same(draw(p, None, message=message()), draw(p, loop, message=message()))
    assert loop.seconds > 0
    assert not loop._broken
