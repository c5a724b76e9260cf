"""What padded jumps must satisfy: in order, apart, inside the window, with finite marks, unused rows last."""

from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn.data.checks import show_time
from stochdyn.errors import DataError, TimeError

Say = Callable[[list[int]], str]


def unused(times: Tensor) -> Tensor:
    """Which rows hold no jump.

    Example:
        >>> unused(torch.tensor([0.5, float("inf")])).tolist()
        [False, True]
    """
    return times == float("inf")


def faults(values: Tensor, t0: Tensor, t1: Tensor) -> dict[str, Tensor]:
    """By the name of the fault, which rows (*batch, jump) have it; in the order in which to name them.

    Args:
        values: (*batch, jump, 1 + mark).
        t0, t1: (*batch,) the window, both ends inside.

    Example:
        >>> found = faults(torch.tensor([[0.7], [0.5]]), torch.tensor(0.0), torch.tensor(1.0))
        >>> [name for name, rows in found.items() if rows.any()]
        ['order']
    """
    times = values[..., 0]
    free = unused(times)
    step = torch.diff(times, dim=-1)
    later = torch.nn.functional.pad(step, (1, 0), value=1.0)
    gone = torch.nn.functional.pad(free[..., :-1], (1, 0)) & ~free
    start, end = t0[..., None].to(times.device), t1[..., None].to(times.device)
    return {
        "number": times.isnan() | (times == -float("inf")),
        "padding": gone,
        "order": (later < 0) & ~free,
        "tie": (later == 0) & ~free,
        "window": ((times < start) | (times > end)) & ~free,
        "mark": ~values[..., 1:].isfinite().all(-1) & ~free,
    }


def check_jumps(values: Tensor, t0: Tensor, t1: Tensor, say: Say) -> None:
    """Name the first jump that breaks a rule.

    Args:
        values: (*batch, jump, 1 + mark), unused rows have time inf.
        t0, t1: (*batch,) the window.
        say: what a sequence is called, by its position in the batch.

    Raises:
        TimeError: for times that are no numbers, out of order, tied, or outside the window; a row after an unused one.
        DataError: for marks that are not finite.

    Example:
        >>> check_jumps(torch.tensor([[[0.2], [0.7]]]), torch.zeros(1), torch.ones(1), str)
    """
    if values.shape[-2] == 0:
        return
    found = faults(values, t0, t1)
    for name, rows in found.items():
        if bool(rows.any()):
            first = rows.nonzero()[0].tolist()
            _complain(name, values, (t0, t1), first, say(first[:-1]))


def _complain(
    name: str, values: Tensor, window: tuple[Tensor, Tensor], first: list[int], series: str
) -> None:
    times, k = values[..., 0], first[-1]
    time = times[tuple(first)]
    where = f"{series}, jump {k}"
    if name == "number":
        raise TimeError(f"{where}: time is {float(time)}. Every jump has a time: drop it, or find its time.")
    if name == "padding":
        raise TimeError(
            f"{where}: time {show_time(time)} comes after an unused row (time inf). Unused rows come last; "
            "sd.Jumps.from_list pads for you."
        )
    if name == "order":
        before = times[(*first[:-1], k - 1)]
        raise TimeError(
            f"{where}: time {show_time(time)} comes after {show_time(before)}. Sort the jumps of every series, "
            "together with their marks."
        )
    if name == "tie":
        raise TimeError(
            f"{where}: time {show_time(time)} is there twice, which has probability 0. Give both as one jump with a "
            "mark, or tell them apart by the error of the clock."
        )
    if name == "window":
        start, end = (show_time(t.expand(times.shape[:-1])[tuple(first[:-1])]) for t in window)
        raise TimeError(
            f"{where}: time {show_time(time)} is outside the window [{start}, {end}]. The window is what was watched: "
            "set t0 and t1 so that it holds all jumps, or drop those outside."
        )
    raise DataError(
        f"{where}, time {show_time(time)}: mark is {values[tuple(first)][1:].tolist()}. Marks are finite numbers: "
        "drop the jump, or model its mark as missing."
    )


def inside(values: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """Jumps whose times in another dtype left the window by rounding, put back to its ends.

    Example:
        >>> given = torch.tensor([[[0.1]]]).double()
        >>> given.tolist(), inside(given, torch.zeros(1).double(), torch.tensor([0.1], dtype=torch.float64)).tolist()
        ([[[0.10000000149011612]]], [[[0.1]]])
    """
    times = values[..., :1]
    within = times.clamp(t0.to(values)[:, None, None], t1.to(values)[:, None, None])
    return torch.cat([torch.where(unused(times), times, within), values[..., 1:]], -1)


def check_classes(marks: Tensor, real: Tensor, classes: int, times: Tensor, say: Say) -> None:
    """Marks that are classes must be 0, 1, ... classes - 1.

    Args:
        marks: (*batch, jump).
        real: (*batch, jump) where there is a jump.
        classes: how many there are.
        times: (*batch, jump).
        say: as for `check_jumps`.

    Raises:
        DataError: naming the series, the jump and its time.

    Example:
        >>> check_classes(torch.tensor([[1.0]]), torch.tensor([[True]]), 2, torch.ones(1, 1), str)
    """
    bad = real & ~((marks >= 0) & (marks < classes) & (marks == marks.floor()))
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        raise DataError(
            f"{say(first[:-1])}, jump {first[-1]}, time {show_time(times[tuple(first)])}: mark is "
            f"{marks[tuple(first)]:g}, and there are the classes 0, 1, ... {classes - 1}. Number the classes from 0, "
            "or give more of them."
        )
