"""`Series`: a set of multivariate time series, irregular, ragged and with holes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyro
import torch
from torch import Tensor

from stochdyn.data import ragged
from stochdyn.data.assemble import assemble, assemble_rows, name_reading, name_rows
from stochdyn.data.censoring import exact, place
from stochdyn.data.checks import as_mask, as_real, check_devices, check_resolution, fill_missing, value_dtype
from stochdyn.data.covariates import attach
from stochdyn.data.population import AbstractPopulation
from stochdyn.data.support import check_support
from stochdyn.likelihoods import Censored


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Series(AbstractPopulation):
    """A set of multivariate time series; every model is called with one, and a mini-batch is one.

    Times are shared by all series or each series has its own; a mask says what was observed. NaN never stays
    inside: where the mask is False a value that the channel takes stands in. Rows of own times may end in
    padding, repeats of the last time with a mask that is False; `from_list` makes it.

    Shapes:
        times (time,) or (series, time); values (series, time, channel), mask the same or (series, time);
        covariates (series, covariate) or (series, time, covariate).

    Args:
        times: strictly increasing, in any unit; kept in float64.
        values: kept in a tensor's own floating dtype, else in torch's default dtype, or in `dtype`.
        mask: True = observed; None where everything is.
        channels: names of the channels, by default "0", "1", ...
        ids: labels of the series, by default 0, 1, ...
        covariates: known inputs of each series.
        groups: labels of the group of each series, by the name of the grouping, e.g. {"site": labels}.
        lower: lower limit of quantification: a value at or below it says only that the truth is. A number,
            (channel,), or (series, time, channel) with sizes of 1 where it does not vary; -inf where there is none.
        upper: upper limit: a value at or above it says only that the truth is; inf where there is none.
        between: (low, high), each as `lower`: the truth lies between them, whatever the value is. NaN in both where
            the value is exact.
        dtype: the floating dtype of values and covariates.

    Attributes:
        low: (series, time, channel) or None, the lower end of what is known of a censored value, -inf if there is none
            or the value is exact; `high` likewise. `values` holds the limit there, or the middle of both ends.
        lengths: (series,) the number of times of each series without padding.
        index: (series,) the position of each series in the population; slicing keeps it.
        population: the number of series in the full data.

    Raises:
        ShapeError, DtypeError, DataError, TimeError: naming the series, the time and the channel.

    Example:
        >>> import stochdyn as sd
        >>> series = sd.Series([0.0, 0.5, 2.0], [[[1.0], [1.5], [0.0]]], mask=[[[True], [True], [False]]])
        >>> series
        Series(1 series, 3 shared times from 0 to 2, channels ('0',), 67% observed, torch.float32)
        >>> series.last_observed
        tensor([0.5000], dtype=torch.float64)
    """

    times: Tensor
    values: Tensor
    mask: Tensor
    low: Tensor | None
    high: Tensor | None
    lengths: Tensor
    channels: tuple[str, ...]
    covariates: Tensor | None
    _knots: Tensor | None

    def __init__(
        self,
        times: Any,
        values: Any,
        mask: Any = None,
        *,
        channels: Sequence[str] | None = None,
        ids: Sequence[Any] | None = None,
        covariates: Any = None,
        groups: Mapping[str, Any] | None = None,
        lower: Any = None,
        upper: Any = None,
        between: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kind = value_dtype(values, dtype)
        device = check_devices(times=times, values=values, mask=mask, covariates=covariates)
        fields = assemble(
            as_real("times", times).to(device, torch.float64, copy=True),
            as_real("values", values).to(device),
            None if mask is None else as_mask("mask", mask).to(device),
            channels=channels,
            ids=ids,
            covariates=covariates,
            groups=groups,
            limits={"lower": lower, "upper": upper, "between": between},
            dtype=kind,
        )
        self.__dict__.update(fields)

    @classmethod
    def from_list(
        cls,
        rows: Sequence[Any],
        *,
        channels: Sequence[str] | None = None,
        ids: Sequence[Any] | None = None,
        covariates: Any = None,
        groups: Mapping[str, Any] | None = None,
        lower: Any = None,
        upper: Any = None,
        between: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Series of different lengths: `[(times_i, values_i), ...]` or `[(times_i, values_i, mask_i), ...]`.

        Rows are padded to the longest. Where all have the same times, these are kept once, as (time,).

        Args:
            rows: times_i (time_i,), values_i (time_i, channel), mask_i (time_i,) or (time_i, channel).
            covariates: (series, covariate), or a list of (time_i, covariate) padded like the rows.
            lower, upper, between: as for `Series`, or a list of (time_i, channel) padded like the rows.
            channels, ids, groups, dtype: as for `Series`.

        Example:
            >>> import stochdyn as sd
            >>> series = sd.Series.from_list([([0, 1, 2], [[1.0], [2.0], [3.0]]), ([0.5], [[4.0]])])
            >>> series.lengths.tolist(), series.times[1].tolist()
            ([3, 1], [0.5, 0.5, 0.5])
        """
        named = {"channels": channels, "ids": ids, "covariates": covariates, "groups": groups, "dtype": dtype}
        limits = {"lower": lower, "upper": upper, "between": between}
        return cls._of(assemble_rows(list(rows), limits=limits, **named))

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        time: str,
        values: str | Sequence[str],
        series: str | None = None,
        *,
        covariates: str | Sequence[str] = (),
        groups: str | Sequence[str] = (),
        lower: Any = None,
        upper: Any = None,
        between: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A long pandas frame, one row per series and time; rows need not be sorted.

        NaN in a values column is read as missing, as data frames mean it; inf is refused.

        Args:
            frame: the data frame.
            time: the column with the times, as numbers.
            values: the columns that become channels.
            series: the column that labels the series; None where there is only one.
            covariates: columns of known inputs, without holes.
            groups: columns that label groups of series, the same in all rows of a series.
            lower, upper: limits of quantification: a number, the name of a column (NaN where there is none), or a list
                with one of them for each channel.
            between: (low, high), each like `lower`; a value with both ends is observed, also if it is NaN.
            dtype: as for `Series`.

        Raises:
            DataError, TimeError: if a column is missing or not numeric, or a series has a time twice.

        Example:
            >>> import pandas
            >>> import stochdyn as sd
            >>> frame = pandas.DataFrame({"year": [1901, 1900], "hare": [47.2, 30.0], "lynx": [None, 4.0]})
            >>> series = sd.Series.from_frame(frame, time="year", values=["hare", "lynx"])
            >>> series.times.tolist(), series.mask.tolist()
            ([1900.0, 1901.0], [[[True, True], [True, False]]])
        """
        limits = {"lower": lower, "upper": upper, "between": between}
        rows, options = ragged.read_frame(frame, time, values, series, covariates, groups, limits=limits)
        return cls.from_list(rows, **options, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.values.device

    @property
    def obs_dim(self) -> int:
        """The number of channels."""
        return self.values.shape[-1]

    @property
    def censored(self) -> Tensor:
        """(series, time, channel) True where a value is known only to lie between `low` and `high`.

        Example:
            >>> import stochdyn as sd
            >>> series = sd.Series([0.0, 1.0], [[[0.02], [3.0]]], lower=0.1)
            >>> series.censored.flatten().tolist(), series.values.flatten().tolist()
            ([True, False], [0.10000000149011612, 3.0])
        """
        return self.mask & ~exact(self.mask, self._ends)

    @property
    def _ends(self) -> tuple[Tensor, Tensor] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def last_observed(self) -> Tensor:
        """(series,) the last time with an observation in any channel; -inf where there is none."""
        seen = self.mask.any(-1)
        return self.times.expand(seen.shape).masked_fill(~seen, -float("inf")).amax(-1)

    def as_series(self) -> Self:
        """The series itself; see `Jumps.as_series`."""
        return self

    def _take(self, where: slice | Tensor) -> Self:
        return self._with(
            times=self.times if self.times.ndim == 1 else self.times[where],
            values=self.values[where],
            mask=self.mask[where],
            low=None if self.low is None else self.low[where],
            high=None if self.high is None else self.high[where],
            lengths=self.lengths[where],
            covariates=None if self.covariates is None else self.covariates[where],
            index=self.index[where],
            _knots=None if self._knots is None else self._knots[where],
            _whole=False,
        )

    def observe(self, name: str, likelihood: Any) -> Tensor:
        """Condition on the values, inside `plate`: missing ones drop out, censored ones count as tails or intervals.

        It is `pyro.sample(name, likelihood.mask(self.mask).to_event(2), obs=self.values)`, with the likelihood as
        `Censored` where values are, and values outside the support named.

        Args:
            name: of the site.
            likelihood: a distribution over scalars (..., series, time, channel), e.g. `decoder(states)`.

        Raises:
            DataError: if the likelihood cannot produce a value, naming the series, the time and the channel.
            SupportError: if values are censored and the likelihood has no distribution function.

        Example:
            >>> import stochdyn as sd, pyro.distributions as dist
            >>> series = sd.Series([0.0, 1.0], [[[0.02], [3.0]]], lower=0.1)
            >>> with series.plate("series"):
            ...     y = series.observe("y", dist.Normal(torch.ones(1, 2, 1), 1.0))
        """
        if likelihood._validate_args:
            say = name_reading(self.times, self.ids, self.channels)
            check_support(likelihood, self.values, exact(self.mask, self._ends), say)
        if self.low is not None and self.high is not None:
            likelihood = Censored(likelihood, self.low, self.high)
        return pyro.sample(name, likelihood.mask(self.mask).to_event(2), obs=self.values)

    def _cast(self, dtype: torch.dtype) -> Self:
        self._check_times(dtype)
        say = name_reading(self.times, self.ids, self.channels)
        ends = None if self.low is None or self.high is None else (self.low.to(dtype), self.high.to(dtype))
        low, high = ends or (None, None)
        return self._with(
            values=place(fill_missing(self.values, exact(self.mask, ends), dtype, say), ends),
            low=low,
            high=high,
            covariates=None if self.covariates is None else self.covariates.to(dtype),
        )

    def _check_times(self, dtype: torch.dtype) -> None:
        rows, where = name_rows(self.times, self.ids)
        check_resolution(rows, self.lengths[: len(rows)], dtype, where)

    def extend(self, ts: Any) -> Self:
        """The same series with further times at which nothing is observed, e.g. to forecast.

        Times that a series has already keep their data. Covariates that vary in time carry their last value
        forward (before the first time, the first one backward).

        Args:
            ts: (k,) further times for all series, in any order.

        Example:
            >>> import stochdyn as sd
            >>> ahead = sd.Series([0.0, 1.0], [[[1.0], [2.0]]]).extend([2.0, 0.5])
            >>> ahead.times.tolist(), ahead.mask.flatten().tolist()
            ([0.0, 0.5, 1.0, 2.0], [True, False, True, False])
        """
        new = self._with(**ragged.extend_rows(self, ts))
        new._check_times(self.values.dtype)
        return new

    def with_covariates(self, given: "Series", *, before: Any = None) -> Self:
        """The same series with covariates that were given at times of their own: doses, stimuli, weather.

        Their times are merged in as times at which nothing is observed, so that a grid made of `times` has them. They
        replace the covariates that there were. Times after the last observation are a known future: `sd.predict` of
        the result uses it.

        Args:
            given: the covariates as a `Series` of the same ids, one channel each; where its mask is False the value
                before goes on.
            before: the value at a series' first time where none was given by then: a number, or one per covariate.

        Raises:
            DataError: if a series has no covariates, or no value at its first time.

        Example:
            >>> import stochdyn as sd
            >>> doses = sd.Series([1.0, 1.5], [[[100.0], [0.0]]])
            >>> series = sd.Series([0.0, 2.0], [[[1.0], [2.0]]]).with_covariates(doses, before=0.0)
            >>> series.times.tolist(), series.covariates.flatten().tolist()
            ([0.0, 1.0, 1.5, 2.0], [0.0, 100.0, 0.0, 0.0])
        """
        new = self._with(**attach(self, given, before))
        new._check_times(self.values.dtype)
        return new

    def __repr__(self) -> str:
        part = "" if self._whole else f" of {self.population}"
        low, high = int(self.lengths.min()), int(self.lengths.max())
        span = f"{high} shared" if self.times.ndim == 1 else f"{low} to {high} own"
        span += f" times from {float(self.times.min()):.10g} to {float(self.times.max()):.10g}"
        share = 100.0 * float(self.mask.sum()) / (int(self.lengths.sum()) * self.obs_dim)
        about = f"channels {self.channels}, {share:.0f}% observed, "
        if self.low is not None:
            about += f"{100.0 * float(self.censored.sum()) / max(float(self.mask.sum()), 1.0):.0f}% of them censored, "
        about += f"{self.values.dtype}"
        about += "".join(f", {len(grouping)} groups {name!r}" for name, grouping in self._groups.items())
        return f"Series({len(self)}{part} series, {span}, {about})"
