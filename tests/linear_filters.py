"""Flow, jump and decoder that make an `ObservationJumpODE` a filter, and the exact answers by dense Gaussians."""

import math

import pyro.distributions as dist
import torch
from torch import nn

import stochdyn as sd

F64 = torch.float64
THETA, MU, SIGMA = torch.tensor([1.5, 0.7], dtype=F64), torch.tensor([0.5, -1.0], dtype=F64), 0.8
A = torch.tensor([[-0.5, -2.0], [1.0, -0.7]], dtype=F64)
G = torch.tensor([[0.6, 0.0], [0.3, 0.5]], dtype=F64)
NOISE = torch.tensor([0.3, 0.2], dtype=F64)
SOLVER = sd.RungeKutta4(160)


class Moments(nn.Module):
    """Mean and variance of independent Ornstein-Uhlenbeck processes, h = (means, variances)."""

    def forward(self, t, h):
        m, v = h.chunk(2, -1)
        return torch.cat([THETA * (MU - m), SIGMA**2 - 2 * THETA * v], -1)


def known(t, h, y, mask, seen):
    """What is observed is known."""
    m, v = h.chunk(2, -1)
    return torch.cat([torch.where(mask > 0, y, m), torch.where(mask > 0, 0.0, v)], -1)


class AsModule(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class MeanAndVariance(nn.Module):
    def forward(self, h):
        m, v = h.chunk(2, -1)
        return dist.Normal(m, v.clamp_min(1e-14).sqrt())


def exact_processes(jump=known):
    start = torch.cat([MU, SIGMA**2 / (2 * THETA)])
    return sd.ObservationJumpODE(
        2,
        4,
        flow=Moments(),
        jump=AsModule(jump),
        decoder=MeanAndVariance(),
        start=start,
        solver=SOLVER,
        dt=None,
    )


def transition(x, dt, channel):
    """Of an Ornstein-Uhlenbeck process."""
    theta, mu = THETA[channel], MU[channel]
    decay = torch.exp(-theta * dt)
    return dist.Normal(mu + (x - mu) * decay, SIGMA * ((1 - decay**2) / (2 * theta)).sqrt())


def transitions_log_prob(batch):
    """(series,) from the stationary start, channel by channel over its own observed times."""
    total = torch.zeros(len(batch), dtype=F64)
    for i in range(len(batch)):
        times = batch.times.expand(len(batch), -1)[i]
        for c in range(2):
            at = batch.mask[i, :, c]
            t, y = times[at], batch.values[i, at, c]
            first = dist.Normal(MU[c], SIGMA / (2 * THETA[c]).sqrt()).log_prob(y[:1]).sum()
            total[i] += first + transition(y[:-1], t.diff(), c).log_prob(y[1:]).sum()
    return total


class KalmanBucy(nn.Module):
    """Mean and covariance of dx = A x dt + G dW, h = (mean, covariance)."""

    def forward(self, t, h):
        P = h[..., 2:].unflatten(-1, (2, 2))
        return torch.cat([h[..., :2] @ A.mT, (A @ P + P @ A.mT + G @ G.mT).flatten(-2)], -1)


def update(t, h, y, mask, seen):
    """Kalman's update by one channel after the other."""
    m, P = h[..., :2], h[..., 2:].unflatten(-1, (2, 2))
    for c in range(2):
        gain = P[..., c] / (P[..., c, c] + NOISE[c] ** 2)[..., None] * (mask[..., c] > 0)[..., None]
        m, P = m + gain * (y[..., c] - m[..., c])[..., None], P - gain[..., None] * P[..., c, :][..., None, :]
    return torch.cat([m, P.flatten(-2)], -1)


class Seen(nn.Module):
    def forward(self, h):
        P = h[..., 2:].unflatten(-1, (2, 2))
        return dist.Normal(h[..., :2], (P.diagonal(dim1=-2, dim2=-1) + NOISE**2).sqrt())


def stationary():
    """The covariance that does not change."""
    eye = torch.eye(2, dtype=F64)
    return -torch.linalg.solve(torch.kron(A, eye) + torch.kron(eye, A), (G @ G.mT).flatten()).reshape(2, 2)


def kalman_filter(jump=update):
    start = torch.cat([torch.zeros(2, dtype=F64), stationary().flatten()])
    return sd.ObservationJumpODE(
        2, 6, flow=KalmanBucy(), jump=AsModule(jump), decoder=Seen(), start=start, solver=SOLVER, dt=None
    )


def joint(times, channels, noisy=True):
    """The covariance of observations at non-decreasing times of channels, all of one stationary path."""
    P, n = stationary(), len(times)
    C = torch.zeros(n, n, dtype=F64)
    for a in range(n):
        for b in range(a, n):
            lagged = torch.matrix_exp(A * (times[b] - times[a])) @ P
            C[a, b] = C[b, a] = lagged[channels[b], channels[a]]
    return C + torch.diag(NOISE[channels] ** 2) * noisy


def evidence(batch):
    """(series,) by the dense covariance of all that was observed."""
    out = []
    for i in range(len(batch)):
        k, c = batch.mask[i].nonzero(as_tuple=True)
        C = joint(batch.times.expand(len(batch), -1)[i][k], c)
        y = batch.values[i, k, c]
        out.append(-0.5 * (y @ torch.linalg.solve(C, y) + torch.logdet(C) + len(y) * math.log(2 * math.pi)))
    return torch.stack(out)


def ragged(one_channel=False, seed=0):
    """Three series of 7, 5 and 4 irregular times with holes; with `one_channel` at most one at a time."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (7, 5, 4):
        times = (0.05 + torch.rand(length, generator=generator, dtype=F64)).cumsum(0)
        values = torch.randn(length, 2, generator=generator, dtype=F64)
        mask = torch.rand(length, 2, generator=generator) < 0.7
        if one_channel:
            mask[:, 1] &= ~mask[:, 0]
        rows.append((times, values, mask))
    return sd.Series.from_list(rows, dtype=F64)
