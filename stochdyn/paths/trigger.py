"""Triggers: a state jumps where a condition on it crosses zero."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stochdyn.errors import FieldError, ShapeError
from stochdyn.fields import Field, call_field, evaluate

# Dimensions put before the batch when a condition is tried: tells one number per series from one per state.
_LIFT = 8


@dataclass(frozen=True)
class Trigger:
    """Where `condition(t, z)` crosses zero, the state jumps to `jump_map(t, z)`.

    A crossing is one by the flow: from positive to negative (direction -1), from negative to positive (+1), either (0).
    What a jump map, or a scheduled jump, carries over the surface does not fire it. A path that touches the surface and
    turns back does not fire it either. A start exactly on the surface that moves on in the direction fires at once;
    with direction 0 there is no side it came from, and it does not.

    Args:
        condition: `(t, z[, context])` -> (*batch,), one number for each series.
        jump_map: `(t, z[, context])` -> shape of z; None leaves the state, and only records the time.
        direction: -1, 0 or 1.
        terminal: whether the series stops there, after its jump; the path repeats its last state.

    Raises:
        FieldError: if a part is not callable, or the direction is another.

    References:
        Chen, Amos & Nickel, "Learning neural event functions for ordinary differential equations", 2021,
        https://arxiv.org/abs/2011.03902

    Example:
        >>> import torch, stochdyn as sd
        >>> ball = lambda t, z: torch.stack([z[..., 1], torch.full_like(z[..., 0], -9.81)], -1)
        >>> floor = sd.Trigger(lambda t, z: z[..., 0], lambda t, z: z * torch.tensor([1.0, -0.8]), direction=-1)
        >>> start = torch.tensor([[10.0, 0.0], [5.0, 0.0]])
        >>> path, jumps = sd.odeint(ball, start, torch.tensor([0.0, 3.0]), jumps=[floor], return_jumps=True)
        >>> jumps.times
        tensor([[1.4278,    inf],
                [1.0096, 2.6251]], dtype=torch.float64)
    """

    condition: Field
    jump_map: Field | None = None
    direction: int = 0
    terminal: bool = False

    def __post_init__(self) -> None:
        if not callable(self.condition) or not (self.jump_map is None or callable(self.jump_map)):
            raise FieldError(
                "Trigger: `condition` and `jump_map` must be callable as (t, z[, context]), got "
                f"{type(self.condition).__name__} and {type(self.jump_map).__name__}."
            )
        if isinstance(self.direction, bool) or self.direction not in (-1, 0, 1):
            raise FieldError(
                f"Trigger: `direction` must be -1 (falling through zero), 1 (rising) or 0, got {self.direction!r}."
            )


@dataclass(frozen=True)
class Conditions:
    """The conditions of several triggers as one function, and their jump maps.

    Args:
        triggers: the triggers.
        flat: for each, whether its condition returns (*batch,), not (*batch, 1).

    Example:
        >>> two = Conditions((Trigger(lambda t, z: z[..., 0]), Trigger(lambda t, z: t - 1)), (True, False))
        >>> t, z, f = torch.ones(3, 1), torch.full((3, 2), 5.0), torch.full((3, 2), 2.0)
        >>> value, slope = two.along(t, z, f)
        >>> value[0], slope[0]
        (tensor([5., 0.]), tensor([2., 1.]))
    """

    triggers: tuple[Trigger, ...]
    flat: tuple[bool, ...]

    def __call__(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """(*batch, trigger)."""
        if not self.triggers:
            return z.new_zeros(*z.shape[:-1], 0)
        values = []
        for k, (trigger, flat) in enumerate(zip(self.triggers, self.flat, strict=True)):
            value = evaluate(f"condition of trigger {k}", trigger.condition, t, z, context)
            values.append((value if flat else value[..., 0]).expand(z.shape[:-1]))
        return torch.stack(values, -1)

    def along(self, t: Tensor, z: Tensor, f: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The conditions and their slopes along the flow, each (*batch, trigger)."""
        if not self.triggers:
            return self(t, z), self(t, z)
        return slope_along(lambda s, x: self(s, x, context), t, z, f)

    def jump(self, fired: Tensor, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The states after the jumps of the triggers `fired` (*batch,); none where that is negative."""
        after = z
        for k, trigger in enumerate(self.triggers):
            mine = fired == k
            if trigger.jump_map is not None and bool(mine.any()):
                # A copy: a map that writes into its state must not reach series that do not jump, or the user's z0.
                moved = evaluate(f"jump map of trigger {k}", trigger.jump_map, t, z.clone(), context)
                after = torch.where(mine[..., None], moved, after)
        return after


def slope_along(
    function: Callable[[Tensor, Tensor], Tensor], t: Tensor, z: Tensor, f: Tensor
) -> tuple[Tensor, Tensor]:
    """A function of (t, z) and its derivative in time where z moves by f.

    Example:
        >>> slope_along(lambda t, z: t * z, torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([0.5]))
        (tensor([6.]), tensor([4.]))
    """
    t, z, f = t.contiguous(), z.contiguous(), f.contiguous()  # forward mode refuses expanded tensors
    # torch.func.jvp is the same, at ten times the overhead.
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(t, torch.ones_like(t)), forward_ad.make_dual(z, f))
        value, slope = forward_ad.unpack_dual(out)
    return value, torch.zeros_like(value) if slope is None else slope


def read_triggers(
    triggers: Sequence[Trigger], t: Tensor, z: Tensor, context: Tensor | None
) -> tuple[Conditions, list[Tensor]]:
    """Try each condition and jump map once.

    Args:
        triggers: the triggers.
        t, z, context: the first time (..., 1), the start (*batch, state), the first row of the context.

    Returns:
        The conditions, and what they and the jump maps returned, (*batch, 1 or state), to read shapes off.

    Raises:
        FieldError, ShapeError, DtypeError: naming the trigger, by its position in the list.

    Example:
        >>> conditions, _ = read_triggers([Trigger(lambda t, z: z[..., 0])], torch.zeros(1), torch.ones(2), None)
        >>> conditions.flat
        (True,)
    """
    flat, found = [], []
    for k, trigger in enumerate(triggers):
        one_each, value = _read_condition(f"condition of trigger {k}", trigger.condition, t, z, context)
        flat.append(one_each)
        found.append(value)
        if trigger.jump_map is not None:
            found.append(check_map(f"jump map of trigger {k}", trigger.jump_map, t, z, context))
    return Conditions(tuple(triggers), tuple(flat)), found


def check_map(
    name: str, jump_map: Callable[..., Tensor], t: Tensor, z: Tensor, context: Tensor | None
) -> Tensor:
    """Try a jump map once.

    Raises:
        FieldError, DtypeError: if it fails, or does not return a state.

    Example:
        >>> check_map("jump map", lambda t, z: -z, torch.zeros(1), torch.ones(2), None)
        tensor([-1., -1.])
    """
    after = call_field(name, jump_map, t, z.clone(), context)
    if after.shape[-1] != z.shape[-1]:
        raise FieldError(
            f"The {name} returned shape {tuple(after.shape)} for z of shape {tuple(z.shape)}, expected (..., state="
            f"{z.shape[-1]}). It returns the whole state after the jump, what does not jump included."
        )
    return after


def _read_condition(
    name: str, condition: Field, t: Tensor, z: Tensor, context: Tensor | None
) -> tuple[bool, Tensor]:
    ones = [1] * _LIFT
    lifted = z.reshape(*ones, *z.shape)
    time = t.expand(*z.shape[:-1], 1).reshape(*ones, *z.shape[:-1], 1)
    given = None if context is None else context.expand(*z.shape[:-1], context.shape[-1])
    given = None if given is None else given.reshape(*ones, *given.shape)
    value = call_field(name, condition, time, lifted, given)
    try:
        plain = evaluate(name, condition, time.reshape(*z.shape[:-1], 1), z, context)
    except (RuntimeError, IndexError) as error:
        raise FieldError(
            f"The {name} failed on z of shape {tuple(z.shape)}: {error}. The first entry of the state is z[..., 0]."
        ) from error
    flat = value.dim() == lifted.dim() - 1
    value = value[..., None] if flat else value
    lead = next((i for i in range(value.dim() - 1) if value.shape[i] != 1), value.dim() - 1)
    value = value.reshape(value.shape[min(lead, _LIFT) :])
    batch = torch.Size(plain.shape if flat else plain.shape[:-1])
    while batch and len(batch) > value.dim() - 1 and batch[0] == 1:
        batch = batch[1:]
    if value.shape[-1] != 1 or batch != value.shape[:-1]:
        raise ShapeError(
            f"The {name} must return one number for each series, (*batch,), got shape {tuple(plain.shape)} for z of "
            f"shape {tuple(z.shape)}. The first entry of the state is z[..., 0]."
        )
    return flat, value
