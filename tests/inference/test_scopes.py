"""What a fit changes is put back, also after an error."""

import contextlib
import os
import random
import signal
import threading
import warnings

import numpy as np
import pyro
import pytest
import torch
from torch import nn

from stochdyn.inference.scopes import Stop, interruptible, mode, seeded, unvalidated, validated


def draw():
    return torch.rand(()).item(), random.random(), np.random.rand()


@pytest.fixture(autouse=True)
def _listening():
    """Ctrl-C as in a terminal: a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_seeded_fixes_all_three_generators_and_puts_them_back():
    pyro.set_rng_seed(1)
    expected = draw()
    pyro.set_rng_seed(1)
    inside = []
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError), seeded(7):
            inside.append(draw())
            raise ZeroDivisionError
    assert inside[0] == inside[1] != expected
    assert draw() == expected


def test_without_a_seed_the_state_moves_on():
    pyro.set_rng_seed(1)
    first = draw()
    pyro.set_rng_seed(1)
    with seeded(None):
        assert draw() == first
    assert draw() != first


def test_modes_of_all_parts_are_put_back():
    net = nn.Sequential(nn.Dropout().eval(), nn.Dropout()).eval()
    net[1].train()
    with mode([net], train=True):
        assert all(part.training for part in net.modules())
        net.append(nn.Dropout())
    assert [part.training for part in net] == [False, True, False]
    assert not net.training


def test_validation_is_off_inside_and_back_outside():
    state = torch.distributions.Distribution._validate_args
    with unvalidated():
        torch.distributions.Normal(0.0, -1.0)
        assert not pyro.infer.util.is_validation_enabled()
    assert torch.distributions.Distribution._validate_args == state
    with pytest.raises(ValueError, match="scale"), validated():
        torch.distributions.Normal(0.0, -1.0)
    with validated():
        warnings.warn("Encountered NaN: loss", stacklevel=1)
    with pytest.warns(UserWarning, match="other"), validated():
        warnings.warn("other", stacklevel=1)


def test_the_second_ctrl_c_raises():
    stop = Stop()
    stop.request()
    with pytest.raises(KeyboardInterrupt):
        stop.request()


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)
def test_signals():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interruptible() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_own_handlers_are_left_alone():
    seen = []

    def run():
        with interruptible() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    before = signal.getsignal(signal.SIGINT)
    assert seen == [(False, before)]
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[1] == (False, signal.SIG_IGN)
