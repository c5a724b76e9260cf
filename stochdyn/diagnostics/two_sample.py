"""The classifier two-sample test: can a classifier tell two sets of draws apart?"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.diagnostics.tree import as_array
from stochdyn.errors import DataError, ShapeError

RATE, DECAY, BATCH, EPOCHS, STEPS = 5e-3, 1e-3, 256, 20, 200


@dataclass(frozen=True)
class TwoSample:
    """The cross-validated accuracy of a classifier: .5 where two sets of draws cannot be told apart, 1 where always.

    Attributes:
        accuracy: the share of held-out draws that it assigns rightly.
        draws: the number of draws classified, of both sets together.

    Example:
        >>> from stochdyn.diagnostics import TwoSample
        >>> print(TwoSample(accuracy=0.531, draws=8000))
        C2ST 0.531 (0.5 +- 0.011 if the same)
    """

    accuracy: float
    draws: int

    @property
    def error(self) -> float:
        """The standard error of the accuracy if the sets are of one law."""
        return 0.5 / math.sqrt(self.draws)

    def differs(self, errors: float = 3.0) -> bool:
        """Whether the accuracy is more than so many standard errors above .5. False proves nothing."""
        return self.accuracy > 0.5 + errors * self.error

    def __str__(self) -> str:
        return f"C2ST {self.accuracy:.3f} (0.5 +- {2 * self.error:.3f} if the same)"


def c2st(x: Any, y: Any, *, folds: int = 5, seed: int = 0) -> TwoSample:
    """Train a classifier to tell two sets of draws apart; report its accuracy on draws that it has not seen.

    A net with two hidden layers of 10 d units, on columns scaled by the mean and the spread of x, cross-validated. It
    sees what differs anywhere in the joint law, correlations too, as far as draws and net suffice. The larger set is
    thinned at random to the size of the other.

    Args:
        x: draws of the reference, (draw, d) or (draw,); independent, as all folds rely on it.
        y: draws to compare, likewise.
        folds: parts, each held out once.
        seed: of folds, weights and batches; the random state outside is kept.

    Raises:
        ShapeError: if the dimensions differ.
        DataError: if a draw is not finite, or there are fewer than 20 draws per fold.

    References:
        Lopez-Paz & Oquab, "Revisiting classifier two-sample tests", 2017, https://arxiv.org/abs/1610.06545;
        Lueckmann et al., "Benchmarking simulation-based inference", 2021, https://arxiv.org/abs/2101.04653

    Example:
        >>> import numpy as np
        >>> import stochdyn as sd
        >>> rng = np.random.default_rng(0)
        >>> sd.c2st(rng.normal(size=(500, 2)), rng.normal(1.0, 1.0, size=(500, 2))).differs()
        True
    """
    a, b = _read("x", x), _read("y", y)
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"x has {a.shape[1]} columns, y has {b.shape[1]}. Give the same quantities.")
    size = min(len(a), len(b))
    if folds < 2 or size < 20 * folds:
        raise DataError(
            f"{size} draws of each set for {folds} folds. Take at least 2 folds and 20 draws for each."
        )
    rng = np.random.default_rng(seed)
    a, b = rng.permutation(a)[:size], rng.permutation(b)[:size]
    spread = a.std(0)
    both = (np.concatenate([a, b]) - a.mean(0)) / np.where(spread > 0, spread, 1.0)
    data = torch.from_numpy(both.clip(-1e6, 1e6)).float()
    labels = torch.arange(2 * size) >= size
    fold = torch.arange(size).repeat(2) % folds
    net = _train(data, labels, fold, folds, torch.Generator().manual_seed(seed))
    right = sum(int(((_logit(net, data)[k] > 0) == labels)[fold == k].sum()) for k in range(folds))
    return TwoSample(right / (2 * size), 2 * size)


def _read(name: str, draws: Any) -> np.ndarray:
    array = as_array(draws).astype(float)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2:
        raise ShapeError(f"`{name}` has shape {array.shape}, expected (draw, d). Flatten each draw to a row.")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(1).sum())
        raise DataError(f"`{name}`: {bad} of {len(array)} draws are not finite. Find out why they diverged.")
    return array


def _train(
    data: Tensor, labels: Tensor, fold: Tensor, folds: int, generator: torch.Generator
) -> list[Tensor]:
    """The weights of all folds' nets, (fold, inputs, outputs) and (fold, 1, outputs), trained side by side."""
    d, width = data.shape[1], 10 * data.shape[1]
    net = _start(folds, (d, width, width, 1), generator)
    use = [(fold != k).nonzero()[:, 0] for k in range(folds)]
    size = min(len(rows) for rows in use)
    steps = max(EPOCHS * (size // BATCH), STEPS)
    optimiser = torch.optim.AdamW(net, lr=RATE, weight_decay=DECAY, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, cycle_momentum=False)
    targets, done = labels.float(), 0
    with torch.enable_grad():
        while done < steps:
            order = torch.stack([rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in use])
            for rows in order.split(max(size // max(size // BATCH, 1), 1), dim=1)[: steps - done]:
                logit = _logit(net, data[rows])
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, targets[rows])
                optimiser.zero_grad()
                (folds * loss).backward()
                optimiser.step()
                schedule.step()
                done += 1
    return [p.detach() for p in net]


def _start(folds: int, widths: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    net = []
    for inputs, outputs in pairwise(widths):
        bound = math.sqrt(6 / (inputs + outputs))
        weight = (
            2 * torch.rand(folds, inputs, outputs, generator=generator, dtype=torch.float32) - 1
        ) * bound
        net += [weight.requires_grad_(), weight.new_zeros(folds, 1, outputs).requires_grad_()]
    return net


def _logit(net: list[Tensor], x: Tensor) -> Tensor:
    """(fold, draw)"""
    x = x.expand(len(net[0]), *x.shape[-2:])
    for k in range(0, len(net), 2):
        x = torch.baddbmm(net[k + 1], x if k == 0 else x.relu(), net[k])
    return x[..., 0]
