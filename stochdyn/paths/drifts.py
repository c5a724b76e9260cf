"""A drift bound to the context of every step: what does not depend on the state is computed once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.fields import Field, evaluate

BoundDrift = Callable[[Tensor, Tensor], Tensor]

_ROWS = 4096


@dataclass(frozen=True)
class Drifts:
    """The drifts (t, z) of all steps of a chain.

    Args:
        field: the drift. One with `prepared` (see `NeuralField`) has its context's part
            computed for all steps in one call.
        context: (steps, *batch, context_dim), (1, ...) where static, or None.
        steps: how many.

    Example:
        >>> import torch
        >>> drifts = Drifts(lambda t, z: -z, None, 3)
        >>> drifts.at_once()(torch.zeros(3, 1), torch.ones(3, 2)).shape, len(drifts.one_by_one())
        (torch.Size([3, 2]), 3)
    """

    field: Field
    context: Tensor | None
    steps: int

    def at_once(self) -> BoundDrift:
        """For all steps together, time-major; on a CPU in blocks of steps."""
        bind, given = self._prepared()

        def of(t: Tensor, z: Tensor) -> Tensor:
            return in_blocks(lambda s, x, c: bind(c)(s, x), t, z, given)

        return of

    def shares(self) -> Tensor | None:
        """What the field gets of the context at each step: its contribution, where the field has one."""
        if self.context is not None and hasattr(self.field, "contribution"):
            return self.field.contribution(self.context)
        return self.context

    def one_by_one(self) -> list[BoundDrift]:
        """One for each step."""
        bind, given = self._prepared()
        if given is None or given.shape[0] == 1:
            return [bind(None if given is None else given[0])] * self.steps
        return [bind(row) for row in given.unbind(0)]

    def _prepared(self) -> tuple[Callable[[Tensor | None], BoundDrift], Tensor | None]:
        """How to bind a step's share, and the shares of all steps."""
        field, context = self.field, self.context
        if context is not None and hasattr(field, "prepared"):
            given, value = field.prepared(context)
            return lambda c: lambda t, z: value(t, z, c), given
        return lambda c: lambda t, z: evaluate("drift", field, t, z, c), context


def in_blocks(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor], t: Tensor, z: Tensor, given: Tensor | None
) -> Tensor:
    """`function(t, z, given)` of time-major tensors, in blocks of times whose intermediate values fit a CPU's cache.

    What networks make of all times at once is too much for it, and costs twice the time. On other devices one call.

    Args:
        t: (time, ..., 1); `z`: (time, *batch, state); `given`: (time, ...), or (1, ...), or None.

    Example:
        >>> z = torch.ones(3, 5000, 2)
        >>> in_blocks(lambda t, x, given: t * x, torch.arange(3.0).reshape(3, 1, 1), z, None).shape
        torch.Size([3, 5000, 2])
    """
    times, block = z.shape[0], block_length(z)
    if times <= block:
        return function(t, z, given)

    def rows(x: Tensor | None) -> "tuple[Tensor, ...] | list[Tensor | None]":
        return x.split(block) if x is not None and x.shape[0] == times else [x] * -(-times // block)

    parts = [function(*part) for part in zip(rows(t), rows(z), rows(given), strict=True)]
    lead = [torch.broadcast_shapes(p.shape[:-1], x.shape[:-1]) for p, x in zip(parts, rows(z), strict=True)]
    return torch.cat([part.expand(*shape, part.shape[-1]) for part, shape in zip(parts, lead, strict=True)])


def block_length(z: Tensor) -> int:
    """How many times of (time, *batch, state) to take at once.

    Example:
        >>> block_length(torch.zeros(100, 1024, 4))
        4
    """
    if z.device.type != "cpu" or z.numel() == 0:
        return max(z.shape[0], 1)
    return max(1, _ROWS // (z[0].numel() // z.shape[-1]))


def in_time(context: Tensor | None, steps: int) -> Tensor | None:
    """Of a context at grid times, the rows that hold at the start of each step; static ones keep their row.

    Example:
        >>> import torch
        >>> in_time(torch.zeros(4, 2, 5), 3).shape, in_time(torch.zeros(1, 2, 5), 3).shape
        (torch.Size([3, 2, 5]), torch.Size([1, 2, 5]))
    """
    return context if context is None or context.shape[0] == 1 else context[:steps]
