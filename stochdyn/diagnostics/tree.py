"""Named arrays to an `xarray.DataTree` in ArviZ's layout, with numpy and xarray alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import xarray as xr

from stochdyn.errors import DataError, ShapeError

FIXED_GROUPS = ("observed_data", "constant_data", "predictions_constant_data")
SAMPLING = "variational: independent draws from the guide"


def as_array(values: Any) -> np.ndarray:
    """An array from numbers, an array, or a tensor on any device; torch is not imported for it.

    Example:
        >>> from stochdyn.diagnostics.tree import as_array
        >>> as_array([1, 2]).shape
        (2,)
    """
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


@dataclass(frozen=True)
class Variable:
    """An array whose dimensions have names.

    Attributes:
        dims: one name per dimension.
        values: the array; an array, numbers, or a tensor.

    Raises:
        ShapeError: if the number of names is not the number of dimensions.

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import Variable
        >>> Variable(("draw", "series"), np.zeros((500, 3))).sizes
        {'draw': 500, 'series': 3}
    """

    dims: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))
        object.__setattr__(self, "values", as_array(self.values))
        if len(self.dims) != self.values.ndim:
            raise ShapeError(
                f"a variable has dims {self.dims} but values of shape {self.values.shape}. "
                "Name every dimension once."
            )
        if len(set(self.dims)) != len(self.dims):
            raise ShapeError(
                f"a variable has dims {self.dims}: one name twice. Give each dimension a name of its own."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension by name."""
        return dict(zip(self.dims, self.values.shape, strict=True))


Groups = Mapping[str, Mapping[str, Variable]]
Coords = Mapping[str, Sequence[Any] | np.ndarray | Variable]


def build_tree(
    groups: Groups, coords: Coords | None = None, attrs: Mapping[str, Any] | None = None
) -> xr.DataTree:
    """Build the tree that ArviZ reads: one node per group, `(chain, draw, ...)` where there are draws.

    Variables come with `draw` first and get `chain` of size 1 in front of it; those of `observed_data`,
    `constant_data` and `predictions_constant_data` have neither. A dimension means the same in every
    group, `draw` apart; forecasts at other times need a time dimension of their own.

    Args:
        groups: variables by group (`posterior`, `log_likelihood`, `observed_data` ...) and name.
        coords: labels of a dimension by its name, 1-D; without them it is numbered from 0. A `Variable` is a
            coordinate over the dims that it names, stored in each group that has them all. Where it has the
            name of a dimension but more dims (own times of each series: `"time": Variable(("series", "time"),
            times)`), it is stored as `time_value`, because `time` numbers the rows.
        attrs: text or numbers, added to every node.

    Returns:
        The tree. Every node says `inference_library`, its version, `created_at` (UTC), and `sampling`: the
        draws are independent, so rhat and the effective sample size say nothing about the quality of the fit.

    Raises:
        ShapeError: if a variable lacks `draw`, has it where it must not, or two variables disagree on a size.
        DataError: if `sample_stats` holds NaN, or a coordinate belongs to no variable.

    References:
        ArviZ, InferenceData schema specification, https://python.arviz.org/en/stable/schema/schema.html

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import Variable, build_tree
        >>> theta = Variable(("draw", "subject"), np.random.default_rng(0).normal(size=(500, 3)))
        >>> tree = build_tree({"posterior": {"theta": theta}}, coords={"subject": ["a", "b", "c"]})
        >>> dict(tree["posterior"].sizes)
        {'chain': 1, 'draw': 500, 'subject': 3}
    """
    coords = dict(coords or {})
    for group, name, variable in _walk(groups):
        _check_draws(group, name, variable)
    sizes = _common_sizes(groups)
    placed = dict(_place(coords, sizes))
    everywhere = _provenance() | dict(attrs or {})
    nodes = {f"/{group}": _dataset(group, named, placed, everywhere) for group, named in groups.items()}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=everywhere), **nodes})


def _walk(groups: Groups) -> Iterator[tuple[str, str, Variable]]:
    return ((group, name, variable) for group, named in groups.items() for name, variable in named.items())


def _check_draws(group: str, name: str, variable: Variable) -> None:
    where = f"{group}/{name} has dims {variable.dims}"
    if group in FIXED_GROUPS:
        if {"chain", "draw"} & set(variable.dims):
            raise ShapeError(f"{where}, but {group} holds no draws. Put it into another group.")
        return
    if variable.dims[:1] != ("draw",) or "chain" in variable.dims:
        raise ShapeError(f"{where}. Give it `draw` first and no `chain`: the builder adds chain=1.")
    if group == "sample_stats" and variable.values.dtype.kind == "f" and np.isnan(variable.values).any():
        count = int(np.isnan(variable.values).sum())
        raise DataError(
            f"{group}/{name}: {count} of {variable.values.size} values are NaN. "
            "The model diverged there, or the guide left its support: look at these draws, do not drop them."
        )


def _common_sizes(groups: Groups) -> dict[str, int]:
    """The size of each dimension, `draw` included; a dimension has one size, `draw` one in each group."""
    first: dict[tuple[str, str], tuple[str, int]] = {}
    for group, name, variable in _walk(groups):
        for dim, size in variable.sizes.items():
            scope = group if dim == "draw" else ""
            seen, known = first.setdefault((scope, dim), (f"{group}/{name}", size))
            if known != size:
                raise ShapeError(
                    f"dimension {dim!r} has size {known} in {seen} and {size} in {group}/{name}. "
                    "Give one of them another dimension name."
                )
    return {dim: size for (_, dim), (_, size) in first.items()}


def _place(coords: Coords, sizes: Mapping[str, int]) -> Iterator[tuple[str, Variable]]:
    """Coordinates as variables, checked against the sizes, under the name they are stored by."""
    for name, given in coords.items():
        coord = given if isinstance(given, Variable) else Variable((name,), _labels(name, given))
        unknown = [dim for dim in coord.dims if dim not in sizes or dim in ("chain", "draw")]
        if unknown:
            known = sorted(set(sizes) - {"draw"})
            raise DataError(
                f"coords[{name!r}] is over {unknown}, which no variable has; the dimensions are {known}. "
                "Correct the name or leave it out."
            )
        for dim, size in coord.sizes.items():
            if size != sizes[dim]:
                raise ShapeError(
                    f"coords[{name!r}] has {size} values along {dim!r}, the variables have {sizes[dim]}. "
                    "Give one for each."
                )
        is_index = coord.dims == (name,)
        yield (f"{name}_value" if name in sizes and not is_index else name), coord


def _labels(name: str, given: Sequence[Any] | np.ndarray) -> np.ndarray:
    labels = as_array(given)
    if labels.ndim != 1:
        raise ShapeError(
            f"coords[{name!r}] has shape {labels.shape}; the labels of a dimension are 1-D. "
            "For a coordinate over several dimensions give a Variable, which names them."
        )
    return labels


def _dataset(
    group: str, named: Mapping[str, Variable], placed: Mapping[str, Variable], attrs: Mapping[str, Any]
) -> xr.Dataset:
    drawn = group not in FIXED_GROUPS
    data = {
        name: (("chain", *v.dims), v.values[None]) if drawn else (v.dims, v.values)
        for name, v in named.items()
    }
    sizes = {dim: size for v in named.values() for dim, size in v.sizes.items()}
    if drawn:
        sizes = {"chain": 1} | sizes
    coords: dict[str, Any] = {dim: (dim, np.arange(size)) for dim, size in sizes.items()}
    coords |= {name: (c.dims, c.values) for name, c in placed.items() if set(c.dims) <= set(sizes)}
    clash = sorted(set(coords) & set(data))
    if clash:
        raise DataError(
            f"{group}: {clash} are both variables and dimensions or coordinates. Rename one of each."
        )
    return xr.Dataset(data, coords=coords, attrs=dict(attrs))


def _provenance() -> dict[str, Any]:
    try:
        installed = version("stochdyn")
    except PackageNotFoundError:  # a checkout on the path, never installed
        installed = "unknown"
    return {
        "inference_library": "stochdyn",
        "inference_library_version": installed,
        "created_at": datetime.now(UTC).isoformat(),
        "sampling": SAMPLING,
    }
