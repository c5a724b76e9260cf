import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import stochdyn as sd

HAWKES = {"mu": 0.5, "alpha": 0.8, "beta": 1.6}


@pytest.fixture(scope="module")
def drawn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        value = sd.Hawkes(**HAWKES, t0=0.0, t1=100.0).sample((54,))
    return sd.Jumps(value, 0.0, 100.0)


def of(**changes):
    return sd.Hawkes(**{**HAWKES, **changes}, t0=0.0, t1=100.0)


def test_five_thousand_jumps_of_the_true_law_pass(drawn):
    found = sd.time_rescaling(of(), drawn)
    assert len(found.residuals) > 5000
    assert not found.rejects()
    assert "lag-1 correlation" in str(found)


def test_wrong_kernels_are_rejected(drawn):
    assert sd.time_rescaling(of(beta=2.4, alpha=1.2), drawn).rejects()  # the same branching ratio
    assert sd.time_rescaling(of(alpha=0.8 * 1.2), drawn).rejects()
    poisson = sd.time_rescaling(sd.PoissonProcess(1.0, 0.0, 100.0), drawn)
    assert poisson.rejects() and poisson.ks > 0.1


def test_right_distribution_but_dependent_gaps_are_seen_by_the_lag():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=3000)
    for k in range(1, len(scores)):
        scores[k] = 0.2 * scores[k - 1] + math.sqrt(1 - 0.04) * scores[k]
    gaps = -torch.special.log_ndtr(torch.tensor(-scores))
    found = sd.time_rescaling(sd.PoissonProcess(1.0, 0.0, 4000.0), gaps.cumsum(0)[:, None])
    assert found.ks_pvalue > 0.01 and found.lag == pytest.approx(0.2, abs=0.06) and found.rejects()


@pytest.mark.parametrize("shape", [(0, 1), (3, 0, 1)])
def test_no_jumps_at_all(shape):
    with pytest.raises(sd.DataError, match="There are 0 jumps"):
        sd.time_rescaling(sd.PoissonProcess(1.0, 0.0, 4.0), torch.zeros(shape))


def test_short_windows_bias_nothing():
    # Each window holds two jumps on average: gaps that its end cuts off must count. Control: dropped, they do not.
    torch.manual_seed(0)
    process = sd.PoissonProcess(1.0, 0.0, 2.0)
    value = process.sample((2500,))
    assert not sd.time_rescaling(process, value).rejects()
    own, _ = process.residuals(value)
    inside = own[~own.isnan()]
    assert float(inside.mean()) < 0.8


def test_level_of_the_test():
    torch.manual_seed(0)
    process = sd.PoissonProcess(1.0, 0.0, 200.0)
    rejected = sum(sd.time_rescaling(process, one).rejects(0.1) for one in process.sample((200,)))
    assert rejected < 20 + 4 * math.sqrt(18)


def test_too_few_jumps_and_the_plot(drawn):
    with pytest.raises(sd.DataError, match="There are 2 jumps"):
        sd.time_rescaling(of(), torch.tensor([[0.5], [0.7]]))
    ax = sd.plot_time_rescaling(sd.time_rescaling(of(), drawn))
    curve = ax.lines[-1].get_ydata()
    wrong = sd.plot_time_rescaling(sd.time_rescaling(sd.PoissonProcess(1.0, 0.0, 100.0), drawn))
    assert np.abs(curve).max() < 0.03 < np.abs(wrong.lines[-1].get_ydata()).max()
    plt.close("all")


def test_jumps_that_are_given_do_not_count():
    # The clock starts at the first jump and stops at the tenth. Control: counted, the zeros are seen.
    torch.manual_seed(0)
    times = torch.cumsum(torch.empty(300, 9, dtype=torch.float64).exponential_(), 1)
    times = torch.cat([torch.zeros(300, 1), times], 1)
    process = sd.PoissonProcess(1.0, torch.zeros(300), times[:, -1])
    assert not sd.time_rescaling(process, times[..., None], given=1).rejects()
    assert sd.time_rescaling(process, times[..., None]).rejects()


def test_a_window_with_fewer_jumps_than_are_given_is_left_out():
    # The clock starts at the first jump; in most windows there is none. Control: one jump in them, with what follows.
    torch.manual_seed(0)
    times = torch.cumsum(torch.empty(60, 12, dtype=torch.float64).exponential_(), 1)
    times = torch.cat([torch.zeros(60, 1), times], 1)
    empty = torch.full((120, 13), math.inf, dtype=torch.float64)
    end = torch.cat([times[:, -1], torch.full((120,), 5.0)])
    mixed = torch.cat([times, empty])[torch.arange(180).reshape(3, 60).T.flatten()]
    process = sd.PoissonProcess(1.0, torch.zeros(180), end[torch.arange(180).reshape(3, 60).T.flatten()])
    found = sd.time_rescaling(process, mixed[..., None], given=1)
    alone = sd.time_rescaling(sd.PoissonProcess(1.0, torch.zeros(60), end[:60]), times[..., None], given=1)
    np.testing.assert_allclose(found.residuals, alone.residuals)
    mixed[mixed[:, 0].isinf(), 0] = 0.0
    assert sd.time_rescaling(process, mixed[..., None], given=1).residuals.max() > alone.residuals.max()


def test_rounding_below_zero_between_jumps_is_no_missing_number():
    jumps = sd.Jumps.from_list([[0.5 + k for k in range(20)]], t0=0.0, t1=30.0)

    class Rounded(sd.PoissonProcess):
        def residuals(self, jumps):
            own, after = super().residuals(jumps)
            return torch.where(jumps[..., 0] == 9.5, -1e-17, own), after

    found = sd.time_rescaling(Rounded(1.0, torch.zeros(1).double(), 30.0), jumps)
    assert np.isfinite(found.lag) and found.residuals.min() == 0


def test_a_gap_without_a_finite_compensator_is_named():
    jumps = sd.Jumps.from_list([[0.5 + k for k in range(20)], [0.5, 9.0]], t0=0.0, t1=30.0)

    class Broken(sd.PoissonProcess):
        def residuals(self, jumps):
            own, after = super().residuals(jumps)
            return torch.where(jumps[..., 0] == 9.0, torch.nan, own), after

    with pytest.raises(sd.DataError, match="series 1, time 9: the compensator over the gap before this jump"):
        sd.time_rescaling(Broken(1.0, torch.zeros(2).double(), 30.0), jumps)
    assert len(sd.time_rescaling(sd.PoissonProcess(1.0, 0.0, 30.0), jumps).residuals) == 22
