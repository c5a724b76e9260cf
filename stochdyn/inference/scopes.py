"""What a fit changes around itself, and puts back: random state, module modes, validation, Ctrl-C."""

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.util import get_rng_state, set_rng_state
from torch import nn


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws inside depend on the seed alone, and the random state outside (torch, numpy, random) is kept.

    With None the current state is used, and moves on.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with seeded(0):
        ...     _ = torch.randn(3)
        >>> bool((before == torch.get_rng_state()).all())
        True
    """
    if seed is None:
        yield
        return
    state = get_rng_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        pyro.set_rng_seed(seed)
        try:
            yield
        finally:
            set_rng_state(state)


@contextmanager
def mode(modules: list[nn.Module], *, train: bool) -> Iterator[None]:
    """Sets the training mode of whole modules, and puts back the mode of every part.

    Example:
        >>> import torch
        >>> net = torch.nn.Dropout().eval()
        >>> with mode([net], train=True):
        ...     print(net.training)
        True
        >>> net.training
        False
    """
    before = [(root, part, part.training) for root in modules for part in root.modules()]
    for root in modules:
        root.train(train)
    try:
        yield
    finally:
        for root, part, training in before:
            # Parts that were made meanwhile take the mode of their root.
            part.train(training) if part is root else setattr(part, "training", training)


@contextmanager
def validated() -> Iterator[None]:
    """Pyro's validation as the user has it, without its warnings about NaN: a fit reports those itself.

    Example:
        >>> import warnings
        >>> with validated():
        ...     warnings.warn("Encountered NaN: loss")
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Encountered (NaN|[+-]?inf)")
        yield


@contextmanager
def unvalidated() -> Iterator[None]:
    """Pyro's and torch's validation of distributions off.

    Example:
        >>> import torch
        >>> with unvalidated():
        ...     print(torch.distributions.Normal(0.0, -1.0).scale)
        tensor(-1.)
    """
    torch_status = torch.distributions.Distribution._validate_args
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(torch_status)


class Stop:
    """Whether Ctrl-C was pressed; a second one raises at once.

    Example:
        >>> stop = Stop()
        >>> stop.request()
        >>> stop.requested
        True
    """

    def __init__(self) -> None:
        self.requested = False

    def request(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def interruptible() -> Iterator[Stop]:
    """The first Ctrl-C only marks the yielded `Stop`, so that a step is never torn; the second raises.

    Outside the main thread, or where the program has its own handler, nothing is changed.

    Example:
        >>> with interruptible() as stop:
        ...     print(stop.requested)
        False
    """
    stop = Stop()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return
    signal.signal(signal.SIGINT, stop.request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
