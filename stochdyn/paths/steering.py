"""What moves a guide's path besides messages: a control in noise units, or a drift in place of the prior's."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stochdyn.errors import GuideError, ShapeError
from stochdyn.fields import Field, call_field
from stochdyn.paths.chain import Chain
from stochdyn.paths.checks import context_by_time, lift
from stochdyn.paths.drifts import BoundDrift, Drifts, in_time

Control = Callable[..., Tensor]


class Steering:
    """A control on a chain, with the context that it gets.

    Args:
        control: `(t, z[, context]) -> (..., noise)`.
        context: (*batch, context_dim) or (*batch, time, context_dim); None for the chain's own.
        score_context: the same as a score that leaves out the guide's own parameters sees it; None: detached.
        chain: where it acts.

    Raises:
        FieldError, ShapeError: if it does not return noise units.
    """

    def __init__(
        self, control: Control, context: Tensor | None, score_context: Tensor | None, chain: Chain
    ) -> None:
        self.control, self.steps = control, chain.steps
        shape, points = chain.batch_shape, chain.steps + 1
        given = chain._context if context is None else context_by_time(context, points, shape)
        self.context = in_time(given, chain.steps)
        scored = context_by_time(score_context, points, shape)
        if scored is None and given is not None:
            scored = given if context is None else given.detach()
        self._scored = in_time(scored, chain.steps)
        self.batch_shape = self._probe(chain)

    def _probe(self, chain: Chain) -> torch.Size:
        z = chain.start.centre().detach().expand(*chain.batch_shape, chain.state_dim)
        t, _, _ = chain.layout(z.dim())
        if chain.steps < 1:
            return torch.Size()
        context = None if self.context is None else lift(self.context, z.dim())[0]
        with torch.no_grad():
            u = call_field("control", self.control, t[0], z, context)
        if u.shape[-1] not in (chain.noise_dim, 1):
            raise ShapeError(
                f"The control returned {tuple(u.shape)}, expected (..., noise={chain.noise_dim})."
            )
        return u.shape[:-1]

    def frozen(self) -> "Steering":
        """The control with its own parameters detached, and the context that a score sees."""
        new = copy.copy(self)
        new.control = frozen(self.control)
        new.context = self._scored
        return new

    def drifts(self, ndim: int) -> Drifts:
        """The control of every step, its context bound."""
        context = None if self.context is None else lift(self.context, ndim)
        return Drifts(self.control, context, self.steps)


def shift(control: BoundDrift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
    """What a control adds to the noise of a step."""
    return dt.sqrt() * control(t, z)


def frozen(field: Field) -> Field:
    """A field with its own parameters detached; a closure cannot be looked into and stays attached."""
    return Frozen(field) if isinstance(field, nn.Module) else field


class Frozen:
    """A module whose parameters are seen detached; its methods too."""

    def __init__(self, module: nn.Module) -> None:
        self._module = copy.copy(module)
        _detach(self._module)
        if hasattr(module, "prepared"):
            self.prepared = self._module.prepared

    def __call__(self, *args: Tensor) -> Tensor:
        return self._module(*args)


def _detach(module: nn.Module) -> None:
    """Replace parameters by detached tensors in a shallow copy of a module, and in copies of its parts."""
    module.__dict__ = {**module.__dict__}
    module._parameters = {k: None if p is None else p.detach() for k, p in module._parameters.items()}  # type: ignore
    parts = {k: None if part is None else copy.copy(part) for k, part in module._modules.items()}
    module._modules = parts  # type: ignore
    for part in parts.values():
        if part is not None:
            _detach(part)


def check_combination(control: object, drift: object, context: Tensor | None, chain: Chain) -> None:
    """Refuse what does not go together.

    Raises:
        GuideError: a drift beside a control, or with fewer noises than states; a context for nothing.
    """
    if drift is not None and control is not None:
        raise GuideError(
            "`drift` takes the place of the prior's drift, `control` is added to it. Give one: control=(drift - "
            "prior drift) / diffusion is the same in noise units."
        )
    if drift is not None and chain.noise_dim < chain.state_dim:
        raise GuideError(
            f"With {chain.noise_dim} noises for {chain.state_dim} states another drift leads where no noise reaches. "
            "Use `control`, in noise units."
        )
    if context is not None and drift is None and control is None:
        raise GuideError("`context` is for `drift` or `control`, and neither is given.")
