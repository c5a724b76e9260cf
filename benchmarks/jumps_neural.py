"""The neural jump ODE of `jumps.py`: a few, fitted to the training part, one chosen on the validation part."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import stochdyn as sd

LogLikelihood = Callable[[sd.JumpODE, sd.Jumps], Tensor]


@dataclass(frozen=True)
class Size:
    """What is chosen on the validation part.

    `base` tells whether the prior holds the base of the log intensity too: it is then zero, one jump per unit of
    time where the state is zero, unless the data say otherwise.
    """

    state_dim: int
    hidden: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    base: bool = True


SIMULATED = {"linear": Size(2, ()), "free_base": Size(2, (), base=False), "network": Size(3, (16,))}
EARTHQUAKES = {"shortest": 0.02, "longest": 20.0, "nodes": 6, "step": 10.0}
MARKED = {"linear": Size(5, (), EARTHQUAKES), "network": Size(5, (16,), EARTHQUAKES)}


def make(size: Size, train: sd.Jumps) -> sd.NeuralJumpODE:
    """At the mean rate of the data."""
    torch.manual_seed(0)
    rate = float(train.counts.sum() / (train.t1 - train.t0).sum())
    return sd.NeuralJumpODE(
        size.state_dim, size.hidden, marks=train.classes, rate=rate, **size.options
    ).double()


def sparsity(net: sd.NeuralJumpODE, width: float, train: sd.Jumps, *, base: bool = True) -> Tensor:
    """Minus the log density of Cauchy priors: on all that makes the intensity differ from a constant, and the constant.

    Their scale is `width` times the error of one parameter, for a coordinate of unit spread; the one that integrates
    spreads with time, where its push is not what jumps bring.
    """
    head, total = net.intensity, torch.zeros((), dtype=torch.float64)
    length, each = (train.t1 - train.t0).mean(), train.counts.double().mean()
    scale = width / (each * len(train)).sqrt()
    spread = (1 + ((net.flow.push + each / length) * length).square() / 12).sqrt()
    parts = [head.slope[:, :1] * spread, head.slope[:, 1:], head.log_rise.exp()]
    parts += [] if head.net is None else list(head.net.layers[-1].parameters())
    parts += [head.base] if base else []
    for part in parts:
        total = total + torch.log1p((part / scale) ** 2).sum()
    # The start is seen only once in a sequence.
    return total + torch.log1p(net.initial.square() / (scale.square() * each)).sum()


def fit(
    net: sd.NeuralJumpODE, train: sd.Jumps, likelihood: LogLikelihood, steps: int, *, base: bool = True
) -> None:
    """The posterior's mode by L-BFGS, from a wide prior to a narrow one, in units of the error of one parameter.

    The base is held later: it begins at the mean rate, and would stay there were that near one.
    """
    count = float(train.counts.sum())
    for width, held in ((1.0, False), (1.0, base), (0.1, base)):
        optimiser = torch.optim.LBFGS(
            net.parameters(), max_iter=steps, history_size=30, line_search_fn="strong_wolfe", tolerance_grad=1e-8
        )  # fmt: skip

        def closure(optimiser: Any = optimiser, width: float = width, held: bool = held) -> Tensor:
            optimiser.zero_grad()
            prior = sparsity(net, width, train, base=held)
            loss = (prior - likelihood(net(train, validate_args=False), train)) / count
            if not loss.isfinite():  # the line search went too far: it turns at a wall, and is lost at inf
                return _wall(net, loss)
            loss.backward()
            return loss

        optimiser.step(closure)


def _wall(net: sd.NeuralJumpODE, loss: Tensor) -> Tensor:
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.full_like(loss.detach(), 1e6)


@dataclass(frozen=True)
class Candidate:
    """A fitted net, its log-likelihood for each sequence of the validation part, and the seconds of its fit."""

    net: sd.NeuralJumpODE
    score: Tensor
    seconds: float


def candidates(
    train: sd.Jumps, validation: sd.Jumps, sizes: dict[str, Size], likelihood: LogLikelihood, steps: int
) -> dict[str, Candidate]:
    """One for every size, in order."""
    out = {}
    for name, size in sizes.items():
        start, net = time.perf_counter(), make(size, train)
        fit(net, train, likelihood, steps, base=size.base)
        with torch.no_grad():
            score = net(validation, nodes=None).log_prob(validation.values)
        print(f"  {name}: {float(score.sum()):.2f} on the validation part", flush=True)
        out[name] = Candidate(net, score, time.perf_counter() - start)
    return out


def choose(found: dict[str, Candidate]) -> str:
    """The first that no later one beats by a standard error of the validation likelihood."""
    best = next(iter(found))
    for name, candidate in found.items():
        gain = candidate.score - found[best].score
        if float(gain.sum()) > float(gain.std()) * len(gain) ** 0.5:
            best = name
    return best
