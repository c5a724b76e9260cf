"""The guide ahead of the model: which parameters move when, how the phase ends, and steps that change nothing."""

import itertools
import math
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import stochdyn as sd
from stochdyn.errors import FitError
from stochdyn.inference.aggressive import Aggressive, Phase
from stochdyn.inference.loop import Settings, Trainer, train
from stochdyn.inference.objective import ELBO
from stochdyn.inference.result import Fit
from stochdyn.inference.schedule import Constant
from tests.programs import ou, ou_series

Y = torch.linspace(-2, 2, 12)


@pytest.fixture(autouse=True)
def _seed():
    pyro.clear_param_store()
    torch.manual_seed(0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    pyro.clear_param_store()


class Model(nn.Module):
    """A slope; `misbehave` is asked at every call."""

    def __init__(self, misbehave=lambda call: None):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("calls", torch.tensor(0.0))
        self.misbehave = misbehave
        self.call = -1

    def forward(self, y):
        self.call += 1
        self.calls += 1
        factor = self.misbehave(self.call)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.slope * z if factor is None else self.slope * z * factor
            pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


class Guide(nn.Module):
    """Amortised, and with a reference to the model's slope."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(self.gain * y * self.model.slope, 0.5))


def trainer_of(model, guide, lr=0.05):
    return Trainer(Fit(model, guide), Settings(ELBO(), lr=Constant(lr), kl_weight=Constant(1.0)))


def run(trainer, steps, phase, args=(Y,)):
    train(trainer, itertools.repeat(args), steps, monitor=None, progress=False, phase=phase)
    return trainer.fit


def recorded(trainer):
    """The parameters after every step, and which part was moved."""
    seen, take = [], trainer.take

    def spy(args, part=None, **options):
        before = {name: p.detach().clone() for name, p in trainer.parameters.named().items()}
        loss = take(args, part, **options)
        after = trainer.parameters.named()
        moved = {name for name, p in before.items() if not torch.equal(p, after[name].detach())}
        seen.append((part, loss, moved))
        return loss

    trainer.take = spy
    return seen


def test_the_guide_moves_alone_and_then_the_model():
    model = Model()
    trainer = trainer_of(model, Guide(model))
    seen = recorded(trainer)
    fit = run(trainer, 3, Phase(Aggressive(max_inner=7, window=50), Y))
    assert fit.step == len(fit.losses) == 3
    assert fit.inner == 21
    assert [moved for _, _, moved in seen] == 3 * ([{"guide.gain"}] * 7 + [{"model.slope"}])
    together = trainer_of(model, Guide(model))
    seen = recorded(together)
    run(together, 1, None)
    assert seen[0][2] == {"model.slope", "guide.gain"}  # control


def test_the_inner_loop_ends_when_the_windowed_loss_is_no_better():
    model = Model()
    trainer = trainer_of(model, Guide(model))
    losses = iter([5.0, 4.0, 3.0, 2.0, 2.0, 3.0, 9.0])
    calls = []

    def take(args, part=None, *, counts=True):
        calls.append(counts)
        trainer.fit.step += counts
        return next(losses)

    trainer.take = take
    Phase(Aggressive(max_inner=50, window=2), Y).advance(trainer, itertools.repeat((Y,)), sd_stop())
    assert calls == [False] * 6 + [True]  # 4.5, 2.5, then 2.5 again


def sd_stop(requested=False):
    class Stop:
        pass

    stop = Stop()
    stop.requested = requested
    return stop


def test_parameters_that_both_have_are_the_models():
    batch = ou_series(3, torch.linspace(0, 1, 4))

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

        def forward(self, data):
            ou(data, theta=self.rate.exp(), substeps=2)

    model = Learned()
    # This guide tells Pyro of the model's parameters too, and makes its own at the first call.
    trainer = trainer_of(model, sd.AmortizedGuide(model, paths=sd.FreeMessage()))
    seen = recorded(trainer)
    run(trainer, 2, Phase(Aggressive(max_inner=2), batch), (batch,))
    moved = [m for _, _, m in seen]
    assert moved[1:3] == [{"guide.paths.z.numbers"}, {"model.rate"}]
    assert moved[3:] == [{"guide.paths.z.numbers"}] * 2 + [{"model.rate"}]


@pytest.mark.parametrize(
    ("model", "whose"), [(lambda y: Model()(y), "model"), (Model(), "guide")], ids=["model", "guide"]
)
def test_two_sides_are_needed(model, whose):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.1))

        def forward(self, y):
            with pyro.plate("rows", len(y)):
                pyro.sample("z", dist.Normal(self.gain * y, 0.5))

    def fixed(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0.3 * y, 0.5))

    with pytest.raises(FitError, match=f"the {whose} has no parameters of its own"):
        sd.fit(model, Plain() if whose == "model" else fixed, Y, aggressive=Aggressive(), progress=False)


def factor_at(*calls):
    return lambda call: float("nan") if call in calls else None


def test_a_bad_inner_step_changes_nothing():
    model = Model(factor_at(8, 9))
    trainer = trainer_of(model, Guide(model))
    seen = recorded(trainer)
    fit = run(trainer, 2, Phase(Aggressive(max_inner=9, window=50), Y))
    bad = [moved for _, loss, moved in seen if loss is None]
    assert bad == [set(), set()]
    assert fit.skipped == 2
    assert fit.step == len(fit.losses) == 2
    assert (
        model.calls == fit.inner + fit.step - 2
    )  # the buffers of bad steps, probes and measurements are put back


def test_an_inner_loop_that_breaks_down_keeps_the_last_good_state():
    good = {}
    model = Model(lambda call: float("nan") if call > 6 else None)
    guide = Guide(model)

    def spy(trainer, take):
        def wrapped(*args, **options):
            loss = take(*args, **options)
            if loss is not None:
                good.update({n: p.detach().clone() for n, p in trainer.parameters.named().items()})
            return loss

        return wrapped

    trainer = trainer_of(model, guide)
    trainer.take = spy(trainer, trainer.take)
    with pytest.raises(FitError, match="10 steps in a row were not finite") as error:
        run(trainer, 5, Phase(Aggressive(max_inner=50, window=50), Y))
    assert error.value.fit is trainer.fit
    assert trainer.fit.step == 0
    assert trainer.fit.inner == 6 + 10
    for name, p in trainer.parameters.named().items():
        assert torch.equal(p, good[name])


def test_ctrl_c_ends_the_inner_loop_after_its_step():
    def press(call):
        if call == 5:
            signal.raise_signal(signal.SIGINT)

    model = Model(press)
    trainer = trainer_of(model, Guide(model))
    seen = recorded(trainer)
    fit = run(trainer, 4, Phase(Aggressive(max_inner=50, window=100), Y))
    assert fit.interrupted
    assert (fit.step, fit.inner) == (0, 5)
    assert seen[-1][2] == {"guide.gain"}  # the running step was finished, and the model left alone
    assert fit.mutual_information == []


def test_the_phase_ends_when_the_information_stops_rising(monkeypatch):
    model = Model()
    trainer = trainer_of(model, Guide(model))
    phase = Phase(Aggressive(max_inner=2, every=2, patience=2), Y)
    found = iter([0.1, 0.5, 0.4, math.nan, 0.9, 1.0])
    monkeypatch.setattr(phase, "_measure", lambda trainer: (next(found), {"z": 1}))
    fit = run(trainer, 20, phase)
    assert [step for step, _ in fit.mutual_information] == [2, 4, 6, 8, 20]
    assert [units for _, units in fit.active_units] == [{"z": 1}] * 5
    assert fit.inner == 16  # eight steps with two each
    assert not phase.active


def test_measuring_leaves_the_training_alone():
    def result(every):
        model = Model()
        fit = sd.fit(
            model,
            Guide(model),
            Y,
            steps=6,
            lr=0.05,
            progress=False,
            aggressive=Aggressive(max_inner=3, every=every, patience=100),
        )
        return fit, model

    often, seldom = result(1), result(6)
    assert len(often[0].mutual_information) == 6
    assert len(seldom[0].mutual_information) == 1
    assert often[0].mutual_information[-1] == seldom[0].mutual_information[-1]
    assert often[0].losses == seldom[0].losses
    assert torch.equal(often[1].slope, seldom[1].slope)
    assert torch.equal(often[1].calls, seldom[1].calls)


def test_the_record_says_so():
    assert repr(Fit(None, None, losses=[1.0], kl_weights=[1.0], step=1, inner=7)) == (
        "Fit: 1 steps (7 more of the guide) in 0.0 s, ELBO -1"
    )
    with pytest.raises(FitError, match="window must be at least 1, got 0"):
        Aggressive(window=0)


# Posterior collapse.

TIMES = 10


def autoregressive_series(number=100):
    """y_t = .9 y_{t-1} + .15 c + .2 noise: the last value says almost all, the level c of a series the rest."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(number, generator=generator)
    y = [torch.randn(number, generator=generator)]
    for _ in range(TIMES):
        y.append(0.9 * y[-1] + 0.15 * c + 0.2 * torch.randn(number, generator=generator))
    return torch.stack(y, 1)


class Autoregressive(nn.Module):
    """A strong likelihood, that can do without z; z passes three layers."""

    def __init__(self):
        super().__init__()
        self.rho, self.log_noise = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, y):
        with pyro.plate("series", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.rho * y[:, :-1] + self.weight**3 * z[..., None]
            pyro.sample("y", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=y[:, 1:])


class Lagging(nn.Module):
    """A guide that learns slowly: it sees the data in large units."""

    def __init__(self):
        super().__init__()
        self.gain, self.log_scale = nn.Parameter(torch.zeros(TIMES + 1)), nn.Parameter(torch.tensor(0.0))

    def forward(self, y):
        with pyro.plate("series", len(y)):
            pyro.sample("z", dist.Normal(0.005 * (y @ self.gain), self.log_scale.exp()))


@pytest.mark.slow
def test_the_plain_fit_collapses_and_the_aggressive_one_does_not():
    y = autoregressive_series()
    options = {"lr": Constant(0.02), "progress": False}
    aggressive = Aggressive(every=5, draws=3)
    ahead = sd.fit(Autoregressive(), Lagging(), y, steps=250, aggressive=aggressive, **options)
    plain = sd.fit(Autoregressive(), Lagging(), y, steps=ahead.step + ahead.inner, **options)  # the same work
    used, unused = (sd.posterior_collapse(fit, y) for fit in (ahead, plain))
    assert used.mutual_information > 0.8
    assert used.active_units == {"z": 1}
    assert unused.mutual_information < 0.1  # the negative control
    assert unused.active_units == {"z": 0}
    assert ahead.elbo > plain.elbo + 5
    assert [value for _, value in ahead.mutual_information][-1] > 0.8
