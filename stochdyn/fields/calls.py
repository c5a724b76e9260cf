"""Fields: what a path is made of, and how it is called.

A field is any callable `(t, z)` or `(t, z, context)` that returns a tensor. `t` broadcasts against `z` and
ends in a dimension of size 1; `z` ends in the state and has every batch dimension, and so has `context`, so
that `torch.cat([z, context], -1)` works. See `stochdyn.shapes` for the two layouts in which a field is
called.
"""

from collections.abc import Callable

from torch import Tensor

from stochdyn.errors import DtypeError, FieldError

Field = Callable[..., Tensor]


def evaluate(name: str, field: Field, t: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
    """Call a user's field; `context` is left out where there is none, and gets the batch of z.

    Raises:
        FieldError: if the field raises NotImplementedError, which Pyro would swallow.

    Example:
        >>> import torch
        >>> evaluate("drift", lambda t, z: -z, torch.zeros(1), torch.ones(2), None)
        tensor([-1., -1.])
    """
    try:
        if context is None:
            return field(t, z)
        return field(t, z, context.expand(*z.shape[:-1], context.shape[-1]))
    except NotImplementedError as error:
        raise FieldError(
            f"The {name} raised NotImplementedError: {error}. Implement it for this input."
        ) from error


def call_field(name: str, field: Field, t: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
    """Call a field as `evaluate` does and say in the user's words what went wrong.

    Raises:
        FieldError: if it is not callable, fails, or returns no tensor with a last dimension.
        DtypeError: if it changes dtype or device.

    Example:
        >>> import torch
        >>> call_field("control", lambda t, z: 0 * z, torch.zeros(1), torch.ones(2), None)
        tensor([0., 0.])
    """
    given = f"t of shape {tuple(t.shape)}, z of shape {tuple(z.shape)}"
    if context is not None:
        given += f", context of shape {(*z.shape[:-1], context.shape[-1])}"
    if not callable(field):
        raise FieldError(f"The {name} must be callable as (t, z[, context]), got {type(field).__name__}.")
    try:
        out = evaluate(name, field, t, z, context)
    except (RuntimeError, TypeError, IndexError) as error:
        raise FieldError(
            f"The {name} failed on {given}: {error}. `z` ends in the state and has the batch before it, so a "
            "parameter of batch shape is written theta[..., None]; a context comes as third argument."
        ) from error
    if not isinstance(out, Tensor) or out.dim() < 1:
        got = "a number" if isinstance(out, Tensor) else type(out).__name__
        raise FieldError(f"The {name} must return a tensor that ends in the state, got {got} for {given}.")
    if out.dtype != z.dtype or out.device != z.device:
        raise DtypeError(
            f"The {name} returned {out.dtype} on {out.device} for a state of {z.dtype} on {z.device}. "
            "Create its parameters with the dtype and device of the initial state."
        )
    return out
