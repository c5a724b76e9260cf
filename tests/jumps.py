"""Exact answers for point processes, by plain loops and other routes than the package's."""

import math

import torch
from torch import Tensor

TIMES = [0.2, 0.5, 0.9, 1.0, 1.7, 2.4, 2.45, 3.1]
END = 4.0
HAWKES = {"mu": 0.5, "alpha": 0.8, "beta": 1.6}
HAWKES_LOG_PROB = -4.897287954639082
HAWKES_COMPENSATOR = [
    0.1, 0.4406083041, 1.0232138907, 1.2102449732, 2.4291789948, 3.3995547115, 3.4860958698, 4.6121035347,
]  # fmt: skip
SELF_CORRECTING_LOG_PROB = -3.2246192365790254  # mu 1, alpha .4
LOG_LINEAR_LOG_PROB = -4.821196117343815  # exp(-.3 + .4 t)
GAMMA_POISSON_LOG_EVIDENCE = -3.4347232260864544  # Gamma(2, 1.5); the posterior is Gamma(10, 5.5)


def value(times: list[float] = TIMES) -> Tensor:
    """The padded tensor of one sequence, with two unused rows."""
    rows = [*times, math.inf, math.inf]
    return torch.tensor(rows, dtype=torch.float64)[:, None]


def hawkes_log_prob(
    rows: list[tuple[float, int]], mu: Tensor, alpha: Tensor, beta: Tensor, end: float
) -> float:
    """The multivariate Hawkes process by its definition: sums over all pairs of jumps, which are (time, kind)."""
    total = -float(mu.sum()) * end
    for k, (t, i) in enumerate(rows):
        rate = float(mu[i])
        for s, j in rows[:k]:
            rate += float(alpha[i, j]) * math.exp(-float(beta[i, j]) * (t - s))
        total += math.log(rate)
        for other in range(len(mu)):
            a, b = float(alpha[other, i]), float(beta[other, i])
            total -= a / b * (1 - math.exp(-b * (end - t)))
    return total


def mean_count(values: Tensor) -> Tensor:
    """The number of jumps of every sequence, as a float."""
    return torch.isfinite(values[..., 0]).sum(-1).double()
