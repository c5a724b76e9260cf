"""Exact answers, each by another route than the package's: a plain Kalman filter over dense matrices."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OU = {"theta": 1.5, "mu": 0.5, "sigma": 0.8, "noise": 0.2}
OU_TIMES = torch.tensor([0.1, 0.25, 0.7, 0.75, 1.5, 1.9, 2.6, 3.0], dtype=torch.float64)
OU_VALUES = torch.tensor([0.9, 0.7, 0.2, 0.35, 0.6, 1.1, 0.4, 0.0], dtype=torch.float64)[:, None]
OU_LOG_EVIDENCE = -2.9630375743187316
OU_KNOWN_START_LOG_EVIDENCE = -5.767653704433943  # X = 0 at time 0


@dataclass
class Linear:
    """x' = F x + b + N(0, Q) per step, x0 ~ N(m, P); y = H x + N(0, R) at the steps in `observed`."""

    F: list[Tensor]
    b: list[Tensor]
    Q: list[Tensor]
    m: Tensor
    P: Tensor
    H: Tensor
    R: Tensor


def kalman_log_evidence(model: Linear, observed: dict[int, Tensor]) -> float:
    m, P, total = model.m, model.P, 0.0
    for k in range(len(model.F) + 1):
        if k in observed:
            S = model.H @ P @ model.H.mT + model.R
            r = observed[k] - model.H @ m
            total += -0.5 * float(
                r @ torch.linalg.solve(S, r) + torch.logdet(S) + len(r) * math.log(2 * math.pi)
            )
            K = P @ model.H.mT @ torch.linalg.inv(S)
            m, P = m + K @ r, P - K @ model.H @ P
        if k < len(model.F):
            m, P = model.F[k] @ m + model.b[k], model.F[k] @ P @ model.F[k].mT + model.Q[k]
    return total


def euler_linear(A: Tensor, shift: Tensor, noise: Tensor, dts: Tensor, **start: Tensor) -> Linear:
    """The Euler discretisation of dx = (A x + shift) dt + noise dW."""
    eye = torch.eye(len(A), dtype=A.dtype)
    return Linear(
        [eye + A * dt for dt in dts],
        [shift * dt for dt in dts],
        [noise @ noise.mT * dt for dt in dts],
        **start,
    )


def ou_discretised(dts: Tensor, theta: float, mu: float, sigma: float, noise: float) -> Linear:
    one = torch.ones(1, 1, dtype=torch.float64)
    return euler_linear(
        -theta * one, theta * mu * one[0], sigma * one, dts,
        m=mu * one[0], P=sigma**2 / (2 * theta) * one, H=one, R=noise**2 * one,
    )  # fmt: skip


def one_start(x0: Tensor) -> dict[str, Tensor]:
    """A known start, as a Kalman filter sees it."""
    return {"m": x0, "P": torch.zeros(len(x0), len(x0), dtype=x0.dtype)}


# An underdamped oscillator in a heat bath, noise on the velocity only; its position is observed.
LANGEVIN = {"omega": 2.0, "gamma": 0.5, "sigma": 0.7, "noise": 0.1}
LANGEVIN_TIMES = torch.tensor([0.0, 0.3, 0.8, 1.1, 2.0], dtype=torch.float64)
LANGEVIN_VALUES = torch.tensor([0.9, -0.2, -0.6, -0.5], dtype=torch.float64)[:, None]
LANGEVIN_LOG_EVIDENCE = -0.9078722094184745


def langevin_matrix() -> Tensor:
    return torch.tensor([[0.0, 1.0], [-(LANGEVIN["omega"] ** 2), -LANGEVIN["gamma"]]], dtype=torch.float64)


def rotation(decay: float, speed: float) -> Tensor:
    """The drift matrix of a rotating two-dimensional Ornstein-Uhlenbeck process."""
    return torch.tensor([[-decay, -speed], [speed, -decay]], dtype=torch.float64)


def ou_path_kl(a: float, c: float, s: float, T: float, x0: float) -> float:
    """Girsanov KL of an OU process of rate a against one of rate c, same diffusion, known start."""
    decay = 1 - math.exp(-2 * a * T)
    return (c - a) ** 2 / (2 * s**2) * (x0**2 * decay / (2 * a) + s**2 / (2 * a) * (T - decay / (2 * a)))


def within(estimates: Tensor, expected: "Tensor | float", errors: float = 4.0) -> bool:
    """Whether the mean of independent estimates is `expected` up to standard errors, in every component."""
    se = estimates.std(0) / math.sqrt(len(estimates))
    return bool(((estimates.mean(0) - expected).abs() <= errors * se).all())
