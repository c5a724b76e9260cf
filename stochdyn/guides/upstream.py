"""What the head of a site sees of the latents sampled before it: in which plates, and at which member."""

from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from stochdyn.data import AbstractPopulation, Series
from stochdyn.errors import GuideError
from stochdyn.guides.plates import Place


def series_of(args: tuple[Any, ...]) -> Series | None:
    """The data as an encoder reads them: the first argument, if it is a `Series` or `Jumps`."""
    return args[0].as_series() if args and isinstance(args[0], AbstractPopulation) else None


def series_around(place: Place, args: tuple[Any, ...]) -> Series:
    """The data whose series the path of a site belongs to, one each.

    Raises:
        GuideError: if the data are not a `Series`, or the path is not in the plate over its series.
    """
    batch = series_of(args)
    if batch is None:
        raise GuideError(
            f"path site '{place.name}': its guide needs a Series as the model's first argument, got "
            f"{type(args[0]).__name__ if args else 'nothing'}. "
            "Call model(batch), or use FreeMessage() without an encoder."
        )
    if not any(frame.dim == -1 and frame.size == len(batch) for frame in place.frames):
        raise GuideError(
            f"path site '{place.name}' stands in plates {place.sizes()}, and its guide gives one posterior for each of "
            f"{len(batch)} series. Sample it inside batch.plate('series'), or use encoder=None and FreeMessage()."
        )
    return batch


def beside(*parts: Tensor) -> Tensor:
    """Tensors (*batch, size) of any batch shapes that broadcast, side by side in the last dimension.

    Example:
        >>> import torch
        >>> beside(torch.zeros(4, 3), torch.ones(5, 1, 2)).shape
        torch.Size([5, 4, 5])
    """
    lead = torch.broadcast_shapes(*[p.shape[:-1] for p in parts])
    return torch.cat([p.expand(*lead, p.shape[-1]) for p in parts], -1)


def group_frame(place: Place, batch: Series) -> CondIndepStackFrame | None:
    """The plate of a site that stands in a plate over groups of the series, and in no other."""
    if len(place.frames) != 1:
        return None
    frame = place.frames[0]
    known = frame.name in batch.groups and frame.size == len(batch.grouping(frame.name))
    return frame if known else None


def series_frame(place: Place, batch: Series) -> CondIndepStackFrame | None:
    """The plate around a site that is over the series at hand."""
    for frame in place.frames:
        whole = (frame.full_size or frame.size) == batch.population
        if frame.size == len(batch) and whole and frame.name not in batch.groups:
            return frame
    return None


def rows(value: Tensor, dim: int, index: Tensor | None = None) -> Tensor:
    """A value (*batch, size) with a plate's dimension moved to the last of the batch, at some of its members."""
    while value.dim() - 1 < -dim:
        value = value[None]
    value = value.transpose(dim - 1, -2)
    return value if index is None else value.index_select(-2, index)


def seen_by_path(source: Place, place: Place, batch: Series | None) -> bool:
    """Whether the head of a path sees a latent."""
    if source.within(place):
        return True
    if batch is None:
        return False
    frame = series_frame(place, batch)
    return group_frame(source, batch) is not None and frame is not None and frame.dim == -1


def for_path(value: Tensor, source: Place, place: Place, batch: Series | None) -> Tensor:
    """What the head of a path sees of it: (*batch, size), of a group's latent that of the group of each series."""
    if source.within(place) or batch is None:
        return value
    frame = source.frames[0]
    return rows(value, frame.dim, batch.groups[frame.name])


def seen_by_series(source: Place, batch: Series, plate: str) -> bool:
    """Whether the head of an amortised site sees a latent; `plate` is that of the site."""
    if not source.frames or group_frame(source, batch) is not None:
        return True
    return [frame.name for frame in source.frames] == [plate] and plate not in batch.groups


def for_series(value: Tensor, source: Place, batch: Series, population: bool) -> Tensor:
    """What the head sees of it: (..., series, size), for the series at hand or for the whole population."""
    if not source.frames:
        return rows(value, -1) if value.dim() > 1 else value
    frame = source.frames[0]
    if group_frame(source, batch) is None:
        return rows(value, frame.dim)
    index = batch.grouping(frame.name).member if population else batch.groups[frame.name]
    return rows(value, frame.dim, index)
