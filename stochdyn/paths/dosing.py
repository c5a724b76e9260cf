"""Doses as jumps: of the state, and of the rates at which infusions run."""

import torch
from torch import Tensor

from stochdyn.data.doses import Doses
from stochdyn.fields import Field, evaluate
from stochdyn.paths.schedule import Schedule
from stochdyn.paths.trigger import Trigger


def has_infusions(doses: Doses) -> bool:
    """Whether any dose takes time.

    Example:
        >>> import stochdyn as sd
        >>> has_infusions(sd.Doses([sd.Dose(0.0, 1.0)])), has_infusions(sd.Doses([sd.Dose(0.0, 1.0, rate=2.0)]))
        (False, True)
    """
    return bool((doses.duration > 0).any())


def as_schedule(doses: Doses, z: Tensor, infusions: bool) -> Schedule:
    """The doses as a schedule, of states (z, rates) if there are infusions.

    Args:
        doses: the doses.
        z: a state, for its size and dtype.
        infusions: whether the state has the rates too.

    Raises:
        DataError: if a compartment is beyond the state.

    Example:
        >>> import stochdyn as sd
        >>> doses = sd.Doses([sd.Dose(0.0, 6.0, rate=2.0), sd.Dose(1.0, 5.0)])
        >>> schedule = as_schedule(doses, torch.zeros(1), True)
        >>> schedule.times, schedule.amounts[:, :2]
        (tensor([0., 1., 3., inf], dtype=torch.float64), tensor([[ 0.,  2.],
                [ 5.,  0.],
                [ 0., -2.],
                [ 0.,  0.]]))
    """
    width = z.shape[-1]
    doses.check_compartments(width)
    starts, amounts, duration = doses.acting()
    starts, amounts, duration = torch.broadcast_tensors(starts, amounts, duration)
    into = torch.nn.functional.one_hot(doses.compartment.clamp_max(width - 1), width).to(amounts.dtype)
    slow = doses.duration > 0
    bolus, reset = torch.where(slow, 0.0, amounts)[..., None] * into, doses.reset.to(amounts.dtype)[..., None]
    reset = reset.expand(*bolus.shape[:-1], 1)
    if not infusions:
        return _sorted(starts, torch.cat([bolus, reset], -1).to(z.dtype))
    rate = torch.where(slow, amounts / torch.where(duration > 0, duration, 1.0), 0.0)[..., None] * into
    first = torch.cat([bolus, rate, reset], -1)
    ends = torch.where(slow, starts + duration, torch.inf)
    other = starts[..., None, :]
    # At one time the order is that of the doses, then the ends: a reset at an infusion's end comes before it.
    place = torch.arange(starts.shape[-1], device=starts.device)
    later = (other > starts[..., None]) | ((other == starts[..., None]) & (place > place[:, None]))
    cut = (doses.reset[..., None, :] & later & (other <= ends[..., None]) & slow[..., None]).any(-1)
    stop = torch.where(cut[..., None], 0.0, 0.0 - rate)
    second = torch.cat([torch.zeros_like(bolus), stop, torch.zeros_like(reset)], -1)
    return _sorted(torch.cat([starts, ends], -1), torch.cat([first, second], -2).to(z.dtype))


def _sorted(times: Tensor, amounts: Tensor) -> Schedule:
    order = times.detach().argsort(dim=-1, stable=True)
    index = order[..., None].expand(*order.shape, amounts.shape[-1])
    return Schedule(times.gather(-1, order), _take, amounts.expand(index.shape).gather(-2, index))


def _take(t: Tensor, z: Tensor, amount: Tensor) -> Tensor:
    return z * (1 - amount[..., -1:]) + amount[..., :-1]


def with_rates(field: Field, width: int) -> Field:
    """A field of states (z, rates): what the field says plus the rates, which do not change by themselves.

    Example:
        >>> with_rates(lambda t, z: -z, 1)(torch.zeros(1), torch.tensor([1.0, 3.0]))
        tensor([2., 0.])
    """

    def rates(t: Tensor, state: Tensor, context: Tensor | None = None) -> Tensor:
        z, r = state[..., :width], state[..., width:]
        f = evaluate("field", field, t, z, context).expand(z.shape)
        return torch.cat([f + r, torch.zeros_like(r)], -1)

    return rates


def _of_state(function: Field, width: int, back: bool) -> Field:
    def call(t: Tensor, state: Tensor, given: Tensor | None = None) -> Tensor:
        value = evaluate("jump map", function, t, state[..., :width], given)
        return torch.cat([value.expand(state[..., :width].shape), state[..., width:]], -1) if back else value

    return call


def on_state(jump: Trigger | Schedule, width: int) -> "Trigger | Schedule":
    """A trigger or schedule of the state z as one of (z, rates).

    Example:
        >>> lifted = on_state(Trigger(lambda t, z: z[..., 0], lambda t, z: -z), 1)
        >>> lifted.jump_map(torch.zeros(1), torch.tensor([1.0, 3.0]))
        tensor([-1.,  3.])
    """
    if isinstance(jump, Schedule):
        return Schedule(jump.times, _of_state(jump.jump_map, width, True), jump.amounts)
    moved = None if jump.jump_map is None else _of_state(jump.jump_map, width, True)
    return Trigger(_of_state(jump.condition, width, False), moved, jump.direction, jump.terminal)
