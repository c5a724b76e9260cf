"""Steps that change nothing when they fail, patience, interruption, monitoring."""

import itertools
import math
import os
import signal
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stochdyn.errors import DivergedError, FitError
from stochdyn.inference.loop import Clip, Monitor, Settings, Trainer, train
from stochdyn.inference.objective import ELBO
from stochdyn.inference.result import Fit
from stochdyn.inference.schedule import Constant

Y = torch.tensor([1.0, 3.0])


class Model(nn.Module):
    """A maximum-likelihood mean with a running buffer, that can be told to misbehave at chosen calls."""

    def __init__(self, misbehave=lambda call: None):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("calls", torch.tensor(0.0))
        self.misbehave = misbehave
        self.call = -1

    def forward(self, y):
        self.call += 1
        self.calls += 1
        factor = self.misbehave(self.call)
        loc = self.loc if factor is None else self.loc * factor
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def empty_guide(y):
    pass


def trainer_of(model, guide=empty_guide, **settings):
    options = {"lr": Constant(0.1), "kl_weight": Constant(1.0)} | settings
    return Trainer(Fit(model, guide), Settings(ELBO(), **options))


def run(trainer, steps, monitor=None, args=(Y,)):
    train(trainer, itertools.repeat(args), steps, monitor=monitor, progress=False)
    return trainer.fit


def raising(error, *calls):
    def misbehave(call):
        if call in calls:
            raise error

    return misbehave


FAULTS = {
    "loss": lambda call: float("nan") if call in (5, 6) else None,
    "diverged": raising(DivergedError("series 0, time 0.5: inf"), 5, 6),
    "validation": raising(ValueError("Expected parameter loc ... found invalid values:\ntensor(nan)"), 5, 6),
    "linear algebra": raising(torch.linalg.LinAlgError("not positive-definite"), 5, 6),
}


@pytest.fixture(autouse=True)
def _listening():
    """Ctrl-C as in a terminal: a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_fails_changes_nothing(fault):
    trainer = trainer_of(Model(FAULTS[fault]))
    model, seen = trainer.fit.model, []
    for _ in range(9):
        trainer.take((Y,))
        seen.append((model.loc.item(), model.calls.item(), trainer.fit.skipped))
    assert [row[1:] for row in seen[4:8]] == [(5.0, 0), (5.0, 1), (5.0, 2), (6.0, 2)]
    assert seen[4][0] == seen[5][0] == seen[6][0] != seen[7][0]
    assert (trainer.fit.step, len(trainer.fit.losses)) == (9, 7)
    # The optimiser did not see the failed steps either.
    reference = trainer_of(Model())
    for _ in range(7):
        reference.take((Y,))
    assert model.loc.item() == reference.fit.model.loc.item()


def test_a_gradient_that_overflows_adam_is_skipped():
    model = Model()
    trainer = trainer_of(model, clip_norm=None)
    trainer.take((Y,))
    before = model.loc.item()
    handle = model.loc.register_hook(lambda gradient: gradient * 1e25)
    trainer.take((Y,))
    handle.remove()
    assert model.loc.item() == before
    assert trainer.fit.skipped == 1


@pytest.mark.parametrize("fault", ["validation", "linear algebra"])
def test_errors_of_a_program_that_never_worked_are_its_own(fault):
    error = {
        "validation": ValueError("invalid values"),
        "linear algebra": torch.linalg.LinAlgError("singular"),
    }
    trainer = trainer_of(Model(raising(error[fault], 0)))
    with pytest.raises(type(error[fault]), match=str(error[fault])):
        trainer.take((Y,))


@pytest.mark.parametrize(
    "error", [ValueError("shape mismatch in finance"), RuntimeError("nan"), KeyError("nan")]
)
def test_other_errors_are_not_swallowed(error):
    trainer = trainer_of(Model(raising(error, 3)))
    with pytest.raises(type(error)):
        run(trainer, 5)
    assert trainer.fit.step == 3


def test_nothing_to_train_is_found_at_the_first_step_that_works():
    def model(y, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 1:
            raise DivergedError("the first run")
        pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=y[0])

    trainer = trainer_of(model)
    with pytest.raises(FitError, match="nothing to train"):
        run(trainer, 3)
    assert trainer.fit.skipped == 1


def test_patience_counts_in_a_row():
    nine = Model(lambda call: float("nan") if call % 10 else None)
    assert run(trainer_of(nine), 40).skipped == 36
    ten = trainer_of(Model(lambda call: float("nan") if call >= 5 else None))
    with pytest.raises(
        FitError, match="10 steps in a row were not finite; the last finite loss was"
    ) as caught:
        run(ten, 40)
    fit = caught.value.fit
    assert fit is ten.fit
    assert (fit.step, fit.skipped, len(fit.losses)) == (15, 10, 5)
    assert torch.isfinite(fit.model.loc)
    assert "step 14" in str(caught.value)
    assert isinstance(caught.value.__cause__, DivergedError)


def test_the_diagnosis_of_a_wrong_scale():
    with pytest.raises(FitError, match=r"no loss was finite.*\n.*site 'y' \(observed, .*1e\+25") as caught:
        run(trainer_of(Model()), 40, args=(Y * 1e25 / 3,))
    assert "divide them by their standard deviation" in str(caught.value)
    assert caught.value.fit.model.loc.item() == 0.0


def test_the_diagnosis_of_bad_gradients():
    model = Model()
    trainer = trainer_of(model)
    trainer.take((Y,))
    model.loc.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FitError, match=r"no sample site.*\n.*non-finite gradient: model\.loc; .*value: none"):
        run(trainer, 40)


def test_validation_is_on_for_ten_steps():
    seen = []
    run(trainer_of(Model(lambda call: seen.append(pyro.infer.util.is_validation_enabled()))), 12)
    assert seen == [True] * 10 + [False] * 2
    assert pyro.infer.util.is_validation_enabled()
    seen.clear()
    with pyro.validation_enabled(False):
        run(trainer_of(Model(lambda call: seen.append(pyro.infer.util.is_validation_enabled()))), 2)
        assert seen == [False] * 2


def test_one_transfer_per_step():
    class CountTransfers(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def guide(y):
        pyro.param("unused", torch.tensor(0.0))

    pyro.clear_param_store()
    trainer = trainer_of(Model(), guide)
    run(trainer, 3)
    with pyro.validation_enabled(False), CountTransfers() as mode:
        trainer.take((Y,))
    assert mode.count <= 1


def test_keyboard_interrupt_returns_what_there_is():
    trainer = trainer_of(Model(raising(KeyboardInterrupt(), 30)))
    fit = run(trainer, 100)
    assert (fit.interrupted, fit.step, len(fit.losses)) == (True, 30, 30)
    assert fit.model.calls.item() == 30
    assert fit.model.loc.grad is None
    assert fit.seconds > 0
    assert not pyro.poutine.runtime._PYRO_STACK


on_main_thread = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)


@on_main_thread
def test_a_signal_ends_after_the_step():
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    fit = run(trainer_of(Model()), 20_000)
    timer.join()
    assert fit.interrupted
    assert fit.step == len(fit.losses) == fit.model.calls.item() > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@on_main_thread
def test_the_second_ctrl_c_is_not_swallowed():
    def press_twice(call):
        if call == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    trainer = trainer_of(Model(press_twice))
    with pytest.raises(KeyboardInterrupt):
        run(trainer, 100)
    assert trainer.fit.step == 4
    assert trainer.fit.model.calls.item() == 4


def test_monitoring_records_and_changes_nothing():
    def guide(y):
        pass

    class Noisy(Model):
        def forward(self, y):
            self.seen = self.training
            super().forward(y + 0.1 * torch.randn(2))

    torch.manual_seed(0)
    alone = run(trainer_of(Noisy()), 30)
    torch.manual_seed(0)
    watched = run(trainer_of(Noisy()), 30, Monitor(Y, every=10))
    assert watched.losses == alone.losses
    assert [step for step, _ in watched.validation] == [10, 20, 30]
    assert watched.validation[0][1] < watched.validation[2][1]
    assert watched.model.calls.item() == 30


def test_monitoring_is_per_series_and_survives_divergence():
    class Data:
        population = 4
        y = Y

    class OfData(Model):
        def forward(self, data):
            super().forward(data.y if self.training else data.y[:1])
            if not self.training:
                raise DivergedError("at evaluation")

    fit = run(trainer_of(OfData()), 2, Monitor(Data(), every=1), args=(Data(),))
    assert [(step, math.isnan(value)) for step, value in fit.validation] == [(1, True), (2, True)]
    calm = run(trainer_of(Model()), 1, Monitor(Y, every=1))
    four = Monitor(Y, every=1)
    four.population = 4
    quarter = run(trainer_of(Model()), 1, four)
    assert quarter.validation[0][1] == pytest.approx(calm.validation[0][1] / 4)


def test_clipping_follows_the_recent_average():
    clip = Clip(2.0)
    assert clip.limit() == math.inf
    clip.record(10.0)
    assert clip.limit() == 20.0
    clip.record(20.0)
    assert clip.limit() == pytest.approx(2 * (0.95 * 10 + 0.05 * 20))
    off, flat = Clip(None), Clip(2.0)
    for one in (off, flat):
        one.record(0.0)
        assert one.limit() == math.inf


def test_a_spike_is_clipped():
    def loc_after_spike(clip_norm):
        model = Model()
        trainer = trainer_of(model, clip_norm=clip_norm)
        run(trainer, 5)
        handle = model.loc.register_hook(lambda gradient: gradient * 1e6)
        trainer.take((Y,))
        handle.remove()
        return trainer.parameters.optimizer.state[model.loc]["exp_avg_sq"].item()

    assert loc_after_spike(10.0) < 10 < 1e6 < loc_after_spike(None)


def test_schedules_are_followed():
    steps = []

    def lr(step):
        steps.append(step)
        return 0.0 if step == 1 else 0.1

    trainer = trainer_of(Model(), lr=lr)
    values = [trainer.fit.model.loc.item()]
    for _ in range(3):
        trainer.take((Y,))
        values.append(trainer.fit.model.loc.item())
    assert steps == [0, 1, 2]
    assert [new != old for old, new in itertools.pairwise(values)] == [True, False, True]
    with pytest.raises(FitError, match="kl_weight at step 0"):
        trainer_of(Model(), kl_weight=lambda step: -1.0).take((Y,))
