"""`Jumps`: sequences of occurrences in continuous time, ragged, with or without marks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import pyro
import torch
from torch import Tensor

from stochdyn.data.checks import as_real, check_names
from stochdyn.data.groups import read_groups
from stochdyn.data.jump_checks import check_classes, check_jumps, inside, unused
from stochdyn.data.population import AbstractPopulation
from stochdyn.data.series import Series
from stochdyn.errors import DataError, PaddingError, ShapeError, TimeError
from stochdyn.shapes import check_shape


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Jumps(AbstractPopulation):
    """Sequences of jumps, each watched from t0 to t1; a mini-batch is one too.

    Shapes:
        values (series, max_jumps, 1 + mark): the time, then the marks; unused rows come last and have time inf.

    Args:
        values: as above; kept in float64 unless `dtype` says otherwise.
        t0: the start of the window, for all or (series,).
        t1: its end. A window says also when nothing happened: it is not the time of the last jump.
        classes: how many classes the (first) mark has; None where it is a quantity.
        marks: names of the marks, by default "mark" or "mark 0", "mark 1", ...
        ids: labels of the series, by default 0, 1, ...
        covariates: (series, covariate) known inputs of each series.
        groups: labels of the group of each series, by the name of the grouping.
        dtype: the floating dtype of values and covariates.

    Attributes:
        counts: (series,) the number of jumps of each series.
        t0, t1: (series,) in float64.
        index: (series,) the position of each series in the population; slicing keeps it.
        population: the number of series in the full data.

    Raises:
        TimeError: unsorted, tied, or outside the window: naming the series, the jump, the time.
        ShapeError, DtypeError, DataError: likewise.

    Example:
        >>> import stochdyn as sd
        >>> jumps = sd.Jumps([[[0.2], [0.7]], [[0.4], [float("inf")]]], t1=1.0)
        >>> jumps
        Jumps(2 series, 1 to 2 jumps between 0 and 1, no marks, torch.float64)
        >>> jumps.counts.tolist()
        [2, 1]
    """

    values: Tensor
    t0: Tensor
    t1: Tensor
    counts: Tensor
    marks: tuple[str, ...]
    classes: int | None
    covariates: Tensor | None

    def __init__(
        self,
        values: Any,
        t0: Any = 0.0,
        t1: Any = None,
        *,
        classes: int | None = None,
        marks: Sequence[str] | None = None,
        ids: Sequence[Any] | None = None,
        covariates: Any = None,
        groups: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        raw = as_real("values", values)
        check_shape("values", raw, ["series", "jump", "1 + mark"], "Ragged lists go into sd.Jumps.from_list.")
        size, _, width = raw.shape
        if size == 0 or width == 0:
            raise DataError(
                f"`values` has shape {tuple(raw.shape)}. Pass at least one series, and its times."
            )
        labels = check_names("ids", ids, size, range(size))
        start, end = _window(t0, t1, size, raw.device)
        say = partial(_series, labels)
        # In the precision in which the times were given: 0.1 in float32 is not after 0.1.
        raw = raw if raw.is_floating_point() else raw.double()
        check_jumps(raw, start.to(raw), end.to(raw), say)
        values = inside(raw.to(dtype, copy=True), start, end)
        check_jumps(values, start.to(values), end.to(values), say)
        if classes is not None and width == 1:
            raise DataError(
                "`classes` says what the marks are, and `values` has none. Leave it out, or add the marks as a column."
            )
        free = unused(values[..., 0])
        if classes is not None and width > 1:
            check_classes(values[..., 1], ~free, classes, values[..., 0], say)
        values[..., 1:] = values[..., 1:].masked_fill(free[..., None], 0.0)
        default = ("mark",) if width == 2 else tuple(f"mark {k}" for k in range(width - 1))
        names = check_names("marks", marks, width - 1, default)
        self.__dict__.update(
            values=values,
            t0=start,
            t1=end,
            counts=(~free).sum(-1),
            marks=tuple(names),
            classes=classes,
            covariates=_read_covariates(covariates, size, dtype, raw.device),
            index=torch.arange(size, device=raw.device),
            population=size,
            _ids=labels,
            _groups=read_groups(groups, size, raw.device),
            _whole=True,
        )

    @classmethod
    def from_list(
        cls, rows: Sequence[Any], t0: Any = 0.0, t1: Any = None, *, max_jumps: int | None = None, **named: Any
    ) -> Self:
        """Sequences of different lengths: `[times_i, ...]` or `[(times_i, marks_i), ...]`.

        Args:
            rows: times_i (jump_i,), marks_i (jump_i,) or (jump_i, mark). A sequence without jumps is an empty list.
            t0, t1: the window, for all or (series,).
            max_jumps: rows of the padded tensor, by default as many as the longest sequence needs.
            **named: the rest of what `Jumps` takes.

        Raises:
            PaddingError: if a sequence has more than `max_jumps` jumps.

        Example:
            >>> import stochdyn as sd
            >>> jumps = sd.Jumps.from_list([([0.2, 0.7], [1, 0]), ([0.4], [1])], t0=0.0, t1=1.0, classes=2)
            >>> jumps.values[1].tolist()
            [[0.4, 1.0], [inf, 0.0]]
        """
        if len(rows) == 0:
            raise DataError("`rows` is empty. Pass at least one series; one without jumps is an empty list.")
        labels = check_names("ids", named.get("ids"), len(rows), range(len(rows)))
        parts = [_read_row(row, _series(labels, [k])) for k, row in enumerate(rows)]
        width = max(part.shape[1] for part in parts)
        longest = max(len(part) for part in parts)
        for k, part in enumerate(parts):
            _check_row(part, width, longest if max_jumps is None else max_jumps, _series(labels, [k]))
        values = torch.zeros(len(rows), longest if max_jumps is None else max_jumps, width).double()
        values[..., 0] = float("inf")
        for k, part in enumerate(parts):
            values[k, : len(part), : part.shape[1]] = part
        return cls(values, t0, t1, **named)

    @classmethod
    def of_times(cls, series: Series, t0: Any = 0.0, t1: Any = None) -> Self:
        """The times at which series were observed, as jumps: when somebody looked may be data too.

        A time at which no channel was observed is none. Labels, groups and the place in the population stay.

        Args:
            series: of which the times are taken.
            t0, t1: the window in which a time could have been, for all or (series,).

        Raises:
            TimeError: if an observed time is outside the window.

        Example:
            >>> import stochdyn as sd
            >>> series = sd.Series.from_list([([0.2, 0.7], [[1.0], [2.0]]), ([0.4], [[3.0]])])
            >>> sd.Jumps.of_times(series, 0.0, 1.0).times.tolist()
            [[0.2, 0.7], [0.4, inf]]
        """
        seen = series.mask.any(-1)
        times = torch.where(seen, series.times, float("inf")).sort(-1).values[:, : int(seen.sum(-1).max())]
        if torch.equal(times.float().double(), times):
            times = times.float()  # they may have been given so: 0.1 in float32 is not after 0.1
        kept = {name: getattr(series, name) for name in ("index", "population", "_ids", "_groups", "_whole")}
        return cls(times[..., None], t0, t1, ids=series.ids)._with(**kept)

    @property
    def times(self) -> Tensor:
        """(series, max_jumps), inf where unused."""
        return self.values[..., 0]

    @property
    def channels(self) -> tuple[str, ...]:
        """What the columns of `values` are."""
        return ("time", *self.marks)

    @property
    def mask(self) -> Tensor:
        """(series, max_jumps) True where there is a jump."""
        return ~unused(self.times)

    def _take(self, where: slice | Tensor) -> Self:
        return self._with(
            values=self.values[where],
            t0=self.t0[where],
            t1=self.t1[where],
            counts=self.counts[where],
            covariates=None if self.covariates is None else self.covariates[where],
            index=self.index[where],
            _whole=False,
        )

    def _cast(self, dtype: torch.dtype) -> Self:
        values = inside(self.values.to(dtype, copy=True), self.t0, self.t1)
        # Rounding must not put a jump past the end of its window, nor two at one time.
        check_jumps(values, self.t0.to(dtype), self.t1.to(dtype), partial(_series, self.ids))
        covariates = None if self.covariates is None else self.covariates.to(dtype)
        return self._with(values=values, covariates=covariates)

    def as_series(self) -> Series:
        """The jumps as encoders read them: channels "jump" (1) and the marks, and 0 at both ends of the window.

        An encoder has `obs_dim = 1 + number of marks`; its entry 0 has read the whole window.

        Example:
            >>> import stochdyn as sd
            >>> series = sd.Jumps.from_list([[0.5], []], t0=0.0, t1=1.0).as_series()
            >>> series.times.tolist(), series.values[..., 0].tolist()
            ([[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]], [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        """
        free = unused(self.times)
        start, end = self.t0[:, None], self.t1[:, None]
        times = torch.cat([start, torch.where(free, end, self.times.double()), end], 1)
        happened = torch.cat([(~free).to(self.values)[..., None], self.values[..., 1:]], -1)
        values = torch.nn.functional.pad(happened, (0, 0, 1, 1))
        used = torch.arange(times.shape[1], device=times.device) < self.counts[:, None] + 2
        common = {name: getattr(self, name) for name in ("index", "population", "_ids", "_groups", "_whole")}
        return Series._of(
            {
                "times": times,
                "values": values,
                "mask": used[..., None].expand(values.shape),
                "low": None,
                "high": None,
                "lengths": self.counts + 2,
                "channels": ("jump", *self.marks),
                "covariates": self.covariates,
                "_knots": None,
                **common,
            }
        )

    def observe(self, name: str, process: Any) -> Tensor:
        """Condition on the jumps, inside `plate`: `pyro.sample(name, process, obs=self.values)`.

        Args:
            name: of the site.
            process: a point process over the window of these jumps.

        Raises:
            TimeError: if its window is another one, naming the series.

        Example:
            >>> import stochdyn as sd
            >>> jumps = sd.Jumps.from_list([[0.5], []], t0=0.0, t1=1.0)
            >>> with jumps.plate("series"):
            ...     value = jumps.observe("jumps", sd.PoissonProcess(2.0, jumps.t0, jumps.t1))
        """
        for what, own in (("t0", self.t0), ("t1", self.t1)):
            given = getattr(process, what).to(own)
            other = (given != own).reshape(-1, len(self)).any(0) if given.dim() else given != own
            if bool(other.any()):
                k = int(other.nonzero()[0])
                raise TimeError(
                    f"{_series(self.ids, [k])}: the jumps were watched with {what} = {own[k]:g}, the "
                    f"process has {what} = {given.expand(own.shape)[..., k].flatten()[0]:g}. Make it with batch.t0 and "
                    "batch.t1."
                )
        return pyro.sample(name, process, obs=self.values)

    def __repr__(self) -> str:
        part = "" if self._whole else f" of {self.population}"
        span = (
            f"{int(self.counts.min())} to {int(self.counts.max())} jumps between {float(self.t0.min()):.10g}"
        )
        marks = f"marks {self.marks}" if self.marks else "no marks"
        marks += "" if self.classes is None else f" of {self.classes} classes"
        about = f"{marks}, {self.values.dtype}"
        about += "".join(f", {len(grouping)} groups {name!r}" for name, grouping in self._groups.items())
        return f"Jumps({len(self)}{part} series, {span} and {float(self.t1.max()):.10g}, {about})"


def _series(labels: Sequence[Any], first: list[int]) -> str:
    return f"series {labels[first[0]]}"


def _window(t0: Any, t1: Any, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if t1 is None:
        raise TimeError(
            "`t1` is missing: the end of the time that was watched. It is not the last jump: that nothing happened "
            "after it is data too. Pass a number, or one for each series."
        )
    ends = []
    for name, given in (("t0", t0), ("t1", t1)):
        time = as_real(name, given).to(device, torch.float64)
        if time.ndim and tuple(time.shape) != (size,):
            raise ShapeError(
                f"`{name}` must be a number or have shape (series,) = ({size},), got {tuple(time.shape)}."
            )
        ends.append(time.expand(size).clone())
    bad = ~(ends[0] < ends[1]) | ~(ends[0].isfinite() & ends[1].isfinite())
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        raise TimeError(
            f"series {k}: the window [{ends[0][k]:g}, {ends[1][k]:g}] has no length. t0 must be before t1, both finite."
        )
    return ends[0], ends[1]


def _read_row(row: Any, where: str) -> Tensor:
    """(jump, 1 + mark), or (jump, 1) where there are no marks."""
    marked = isinstance(row, tuple) and len(row) == 2 and not isinstance(row[0], int | float)
    given = row[0] if marked else row
    times = as_real("times", given if len(given) else torch.zeros(0)).double()
    if times.ndim != 1:
        raise ShapeError(
            f"{where}: times must have shape (jump,), got {tuple(times.shape)}. With marks write (times, marks)."
        )
    if not marked:
        return times[:, None]
    marks = as_real("marks", row[1] if len(row[1]) else torch.zeros(0)).double()
    marks = marks[:, None] if marks.ndim == 1 else marks
    if len(marks) != len(times):
        raise ShapeError(f"{where}: {len(times)} times and {len(marks)} marks. Every jump has its marks.")
    return torch.cat([times[:, None], marks.to(times.device)], 1)


def _check_row(part: Tensor, width: int, most: int, where: str) -> None:
    if len(part) > most:
        raise PaddingError(
            f"{where}: has {len(part)} jumps, the padding holds max_jumps={most}. Set max_jumps to at least "
            f"{len(part)}, or leave it out."
        )
    if len(part) and part.shape[1] != width:
        raise ShapeError(
            f"{where}: has {part.shape[1] - 1} marks per jump, another series has {width - 1}. Give all the same."
        )


def _read_covariates(covariates: Any, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if covariates is None:
        return None
    read = as_real("covariates", covariates).to(device, dtype, copy=True)
    check_shape("covariates", read, [size, "covariate"], "Jumps have covariates of the whole series.")
    if not bool(read.isfinite().all()):
        k = int((~read.isfinite()).any(1).nonzero()[0])
        raise DataError(
            f"series {k}: covariates are {read[k].tolist()}. They are known inputs: fill the hole."
        )
    return read
