"""Steps whose length each series of a batch chooses for itself."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.errors import FieldError
from stochdyn.solvers.adaptive import AbstractAdaptive, Dopri5, Tsit5
from stochdyn.solvers.backends.torchdiffeq import TSIT5_ERROR, TSIT5_NODES, TSIT5_STAGES
from stochdyn.solvers.integrator import AbstractMean, AbstractODESolver, Drift

_Rows = tuple[tuple[float, ...], ...]

DOPRI5_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
DOPRI5_STAGES: _Rows = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DOPRI5_ERROR = (
    35 / 384 - 5179 / 57600, 0.0, 500 / 1113 - 7571 / 16695, 125 / 192 - 393 / 640, -2187 / 6784 + 92097 / 339200,
    11 / 84 - 187 / 2100, -1 / 40,
)  # fmt: skip


class AbstractStepper(ABC):
    """One step from z at t, of a length that each series has for itself."""

    @abstractmethod
    def step(
        self, drift: Drift, t: Tensor, h: Tensor, z: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The state after the step, the field there, and the size of the error (*batch,) in units of what is allowed.

        Args:
            drift: called as (t, z).
            t, h: (*batch, 1), in the dtype of z.
            z: (*batch, state).
            f: the field at t and z.
        """


@dataclass(frozen=True)
class FixedStepper(AbstractStepper):
    """A one-step method without an error estimate.

    Example:
        >>> import stochdyn as sd
        >>> one = torch.ones(1)
        >>> FixedStepper(sd.Heun()).step(lambda t, z: -z, 0 * one, 0.1 * one, one, -one)[0]
        tensor([0.9050])
    """

    method: AbstractMean

    def step(
        self, drift: Drift, t: Tensor, h: Tensor, z: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        def known(s: Tensor, x: Tensor) -> Tensor:
            return f if s is t and x is z else drift(s, x)

        end = self.method.once(known, t, h, z)
        return end, drift(t + h, end).expand(z.shape), None


@dataclass(frozen=True)
class PairStepper(AbstractStepper):
    """An embedded pair of Runge-Kutta methods whose last stage is the field at the step's end.

    Example:
        >>> import stochdyn as sd
        >>> one, pair = torch.ones(1, dtype=torch.float64), stepper(sd.Dopri5())
        >>> z, f, error = pair.step(lambda t, z: -z, 0 * one, 0.1 * one, one, -one)
        >>> bool((z - torch.exp(-0.1 * one)).abs() < 1e-8), bool(error < 1)
        (True, True)
    """

    nodes: tuple[float, ...]
    stages: _Rows
    error: tuple[float, ...]
    tolerance: AbstractAdaptive

    def step(
        self, drift: Drift, t: Tensor, h: Tensor, z: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        slopes, x = [f], z
        for node, row in zip(self.nodes, self.stages, strict=True):
            x = z + h * _combine(row, slopes)
            slopes.append(drift(t + node * h, x).expand(z.shape))
        with torch.no_grad():
            allowed = self.tolerance.atol + self.tolerance.rtol * torch.maximum(z.abs(), x.abs())
            size = (h * _combine(self.error, slopes) / allowed).square().mean(-1).sqrt()
        return x, slopes[-1], size


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    used = [(w, k) for w, k in zip(weights, slopes, strict=True) if w]
    total = used[0][0] * used[0][1]
    for w, k in used[1:]:
        total = torch.add(total, k, alpha=w)
    return total


def stepper(solver: AbstractODESolver) -> AbstractStepper:
    """The steps of a solver, for series that step apart.

    Raises:
        FieldError: if the solver cannot do without steps in common.

    Example:
        >>> import stochdyn as sd
        >>> type(stepper(sd.RungeKutta4(4))).__name__
        'FixedStepper'
    """
    if isinstance(solver, AbstractMean):
        return FixedStepper(solver)
    if isinstance(solver, Dopri5):
        return PairStepper(DOPRI5_NODES, DOPRI5_STAGES, DOPRI5_ERROR, solver)
    if isinstance(solver, Tsit5):
        return PairStepper(TSIT5_NODES, TSIT5_STAGES, TSIT5_ERROR, solver)
    raise FieldError(
        f"odeint: with jumps every series steps for itself, which {type(solver).__name__} cannot. Use sd.Dopri5(), "
        "sd.Tsit5(), or a method of fixed steps such as sd.RungeKutta4(substeps)."
    )
