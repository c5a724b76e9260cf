"""Adaptive explicit Runge-Kutta methods, by torchdiffeq."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import DivergedError
from stochdyn.solvers.integrator import Drift


@dataclass(frozen=True)
class Control:
    """Tolerances, the largest number of steps between two times, and the pieces of z controlled apart."""

    rtol: float
    atol: float
    max_steps: int
    parts: tuple[int, ...] = ()

    def norm(self, error: Tensor) -> Tensor:
        """The worst of all series: an average over the batch would let one stiff series hide among many."""
        error = error.detach()  # no gradient through the choice of steps: the root has none at 0
        if error.dim() == 0 or error.numel() == 0:
            return error.abs().sum()
        if self.parts:
            return torch.stack([x.square().mean().sqrt() for x in error.split(self.parts) if x.numel()]).max()
        return error.square().mean(-1).sqrt().max()


@dataclass
class Watched:
    """A field that remembers where it was called last, to say where a solver gave up."""

    drift: Drift
    t: Tensor | None = None
    z: Tensor | None = None
    f: Tensor | None = None
    ok: bool = True

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        f = self.drift(t, z).expand(z.shape)
        if self.ok:
            self.t, self.z, self.f = t.detach(), z.detach(), f.detach()
            self.ok = bool(torch.isfinite(f).all())
        return f

    def error(self, why: str) -> DivergedError:
        """The error that names time, series and state of the last call."""
        if self.z is None or self.t is None or self.f is None:
            return DivergedError(f"The solver failed before its first step: {why}.")
        rows, rates = (x.reshape(-1, x.shape[-1]) for x in (self.z, self.f))
        size = torch.nan_to_num(rates.abs(), nan=torch.inf).amax(-1)
        series = int(size.argmax())
        time = self.t.expand(*self.z.shape[:-1], 1).reshape(-1)[series].item()
        state = [round(x, 4) for x in rows[series, :8].tolist()]
        batch = self.z.shape[:-1]
        member = (
            [int(i) for i in torch.unravel_index(torch.tensor(series), batch)] if len(batch) > 1 else series
        )
        name = tuple(member) if isinstance(member, list) else member
        return DivergedError(
            f"series {name}, time {time:g}: {why}; the state was {state}. If the field explodes, bound it; if it is "
            "stiff, use sd.Rosenbrock(substeps) or sd.Radau(); else loosen rtol and atol."
        )


def solve(method: str, drift: Drift, z: Tensor, times: Tensor, control: Control) -> Tensor:
    """The states (time, *batch, state) at times (time, ..., 1); see `AbstractODESolver.solve`.

    Raises:
        DivergedError: if the steps get too small or too many.
    """
    if times.shape[0] == 1:
        return z[None]
    watched = Watched(drift)
    try:
        if times.numel() == times.shape[0] and (times.diff(dim=0) > 0).all():
            return _shared(method, watched, z, times.reshape(-1), control)
        return _gap_by_gap(method, watched, z, times, control)
    except AssertionError as error:  # what torchdiffeq raises
        raise watched.error(_reason(str(error), control)) from error


def _reason(message: str, control: Control) -> str:
    if message.startswith("max_num_steps"):
        return f"more than {control.max_steps} steps between two times"
    if message.startswith("underflow"):
        return "the step became too small to go on"
    if message.startswith("non-finite"):
        return "the state is not finite"
    raise AssertionError(message)


def _shared(method: str, watched: Watched, z: Tensor, times: Tensor, control: Control) -> Tensor:
    origin = times[0].to(z.dtype)
    return _solve(
        method, lambda s, x: watched((origin + s).reshape([1] * x.dim()), x), z, times - times[0], control
    )


def _gap_by_gap(method: str, watched: Watched, z: Tensor, times: Tensor, control: Control) -> Tensor:
    starts, gaps, states = times.to(z.dtype), times.diff(dim=0).to(z.dtype), [z]
    unit = torch.tensor([0.0, 1.0], dtype=torch.float64, device=z.device)
    for t, dt in zip(starts.unbind(0), gaps.unbind(0), strict=False):

        def scaled(s: Tensor, x: Tensor, t: Tensor = t, dt: Tensor = dt) -> Tensor:
            return dt * watched(t + s * dt, x)

        states.append(_solve(method, scaled, states[-1], unit, control)[-1] if dt.any() else states[-1])
    return torch.stack(states)


def _solve(method: str, drift: Drift, z: Tensor, times: Tensor, control: Control) -> Tensor:
    # Steps end at the times: between steps torchdiffeq interpolates to order 4, whatever the method's own.
    options = {"norm": control.norm, "max_num_steps": control.max_steps, "step_t": times[1:]}
    library = _library()
    return library.odeint(
        drift, z, times, rtol=control.rtol, atol=control.atol, method=method, options=options
    )


@cache
def _library() -> Any:
    """torchdiffeq, with Tsitouras' method among its solvers."""
    import torchdiffeq
    from torchdiffeq._impl import rk_common
    from torchdiffeq._impl.odeint import SOLVERS

    def numbers(*x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float64)

    class Tsit5Solver(rk_common.RKAdaptiveStepsizeODESolver):
        order = 5
        tableau = rk_common._ButcherTableau(
            alpha=numbers(*TSIT5_NODES), beta=[numbers(*row) for row in TSIT5_STAGES],
            c_sol=numbers(*TSIT5_WEIGHTS), c_error=numbers(*TSIT5_ERROR),
        )  # fmt: skip
        mid = numbers(*TSIT5_MIDDLE)

    SOLVERS["tsit5"] = Tsit5Solver
    return torchdiffeq


TSIT5_NODES = (0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0)
TSIT5_WEIGHTS = (
    0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0
)  # fmt: skip
TSIT5_STAGES = (
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    TSIT5_WEIGHTS[:6],
)
TSIT5_ERROR = (
    -0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629, 0.5823571654525552,
    -0.45808210592918697, 0.015151515151515152,
)  # fmt: skip
# Coefficients of theta, theta^2, ... of the free interpolant, one row per stage.
TSIT5_DENSE = (
    (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
    (0.0, 0.13169999999999998, -0.2234, 0.1017),
    (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
    (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
    (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
    (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
    (0.0, 1.5, -4.0, 2.5),
)
TSIT5_MIDDLE = tuple(sum(c / 2 ** (k + 1) for k, c in enumerate(row)) for row in TSIT5_DENSE)
