import numpy as np
import pytest

from stochdyn.diagnostics.coverage import Coverage
from stochdyn.diagnostics.diagnosis import LatentUse
from stochdyn.diagnostics.importance import ParetoK
from stochdyn.diagnostics.rescaling import TimeRescaling
from stochdyn.diagnostics.settling import Settling
from stochdyn.diagnostics.verdicts import (
    judge_coverage,
    judge_gap,
    judge_latents,
    judge_rescaling,
    judge_settling,
    judge_tail,
    judge_tails,
)
from stochdyn.diagnostics.weights import Estimate


def k(value):
    return ParetoK(value, False, 1000, 2 / 3, 100.0)


@pytest.mark.parametrize(
    ("gap", "points", "level"), [(0.4, 5, "good"), (1.0, 5, "fair"), (3.0, 5, "bad"), (3.0, 200, "good")]
)
def test_a_gap_counts_against_the_readings(gap, points, level):
    found = judge_gap(Estimate(np.array([gap]), np.array([0.01])), ["Ada"], np.array([points]), None)
    assert found.level == level and "'Ada'" in found.found
    assert bool(found.advice) == (level != "good")


def test_a_gap_must_be_surer_than_its_error_and_shared_latents_count():
    unsure = Estimate(np.array([3.0]), np.array([2.0]))
    assert judge_gap(unsure, ["Ada"], np.array([5]), None).level == "good"
    assert judge_gap(unsure, ["Ada"], np.array([5]), Estimate(5.0, 0.1)).level == "bad"


@pytest.mark.parametrize(
    ("khat", "numbers", "gap", "level"),
    [
        (0.3, 1, 0.05, "good"),
        (0.3, 1, 0.3, "bad"),
        (0.8, 1, 0.05, "fair"),
        (0.8, 1, 0.3, "bad"),
        (1.2, 1, 0.05, "bad"),
        (1.2, 100, 1.0, "fair"),
        (1.2, 100, 5.0, "bad"),
        (np.nan, 1, 0.0, "bad"),
    ],
)
def test_one_tail(khat, numbers, gap, level):
    assert judge_tail(k(khat), "theta", numbers, Estimate(gap, 0.01)).level == level


def test_weights_that_hardly_differ_have_no_tail_worth_naming():
    flat = ParetoK(2.5, False, 1000, 2 / 3, 998.0)
    assert judge_tail(flat, "theta", 1, Estimate(1e-4, 1e-5)).found.startswith(
        "weights nearly equal, worth 998"
    )
    both = Estimate(np.full(2, 1e-4), np.full(2, 1e-5))
    assert judge_tails([flat, flat], ["a", "b"], "theta", 1, both).level == "good"


def test_tails_of_series():
    gap = Estimate(np.full(20, 0.05), np.full(20, 0.01))
    ids = list(range(20))
    assert judge_tails([k(0.2)] * 20, ids, "z", 2, gap).level == "good"
    assert judge_tails([k(0.2)] * 19 + [k(0.9)], ids, "z", 2, gap).level == "fair"
    some = judge_tails([k(0.2)] * 15 + [k(0.8)] * 4 + [k(0.9)], ids, "z", 2, gap)
    assert some.level == "bad" and "series 19" in some.found
    narrow = Estimate(np.full(20, 0.5), np.full(20, 0.01))
    assert judge_tails([k(0.2)] * 20, ids, "z", 2, narrow).level == "bad"
    assert "not finite" in judge_tails([k(0.2)] * 19 + [k(np.nan)], ids, "z", 2, gap).found


def use(**changes):
    ones = np.ones((5, 1))
    given = {"local": True, "posterior_sd": 0.3 * ones, "prior_sd": ones, "units": 1, "active": 1, "kl": 1.0}
    return LatentUse("z", **{**given, **changes})


def test_latents():
    ones = np.ones((5, 1))
    same = use(posterior_sd=ones, active=0, kl=0.001)
    assert judge_latents([use()], True).level == "good"
    assert judge_latents([same], False).level == "bad"
    assert judge_latents([same], True).level == "fair"
    assert judge_latents([use(posterior_sd=0 * ones)], True).level == "bad"
    idle = use(posterior_sd=ones, local=False, active=None, kl=0.0)
    assert judge_latents([idle], True).found == "posterior = prior: z"
    assert judge_latents([], True).level == "good"
    assert judge_latents([use(prior_sd=np.nan * ones)], True).level == "-"


def ranks(scale, size=1000):
    from scipy import stats

    return stats.norm.cdf(stats.norm.ppf((np.arange(size) + 0.5) / size) * scale)


@pytest.mark.parametrize(("scale", "level"), [(1.0, "good"), (1.25, "fair"), (2.0, "bad"), (0.5, "fair")])
def test_coverage(scale, level):
    assert judge_coverage(Coverage.of(("y",), [ranks(scale)], how="hidden")).level == level


def test_smoothing_may_cover_too_much_and_few_values_say_little():
    assert judge_coverage(Coverage.of(("y",), [ranks(0.5)], how="seen")).level == "-"
    assert judge_coverage(Coverage.of(("y",), [ranks(2.0)], how="seen")).level == "bad"
    assert judge_coverage(Coverage.of(("y",), [ranks(2.0, size=6)], how="hidden")).level == "good"
    assert judge_coverage(Coverage.of(("y",), [np.zeros(0)], how="hidden")).level == "-"


def test_the_channel_that_is_furthest_off_is_named():
    found = judge_coverage(Coverage.of(("a", "b"), [ranks(1.0), ranks(2.0)], how="hidden"))
    assert found.level == "bad" and "'b'" in found.found


def test_of_many_tails_a_bad_one_is_named_and_not_a_rounding_error():
    equal = ParetoK(1.5, False, 1000, 2 / 3, 999.0)
    found = judge_tails([equal, k(0.9), k(0.2)], "abc", "z", 2, Estimate(np.ones(3), np.zeros(3)))
    assert (
        found.level == "bad"
        and found.found.startswith("1 of 3 series")
        and "0.90 in series 'b'" in found.found
    )


def test_the_verdict_of_coverage_is_about_the_channel_that_it_comes_from():
    few_values, wide = np.array([0.1, 0.9, 0.15, 0.8, 0.99]), ranks(0.5)
    found = judge_coverage(Coverage.of(("a", "b"), [few_values, wide], how="hidden"))
    assert found.level == "fair" and "'b'" in found.found and "wider" in found.advice
    middle = np.where(np.arange(2000) % 20 < 18, 0.5 + 0.44 * np.sign(np.arange(2000) % 2 - 0.5), 0.99)
    found = judge_coverage(Coverage.of(("a", "b"), [few_values, middle], how="hidden"))
    assert found.level == "bad" and "'b'" in found.found and "narrow" in found.advice


def test_jumps_and_training():
    assert judge_rescaling({"y": TimeRescaling(np.ones(20), 0.1, 0.5, 0.0, 0.9)}).level == "good"
    assert judge_rescaling({"y": TimeRescaling(np.ones(20), 0.1, 0.5, 0.5, 1e-9)}).level == "bad"
    assert judge_settling("no losses").level == "-"
    assert judge_settling(Settling(0.1, 1.0, 2.0, 100)).level == "good"
    assert judge_settling(Settling(1.0, 0.1, 2.0, 100)).level == "fair"
    rises = judge_settling(Settling(-9.0, 0.1, 2.0, 100))
    assert rises.level == "bad" and "lower lr" in rises.advice
