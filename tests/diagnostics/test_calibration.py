import numpy as np
import pytest

import stochdyn as sd
from stochdyn.diagnostics import Calibration, sbc

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
