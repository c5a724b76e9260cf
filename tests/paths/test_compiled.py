"""What drawing a path computed: the loop in compiled chunks, and the reuse of its numbers by densities."""

import copy
import itertools
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

import stochdyn as sd

F64 = torch.float64
STATE, SERIES, POINTS = 2, 3, 6


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Fields(nn.Module):
    """What a prior and its guides learn."""

    def __init__(self, context=0, time=False):
        super().__init__()
        torch.manual_seed(0)
        self.drift = sd.NeuralField(STATE, hidden=(5,), context_dim=context, time=time)
        self.diffusion = sd.ElementwiseField(STATE, 4)
        self.guide = sd.NeuralField(STATE, hidden=(5,), context_dim=3)
        self.log_sigma = nn.Parameter(tensor(-1.0, -0.5))
        self.matrix = nn.Parameter(tensor(0.5, 0.1, 0.2, 0.6).reshape(2, 2))
        self.loc = nn.Parameter(tensor(0.2, -0.1))
        self.h, self.context = nn.Parameter(numbers(POINTS, STATE)), nn.Parameter(numbers(POINTS, 3, seed=1))
        self.root = nn.Parameter(numbers(POINTS, STATE, STATE, seed=2))
        self.double()

    def guide_of(self, kind):
        """Arguments of `guided`, by kind."""
        h, root = self.h, self.root
        match kind:
            case "diagonal":
                return {"message": sd.Message(h, root.square().sum(-1))}
            case "full":
                return {"message": sd.Message(h, root @ root.mT)}
            case "drift":
                first = sd.Message(h[:1], root[:1].square().sum(-1))
                return {"message": first, "drift": self.guide, "context": self.context}
            case "control":
                return {"control": self.guide, "context": self.context}
        return {}

    def path(self, diffusion=None, **options):
        ts = torch.linspace(0, 1, POINTS, dtype=F64) ** 1.5
        start = dist.Normal(self.loc, 0.5).expand([SERIES, STATE]).to_event(1)
        return sd.SDEPath(
            self.drift, self.diffusion if diffusion is None else diffusion, start, ts, **options
        )


DIFFUSIONS = {
    "tensor": lambda f: f.log_sigma.exp(),
    "module": lambda f: f.diffusion,
    "matrix": lambda f: sd.MatrixDiffusion(f.matrix),
    "closure": lambda f: lambda t, z: 0.3 + f.log_sigma.exp() * z.sigmoid(),
}


def same(a, b, atol=1e-10):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=atol)


class TestCompiledLoop:
    """With `torch.compile` replaced by nothing: what the chunks compute, and when they are compiled."""

    @pytest.fixture
    def compiled(self, monkeypatch):
        calls = []
        monkeypatch.setattr(torch, "compile", lambda f, dynamic: calls.append(f) or f)
        return calls

    def draw(self, fields, path, loop, kind="none", sample_shape=()):
        q = path.guided(**fields.guide_of(kind), loop=loop)
        torch.manual_seed(1)
        z = q.rsample(sample_shape)
        total = (path.log_prob(z) - q.score_parts(z).entropy_term).sum()
        return [z, *torch.autograd.grad(total, list(fields.parameters()), allow_unused=True)]

    @pytest.mark.parametrize("kind", ["none", "diagonal", "drift"])
    @pytest.mark.parametrize("context", [None, "static", "timed"])
    @pytest.mark.parametrize("solver", [sd.EulerMaruyama(), sd.GaussianStep(mean=sd.Heun())])
    def test_equals_the_plain_loop(self, compiled, kind, context, solver):
        fields = Fields(0 if context is None else 2, time=True)
        shape = {"static": (SERIES, 2), "timed": (SERIES, POINTS, 2)}.get(context)
        path = fields.path(solver=solver, context=None if shape is None else numbers(*shape, seed=3))
        loop = sd.Compiled(chunk=2)  # of five steps: the last one is left over
        for sample_shape in ((), (4,)):
            expected = self.draw(fields, path, None, kind, sample_shape)
            same(self.draw(fields, path, loop, kind, sample_shape), expected)
        assert len(compiled) == 2

    def test_compiles_once_for_each_shape_and_mode(self, compiled):
        path, loop = Fields().path(), sd.Compiled(chunk=2)
        for _ in range(3):
            path.guided(loop=loop).rsample()
        assert len(compiled) == 1
        path.guided(loop=loop).rsample((4,))
        assert len(compiled) == 2
        with torch.no_grad():
            path.guided(loop=loop).rsample()
        assert len(compiled) == 3
        Fields().path().guided(loop=loop).rsample()
        assert len(compiled) == 4
        assert loop.seconds > 0

    def test_a_chunk_longer_than_the_path_compiles_nothing(self, compiled):
        path = Fields().path()
        torch.manual_seed(1)
        expected = path.guided().rsample()
        torch.manual_seed(1)
        torch.testing.assert_close(path.guided(loop=sd.Compiled(chunk=50)).rsample(), expected)
        assert compiled == []

    @pytest.mark.parametrize("case", ["drift of one's own", "closure", "tensor", "matrix", "full", "control"])
    def test_what_it_cannot_do_runs_as_it_is(self, compiled, case):
        fields = Fields()

        def path():
            diffusion = DIFFUSIONS[case](fields) if case in DIFFUSIONS else None
            made = fields.path(diffusion)
            if case == "drift of one's own":
                made.chain.drift = lambda t, z: -z
            return made

        kind = case if case in ("full", "control") else "none"
        expected = self.draw(fields, path(), None, kind)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            same(self.draw(fields, path(), sd.Compiled(chunk=2), kind), expected)
        assert compiled == []
        assert seen == []

    @pytest.mark.parametrize("when", ["at once", "at the first call"])
    def test_without_a_compiler_it_warns_once(self, monkeypatch, when):
        calls = []

        def fails(*args, **options):
            calls.append(args)
            raise OSError("no g++\nin sight")

        monkeypatch.setattr(torch, "compile", fails if when == "at once" else lambda f, dynamic: fails)
        fields = Fields()
        path, loop = fields.path(), sd.Compiled(chunk=2)
        expected = self.draw(fields, path, None, "diagonal")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                same(self.draw(fields, path, loop, "diagonal"), expected)
        assert [w.category for w in seen] == [RuntimeWarning]
        assert "torch.compile failed (OSError: no g++), so the loop runs uncompiled" in str(seen[0].message)
        assert len(calls) == 1

    def test_an_error_of_the_users_field_is_the_users(self, monkeypatch):
        class Late(nn.Module):
            def __init__(self):
                super().__init__()
                self.calls = itertools.count()

            def forward(self, t, z):
                if next(self.calls) > 0:
                    raise ZeroDivisionError("mine")
                return -z

        monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
        fields = Fields()
        fields.drift = Late()
        with pytest.raises(ZeroDivisionError, match="mine"):
            fields.path().guided(loop=sd.Compiled(chunk=2)).rsample()

    def test_a_copy_starts_anew(self, compiled):
        path, loop = Fields().path(), sd.Compiled(chunk=2)
        path.guided(loop=loop).rsample()
        other = copy.deepcopy(loop)
        assert (other.chunk, other.seconds) == (2, 0.0)
        path.guided(loop=other).rsample()
        assert len(compiled) == 2

    def test_refused(self):
        with pytest.raises(sd.FieldError, match="`chunk` must be at least 1, got 0"):
            sd.Compiled(chunk=0)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("default")
    @pytest.mark.parametrize("kind", ["none", "diagonal", "drift"])
    def test_by_the_compiler(self, kind):
        fields = Fields(2, time=True)
        path = fields.path(context=numbers(SERIES, 2, seed=3))
        loop = sd.Compiled(chunk=2)
        expected = self.draw(fields, path, None, kind)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                same(self.draw(fields, path, loop, kind), expected)
        assert [str(w.message) for w in seen if "sd.Compiled" in str(w.message)] == []
        assert loop.seconds > 0
        assert len(loop._made) == 1


class TestRecall:
    """Densities of the drawn path made of what drawing it computed: the same values, the same gradients."""

    def setup_method(self):
        self.fields = Fields()
        self.learn = list(self.fields.parameters())

    def path(self, diffusion):
        return self.fields.path(DIFFUSIONS[diffusion](self.fields))

    def drawn(self, path, kind, recall):
        q = path.guided(**self.fields.guide_of(kind))
        torch.manual_seed(1)
        z = q.rsample((4,))
        if recall:
            q.recall()
            path.recall(q)
        return q, z

    @pytest.mark.parametrize("kind", ["none", "diagonal", "full", "drift", "control"])
    @pytest.mark.parametrize("diffusion", DIFFUSIONS)
    def test_densities_and_gradients(self, diffusion, kind):
        found = []
        for recall in (False, True):
            path = self.path(diffusion)
            q, z = self.drawn(path, kind, recall)
            assert (q.known(z) is not None) == recall
            assert (path._known(z) is not None) == recall
            parts = path.log_prob(z), q.score_parts(z).entropy_term
            total = (parts[0] - parts[1]).sum()
            gradient = torch.autograd.grad(total, self.learn, allow_unused=True, retain_graph=True)
            gradient = [torch.zeros(1) if g is None else g for g in gradient]
            found.append([z, *parts, q.log_prob(z), kl_divergence(q, path), *gradient])
        same(*found)

    @pytest.mark.parametrize("kind", ["diagonal", "drift"])
    @pytest.mark.parametrize("diffusion", ["tensor", "module"])
    def test_the_kl_and_its_gradient(self, diffusion, kind):
        found = []
        for recall in (False, True):
            path = self.path(diffusion)
            q, _ = self.drawn(path, kind, recall)
            kl = kl_divergence(q, path)
            gradient = torch.autograd.grad(kl.sum(), self.learn, allow_unused=True)
            found.append([kl, *[torch.zeros(1) if g is None else g for g in gradient]])
        same(*found)

    @pytest.mark.parametrize("kind", ["diagonal", "full", "drift"])
    def test_not_for_another_value(self, kind):
        path = self.path("module")
        q, z = self.drawn(path, kind, True)
        guide = self.fields.guide_of(kind)
        fresh, plain = path.guided(**guide), self.path("module")
        for other in (z + 0.1, z.clone(), z[1]):
            assert q.known(other) is None
            same([q.log_prob(other), path.log_prob(other)], [fresh.log_prob(other), plain.log_prob(other)])
        q.rsample((4,))
        same([q.log_prob(z), path.log_prob(z)], [fresh.log_prob(z), plain.log_prob(z)])
        assert q.known(z) is None

    def test_not_by_a_path_of_other_noise_or_drift(self):
        path = self.path("module")
        q, z = self.drawn(path, "none", True)
        other = Fields()
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
        noisier, elsewhere = self.fields.path(other.diffusion), self.fields.path()
        elsewhere.chain.drift = other.drift
        for p in (noisier, elsewhere):
            expected = p.log_prob(z)
            p.recall(q)
            same([p.log_prob(z)], [expected])
            assert (expected - path.log_prob(z)).abs().min() > 1e-4
        assert noisier._known(z) is None
        assert elsewhere._known(z)[0] is None

    def test_an_expanded_path_forgets(self):
        path = self.path("module")
        q, z = self.drawn(path, "none", True)
        assert q.expand([4, SERIES]).known(z) is None
        assert path.expand([4, SERIES])._known(z) is None
