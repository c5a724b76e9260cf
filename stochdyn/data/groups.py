"""Groups of series: which group every series of a population belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import DataError, ShapeError


@dataclass(frozen=True, eq=False)
class Grouping:
    """The groups of a whole population, which every mini-batch of it carries along.

    Attributes:
        labels: of the groups, each once, sorted where they can be.
        member: (population,) the position in `labels` of the group of every series.

    Example:
        >>> grouping = Grouping.of("site", ["south", "north", "south"], 3, torch.device("cpu"))
        >>> grouping.labels, grouping.member.tolist(), grouping.sizes.tolist()
        (('north', 'south'), [1, 0, 1], [1, 2])
    """

    labels: tuple[Any, ...]
    member: Tensor

    @classmethod
    def of(cls, name: str, labels: Any, size: int, device: torch.device) -> "Grouping":
        """Read one label per series.

        Raises:
            ShapeError: if there is not one for each series.
            DataError: if one is missing or cannot be a label.
        """
        given = labels.tolist() if hasattr(labels, "tolist") else labels
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != size:
            got = len(given) if isinstance(given, Sequence) and not isinstance(given, str) else repr(given)
            raise ShapeError(
                f"`groups[{name!r}]` must have one label for each of {size} series, got {got}. Labels that are the "
                "same make a group."
            )
        for position, label in enumerate(given):
            _check_label(name, position, label)
        distinct = _sorted(set(given))
        position_of = {label: k for k, label in enumerate(distinct)}
        return cls(distinct, torch.tensor([position_of[label] for label in given], device=device))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> Tensor:
        """(groups,) how many series of the population each group has."""
        return torch.bincount(self.member, minlength=len(self.labels))

    def part(self, series: Tensor) -> "Grouping":
        """Of a population that is a part of this one; groups without a series are dropped."""
        kept, member = self.member[series].unique(return_inverse=True)
        return Grouping(tuple(self.labels[k] for k in kept.tolist()), member)

    def to(self, device: Any) -> "Grouping":
        """On another device."""
        return Grouping(self.labels, self.member.to(device))


def read_groups(
    groups: Mapping[str, Any] | None, size: int, device: torch.device | str
) -> dict[str, Grouping]:
    """Read `groups={"site": labels, ...}`.

    Raises:
        DataError: if it is not a mapping from names.

    Example:
        >>> read_groups({"site": [7, 3]}, 2, "cpu")["site"].labels
        (3, 7)
    """
    if groups is None:
        return {}
    if not isinstance(groups, Mapping) or not all(isinstance(name, str) for name in groups):
        raise DataError(
            f"`groups` must be a dict from names to labels, got {type(groups).__name__}. Write "
            'groups={"site": labels}.'
        )
    return {name: Grouping.of(name, labels, size, torch.device(device)) for name, labels in groups.items()}


def find_grouping(groups: Mapping[str, Grouping], name: str) -> Grouping:
    """One grouping by its name.

    Raises:
        DataError: if there is none of that name.

    Example:
        >>> len(find_grouping(read_groups({"site": [7, 3]}, 2, "cpu"), "site"))
        2
    """
    if name not in groups:
        raise DataError(
            f"The series have no groups {name!r}, they have {sorted(groups)}. Give them: "
            f"sd.Series(..., groups={{{name!r}: labels}})."
        )
    return groups[name]


def constant_labels(name: str, rows: Sequence[Sequence[Any]], where: Sequence[str]) -> list[Any]:
    """One label per series from the labels of its rows.

    Raises:
        DataError: if a series has two.

    Example:
        >>> constant_labels("site", [["a", "a"], ["b"]], ["series 0", "series 1"])
        ['a', 'b']
    """
    for labels, place in zip(rows, where, strict=True):
        other = next((label for label in labels if label != labels[0] and label == label), None)
        if other is not None:
            raise DataError(
                f"{place}: column {name!r} has {labels[0]!r} and {other!r}. A series belongs to one group; make a "
                "series for each, or a covariate of the column."
            )
    return [labels[0] for labels in rows]


def _check_label(name: str, position: int, label: Any) -> None:
    try:
        hash(label)
        missing = label is None or bool(label != label)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"`groups[{name!r}]`, series {position}: {type(label).__name__} cannot be a label. Use text or numbers."
        ) from error
    if missing:
        raise DataError(
            f"`groups[{name!r}]`, series {position}: the label is missing. A series without a known group "
            "gets one of its own: give it a label that no other has."
        )


def _sorted(labels: set[Any]) -> tuple[Any, ...]:
    try:
        return tuple(sorted(labels))
    except TypeError:
        return tuple(sorted(labels, key=lambda label: (type(label).__name__, repr(label))))
