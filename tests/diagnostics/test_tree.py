import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from stochdyn.diagnostics.tree import Variable, build_tree
from stochdyn.errors import DataError, ShapeError

PACKAGE = Path(__file__).parents[2] / "stochdyn"

WITHOUT_TORCH = """
import importlib.util, sys, types
sys.modules["torch"] = None
package = types.ModuleType("stochdyn")
package.__path__ = [{package!r}]
sys.modules["stochdyn"] = package
spec = importlib.util.spec_from_file_location("tree", {file!r})
tree = importlib.util.module_from_spec(spec)
sys.modules["tree"] = tree
spec.loader.exec_module(tree)
built = tree.build_tree({{"posterior": {{"mu": tree.Variable(("draw",), [1.0, 2.0])}}}})
print(dict(built["posterior"].sizes), "arviz" in sys.modules)
"""


def test_needs_neither_torch_nor_arviz():
    script = WITHOUT_TORCH.format(package=str(PACKAGE), file=str(PACKAGE / "diagnostics" / "tree.py"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{'chain': 1, 'draw': 2} False", done.stderr


def test_adds_the_chain_where_there_are_draws_only():
    tree = build_tree(
        {
            "posterior": {"mu": Variable(("draw", "subject"), np.ones((5, 3)))},
            "prior": {"mu": Variable(("draw", "subject"), np.ones((7, 3)))},
            "observed_data": {"y": Variable(("subject", "time"), np.ones((3, 4)))},
        }
    )
    assert tree["posterior"]["mu"].dims == ("chain", "draw", "subject")
    assert dict(tree["prior"].sizes) == {"chain": 1, "draw": 7, "subject": 3}
    assert dict(tree["observed_data"].sizes) == {"subject": 3, "time": 4}


def test_values_and_coordinates_arrive():
    values = np.arange(6.0).reshape(2, 3)
    tree = build_tree(
        {"posterior": {"mu": Variable(("draw", "subject"), values)}}, coords={"subject": ["a", "b", "c"]}
    )
    mu = tree["posterior"]["mu"]
    assert mu.sel(subject="b").values.tolist() == [[1.0, 4.0]]
    assert mu.coords["draw"].values.tolist() == [0, 1]


def test_own_times_become_a_second_coordinate():
    own = Variable(("series", "time"), [[0.0, 1.0, 2.0], [0.5, 0.7, 9.0]])
    tree = build_tree(
        {
            "posterior": {"theta": Variable(("draw", "series"), np.zeros((4, 2)))},
            "observed_data": {"y": Variable(("series", "time"), np.zeros((2, 3)))},
        },
        coords={"time": own, "group": Variable(("series",), ["x", "y"])},
    )
    y = tree["observed_data"]["y"]
    assert y.coords["time"].values.tolist() == [0, 1, 2]
    assert y.coords["time_value"].sel(series=1).values.tolist() == [0.5, 0.7, 9.0]
    assert "time_value" not in tree["posterior"].coords
    assert tree["posterior"].coords["group"].values.tolist() == ["x", "y"]


def test_says_where_the_draws_come_from():
    tree = build_tree({"posterior": {"mu": Variable(("draw",), np.ones(3))}}, attrs={"steps": 2000})
    for node in (tree, tree["posterior"]):
        assert node.attrs["inference_library"] == "stochdyn"
        assert node.attrs["sampling"] == "variational: independent draws from the guide"
        assert node.attrs["steps"] == 2000
        assert set(node.attrs) >= {"inference_library_version", "created_at"}


def test_takes_tensors():
    variable = Variable(("draw",), torch.ones(3, requires_grad=True))
    assert isinstance(variable.values, np.ndarray)


def test_a_file_opens_with_xarray_alone(tmp_path):
    built = build_tree(
        {"posterior": {"mu": Variable(("draw", "who"), np.ones((3, 2)))}}, coords={"who": ["a", "b"]}
    )
    built.to_netcdf(tmp_path / "fit.nc")
    with xr.open_datatree(tmp_path / "fit.nc") as tree:
        assert tree["posterior"]["mu"].sel(who="b").values.tolist() == [[1.0, 1.0, 1.0]]


def mu(*dims, shape=None):
    return {"mu": Variable(("draw", *dims), np.ones(shape or (4,) * (1 + len(dims))))}


@pytest.mark.parametrize(
    ("groups", "coords", "error", "message"),
    [
        (
            {"posterior": {"mu": Variable(("time",), np.ones(4))}},
            {},
            ShapeError,
            "posterior/mu .* `draw` first",
        ),
        ({"posterior": {"mu": Variable(("draw", "chain"), np.ones((4, 1)))}}, {}, ShapeError, "no `chain`"),
        ({"observed_data": mu()}, {}, ShapeError, "observed_data holds no draws"),
        (
            {"posterior": mu("time"), "log_likelihood": mu("time", shape=(4, 5))},
            {},
            ShapeError,
            "'time' has size 4 in posterior/mu and 5 in log_likelihood/mu",
        ),
        (
            {"posterior": mu() | {"nu": Variable(("draw",), np.ones(3))}},
            {},
            ShapeError,
            "'draw' has size 4 in posterior/mu and 3 in posterior/nu",
        ),
        (
            {"sample_stats": {"lp": Variable(("draw",), [0.0, np.nan, np.nan])}},
            {},
            DataError,
            "sample_stats/lp: 2 of 3 values are NaN",
        ),
        ({"posterior": mu("time")}, {"tiem": [1, 2]}, DataError, r"'tiem'.* the dimensions are \['time'\]"),
        ({"posterior": mu("time")}, {"draw": [1, 2, 3, 4]}, DataError, "'draw'"),
        ({"posterior": mu("time")}, {"time": [1, 2, 3]}, ShapeError, "has 3 values along 'time', .* have 4"),
        ({"posterior": mu("time")}, {"time": np.ones((2, 4))}, ShapeError, "1-D. .*Variable"),
        ({"posterior": mu("mu")}, {}, DataError, r"\['mu'\] are both"),
    ],
)
def test_bad_input_is_refused(groups, coords, error, message):
    with pytest.raises(error, match=message):
        build_tree(groups, coords)


def test_a_variable_checks_its_dims():
    with pytest.raises(ShapeError, match=r"dims \('draw', 'time'\) but values of shape \(3,\)"):
        Variable(("draw", "time"), np.ones(3))
    with pytest.raises(ShapeError, match="one name twice"):
        Variable(("draw", "draw"), np.ones((3, 3)))
