"""The support of a point process, and what is said of a value outside it."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.data.checks import show_time
from stochdyn.data.jump_checks import check_classes, check_jumps, faults, unused
from stochdyn.errors import DataError, ShapeError
from stochdyn.paths.points.marks import marks_inside
from stochdyn.paths.points.occurrences import Occurrences


class JumpSupport(constraints.Constraint):
    """Padded jumps in order, apart, and inside a window, with marks that the process has.

    Example:
        >>> support = JumpSupport(torch.tensor(0.0), torch.tensor(1.0), 1, None)
        >>> support.check(torch.tensor([[[0.2], [0.7]], [[0.7], [0.2]]]))
        tensor([ True, False])
    """

    event_dim = 2
    is_discrete = True  # the number of jumps is

    def __init__(self, t0: Tensor, t1: Tensor, width: int, marks: Any) -> None:
        self.t0, self.t1, self.width, self.marks = t0, t1, width, marks

    def check(self, value: Tensor) -> Tensor:
        bad = torch.stack(list(faults(value, self.t0.to(value), self.t1.to(value)).values())).any(0)
        inside = marks_inside(self.marks, value) | unused(value[..., 0])
        return ~bad.any(-1) & inside.all(-1)

    def explain(self, value: Tensor, name: str) -> None:
        """Raise for the first jump that breaks a rule.

        Raises:
            ShapeError: if the value has another number of marks.
            TimeError, DataError: naming the series, the jump, the time, the fix.
        """
        if value.dim() < 2 or value.shape[-1] != self.width:
            marks = self.width - 1
            raise ShapeError(
                f"{name}: a value has shape (*batch, max_jumps, 1 + mark), here with {marks} mark"
                f"{'' if marks == 1 else 's'}, got {tuple(value.shape)}. Take `.values` of sd.Jumps."
            )
        check_jumps(value, self.t0.to(value), self.t1.to(value), member)
        real = ~unused(value[..., 0])
        if isinstance(self.marks, constraints.integer_interval):
            count = int(torch.as_tensor(self.marks.upper_bound).amax()) + 1
            check_classes(value[..., 1], real, count, value[..., 0], member)
        bad = real & ~marks_inside(self.marks, value)
        if bool(bad.any()):
            first = tuple(bad.nonzero()[0].tolist())
            value = value.expand(*bad.shape, value.shape[-1])
            raise DataError(
                f"{member(list(first[:-1]))}, jump {first[-1]}, time {show_time(value[first][0])}: mark is "
                f"{value[first][1:].tolist()}, and its distribution takes values in {self.marks}. Correct the mark, or "
                "choose another distribution."
            )


def check_marks(support: constraints.Constraint, jumps: Occurrences) -> None:
    """Name the first mark outside a support whose bounds have a row for every jump.

    Raises:
        DataError: naming the series, the jump and its time.

    Example:
        >>> value = torch.tensor([[0.5, 2.0]])
        >>> jumps = Occurrences.of(value, torch.tensor(0.0), torch.tensor(1.0))
        >>> check_marks(constraints.interval(torch.zeros(1), torch.full((1,), 3.0)), jumps)
    """
    marks = jumps.marks if support.event_dim else jumps.marks[..., 0]
    bad = jumps.real & ~support.check(marks)
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"{member(list(first[1:]))}, jump {first[0]}, time {show_time(jumps.times.expand(bad.shape)[first])}: mark "
            f"is {jumps.marks.expand(*bad.shape, -1)[first].tolist()}, and its distribution does not take that value. "
            "Correct the mark, or choose another distribution."
        )


def member(first: list[int]) -> str:
    """What a sequence is called by its position in the batch; leading dimensions of samples are left out.

    Example:
        >>> member([3])
        'series 3'
    """
    return f"series {first[0]}" if len(first) == 1 else f"series {tuple(first)}" if first else "the sequence"
