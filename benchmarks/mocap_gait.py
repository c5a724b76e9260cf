"""What `mocap35.py` knows of walking: a periodic template, and where in it, and how fast, a few given frames are.

The template is a Fourier series in the phase, fitted to training walks that each keep one speed. `Reader` compares
given frames with it, at every phase and speed of a grid, under residuals that are correlated over channels and in time
(a first-order autoregression with full covariances, measured on the training walks).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PHASES, SPEEDS = 180, torch.linspace(-0.36, 0.24, 61, dtype=torch.float64)


def harmonics(phase: Tensor, count: int) -> Tensor:
    """(...,) to (..., 2 count + 1): 1, cosines, sines."""
    angles = phase[..., None] * torch.arange(1, count + 1).to(phase)
    return torch.cat([torch.ones_like(angles[..., :1]), angles.cos(), angles.sin()], -1)


def first_phases(walks: Tensor) -> tuple[Tensor, Tensor]:
    """Phase at the start and speed of every walk, from its two main components, which turn once per cycle."""
    flat = walks.flatten(0, 1)
    _, _, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    x, y = ((walks - flat.mean(0)) @ axes[:2].mT).unbind(-1)
    turn = torch.atan2(y / y.std(), x / x.std())
    step = (turn.diff(dim=1) + math.pi) % (2 * math.pi) - math.pi
    if step.sum() < 0:
        turn, step = -turn, -step
    path = torch.cat([turn[:, :1], turn[:, :1] + step.cumsum(1)], 1)
    t = torch.arange(walks.shape[1]).to(walks) - (walks.shape[1] - 1) / 2
    slope = (path * t).sum(1) / (t * t).sum()
    return path.mean(1), slope


@dataclass(frozen=True)
class Template:
    """A mean walk: y = harmonics(phase) @ weights, phase = start + rate exp(speed) t with t in frames.

    Attributes:
        weights: (2 harmonics + 1, channel).
        rate: radians per frame at log speed 0.
        speeds: (walk,) log speeds of the training walks.
        residuals: (walk, frame, channel) what the template leaves of them.
    """

    weights: Tensor
    rate: float
    speeds: Tensor
    residuals: Tensor

    @property
    def harmonics(self) -> int:
        return (len(self.weights) - 1) // 2

    @classmethod
    def fitted(cls, walks: Tensor, count: int, steps: int = 200) -> "Template":
        """Least squares: weights in closed form, phases and speeds by gradient steps."""
        middle, slope = first_phases(walks)
        t = torch.arange(walks.shape[1]).to(walks) - (walks.shape[1] - 1) / 2
        rate = float(slope.median())
        phase, speed = middle.requires_grad_(), (slope / rate).clamp(0.7, 1.4).log().requires_grad_()
        groups = [{"params": [phase], "lr": 0.03}, {"params": [speed], "lr": 0.004}]
        adam = torch.optim.Adam(groups)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        weights = walks.new_zeros(2 * count + 1, walks.shape[-1])
        for k in range(steps):
            features = harmonics(phase[:, None] + rate * speed.exp()[:, None] * t, count)
            if k % 10 == 0 or k == steps - 1:
                flat = features.detach().flatten(0, 1)
                weights = torch.linalg.lstsq(flat, walks.flatten(0, 1)).solution
            adam.zero_grad()
            (walks - features @ weights).square().mean((1, 2)).sum().backward()
            adam.step()
            decay.step()
        speed, shift = speed.detach(), float(speed.detach().mean())
        features = harmonics(phase.detach()[:, None] + rate * speed.exp()[:, None] * t, count)
        return cls(weights, rate * math.exp(shift), speed - shift, walks - features @ weights)


@dataclass(frozen=True)
class Reading:
    """What given frames say, at the last of them: phase, log speed and its spread, and the residual.

    Attributes:
        phase, speed, spread: (walk,).
        residual: (walk, channel) at the last given frame; `level` is its mean over the given frames.
    """

    phase: Tensor
    speed: Tensor
    spread: Tensor
    residual: Tensor
    level: Tensor


class Reader:
    """Reads phase and speed off given frames, with flat priors, by exact enumeration of a grid.

    Args:
        template: the mean walk, with the residuals of the training walks.
        given: how many frames are given.
        stride: of the frames that are compared, from the last one back.
    """

    def __init__(self, template: Template, given: int, stride: int) -> None:
        self.template = template
        self.frames = torch.arange(given - 1, -1, -stride).flip(0)
        r = template.residuals
        before, after = r[:, :-stride].flatten(0, 1), r[:, stride:].flatten(0, 1)
        self.keep = float((before * after).sum() / before.square().sum())
        self.level, self.step = whitener(r.flatten(0, 1)), whitener(after - self.keep * before)
        t = self.frames.to(r) - float(self.frames[-1])
        self.phases = torch.arange(PHASES).to(r) * (2 * math.pi / PHASES)
        at = self.phases[:, None] + template.rate * SPEEDS.exp()[:, None, None] * t
        means = harmonics(at, template.harmonics) @ template.weights
        steps = (means[..., 1:, :] - self.keep * means[..., :-1, :]) @ self.step
        self.first, self.steps = means[..., 0, :] @ self.level, list(steps.unbind(-2))

    def __call__(self, walks: Tensor) -> Reading:
        t, rate = self.frames.to(walks) - float(self.frames[-1]), self.template.rate
        seen = walks[:, self.frames]
        log = -0.5 * squares(seen[:, 0] @ self.level, self.first)
        steps = (seen[:, 1:] - self.keep * seen[:, :-1]) @ self.step
        for step, mean in zip(steps.unbind(1), self.steps, strict=True):
            log = log - 0.5 * squares(step, mean)
        weight = torch.softmax(log.flatten(1), 1).reshape(log.shape)
        phase = torch.atan2(*((weight.sum(1) * f).sum(1) for f in (self.phases.sin(), self.phases.cos())))
        speed = (weight.sum(2) * SPEEDS).sum(1)
        spread = ((weight.sum(2) * SPEEDS.square()).sum(1) - speed.square()).clamp(min=1e-6).sqrt()
        own = phase[:, None] + rate * speed.exp()[:, None] * t
        residual = seen - harmonics(own, self.template.harmonics) @ self.template.weights
        return Reading(phase, speed, spread, residual[:, -1], residual.mean(1))


def whitener(rows: Tensor, shrink: float = 0.05) -> Tensor:
    """W with W W' the inverse of the second moment, shrunk to its diagonal."""
    moment = rows.mT @ rows / len(rows)
    moment = (1 - shrink) * moment + shrink * moment.diagonal().diag_embed()
    eye = torch.eye(len(moment)).to(moment)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(moment), eye, upper=False).mT


def squares(x: Tensor, means: Tensor) -> Tensor:
    """|x - mean|^2: (walk, channel) against (speed, phase, channel), to (walk, speed, phase)."""
    flat = means.flatten(0, 1)
    found = x.square().sum(1)[:, None] - 2 * x @ flat.mT + flat.square().sum(1)
    return found.reshape(len(x), *means.shape[:-1])


def resampled(walks: Tensor, factor: float) -> Tensor:
    """The walks at `factor` times their speed, as many frames as there are."""
    at = torch.arange(walks.shape[1]).to(walks) * factor
    at = at[at <= walks.shape[1] - 1]
    low = at.long().clamp(max=walks.shape[1] - 2)
    return torch.lerp(walks[:, low], walks[:, low + 1], (at - low)[:, None])
