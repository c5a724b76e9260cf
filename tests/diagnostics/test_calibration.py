import numpy as np
import pytest

import stochdyn as sd
from stochdyn.diagnostics import Calibration, sbc, tarp

SIMULATIONS, DRAWS = 1000, 100


def ranks(scale=1.0, shift=0.0, seed=0, ignore=False):
    """Normal mean with one observation: posterior N(y/2, 1/2), distorted."""
    rng = np.random.default_rng(seed)
    mu = rng.normal(size=SIMULATIONS)
    y = mu + rng.normal(size=SIMULATIONS)
    noise = rng.normal(size=(DRAWS, SIMULATIONS))
    draws = noise if ignore else y / 2 + (shift + scale * noise) * 0.5**0.5

    def log_likelihood(m):
        return -0.5 * (y - m) ** 2

    return Calibration(
        {"mu": (draws < mu).sum(0), "loglik": (log_likelihood(draws) < log_likelihood(mu)).sum(0)}, DRAWS
    )


def test_a_right_posterior_passes_at_the_promised_rate():
    rejected = sum(not ranks(seed=k).passed(0.05) for k in range(100))
    assert rejected <= 5 + 4 * (100 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("distorted", [{"scale": 0.8}, {"scale": 1.25}, {"shift": 0.3}])
def test_a_wrong_posterior_is_rejected(distorted):
    assert all(not ranks(seed=k, **distorted).passed(0.01) for k in range(10))


def test_a_missing_likelihood_shows_only_in_the_log_likelihood():
    found = ranks(ignore=True)
    assert found.p_value("mu") > 0.01
    assert found.p_value("loglik") < 0.01
    assert not found.passed(0.01)


def test_coverage_of_a_right_and_of_a_narrow_posterior():
    error = (0.9 * 0.1 / SIMULATIONS) ** 0.5
    assert abs(ranks().coverage("mu", 0.9) - 0.9) < 4 * error
    assert ranks(scale=0.8).coverage("mu", 0.9) < 0.9 - 4 * error


def test_the_band_holds_the_ranks_of_a_right_posterior():
    found = ranks()
    positions, lower, upper = found.band("mu", alpha=0.01)
    ecdf = np.array([(found.ranks["mu"] < k).mean() for k in range(1, DRAWS + 1)])
    assert positions.shape == lower.shape == upper.shape == (DRAWS,)
    assert ((lower <= ecdf) & (ecdf <= upper)).all()
    wrong = ranks(scale=0.7).ranks["mu"]
    ecdf = np.array([(wrong < k).mean() for k in range(1, DRAWS + 1)])
    assert not ((lower <= ecdf) & (ecdf <= upper)).all()


def test_one_simulation_per_call_gives_as_many_as_asked_for():
    def simulate(rng):
        mu = rng.normal()
        return {"mu": mu}, mu + rng.normal()

    def infer(y):
        return {"mu": y / 2 + np.random.default_rng(int(abs(y) * 1e6)).normal(size=20) * 0.5**0.5}

    found = sbc(simulate, infer, simulations=50, progress=False)
    assert found.ranks["mu"].shape == (50,)
    assert found.draws == 20
    assert "quantity" in str(found)


def test_ties_are_broken_at_random():
    found = sbc(
        lambda rng: ({"n": np.zeros(2000)}, None), lambda _: {"n": np.zeros((9, 2000))}, progress=False
    )
    assert found.passed(0.001)


def test_bad_input_is_named():
    with pytest.raises(sd.ShapeError, match=r"`simulate` gives \['a'\], `infer` gives \['b'\]"):
        sbc(lambda rng: ({"a": 0.0}, None), lambda _: {"b": np.zeros(3)}, progress=False)
    with pytest.raises(sd.DataError, match="'a': a true value or a draw is not finite"):
        sbc(lambda rng: ({"a": np.nan}, None), lambda _: {"a": np.zeros(3)}, progress=False)
    with pytest.raises(sd.ShapeError, match=r"'a': truth has shape \(2,\), draws \(3, 5\)"):
        sbc(lambda rng: ({"a": np.zeros(2)}, None), lambda _: {"a": np.zeros((3, 5))}, progress=False)
    with pytest.raises(sd.DataError, match="`simulations` must be at least 1"):
        sbc(lambda rng: ({}, None), lambda _: {}, simulations=0)


def joint(seed=0, scale=1.0, shift=0.0, r=0.8, ignore=False):
    """Two means, of prior N(0, 1), with one observation each whose errors are correlated by 0.8; r is what the
    posterior uses. Returns truth, draws and data."""
    rng = np.random.default_rng(seed)
    mu = rng.normal(size=(SIMULATIONS, 2))
    noise = np.array([[1, 0.8], [0.8, 1]])
    y = mu + rng.normal(size=(SIMULATIONS, 2)) @ np.linalg.cholesky(noise).T
    covariance = np.linalg.inv(np.eye(2) + np.linalg.inv(noise))
    mean = y @ (covariance @ np.linalg.inv(noise)).T
    right = covariance[0, 1] / covariance[0, 0]
    used = np.diag(np.diag(covariance)) @ np.array([[1, right * r / 0.8], [right * r / 0.8, 1]])
    z = rng.normal(size=(DRAWS, SIMULATIONS, 2))
    draws = z if ignore else mean + shift + scale * z @ np.linalg.cholesky(used).T
    return mu, draws, y


def test_distances_of_a_right_posterior_pass_at_the_promised_rate():
    rejected = sum(not tarp(*joint(seed=k)[:2], seed=k).passed(0.05) for k in range(60))
    assert rejected <= 60 * 0.05 + 4 * (60 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("distorted", [{"scale": 0.8}, {"scale": 1.25}])
def test_distances_find_a_wrong_spread(distorted):
    assert all(not tarp(*joint(seed=k, **distorted)[:2]).passed(0.01) for k in range(5))


def test_distances_often_find_a_wrong_correlation_and_the_ranks_of_single_quantities_never():
    joint_found, single_found = 0, 0
    for k in range(20):
        truth, draws, _ = joint(seed=k, r=-0.8)
        joint_found += not tarp(truth, draws).passed(0.01)
        single = {str(i): (draws[..., i] < truth[:, i]).sum(0) for i in range(2)}
        single_found += not Calibration(single, DRAWS).passed(0.01)
    assert joint_found >= 7
    assert single_found <= 0.2 + 4 * 0.2**0.5


def test_references_that_depend_on_the_data_find_a_posterior_that_ignores_them():
    truth, draws, y = joint(ignore=True)
    assert tarp(truth, draws).passed(0.01)
    assert not tarp(truth, draws, references=y).passed(0.01)
    truth, draws, y = joint()
    assert tarp(truth, draws, references=y).passed(0.01)


def test_distances_do_not_depend_on_units():
    truth, draws, _ = joint()
    scale = np.array([1e-6, 1e3])
    assert (
        tarp(truth, draws).ranks["distance"] == tarp(truth * scale, draws * scale).ranks["distance"]
    ).mean() > 0.999


def test_bad_input_of_distances_is_named():
    truth, draws, _ = joint()
    with pytest.raises(sd.ShapeError, match=r"truth has shape \(1000, 2\), draws \(100, 1000, 1\)"):
        tarp(truth, draws[..., :1])
    with pytest.raises(sd.ShapeError, match=r"references have shape \(2,\)"):
        tarp(truth, draws, references=np.zeros(2))
    with pytest.raises(sd.DataError, match="one simulation"):
        tarp(truth[:1], draws[:, :1])
    with pytest.raises(sd.DataError, match="not finite"):
        tarp(np.where(truth == truth[3, 1], np.nan, truth), draws, references=np.zeros_like(truth))
