import numpy as np
import pytest

from stochdyn.diagnostics.settling import settling

STEPS = np.arange(1500)


def noise(scale, seed=0):
    return scale * np.random.default_rng(seed).standard_t(4, size=len(STEPS))


def test_a_trace_that_had_settled():
    flat = [settling(100 * np.exp(-STEPS / 50) + noise(2, seed)).ratio for seed in range(50)]
    assert np.mean(np.array(flat) > 0.25) < 0.05


def test_a_trace_that_still_falls_or_rises():
    for sign in (1, -1):
        found = settling(noise(2) - sign * 0.02 * STEPS)
        assert found.drift == pytest.approx(sign * 10, abs=4 * found.error)
        assert found.ratio > 1
        assert found.noise == pytest.approx(2, rel=0.4)
        assert found.steps == 500


def test_a_drift_counts_against_noise_one_nat_and_the_series():
    still = 100 - 0.001 * STEPS
    assert settling(still).ratio == pytest.approx(0.5, rel=0.05)
    assert settling(still, series=100).ratio == pytest.approx(0.05, rel=0.05)
    assert settling(still + noise(50)).ratio == 0


def test_what_tells_nothing():
    assert "2 losses" in settling([1.0, 2.0])
    assert "KL weight" in settling(STEPS, np.linspace(0, 1, len(STEPS)))
    assert not isinstance(settling(STEPS, np.minimum(1, STEPS / 500)), str)
