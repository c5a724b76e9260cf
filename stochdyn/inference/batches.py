"""From data to the arguments of a model: whole, or in shuffled mini-batches."""

from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import torch
from torch.utils.data import DataLoader

from stochdyn.errors import FitError


def arguments(data: Any) -> tuple:
    """The positional arguments that `data` stands for: a tuple is spread, all else is one argument.

    Example:
        >>> arguments("x"), arguments(("x", "y"))
        (('x',), ('x', 'y'))
    """
    return data if type(data) is tuple else (data,)


def population(data: Any) -> int | None:
    """How many series the data stand for, or None where the data do not say.

    Example:
        >>> import torch
        >>> population(torch.zeros(5)) is None
        True
    """
    return getattr(data, "population", None)


def moved(data: Any, device: torch.device | str) -> Any:
    """The data on the device, as far as they know how to move.

    Example:
        >>> import torch
        >>> moved((torch.zeros(2), "label"), "cpu")
        (tensor([0., 0.]), 'label')
    """
    if type(data) is tuple:
        return tuple(moved(part, device) for part in data)
    return data.to(device) if hasattr(data, "to") else data


def batches(data: Any, batch_size: int | None, generator: torch.Generator) -> Iterator[tuple]:
    """Arguments for one step after another, without end.

    Args:
        data: Anything, if `batch_size` is None. Else a `Series`, a tensor, or a tuple of them with equal
            lengths: whatever has `len(data)` and `data[index]` for a tensor of rows.
        batch_size: Rows per batch, or None for the whole data at every step. Rows are shuffled anew in
            every pass; the last batch of a pass may be smaller.
        generator: Decides the order of the rows.

    Raises:
        FitError: `batch_size` does not fit the data, or the data cannot be indexed by rows.

    Example:
        >>> import torch
        >>> stream = batches(torch.arange(5), 2, torch.Generator().manual_seed(0))
        >>> [len(next(stream)[0]) for _ in range(4)]
        [2, 2, 1, 2]
    """
    if batch_size is None:
        return repeat(arguments(data))
    rows = _rows(data)
    if not 1 <= batch_size <= rows:
        raise FitError(
            f"batch_size: must be between 1 and the {rows} rows of the data, got {batch_size}. "
            "batch_size=None takes all of them at every step."
        )

    def collate(chosen: list[int]) -> tuple:
        index = torch.tensor(chosen)
        return tuple(part[_sent(index, part)] for part in arguments(data))

    loader = DataLoader(
        range(rows), batch_size=batch_size, shuffle=True, generator=generator, collate_fn=collate
    )
    return chain.from_iterable(repeat(loader))


def steps_per_pass(data: Any, batch_size: int | None) -> int:
    """How many batches hold all data once.

    Example:
        >>> import torch
        >>> steps_per_pass(torch.zeros(5), 2), steps_per_pass(torch.zeros(5), None)
        (3, 1)
    """
    return 1 if batch_size is None else -(-_rows(data) // batch_size)


def _sent(index: torch.Tensor, part: Any) -> torch.Tensor:
    """The index where the data are, sent there without waiting."""
    device = part.device if isinstance(part, torch.Tensor) else getattr(part, "device", index.device)
    if torch.device(device).type == "cuda":
        index = index.pin_memory()
    return index.to(device, non_blocking=True)


def _rows(data: Any) -> int:
    parts = arguments(data)
    for part in parts:
        indexable = hasattr(part, "__len__") and hasattr(part, "__getitem__")
        if not indexable or isinstance(part, list | dict | str | tuple):
            raise FitError(
                f"batch_size: mini-batches need data that are indexed by rows, got a {type(part).__name__}. "
                "Pass a Series or a tensor, or batch_size=None."
            )
    lengths = {len(part) for part in parts}
    if len(lengths) != 1:
        raise FitError(
            f"batch_size: all arguments must have the same number of rows, got {sorted(lengths)}. "
            "Put what is shared by all rows into the model instead of the data."
        )
    return lengths.pop()
