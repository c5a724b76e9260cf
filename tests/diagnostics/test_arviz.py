import arviz as az
import numpy as np
import pytest

from stochdyn.diagnostics import arviz as bridge
from stochdyn.diagnostics.arviz import to_inference_data
from stochdyn.diagnostics.tree import Variable, build_tree

DRAWS, SERIES, TIME = 1000, 3, 12


@pytest.fixture
def tree():
    """A normal mean per series under a flat prior, drawn from its exact posterior."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(SERIES, TIME))
    theta = y.mean(1) + rng.normal(size=(DRAWS, SERIES)) / np.sqrt(TIME)
    log_lik = -0.5 * (y - theta[..., None]) ** 2 - 0.5 * np.log(2 * np.pi)
    return build_tree(
        {
            "posterior": {"theta": Variable(("draw", "series"), theta)},
            "log_likelihood": {"y": Variable(("draw", "series", "time"), log_lik)},
            "sample_stats": {"lp": Variable(("draw",), log_lik.sum((1, 2)))},
            "observed_data": {"y": Variable(("series", "time"), y)},
        },
        coords={"series": ["a", "b", "c"], "time": Variable(("series", "time"), rng.uniform(size=y.shape))},
    )


def test_summary_reads_it(tree):
    table = az.summary(to_inference_data(tree), var_names=["theta"], kind="stats", round_to="none")
    assert list(table.index) == ["theta[a]", "theta[b]", "theta[c]"]
    np.testing.assert_allclose(table["mean"], tree["posterior"]["theta"].mean(("chain", "draw")))


def test_leave_one_out_equals_the_closed_form(tree):
    loo = az.loo(to_inference_data(tree), pointwise=True)
    assert loo.n_data_points == SERIES * TIME
    y = tree["observed_data"]["y"].values
    rest = (y.sum(1, keepdims=True) - y) / (TIME - 1)
    variance = 1 + 1 / (TIME - 1)
    exact = -0.5 * (y - rest) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)
    # Over five other seeds the error was .05 at most in a term, and .05 in the sum.
    np.testing.assert_allclose(loo.loo_i.values, exact, atol=0.15)
    assert abs(loo.elpd_loo - exact.sum()) < 0.2
    left_in = np.log(np.exp(tree["log_likelihood"]["y"]).mean(("chain", "draw"))).sum().item()
    assert left_in - exact.sum() > 1  # the control: without leaving one out it is 1.8 to 3.6 too high


def test_round_trip_through_a_file(tree, tmp_path):
    data = to_inference_data(tree)
    path = str(tmp_path / "fit.nc")
    data.to_netcdf(path)
    back = az.from_netcdf(path)
    for group in ("posterior", "log_likelihood", "sample_stats", "observed_data"):
        assert back[group].load().identical(data[group]), group
    assert back.attrs["inference_library"] == "stochdyn"
    assert "time_value" in back["observed_data"].coords


@pytest.mark.parametrize(("version", "is_tree"), [("0.23.4", False), ("1.0.0", True), ("1.3.0rc1", True)])
def test_the_version_number_decides(tree, monkeypatch, version, is_tree):
    monkeypatch.setattr(bridge.az, "__version__", version)
    assert (to_inference_data(tree) is tree) == is_tree
