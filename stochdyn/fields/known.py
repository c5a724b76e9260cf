"""Known physics plus a network: what a mechanistic model misses."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stochdyn.errors import FieldError
from stochdyn.fields.calls import Field
from stochdyn.fields.hamiltonian import HamiltonianField
from stochdyn.fields.neural import MLP, Linear, NeuralField


class Residual(nn.Module):
    """A known field plus a learned one, f = known(t, z[, context]) + network(t, z[, context]).

    A universal differential equation. The network may see some states only, and add to some only; it starts at zero, so
    that training starts from the known model. What it learned is read by `learned`.

    A part gets the context unless it takes no third argument or its `context_dim` is 0.

    Args:
        known: `(t, z[, context]) -> (..., state)`, any callable; its parameters, if it is a module, are learned too.
        network: `(t, z[, context]) -> (..., len(outputs))`, where z are the states of `states`: a `NeuralField`, say.
        states: the states that the network sees, by default all.
        outputs: the states whose rates it adds to, by default all.
        start: whether the last layer of the network is set to zero, in place. With random weights (`bayesian`) there
            is nothing to set: their prior is centred at zero.

    Shapes:
        z (*batch, state) to (*batch, state); units: state per time.

    Raises:
        FieldError: if indices repeat or are not integers from 0, if the network has no last linear layer to set to zero
            (pass `start=False`), or, when called, if it returns another number of outputs.

    References:
        Rackauckas et al., "Universal differential equations for scientific machine learning", 2020,
        https://arxiv.org/abs/2001.04385

    Example:
        >>> import stochdyn as sd
        >>> def growth(t, z):
        ...     return z * (1 - z / 10)
        >>> drift = sd.Residual(growth, sd.NeuralField(1, hidden=(16,)))
        >>> t, z = torch.zeros(1), torch.linspace(1, 9, 5)[:, None]
        >>> bool((drift(t, z) == growth(t, z)).all()), drift.learned(t, z).shape
        (True, torch.Size([5, 1]))
    """

    def __init__(
        self,
        known: Field,
        network: nn.Module,
        *,
        states: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
        start: bool = True,
    ) -> None:
        super().__init__()
        self.known, self.network = known, network
        self.states, self.outputs = _indices("states", states), _indices("outputs", outputs)
        self._contexts = _takes_context(known), _takes_context(network)
        if start:
            _begin_at_zero(network)

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        given = (context,) if context is not None and self._contexts[0] else ()
        return self.known(t, z, *given) + self.learned(t, z, context)

    def learned(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """What the network adds, (*batch, state): zero where it adds to nothing."""
        given = (context,) if context is not None and self._contexts[1] else ()
        out = self.network(t, z if self.states is None else z[..., list(self.states)], *given)
        wanted = z.shape[-1] if self.outputs is None else len(self.outputs)
        if out.shape[-1] != wanted:
            raise FieldError(
                f"Residual: the network returned {out.shape[-1]} numbers, expected {wanted}, one for each state of "
                f"outputs={self.outputs}. Set its outputs={wanted}."
            )
        if self.outputs is None:
            return out
        columns = torch.tensor(self.outputs, device=out.device)
        return out.new_zeros(*out.shape[:-1], z.shape[-1]).index_copy(-1, columns, out)


def _indices(name: str, given: Sequence[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    found = tuple(given)
    if not found or len(set(found)) < len(found) or not all(isinstance(i, int) and i >= 0 for i in found):
        raise FieldError(
            f"Residual: `{name}` must be different integers from 0, got {found}. None takes all."
        )
    return found


def _takes_context(part: Field) -> bool:
    if getattr(part, "context_dim", None) == 0:
        return False
    try:
        parameters = inspect.signature(
            part.forward if isinstance(part, nn.Module) else part
        ).parameters.values()
    except (TypeError, ValueError):
        return True
    kinds = [p.kind for p in parameters]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in by_position for kind in kinds) > 2


def _begin_at_zero(network: nn.Module) -> None:
    """Set the last linear layer to zero, if the network ends in it."""
    if any(getattr(part, "_pyro_samples", None) for part in network.modules()):
        return
    layers = [m for m in network.modules() if not list(m.children())]
    ends = bool(layers) and isinstance(layers[-1], Linear | nn.Linear) and layers[-1].bias is not None
    # The modules of these are registered in the order in which they are called.
    known = isinstance(network, NeuralField | MLP | HamiltonianField | Linear | nn.Linear | nn.Sequential)
    final = any(getattr(part, "final", None) is not None for part in network.modules())
    if not ends or not known or final:
        raise FieldError(
            f"Residual: {type(network).__name__} does not end in a linear layer, so it cannot be set to zero. Use a "
            "NeuralField without `final`, or pass start=False: it then starts from where its own weights put it."
        )
    with torch.no_grad():
        for p in layers[-1].parameters():
            p.zero_()
