"""PhysioNet 2012 as `Series`: scaled channels, static covariates, and half of the times held out."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import stochdyn as sd

STATIC = ("Age", "Gender", "Height", "ICUType")
DAY = 24 * 60.0


@dataclass(frozen=True)
class Stays:
    """Stays of one part of the file, as a Series whose mask says what is shown, and what is held out.

    Attributes:
        shown: the half of the times that a method may read.
        held: (stay, time, channel) the observations at the other times.
        truth: (stay, time, channel) all values, zero where there are none.
    """

    shown: sd.Series
    held: Tensor
    truth: Tensor

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def everything(self) -> sd.Series:
        """Shown and held out: to train on."""
        return sd.Series(
            self.shown.times,
            self.truth,
            self.shown.mask | self.held,
            channels=self.shown.channels,
            covariates=self.shown.covariates,
        )

    def first(self, count: int) -> "Stays":
        some = torch.arange(min(count, len(self)))
        shown = self.shown
        cut = sd.Series(
            shown.times[some],
            shown.values[some],
            shown.mask[some],
            channels=shown.channels,
            covariates=None if shown.covariates is None else shown.covariates[some],
        )
        return replace(self, shown=cut, held=self.held[some], truth=self.truth[some])


@dataclass(frozen=True)
class Parts:
    """Train, validation and test; `published` turns a squared error into that of the scaling of published figures."""

    train: Stays
    val: Stays
    test: Stays
    published: Tensor


@dataclass(frozen=True)
class Table:
    """The file as a padded table: (stay, time), (stay, time, channel), and statics (stay, static) with NaN."""

    times: Tensor
    values: Tensor
    mask: Tensor
    static: Tensor
    channels: tuple[str, ...]


def read(path: Path) -> Table:
    """The long table as stays; values that came twice in a minute are averaged, -1 (unknown) is missing."""
    with np.load(path) as held:
        record, minute, param = (held[k].astype(np.int64) for k in ("record", "minute", "param"))
        value, names = held["value"].astype(np.float64), [str(n) for n in held["param_names"]]
    statics = [names.index(n) for n in STATIC]
    channels = [k for k, n in enumerate(names) if n not in ("RecordID", *STATIC)]
    _, stay = np.unique(record, return_inverse=True)
    static = np.full((stay.max() + 1, len(statics)), np.nan)
    for column, k in enumerate(statics):
        some = (param == k) & (value >= 0)
        static[stay[some], column] = value[some]
    some = np.isin(param, channels) & (value >= 0)
    some |= (param == names.index("Temp")) & (value < 0)
    stay, minute, value = stay[some], minute[some], value[some]
    channel = np.searchsorted(channels, param[some])
    visits, visit = np.unique(stay * 10_000 + minute, return_inverse=True)
    owner = visits // 10_000
    lengths = np.bincount(owner, minlength=len(static))
    position = np.arange(len(visits)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    times = np.zeros((len(static), lengths.max()))
    times[owner, position] = (visits % 10_000) / DAY
    times = np.maximum.accumulate(times, 1)
    sums, counts = np.zeros((2, *times.shape, len(channels)))
    np.add.at(sums, (stay, position[visit], channel), value)
    np.add.at(counts, (stay, position[visit], channel), 1)
    values = sums / np.maximum(counts, 1)
    arrays = (times, values, counts > 0, static)
    return Table(*map(torch.from_numpy, arrays), tuple(names[k] for k in channels))


def split(table: Table, seed: int = 0, shares: tuple[float, float] = (0.7, 0.1)) -> Parts:
    """Parts by stay; channels from 0 to 1 over the training part; half of the times of every stay held out."""
    generator = torch.Generator().manual_seed(seed)
    count = len(table.times)
    order = torch.randperm(count, generator=generator)
    shown = half(table.mask.any(-1), generator)
    ends = [round(count * shares[0]), round(count * sum(shares))]
    train = order[: ends[0]]
    low, high = extremes(table.values[train], table.mask[train])
    span = torch.where(high > low, high - low, torch.ones_like(high))
    scaled = torch.where(table.mask, (table.values - low) / span, 0.0)
    static = standardised(table.static, train)

    def stays(some: Tensor) -> Stays:
        some = some[table.mask[some].any((1, 2))]
        mask, times = table.mask[some], table.times[some]
        seen = mask & shown[some][..., None]
        y = scaled[some].clamp(0, 1).float()
        series = sd.Series(
            times, y, seen, channels=table.channels, covariates=static[some].float(), dtype=torch.float32
        )
        return Stays(series, mask & ~shown[some][..., None], y)

    # Published code divides by the maximum, not by the span.
    published = (span / torch.where(high == 0, torch.ones_like(high), high)).square()
    return Parts(
        *map(stays, (train, order[ends[0] : ends[1]], order[ends[1] :])), published=published.float()
    )


def half(present: Tensor, generator: torch.Generator) -> Tensor:
    """(stay, time) a random half of the times of every stay, rounded up."""
    rank = torch.rand(present.shape, generator=generator).masked_fill(~present, 2.0).argsort(1).argsort(1)
    return present & (rank < (present.sum(1, keepdim=True) + 1) // 2)


def extremes(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    low = values.masked_fill(~mask, float("inf")).amin((0, 1))
    high = values.masked_fill(~mask, -float("inf")).amax((0, 1))
    return low, high


def standardised(static: Tensor, train: Tensor) -> Tensor:
    """Statics in training units with 0 for unknown, unknown or not, and the four kinds of unit as one-hot."""
    known = static.isfinite()
    part, there = static[train].nan_to_num(), known[train]
    mean = part.sum(0) / there.sum(0).clamp(min=1)
    sd_ = ((part - mean).square() * there).sum(0).div(there.sum(0).clamp(min=1)).sqrt()
    numbers = torch.where(known, (static - mean) / sd_.clamp(min=1e-6), torch.zeros_like(static))[:, :3]
    kind = static[:, 3:] == torch.arange(1, 5)
    return torch.cat([numbers.clamp(-4, 4), (~known[:, :3]).double(), kind.double()], -1)
