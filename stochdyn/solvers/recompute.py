"""A function whose insides are not kept for the backward pass: it runs again when its gradient is due."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from stochdyn.errors import FieldError

Run = Callable[[Tensor], Tensor]


class Reads(TorchFunctionMode):
    """Which tensors that need a gradient the calls inside read, without having made them.

    Example:
        >>> import torch
        >>> k, z = torch.ones(2, requires_grad=True), torch.ones(2)
        >>> with Reads() as reads:
        ...     _ = (k * z).exp()
        >>> [found is k for found in reads.found]
        [True]
    """

    def __init__(self) -> None:
        super().__init__()
        # The tensors themselves, so that no identity is given twice.
        self.made: dict[int, Tensor] = {}
        self._found: dict[int, Tensor] = {}

    @property
    def found(self) -> list[Tensor]:
        """In the order of their first use."""
        return list(self._found.values())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for read in tree_leaves((args, kwargs)):
            if isinstance(read, Tensor) and read.requires_grad and id(read) not in self.made:
                self._found.setdefault(id(read), read)
        out = func(*args, **kwargs)
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.requires_grad and id(made) not in self._found:
                self.made[id(made)] = made
        return out


def reads(run: Run, z: Tensor) -> list[Tensor] | None:
    """The tensors that need a gradient and that a function reads beside its argument.

    Args:
        run: what is called, twice.
        z: its argument.

    Returns:
        Them, or None if no list of them would do: parts of the function, such as compiled ones, cannot be watched, or
        one of the tensors was made from another, so that its gradient holds the other's.

    Example:
        >>> import torch
        >>> k = torch.ones(2, requires_grad=True)
        >>> [found is k for found in reads(lambda z: k * z, torch.zeros(2))]
        [True]
    """
    first, second = _reads(run, z), _reads(run, z)
    if list(first) != list(second):
        return None
    found = list(first.values())
    ends = {_node(t) for t in found}
    nested = any(ends & _behind(_node(t), ends) for t in found)
    return None if nested else found


@torch.enable_grad()
def _reads(run: Run, z: Tensor) -> dict[int, Tensor]:
    leaf = z.detach().requires_grad_()
    with Reads() as watched:
        run(leaf)
    return {id(t): t for t in watched.found if t is not leaf}


def recomputed(run: Run, z: Tensor, read: list[Tensor] | None) -> Tensor:
    """run(z), of which only z and the result are kept.

    Args:
        run: the function. It must do the same both times: no noise drawn inside.
        z: its argument.
        read: what it reads beside it, from `reads`. None leaves the matter to torch's checkpoint, which need not know
            and keeps more.

    Raises:
        FieldError: in the backward pass, if the function reads a tensor that needs a gradient and is not in `read`, or
            if that pass is to be differentiated itself.

    Example:
        >>> import torch
        >>> k = torch.full((2,), 3.0, requires_grad=True)
        >>> recomputed(lambda z: (k * z).square(), torch.ones(2), [k]).sum().backward()
        >>> k.grad
        tensor([6., 6.])
    """
    if read is None:
        return checkpoint(run, z, use_reentrant=False)  # pyright: ignore[reportReturnType]
    return _Recomputed.apply(run, z, *read)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, z: Tensor, *read: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(z, *read)
        return run(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise FieldError(
                "Checkpointed: a second derivative is asked for (`create_graph=True`), and there is none. Use "
                "gradient=sd.Direct()."
            )
        z, *read = ctx.saved_tensors
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(leaf)
        _check(out, [leaf, *read])
        wanted = [t for t in [leaf, *read] if t.requires_grad]
        # Kept, as a part of it may be the graph of a tensor made outside; the rest goes with `out`.
        kept = {"allow_unused": True, "retain_graph": True}
        found = iter(torch.autograd.grad(out, wanted, grads[0], **kept))
        return None, *[next(found) if t.requires_grad else None for t in [leaf, *read]]


def _check(out: Tensor, known: list[Tensor]) -> None:
    """No tensor without a maker is behind the result but the known ones."""
    ends = {_node(t) for t in known if t.requires_grad}
    behind = _behind(_node(out), ends) - ends
    strange = [tuple(node.variable.shape) for node in behind if hasattr(node, "variable")]
    if strange:
        raise FieldError(
            f"Checkpointed: in the backward pass the field reads tensors of shapes {strange} that need a gradient and "
            "that it did not read in its first step, so their gradient would be lost. Read them at all times, pass "
            "them as `context=`, or use gradient=sd.Direct()."
        )


def _node(tensor: Tensor) -> Any:
    """Where its gradient arrives."""
    return get_gradient_edge(tensor).node


def _behind(node: Any, ends: set[Any]) -> set[Any]:
    """All nodes that a gradient reaches from one, itself left out, when it goes no further than the ends."""
    seen, waiting = set(), [n for n, _ in node.next_functions]
    while waiting:
        reached = waiting.pop()
        if reached is not None and reached not in seen:
            seen.add(reached)
            if reached not in ends:
                waiting += [n for n, _ in reached.next_functions]
    return seen
