"""The loop over time, compiled in chunks."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.errors import FieldError
from stochdyn.fields import AbstractDiffusion, Field, has_drawn_weights
from stochdyn.solvers import AbstractKernel

Rows = tuple[Tensor | None, ...]
Chunk = Callable[[Tensor, Rows], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class StepInputs:
    """What every step gets besides the state, time-major: t, dt, contexts of drift and diffusion, message, noise."""

    t: Tensor
    dt: Tensor
    drift_context: Tensor | None
    diffusion_context: Tensor | None
    information: Tensor | None
    precision: Tensor | None
    eps: Tensor

    def part(self, start: int, stop: int) -> Rows:
        """The rows of some steps; what is static keeps its single row."""
        return tuple(
            x if x is None or x.shape[0] == 1 else x[start:stop]
            for x in (
                self.t, self.dt, self.drift_context, self.diffusion_context, self.information, self.precision, self.eps
            )
        )  # fmt: skip


class Compiled:
    """Compile the loop over time in chunks of some steps with `torch.compile`; opt-in.

    Worth it for networks in the drift, small batches and long trainings: the first step waits for the compiler (a
    minute or more per chunk length and batch size; the time is kept in `seconds`), later ones are faster. For diagonal
    noise and diagonal messages or none; other loops run as they are. Drift and diffusion must be modules: what is
    compiled is kept per module, so fields with random weights, which are new ones in every run, run as they are. Where
    no compiler is found, or it fails, one warning is given and the loop runs as it is.

    Args:
        chunk: steps per chunk. More run faster and compile longer.

    Attributes:
        seconds: the time spent on first calls, which compile.

    Raises:
        FieldError: if `chunk` is below 1.

    Example:
        >>> import stochdyn as sd
        >>> loop = sd.Compiled(chunk=5)
        >>> model = sd.LatentSDE(obs_dim=3, state_dim=2, paths=sd.FreeMessage(rank=0), loop=loop)
    """

    def __init__(self, chunk: int = 10) -> None:
        if chunk < 1:
            raise FieldError(f"Compiled: `chunk` must be at least 1, got {chunk}.")
        self.chunk, self.seconds = chunk, 0.0
        self._made: dict[tuple[Any, ...], tuple[Chunk, tuple[object, ...]]] = {}
        self._broken = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        return Compiled(self.chunk)

    def run(
        self,
        drift: Field,
        diffusion: AbstractDiffusion,
        solver: AbstractKernel,
        z: Tensor,
        inputs: StepInputs,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]] | None:
        """States after, means and noise scales of all steps, chunk by chunk; None where it cannot."""
        fields = (drift, diffusion.field)
        modules = all(isinstance(f, nn.Module) and not has_drawn_weights(f) for f in fields)
        if self._broken or not modules or not diffusion.diagonal:
            return None
        plain = step_chunk(drift, diffusion, solver)
        out: list[tuple[Tensor, Tensor, Tensor]] = []
        steps = inputs.eps.shape[0]
        for start in range(0, steps, self.chunk):
            rows = inputs.part(start, min(start + self.chunk, steps))
            whole = start + self.chunk <= steps and not self._broken
            out.append(
                self._call(plain, (drift, diffusion.field, solver), z, rows) if whole else plain(z, rows)
            )
            z = out[-1][0][-1]
        return tuple([x for part in parts for x in part.unbind(0)] for parts in zip(*out, strict=True))  # type: ignore

    def _call(
        self, plain: Chunk, parts: tuple[object, ...], z: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        shapes = tuple(None if row is None else tuple(row.shape) for row in rows)
        grad = torch.is_grad_enabled()
        key = (*map(id, parts), tuple(z.shape), z.dtype, z.device, shapes, grad)
        if key in self._made:
            return self._made[key][0](z, rows)
        if self._broken:
            return plain(z, rows)
        started = time.perf_counter()
        try:
            compiled = torch.compile(plain, dynamic=False)
            result = compiled(z, rows)
        except Exception as error:  # the compiler's own errors have no common base
            plainly = plain(z, rows)  # an error of the user's field is raised here
            warnings.warn(
                f"sd.Compiled: torch.compile failed ({type(error).__name__}: {str(error).splitlines()[0][:200]}), so "
                "the loop runs uncompiled. It needs a C++ compiler (g++) on this machine.",
                RuntimeWarning,
                stacklevel=2,
            )
            self._broken = True
            return plainly
        self.seconds += time.perf_counter() - started
        self._made[key] = compiled, parts
        return result


def step_chunk(drift: Any, diffusion: AbstractDiffusion, solver: AbstractKernel) -> Chunk:
    """Some steps in a row, for diagonal noise and a diagonal message or none."""
    bound = hasattr(drift, "from_contribution")

    def run(z: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        t, dt, own, context, h, J, eps = rows
        states, means, scales = [], [], []
        for k in range(0 if eps is None else eps.shape[0]):
            c, d = _row(own, k), _row(context, k)
            f = (
                (lambda s, x, c=c: drift(s, x))
                if c is None
                else (lambda s, x, c=c: _value(drift, s, x, c, bound))
            )
            a, G = solver.step(f, diffusion, _row(t, k), _row(dt, k), z, d)
            xi = _row(eps, k)
            if h is not None and J is not None:
                p = 1 + G * G * J[k]
                xi = G * (h[k] - J[k] * a) / p + xi / p.sqrt()
            z = a + G * xi
            states.append(z)
            means.append(a)
            scales.append(G.expand(z.shape))
        return torch.stack(states), torch.stack(means), torch.stack(scales)

    return run


def _value(drift: Any, t: Tensor, z: Tensor, c: Tensor, bound: bool) -> Tensor:
    return drift.from_contribution(t, z, c) if bound else drift(t, z, c.expand(*z.shape[:-1], c.shape[-1]))


def _row(x: Tensor | None, k: int) -> Any:
    return None if x is None else x[0 if x.shape[0] == 1 else k]
