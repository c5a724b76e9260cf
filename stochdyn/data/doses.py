"""`Doses`: what was given to each series, when, how fast and into which compartment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stochdyn.data.dose_table import read_dose_frame
from stochdyn.errors import DataError, ShapeError, TimeError


@dataclass(frozen=True)
class Dose:
    """One dose, or a course of them.

    Args:
        time: when it is given, in the unit of the path's times.
        amount: how much.
        compartment: where, counted from 1 as in NONMEM, or its name.
        rate: amount per time of an infusion; 0 is a bolus. Bioavailability then changes how long it runs.
        duration: how long an infusion runs, instead of `rate`. Bioavailability then changes its rate.
        additional: how many more doses follow, one every `interval`.
        interval: the time between them.
        reset: whether the whole state is set to zero first, and infusions stop; with amount 0 that is all.

    Raises:
        TimeError: if a time is not finite, or a duration or an interval is negative.
        DataError: if an amount or rate is negative or not finite, or the parts contradict each other.

    Example:
        >>> import stochdyn as sd
        >>> sd.Dose(0.0, 100.0, additional=2, interval=8.0).times
        [0.0, 8.0, 16.0]
    """

    time: float
    amount: float = 0.0
    compartment: int | str = 1
    rate: float = 0.0
    duration: float = 0.0
    additional: int = 0
    interval: float = 0.0
    reset: bool = False

    def __post_init__(self) -> None:
        at = f"Dose at time {self.time}"
        if not math.isfinite(self.time):
            raise TimeError(f"{at}: the time must be a finite number.")
        for name, kind, fix in (
            ("duration", TimeError, "An infusion takes a positive time; 0 is a bolus."),
            ("interval", TimeError, "Doses of a course are a positive time apart."),
            ("amount", DataError, "Amounts are finite and not negative."),
            ("rate", DataError, "Rates are amounts per time; one to be estimated is written by `duration`."),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise kind(f"{at}: `{name}` is {value}. {fix}")
        if self.rate and self.duration:
            raise DataError(f"{at}: has rate={self.rate} and duration={self.duration}. Give one of them.")
        if (self.rate or self.duration) and not self.amount:
            raise DataError(f"{at}: an infusion of amount 0. Give its amount: it runs for amount / rate.")
        if self.additional < 0 or int(self.additional) != self.additional:
            raise DataError(f"{at}: `additional` is {self.additional}. It counts doses.")
        if self.additional and not self.interval:
            raise TimeError(f"{at}: {self.additional} additional doses need an `interval` above 0.")
        if isinstance(self.compartment, int) and self.compartment < 1:
            raise DataError(f"{at}: compartment {self.compartment}. They are counted from 1, or named.")

    @property
    def times(self) -> list[float]:
        """The times of the whole course."""
        return [self.time + k * self.interval for k in range(int(self.additional) + 1)]


@dataclass(frozen=True, eq=False, init=False)
class Doses:
    """The doses of all series: boluses, infusions, courses, resets, with lag times and bioavailability.

    For `odeint(..., jumps=[doses])`: a bolus jumps its compartment, an infusion adds its rate to the field's, and the
    solver stops exactly at the times, on the grid or not. `given` and `rates` are for SDE paths.

    Shapes:
        times, amounts, compartment, duration, reset (series, dose), or (dose,) of one list for all; time inf is no
        dose.

    Args:
        doses: a list of `Dose`s for each series, or one list for all, sorted by time.
        compartments: their names, in the order of the state.
        ids: labels of the series, for messages.

    Attributes:
        times: as prescribed, without lag.

    Raises:
        TimeError, DataError: naming series and dose: unsorted, an unknown compartment.

    References:
        Bauer, "NONMEM tutorial part I", CPT: Pharmacometrics & Systems Pharmacology 2019,
        https://doi.org/10.1002/psp4.12404 (the meaning of the columns).

    Example:
        >>> import torch, stochdyn as sd
        >>> doses = sd.Doses([sd.Dose(0.0, 100.0, "gut", additional=2, interval=8.0)], compartments=["gut", "blood"])
        >>> def absorb(t, z):
        ...     gut, blood = z.unbind(-1)
        ...     return torch.stack([-1.2 * gut, 1.2 * gut - 0.15 * blood], -1)
        >>> z = sd.odeint(absorb, torch.zeros(2), torch.tensor([0.0, 20.0]), jumps=[doses])
        >>> z[:, 0]  # the first dose is in the state at its time
        tensor([100.0000,   0.8230])
    """

    times: Tensor
    amounts: Tensor
    compartment: Tensor
    duration: Tensor
    scaled: Tensor
    reset: Tensor
    compartments: tuple[str, ...] | None
    ids: tuple[Any, ...]
    lag: tuple[tuple[int | None, Tensor], ...]
    bioavailability: tuple[tuple[int | None, Tensor], ...]

    def __init__(
        self,
        doses: Sequence[Dose] | Sequence[Sequence[Dose]],
        *,
        compartments: Sequence[str] | None = None,
        ids: Sequence[Any] | None = None,
    ) -> None:
        shared = all(isinstance(dose, Dose) for dose in doses) and len(doses) > 0
        rows: Any = [doses] if shared else doses
        names = None if compartments is None else tuple(compartments)
        labels = tuple(range(len(rows))) if ids is None else tuple(ids)
        if len(labels) != len(rows) or not len(rows):
            raise ShapeError(
                f"Doses: {len(rows)} lists of doses and {len(labels)} ids. One of each per series."
            )
        read = [_read_row(row, names, f"series {label}") for row, label in zip(rows, labels, strict=True)]
        padded = [pad_sequence([row[k] for row in read], True, fill) for k, fill in enumerate(_FILL)]
        padded = [x[0] if shared else x for x in padded]
        flags = {"scaled": padded[4].bool(), "reset": padded[5].bool(), "compartment": padded[2].long()}
        self.__dict__.update(
            times=padded[0], amounts=padded[1], duration=padded[3], **flags, compartments=names, ids=labels, lag=(),
            bioavailability=(),
        )  # fmt: skip

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        series: str | None = None,
        *,
        compartments: Sequence[str] | None = None,
        ids: Sequence[Any] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Self:
        """An event table in NONMEM's columns: TIME, AMT and, where there, CMT, RATE, DUR, ADDL, II, EVID, SS.

        EVID is 0 (an observation), 1 (a dose), 2 (left out), 3 (a reset) or 4 (a reset and a dose); without it rows
        with an AMT above 0 are doses. NaN and "." are empty.

        Args:
            frame: a pandas frame, sorted by time within each series.
            series: the column that labels the series; None where there is only one.
            compartments: their names.
            ids: the labels of the series in the order wanted, as `Series.ids` has them; a series may have no dose.
            columns: other names of the columns, e.g. {"TIME": "hour"}.

        Raises:
            DataError, TimeError: naming the row: a missing column, steady state (SS), rates to be estimated (-1, -2).

        Example:
            >>> import pandas, stochdyn as sd
            >>> frame = pandas.DataFrame({"ID": [1, 2], "TIME": [0.0, 0.5], "AMT": [4.0, 5.0]})
            >>> frame["ADDL"], frame["II"] = [1, 0], [8.0, 0.0]
            >>> sd.Doses.from_frame(frame, "ID").times
            tensor([[0.0000, 8.0000],
                    [0.5000,    inf]], dtype=torch.float64)
        """
        rows, labels = read_dose_frame(frame, series, ids, columns or {})
        return cls(
            [[Dose(**fields) for fields in row] for row in rows], compartments=compartments, ids=labels
        )

    def __len__(self) -> int:
        return self.times.shape[0] if self.times.dim() > 1 else 1

    def __getitem__(self, index: Any) -> Self:
        """The doses of some series: a position, a slice, a tensor such as `batch.index`.

        Lags and bioavailabilities of one value per series are those of the same series.
        """
        picked: Any = [index] if isinstance(index, int) else index
        if self.times.dim() == 1:
            return self._with(
                lag=_pick(self.lag, picked, None), bioavailability=_pick(self.bioavailability, picked, None)
            )
        device = self.times.device
        picked = picked.to(device) if isinstance(picked, Tensor) else picked
        position = torch.arange(len(self), device=device)[picked]
        new = {name: getattr(self, name)[position] for name in _TENSORS}
        return self._with(
            **new, ids=tuple(self.ids[i] for i in position.tolist()), lag=_pick(self.lag, position, len(self)),
            bioavailability=_pick(self.bioavailability, position, len(self)),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return self._with(**{name: getattr(self, name).to(device) for name in _TENSORS})

    def until(self, time: Any) -> Self:
        """Without the doses after a time, a number or (series,), e.g. the end of each series.

        Example:
            >>> import stochdyn as sd
            >>> sd.Doses([sd.Dose(0.0, 1.0, additional=3, interval=1.0)]).until(1.5).times
            tensor([0., 1., inf, inf], dtype=torch.float64)
        """
        real = isinstance(time, Tensor) and time.is_floating_point()
        end = torch.as_tensor(time, dtype=None if real else torch.float64, device=self.times.device)
        late = self.times.to(end.dtype) > end[..., None]
        return self._with(
            times=self.times.masked_fill(late, torch.inf), amounts=self.amounts.masked_fill(late, 0.0)
        )

    def adjusted(
        self,
        *,
        lag: "Tensor | Mapping[int | str, Tensor] | None" = None,
        bioavailability: "Tensor | Mapping[int | str, Tensor] | None" = None,
    ) -> Self:
        """With lag times, by which doses act later, and bioavailable fractions; both may be latent.

        What was said of other compartments before stays. A dose whose lag ends after the path does not act on it.

        Args:
            lag: (*batch,) for all compartments, or one for some: {"gut": lag}.
            bioavailability: likewise.

        Raises:
            DataError: if a compartment is unknown, or a value is negative or not finite.

        Example:
            >>> import torch, stochdyn as sd
            >>> doses = sd.Doses([sd.Dose(1.0, 8.0)])
            >>> doses = doses.adjusted(lag=torch.tensor(0.5), bioavailability=torch.tensor(0.75))
            >>> doses.given(torch.tensor([0.0, 1.4, 1.5]), 1)[:, 0]
            tensor([0., 0., 6.])
        """
        return self._with(
            lag=_merge(self.lag, self._by_compartment("lag", lag)),
            bioavailability=_merge(
                self.bioavailability, self._by_compartment("bioavailability", bioavailability)
            ),
        )

    def acting(self) -> tuple[Tensor, Tensor, Tensor]:
        """Times with lag, amounts that act, and durations, each (*batch, dose).

        Example:
            >>> import stochdyn as sd
            >>> sd.Doses([sd.Dose(0.0, 10.0, rate=5.0)]).adjusted(bioavailability=torch.tensor(0.5)).acting()[2]
            tensor([1.], dtype=torch.float64)
        """
        fraction = self._spread(self.bioavailability, 1.0)
        late = self._spread(self.lag, 0.0)
        return (
            self.times + torch.where(self.reset, 0.0, late),
            self.amounts * fraction,
            torch.where(self.scaled, self.duration * fraction, self.duration),
        )

    def given(self, ts: Tensor, state_dim: int) -> Tensor:
        """What boluses have brought into each compartment by the times of a grid, those at a time included.

        For SDE paths: between jumps z - given has none, so it is the path of the drift at z; see docs/jumps.md. A bolus
        between grid times acts from the next one on.

        Shapes:
            ts (*batch, time) -> (*batch, time, state)

        Raises:
            DataError: if there are resets, or a compartment is beyond the state.

        Example:
            >>> import torch, stochdyn as sd
            >>> sd.Doses([sd.Dose(1.0, 8.0, 2)]).given(torch.tensor([0.0, 1.0, 2.0]), 2)
            tensor([[0., 0.],
                    [0., 8.],
                    [0., 8.]])
        """
        times, amounts, _ = self.acting()
        bolus = torch.where(self.duration > 0, 0.0, amounts)
        return self._at(ts, times, bolus, state_dim)

    def rates(self, ts: Tensor, state_dim: int) -> Tensor:
        """The rates of the infusions that run at the times of a grid, in each compartment: a context of an SDE path.

        Shapes:
            ts (*batch, time) -> (*batch, time, state)

        Raises:
            DataError: as for `given`.

        Example:
            >>> import torch, stochdyn as sd
            >>> sd.Doses([sd.Dose(1.0, 8.0, rate=4.0)]).rates(torch.tensor([0.0, 1.0, 2.9, 3.0]), 1)[:, 0]
            tensor([0., 4., 4., 0.])
        """
        times, amounts, duration = self.acting()
        rate = torch.where(self.duration > 0, amounts / torch.where(self.duration > 0, duration, 1.0), 0.0)
        return self._at(ts, times, rate, state_dim) - self._at(ts, times + duration, rate, state_dim)

    def check_compartments(self, state_dim: int) -> None:
        """Refuse doses into compartments that the state does not have.

        Raises:
            DataError: naming the series, the dose and the compartment.

        Example:
            >>> import stochdyn as sd
            >>> sd.Doses([sd.Dose(0.0, 1.0, 2)]).check_compartments(2)
        """
        bad = (self.compartment >= state_dim) & self.times.isfinite()
        if bool(bad.any()):
            *series, k = bad.nonzero()[0].tolist()
            number = int(self.compartment[(*series, k)]) + 1
            raise DataError(
                f"series {self.ids[series[0] if series else 0]}, dose {k}: compartment {number} of a state with "
                f"{state_dim}. Compartments are the entries of the state, counted from 1."
            )

    def _at(self, ts: Tensor, times: Tensor, size: Tensor, state_dim: int) -> Tensor:
        self.check_compartments(state_dim)
        if bool(self.reset.any()):
            raise DataError(
                "Doses: a reset sets the state to zero, which an SDE path cannot. Split the series."
            )
        dtype = ts.dtype if self.amounts.dtype == torch.float64 and ts.dtype != torch.float64 else size.dtype
        # In the dtype of the grid: .7 is not after the .7 of a float32 grid.
        done = (times.to(ts.dtype)[..., None, :] <= ts[..., :, None]) & times.isfinite()[..., None, :]
        into = torch.nn.functional.one_hot(self.compartment, state_dim).to(size.dtype) * size[..., None]
        return (done.to(size.dtype) @ into).to(dtype)

    def _by_compartment(self, name: str, given: Any) -> tuple[tuple[int | None, Tensor], ...]:
        if given is None:
            return ()
        if not isinstance(given, Mapping):
            return ((None, _amount(name, given)),)
        return tuple(
            (_compartment(key, self.compartments, name), _amount(f"{name} of compartment {key!r}", x))
            for key, x in given.items()
        )

    def _spread(self, parts: tuple[tuple[int | None, Tensor], ...], neutral: float) -> Tensor:
        """One number for each dose from those for compartments."""
        out = torch.full_like(self.times, neutral)
        for where, value in parts:
            value = value.to(self.times.device, torch.float64)[..., None]
            out = torch.where(
                torch.ones_like(self.reset) if where is None else self.compartment == where, value, out
            )
        return out

    def _with(self, **changes: Any) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update({**self.__dict__, **changes})
        return new


_TENSORS = ("times", "amounts", "compartment", "duration", "scaled", "reset")
_FILL = (math.inf, 0.0, 0.0, 0.0, 0.0, 0.0)


def _read_row(row: Sequence[Dose], names: tuple[str, ...] | None, where: str) -> tuple[Tensor, ...]:
    events, before = [], -math.inf
    for k, dose in enumerate(row):
        if not isinstance(dose, Dose):
            raise DataError(f"{where}, dose {k}: expected an sd.Dose, got {type(dose).__name__}.")
        if dose.time < before:
            raise TimeError(
                f"{where}, dose {k}: time {dose.time:g} comes after {before:g}. Sort the doses by time; those of a "
                "course may overlap the next ones."
            )
        before = dose.time
        into = _compartment(dose.compartment, names, f"{where}, dose {k}")
        length = dose.amount / dose.rate if dose.rate else dose.duration
        if dose.reset:
            events.append((dose.time, False, (dose.time, 0.0, into, 0.0, False, True)))
        if dose.amount:
            events += [(at, True, (at, dose.amount, into, length, dose.rate > 0, False)) for at in dose.times]
    events.sort(key=lambda event: event[:2])
    table = torch.tensor([e[2] for e in events], dtype=torch.float64).reshape(len(events), 6)
    return tuple(table.unbind(1))


def _amount(name: str, given: Any) -> Tensor:
    """A lag or a fraction of any batch shape; its numbers are looked at where validation is on."""
    value = torch.as_tensor(given)
    if torch.distributions.Distribution._validate_args:
        bad = ~(value.isfinite() & (value >= 0))
        if bool(bad.any()):
            index = tuple(bad.nonzero()[0].tolist())
            where = index[0] if len(index) == 1 else index or 0
            raise DataError(
                f"Doses.adjusted: series {where}: {name} is {value[index].item():g}. It is finite and not negative: "
                "give it a prior on the positive numbers, e.g. a LogNormal."
            )
    return value


def _merge(
    old: tuple[tuple[int | None, Tensor], ...], new: tuple[tuple[int | None, Tensor], ...]
) -> tuple[tuple[int | None, Tensor], ...]:
    """The new ones in the place of the old ones of the same compartments."""
    replaced = {where for where, _ in new}
    kept = () if None in replaced else tuple(part for part in old if part[0] not in replaced)
    return kept + new


def _pick(
    parts: tuple[tuple[int | None, Tensor], ...], picked: Any, size: int | None
) -> tuple[tuple[int | None, Tensor], ...]:
    """The values of some series; one for all stays. Without a size, any more than one are of series."""

    def pick(value: Tensor) -> Tensor:
        per_series = value.dim() > 0 and (value.shape[-1] > 1 if size is None else value.shape[-1] == size)
        index = picked.to(value.device) if isinstance(picked, Tensor) else picked
        return value[..., index] if per_series else value

    return tuple((where, pick(value)) for where, value in parts)


def _compartment(key: int | str, names: tuple[str, ...] | None, where: str) -> int:
    """The position in the state."""
    if isinstance(key, str) and names and key in names:
        return names.index(key)
    if isinstance(key, int) and not isinstance(key, bool) and 1 <= key <= (len(names) if names else key):
        return key - 1
    known = f"The compartments are {list(names)}" if names else "Compartments are counted from 1"
    raise DataError(f"{where}: unknown compartment {key!r}. {known}; name them by compartments=.")
