"""Limits of quantification and intervals of a `Series`: what is read, kept, sliced and refused."""

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd

F64 = torch.float64
INF, NAN = float("inf"), float("nan")
TIMES = [0.0, 1.0, 2.0]
VALUES = [[[0.02, 5.0], [0.3, 99.0], [2.0, 7.0]], [[0.0, 1.0], [1.0, 2.0], [0.1, 200.0]]]


def series(**options):
    return sd.Series(
        TIMES, torch.tensor(VALUES, dtype=F64), **{"lower": [0.1, -INF], "upper": [INF, 50.0], **options}
    )


def test_a_value_at_or_past_a_limit_is_censored():
    s = series()
    assert s.censored.tolist() == [
        [[True, False], [False, True], [False, False]],
        [[True, False], [False, False], [True, True]],
    ]
    assert s.values[0].tolist() == [[0.1, 5.0], [0.3, 50.0], [2.0, 7.0]]
    assert (s.low[0, 0, 0], s.high[0, 0, 0]) == (-INF, 0.1)
    assert (s.low[0, 1, 1], s.high[0, 1, 1]) == (50.0, INF)
    assert (s.low[0, 2, 0], s.high[0, 2, 0]) == (-INF, INF)


def test_a_limit_may_have_every_shape():
    for lower in (0.1, [0.1, 0.1], torch.full((2, 1, 1), 0.1), torch.full((2, 3, 2), 0.1, dtype=F64)):
        assert series(lower=lower).censored.equal(series(lower=0.1).censored)
    own = series(lower=torch.tensor([0.01, 1.5])[:, None, None], upper=None)
    assert own.censored[0].sum() == 0 and own.censored[1].sum() == 4


def test_a_value_recorded_as_the_limit_is_at_the_limit_in_single_precision():
    s = sd.Series(TIMES, torch.tensor(VALUES), lower=0.1)
    assert s.censored[1, 2, 0]
    assert torch.tensor(0.1).double() > 0.1  # what a comparison in double precision would have said


def test_intervals():
    low, high = torch.full((2, 3, 2), NAN), torch.full((2, 3, 2), NAN)
    low[0, 2, 1], high[0, 2, 1] = 6.0, 9.0
    low[1, 1, 0], high[1, 1, 0] = -INF, 3.0
    values = torch.tensor(VALUES, dtype=F64)
    values[0, 2, 1] = NAN  # what lies in an interval needs no value
    s = sd.Series(TIMES, values, lower=[0.1, -INF], between=(low, high))
    assert (s.low[0, 2, 1], s.high[0, 2, 1], s.values[0, 2, 1]) == (6.0, 9.0, 7.5)
    assert (s.low[1, 1, 0], s.high[1, 1, 0], s.values[1, 1, 0]) == (-INF, 3.0, 3.0)
    assert s.censored.sum() == 5


def test_what_is_missing_is_not_censored():
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[0, 0, 0] = False
    s = series(mask=mask)
    assert not s.censored[0, 0, 0]
    assert s.values[0, 0, 0] == 2.0  # an exact value of the channel stands in, not a limit


def test_limits_that_censor_nothing_leave_no_trace():
    plain = sd.Series(TIMES, torch.tensor(VALUES))
    limited = sd.Series(TIMES, torch.tensor(VALUES), lower=-1.0, upper=1000.0)
    assert limited.low is None and limited.high is None
    assert repr(plain) == repr(limited) and not limited.censored.any()


def test_slices_splits_devices_and_further_times():
    s = series(groups={"site": ["a", "b"]})
    assert s[1].high.equal(s.high[1:]) and s[[1, 0]].low.equal(s.low[[1, 0]])
    assert s[1].values.equal(s.values[1:])
    first, second = s.split(0.5)
    assert first.censored.sum() + second.censored.sum() == s.censored.sum()
    single = s.to(torch.float32)
    assert single.low.dtype == single.high.dtype == torch.float32
    assert single.censored.equal(s.censored) and single.values[0, 0, 0] == torch.tensor(0.1)
    assert s.to("cpu").high.equal(s.high)
    ahead = s.extend([0.5, 3.0])
    assert ahead.censored[:, [0, 2, 3]].equal(s.censored) and not ahead.censored[:, [1, 4]].any()
    assert ahead.high[:, [0, 2, 3]].equal(s.high)
    assert "100% observed, 42% of them censored, torch.float64" in repr(s)


def test_from_a_list():
    rows = [([0.0, 1.0], [[0.02], [3.0]]), ([0.5], [[0.3]])]
    s = sd.Series.from_list(rows, lower=0.1)
    assert s.censored.flatten().tolist() == [True, False, False, False]
    own = sd.Series.from_list(rows, lower=[[[0.01], [5.0]], [[0.4]]])
    assert own.censored.flatten().tolist() == [False, True, True, False]
    inside = sd.Series.from_list(rows, between=([[[NAN], [2.0]], [[NAN]]], [[[NAN], [4.0]], [[NAN]]]))
    assert inside.censored.flatten().tolist() == [False, True, False, False]
    with pytest.raises(sd.ShapeError, match="lower of series 1"):
        sd.Series.from_list(rows, lower=[[[0.01], [5.0]], [[0.4], [0.4]]])


def test_from_a_frame():
    frame = pd.DataFrame(
        {
            "id": [1, 1, 2], "day": [1.0, 0.0, 0.0], "a": [0.02, 3.0, NAN], "b": [9.0, 1.0, 1.0],
            "loq": [0.1, 0.1, NAN], "from": [NAN, NAN, 2.0], "to": [NAN, NAN, 4.0],
        }
    )  # fmt: skip
    s = sd.Series.from_frame(frame, "day", ["a", "b"], "id", lower=["loq", None], upper=[None, 8.0])
    assert s.censored[0].tolist() == [[False, False], [True, True]]
    assert s.mask[1, 0].tolist() == [False, True]
    s = sd.Series.from_frame(frame, "day", "a", "id", between=("from", "to"))
    assert s.mask[1, 0, 0] and (s.low[1, 0, 0], s.high[1, 0, 0]) == (2.0, 4.0)
    with pytest.raises(sd.ShapeError, match="`lower` has 1 entries for 2 channels"):
        sd.Series.from_frame(frame, "day", ["a", "b"], "id", lower=["loq"])
    with pytest.raises(sd.DataError, match="Column 'limit' is not in"):
        sd.Series.from_frame(frame, "day", "a", "id", lower="limit")


PLACE = "series 0, time 0, channel 0: "


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"lower": 3.0, "upper": 1.0},
            sd.DataError,
            PLACE + r"`lower` is not below `upper` \(got 3 and 1\)\. A value",
        ),
        ({"lower": 1.0, "upper": 1.0}, sd.DataError, PLACE + "`lower` is not below `upper`"),
        ({"lower": NAN}, sd.DataError, PLACE + "a limit is NaN. Write -inf or inf"),
        ({"lower": [1.0, 2.0, 3.0]}, sd.ShapeError, r"`lower` must be a number, \(channel,\) = \(2,\)"),
        ({"lower": torch.zeros(2, 3)}, sd.ShapeError, r"got \(2, 3\). One limit for each series is"),
        ({"between": (2.0, 2.0)}, sd.DataError, PLACE + r"`between` is empty \(got 2 and 2\)"),
        ({"between": (2.0, NAN)}, sd.DataError, PLACE + "one end of `between` is NaN"),
        ({"between": (-INF, INF)}, sd.DataError, PLACE + "`between` says nothing. Set its mask to False"),
        ({"between": 2.0}, sd.ShapeError, r"`between` must be a pair \(low, high\), got float"),
        ({"lower": "loq"}, sd.DtypeError, "lower"),
    ],
)
def test_nonsense_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        sd.Series(TIMES, torch.tensor(VALUES), **options)


def test_a_limit_needs_a_value():
    values = torch.tensor(VALUES)
    values[0, 0, 0] = NAN
    with pytest.raises(
        sd.DataError, match="series 0, time 0, channel 0: value is nan. Missing values go into `mask`"
    ):
        sd.Series(TIMES, values, lower=0.1)


def log_prob(batch, loc=0.5):
    with batch.plate("series"):
        trace = poutine.trace(batch.observe).get_trace(
            "y", dist.Normal(torch.full(batch.values.shape, loc, dtype=batch.values.dtype), 2.0)
        )
    trace.compute_log_prob()
    return trace.nodes["y"]["log_prob"]


def test_observe_counts_tails_and_densities():
    s, n = series(), dist.Normal(torch.tensor(0.5, dtype=F64), 2.0)
    expected = n.log_prob(s.values)
    expected[s.high == 0.1] = n.cdf(torch.tensor(0.1, dtype=F64)).log()
    expected[s.low == 50.0] = sd.Censored(
        n, torch.tensor(50.0, dtype=F64), torch.tensor(INF, dtype=F64)
    ).log_prob(torch.zeros(()))
    torch.testing.assert_close(log_prob(s), expected.sum((1, 2)), rtol=1e-10, atol=0)
    mask = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)) > 0.4
    torch.testing.assert_close(log_prob(series(mask=mask)), (expected * mask).sum((1, 2)), rtol=1e-10, atol=0)


def test_observe_is_the_line_it_says_where_nothing_is_censored():
    batch = sd.Series(TIMES, torch.tensor(VALUES), mask=torch.tensor(VALUES) > 0.05)
    fn = dist.Normal(torch.zeros(2, 3, 2), 2.0)
    with batch.plate("series"):
        ours = poutine.trace(batch.observe).get_trace("y", fn).nodes["y"]
        line = (
            poutine.trace(pyro.sample)
            .get_trace("y", fn.mask(batch.mask).to_event(2), obs=batch.values)
            .nodes["y"]
        )
    assert type(ours["fn"].base_dist.base_dist) is type(line["fn"].base_dist.base_dist) is dist.Normal
    assert torch.equal(ours["fn"].log_prob(ours["value"]), line["fn"].log_prob(line["value"]))
    assert ours["value"] is batch.values


def test_doses_merge_into_a_censored_series():
    """New times are neither observed nor censored; old ends stay with their times, before and after an extension."""
    data = sd.Series([0.0, 2.0], [[[0.05], [3.0]]], lower=0.1)
    merged = data.with_covariates(sd.Series([1.0, 1.5], [[[9.0], [4.0]]]), before=0.0)
    assert merged.times.tolist() == [0.0, 1.0, 1.5, 2.0]
    assert merged.censored.flatten().tolist() == [True, False, False, False]
    later = merged.extend([3.0])
    assert later.censored.flatten().tolist() == [True, False, False, False, False]
    with later.plate("series"):
        trace = pyro.poutine.trace(later.observe).get_trace("y", dist.Normal(torch.ones(1, 5, 1), 1.0))
    wanted = dist.Normal(1.0, 1.0).cdf(torch.tensor(0.1)).log() + dist.Normal(1.0, 1.0).log_prob(
        torch.tensor(3.0)
    )
    assert (trace.log_prob_sum() - wanted).abs() < 1e-5


def test_one_end_is_enough_in_a_frame():
    frame = pd.DataFrame({"t": [0.0, 1.0], "y": [1.0, NAN], "lo": [NAN, NAN], "hi": [NAN, 0.5]})
    with pytest.raises(sd.DataError, match=r"one end of `between` is NaN"):
        sd.Series.from_frame(frame, "t", "y", between=("lo", "hi"))
