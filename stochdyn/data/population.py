"""What all data have in common: series of a population, of which a mini-batch is a part."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pyro
import torch
from torch import Tensor

from stochdyn.data.checks import value_dtype
from stochdyn.data.groups import Grouping, find_grouping
from stochdyn.data.positions import positions
from stochdyn.errors import DataError

if TYPE_CHECKING:
    from stochdyn.data.series import Series


@dataclass(frozen=True, init=False, eq=False, repr=False)
class AbstractPopulation(ABC):
    """Data of a population: labels, groups, plates, mini-batches, splits. `Series` and `Jumps` are two kinds.

    A subclass holds tensors whose first dimension is the series, and says how to take some of them.

    Attributes:
        index: (series,) the position of each series in the population; slicing keeps it.
        population: the number of series in the full data.

    Example:
        >>> import stochdyn as sd
        >>> jumps = sd.Jumps.from_list([[0.5], [0.2, 0.9]], t0=0.0, t1=1.0)
        >>> isinstance(jumps, AbstractPopulation), jumps[1:].index, jumps[1:].population
        (True, tensor([1]), 2)
    """

    index: Tensor
    population: int
    _ids: Sequence[Any]
    _groups: Mapping[str, Grouping]
    _whole: bool

    @abstractmethod
    def _take(self, where: slice | Tensor) -> Self:
        """The series at these positions, as a mini-batch: `index` likewise, `_whole` False."""

    @abstractmethod
    def _cast(self, dtype: torch.dtype) -> Self:
        """The same data in another floating dtype."""

    @abstractmethod
    def as_series(self) -> "Series":
        """The data as encoders read them."""

    @classmethod
    def _of(cls, fields: dict[str, Any]) -> Self:
        """Build without checks: a mini-batch is taken at every training step."""
        new = object.__new__(cls)
        new.__dict__.update(fields)
        return new

    def _with(self, **changes: Any) -> Self:
        return self._of({**self.__dict__, **changes})

    @property
    def ids(self) -> tuple[Any, ...]:
        """The labels of the series at hand."""
        return tuple(self._ids[i] for i in self.index.tolist())

    @property
    def groups(self) -> Mapping[str, Tensor]:
        """By the name of the grouping, (series,) the position of the group of each series at hand.

        Example:
            >>> import stochdyn as sd
            >>> series = sd.Series([0.0], [[[1.0]]] * 3, groups={"site": ["south", "north", "south"]})
            >>> series.groups["site"].tolist(), series[[1]].groups["site"].tolist()
            ([1, 0, 1], [0])
        """
        return {name: grouping.member[self.index] for name, grouping in self._groups.items()}

    def grouping(self, name: str) -> Grouping:
        """The groups of the whole population: `labels`, `sizes`, and the `member` index of every series.

        Raises:
            DataError: if there are no groups of that name.

        Example:
            >>> import stochdyn as sd
            >>> series = sd.Series([0.0], [[[1.0]]] * 3, groups={"site": ["south", "north", "south"]})
            >>> series[[1]].grouping("site").labels
            ('north', 'south')
        """
        return find_grouping(self._groups, name)

    def group_plate(self, name: str, dim: int = -1) -> pyro.plate:
        """The Pyro plate over all groups of the population, also of those without a series at hand.

        Nothing about groups is subsampled, so what is sampled in it is scaled by 1 in every mini-batch.

        Example:
            >>> import stochdyn as sd
            >>> series = sd.Series([0.0], [[[1.0]]] * 3, groups={"site": ["south", "north", "south"]})
            >>> series[[1]].group_plate("site").size
            2
        """
        return pyro.plate(name, len(self.grouping(name)), dim=dim)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Any) -> Self:
        """A mini-batch of the same population: by an int, slice, list, tensor or bool mask."""
        return self._take(positions(index, len(self), self.index.device))

    def plate(self, name: str = "series", dim: int = -1) -> pyro.plate:
        """The Pyro plate over the series; for a mini-batch it scales log-densities by population / len.

        Example:
            >>> import stochdyn as sd
            >>> series = sd.Series([0.0, 1.0], [[[1.0], [2.0]]] * 6)
            >>> with series[:2].plate("series") as index:
            ...     print(index)
            tensor([0, 1])
        """
        if self._whole:
            return pyro.plate(name, len(self), dim=dim)
        return pyro.plate(name, self.population, subsample=self.index, dim=dim)

    def to(self, *targets: str | torch.device | torch.dtype) -> Self:
        """The same data on another device or in another floating dtype; the times of a `Series` stay in float64.

        Example:
            >>> import torch
            >>> import stochdyn as sd
            >>> sd.datasets.lynx_hare().to(torch.float64).values.dtype
            torch.float64
        """
        new = self
        for target in targets:
            cast = isinstance(target, torch.dtype)
            new = new._cast(value_dtype(None, target)) if cast else new._move(target)
        return new

    def _move(self, device: Any) -> Self:
        moved = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return self._with(**moved, _groups={name: g.to(device) for name, g in self._groups.items()})

    def split(self, fraction: float = 0.8, seed: int = 0, *, by: str | None = None) -> tuple[Self, Self]:
        """Split the series at random into two populations, e.g. to train on and to test on.

        Args:
            fraction: the part of the series in the first, rounded to whole series.
            seed: the same seed gives the same split; torch's own seed is left alone.
            by: the name of a grouping whose groups stay whole; the fraction is then one of groups. None splits
                them: a side keeps the groups that it has a series of, with their labels.

        Raises:
            DataError: if one side would be empty.

        Example:
            >>> import stochdyn as sd
            >>> train, test = sd.Series([0.0, 1.0], [[[1.0], [2.0]]] * 10).split(0.8, seed=0)
            >>> len(train), len(test), train.population
            (8, 2, 8)
        """
        if by is None:
            unit, what = torch.arange(len(self), device=self.index.device), "series"
        else:
            unit, what = (
                self.grouping(by).member[self.index].unique(return_inverse=True)[1],
                f"groups of {by!r}",
            )
        size = int(unit.max()) + 1
        count = round(fraction * size) if 0 < fraction < 1 else 0
        if not 0 < count < size:
            trouble = f"split({fraction}) of {size} {what} leaves one side empty"
            raise DataError(f"{trouble}. Take a fraction that leaves at least one of them on each side.")
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(self.index.device)
        first = torch.isin(unit, order[:count])
        return self._apart(first.nonzero()[:, 0]), self._apart(first.logical_not().nonzero()[:, 0])

    def _apart(self, where: Tensor) -> Self:
        part = self._take(where)
        fresh = torch.arange(len(part), device=part.index.device)
        groups = {name: grouping.part(part.index) for name, grouping in self._groups.items()}
        return part._with(_ids=part.ids, _groups=groups, index=fresh, population=len(part), _whole=True)
