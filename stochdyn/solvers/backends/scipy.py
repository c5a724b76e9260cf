"""Implicit adaptive methods, by scipy: on the CPU, without gradients."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from stochdyn.solvers.backends.torchdiffeq import Control, Watched
from stochdyn.solvers.integrator import Drift


@torch.no_grad()
def solve(method: str, drift: Drift, z: Tensor, times: Tensor, control: Control) -> Tensor:
    """The states (time, *batch, state) at times (time, ..., 1), the batch as one system, gap by gap where it must.

    Raises:
        DivergedError: if the method gives up.
    """
    watched, states = Watched(drift), [z]
    shared = times.numel() == times.shape[0] and bool((times.diff(dim=0) > 0).all())
    if shared and times.shape[0] > 1:
        found = _solve(method, watched, z, times.reshape(-1, 1), control)
        return torch.cat([z[None], found])
    for t, after in zip(times[:-1].unbind(0), times[1:].unbind(0), strict=True):
        pair = torch.stack([torch.zeros_like(t), torch.ones_like(t)])
        if not (after > t).any():
            states.append(states[-1])
            continue
        scaled = _Scaled(watched, t.to(z.dtype), (after - t).to(z.dtype))
        states.append(_solve(method, scaled, states[-1], pair.reshape(2, -1)[:, :1], control)[-1])
    return torch.stack(states)


class _Scaled(Watched):
    """A gap of every series' own length as the unit of time."""

    def __init__(self, watched: Watched, t: Tensor, dt: Tensor) -> None:
        super().__init__(lambda s, x: dt * watched(t + s * dt, x))
        self.inner = watched

    def error(self, why: str) -> Any:
        return self.inner.error(why)


def _solve(method: str, watched: Watched, z: Tensor, times: Tensor, control: Control) -> Tensor:
    """The states at all times but the first, of one system of all entries of z."""
    points = times[:, 0].double().cpu().numpy()
    budget = iter(range(control.max_steps * len(points)))

    def rates(t: float, y: Any) -> Any:
        if next(budget, None) is None:
            raise watched.error(f"more than {control.max_steps * len(points)} calls of the field")
        x = torch.as_tensor(y, dtype=z.dtype).to(z.device).reshape(z.shape)
        return (
            watched(torch.full([1] * z.dim(), t, dtype=z.dtype, device=z.device), x)
            .double()
            .reshape(-1)
            .cpu()
            .numpy()
        )

    start = z.double().reshape(-1).cpu().numpy()
    settings = {"method": method, "t_eval": points[1:], "rtol": control.rtol, "atol": control.atol}
    try:
        found = _solve_ivp()(rates, (points[0], points[-1]), start, **settings)
    except ValueError as error:  # of linear algebra, at a state that is not finite
        raise watched.error("the implicit solver gave up") from error
    if not found.success:
        raise watched.error("the implicit solver gave up")
    values = torch.as_tensor(found.y.T.copy(), dtype=z.dtype).to(z.device)
    return values.reshape(len(points) - 1, *z.shape)


@cache
def _solve_ivp() -> Any:
    from scipy.integrate import solve_ivp

    return solve_ivp
