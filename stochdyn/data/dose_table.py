"""Reading an event table in NONMEM's columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stochdyn.errors import DataError, TimeError

_COLUMNS = ("TIME", "AMT", "CMT", "RATE", "DUR", "ADDL", "II", "EVID", "SS")


def read_dose_frame(
    frame: Any, series: str | None, ids: Sequence[Any] | None, columns: Mapping[str, str]
) -> tuple[list[list[dict[str, Any]]], tuple[Any, ...]]:
    """The arguments of the `Dose`s of each series, and the labels of the series.

    Args:
        frame: a pandas frame.
        series: the column with the labels, or None.
        ids: labels in the order wanted, or None for that of the frame.
        columns: other names of columns.

    Raises:
        DataError, TimeError: naming the row and the column.

    Example:
        >>> import pandas
        >>> frame = pandas.DataFrame({"TIME": [0.0, 1.0], "AMT": [5.0, 0.0], "EVID": [1, 0]})
        >>> read_dose_frame(frame, None, None, {})[0]
        [[{'time': 0.0, 'amount': 5.0}]]
    """
    unknown = sorted(set(columns) - set(_COLUMNS))
    if unknown:
        raise DataError(f"Doses: unknown columns {unknown}. They are {list(_COLUMNS)}.")
    table = {name: _column(frame, columns.get(name, name), name in ("TIME", "AMT")) for name in _COLUMNS}
    if series is not None and series not in frame:
        raise DataError(f"Doses: there is no column {series!r}. There are {list(map(str, frame.columns))}.")
    labels = [0] * len(frame) if series is None else frame[series].tolist()
    order = tuple(dict.fromkeys(labels)) if ids is None else tuple(ids)
    rows: dict[Any, list[dict[str, Any]]] = {label: [] for label in order}
    last: dict[Any, float] = {}
    for k, label in enumerate(labels):
        if label not in rows:
            raise DataError(f"Doses: row {k} is of series {label!r}, which is not among the ids.")
        fields = _dose(k, label, {name: None if x is None else x[k] for name, x in table.items()})
        if fields is None:
            continue
        if fields["time"] < last.get(label, -np.inf):
            raise TimeError(
                f"Doses: row {k}, series {label}: time {fields['time']:g} comes after {last[label]:g}. Sort the frame."
            )
        last[label] = fields["time"]
        rows[label].append(fields)
    return [rows[label] for label in order], order


def _column(frame: Any, name: str, needed: bool) -> list[Any] | None:
    if name not in frame:
        if needed:
            raise DataError(f"Doses: there is no column {name!r}. There are {list(map(str, frame.columns))}.")
        return None
    return frame[name].tolist()


def _empty(value: Any) -> bool:
    return value is None or bool(value != value) or (isinstance(value, str) and value.strip() in (".", ""))


def _whole(where: str, name: str, value: float) -> int:
    if value != int(value):
        raise DataError(f"{where}: {name} is {value:g}. It is a whole number.")
    return int(value)


def _check_needed(where: str, cells: dict[str, Any], numbers: dict[str, float], kind: float) -> None:
    """What an event cannot do without."""
    if _empty(cells["TIME"]) or not np.isfinite(numbers["TIME"]):
        raise DataError(f"{where}: TIME is {cells['TIME']!r}. An event needs the time at which it was.")
    if kind != 3 and not numbers["AMT"]:
        raise DataError(
            f"{where}: a dose (EVID {kind:g}) with AMT {cells['AMT']!r}. Give the amount; an observation has EVID 0, "
            "a reset alone EVID 3."
        )


def _number(k: int, name: str, value: Any) -> float:
    """A cell as a number; an empty one is 0."""
    if _empty(value):
        return 0.0
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"Doses: row {k}, column {name}: {value!r} is not a number.") from None


def _dose(k: int, label: Any, cells: dict[str, Any]) -> dict[str, Any] | None:
    where = f"Doses: row {k}, series {label}"
    numbers = {name: _number(k, name, x) for name, x in cells.items() if name != "CMT"}
    amount, kind = numbers["AMT"], numbers["EVID"] if cells["EVID"] is not None else None
    kind = float(amount > 0) if kind is None else kind
    if kind not in (0, 1, 2, 3, 4):
        raise DataError(f"{where}: EVID is {kind:g}. It is 0 to 4.")
    if kind == 0 and amount:
        raise DataError(f"{where}: an observation (EVID 0) with AMT {amount:g}. A dose has EVID 1.")
    if kind in (0, 2):
        return None
    _check_needed(where, cells, numbers, kind)
    if numbers["SS"]:
        raise DataError(
            f"{where}: steady state (SS) is not read off. Write the doses before: an earlier TIME with ADDL, and a "
            "path that starts there."
        )
    if numbers["RATE"] < 0:
        raise DataError(
            f"{where}: RATE {numbers['RATE']:g} asks for an estimated rate or duration. Give DUR, or build "
            "sd.Dose(...)."
        )
    fields: dict[str, Any] = {"time": numbers["TIME"]}
    if kind != 3:
        fields["amount"] = amount
    into = cells["CMT"]
    if isinstance(into, str) and into.strip() not in (".", ""):
        fields["compartment"] = int(into) if into.strip().isdigit() else into
    elif _number(k, "CMT", into):
        fields["compartment"] = _whole(where, "CMT", _number(k, "CMT", into))
    named = (("RATE", "rate"), ("DUR", "duration"), ("II", "interval"))
    fields |= {new: numbers[old] for old, new in named if numbers[old] and kind != 3}
    if numbers["ADDL"] and kind != 3:
        fields["additional"] = _whole(where, "ADDL", numbers["ADDL"])
    return fields | ({"reset": True} if kind >= 3 else {})
