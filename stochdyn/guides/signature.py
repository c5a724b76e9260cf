"""Checksums of data: a table of posteriors knows the series that it was trained on."""

from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.data import Series
from stochdyn.errors import GuideError
from stochdyn.guides.plates import Place
from stochdyn.guides.upstream import series_frame, series_of


def series_signature(batch: Series) -> Tensor:
    """(series,) a checksum of what was observed, and when.

    Example:
        >>> import stochdyn as sd
        >>> batch = sd.Series([0.0, 1.0], [[[1.0], [2.0]], [[2.0], [1.0]]])
        >>> series_signature(batch).tolist(), series_signature(batch.extend([7.0])).tolist()
        ([9.414213562373096, 8.414213562373096], [9.414213562373096, 8.414213562373096])
    """
    seen = batch.mask.flatten(1)
    times = batch.times.expand(batch.mask.shape[:2])[..., None].expand(batch.mask.shape)
    rank = seen.cumsum(1).double()
    numbers = rank * (batch.values.flatten(1).double() + 1) + rank.sqrt() * times.flatten(1)
    if batch.low is not None:
        numbers = numbers + rank.sqrt() * batch.censored.flatten(1)
    return (numbers * seen).sum(-1)


def same(stored: Tensor, signature: Tensor) -> Tensor:
    """Which checksums agree, up to rounding."""
    return (stored - signature).abs() <= 1e-9 * (1 + stored.abs())


class Trained(nn.Module):
    """Which members of a table were trained, and on which data."""

    seen: Tensor
    signature: Tensor

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(shape, dtype=torch.bool, device=device))
        self.register_buffer("signature", torch.zeros(shape, dtype=torch.float64, device=device))

    def check(self, args: tuple[Any, ...], place: Place, *, learning: bool, training: bool) -> None:
        """Note the data of this run where it trains, else compare.

        Raises:
            GuideError: naming the first series whose data are other ones.
        """
        signature = self._signature(args, place)
        if signature is None:
            return
        if learning or (training and not bool(self.seen.any())):
            rows = place.take(self.seen, 0)
            place.put(self.signature, signature.expand(rows.shape), 0)
            place.put(self.seen, torch.ones_like(rows), 0)
            return
        other = place.take(self.seen, 0) & ~same(place.take(self.signature, 0), signature)
        if bool(other.any()):
            where = other.nonzero()[0].tolist()
            raise GuideError(
                f"site '{place.name}', series {where}: the guide holds a posterior for each of the series that it was "
                f"trained on, and these are other data. Use amortize={{'{place.name}': plate}} with an encoder, or "
                "fit a new guide."
            )

    def _signature(self, args: tuple[Any, ...], place: Place) -> Tensor | None:
        """Of the members of this run, broadcast to its plates; None where they are no series."""
        batch = series_of(args)
        frame = None if batch is None else series_frame(place, batch)
        if batch is None or frame is None or -frame.dim > self.seen.dim():
            return None
        return series_signature(batch).to(self.seen.device).reshape(-1, *[1] * (-frame.dim - 1))
