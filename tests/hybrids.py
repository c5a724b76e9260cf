"""Hybrid systems with known answers."""

import torch

import stochdyn as sd


def number(value):
    return torch.tensor(value, dtype=torch.float64)


GRAVITY = number(9.81)


def spin(t, z):
    """From (0, 1) it is (sin t, cos t)."""
    return torch.stack([z[..., 1], -z[..., 0]], -1)


def ball(gravity):
    return lambda t, z: torch.stack([z[..., 1], -gravity.expand(z.shape[:-1])], -1)


def floor(restitution):
    def turn(t, z):
        return torch.stack(torch.broadcast_tensors(z[..., 0], -restitution * z[..., 1]), -1)

    return sd.Trigger(lambda t, z: z[..., 0], turn, direction=-1)


def bounces(height, gravity, restitution, end, **options):
    """Path at seven times, and jumps, of balls dropped from heights of batch shape."""
    start = torch.stack([height, 0 * height], -1)
    ts = torch.linspace(0, end, 7, dtype=torch.float64)
    return sd.odeint(ball(gravity), start, ts, jumps=[floor(restitution)], return_jumps=True, **options)


def bounce_times(height, gravity, restitution, count):
    """(*batch, count) in closed form."""
    k = torch.arange(1, count + 1, dtype=torch.float64)
    first = (2 * height / gravity).sqrt()
    return first[..., None] * (
        1 + 2 * restitution * (1 - restitution[..., None] ** (k - 1)) / (1 - restitution)
    )
