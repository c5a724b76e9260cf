"""Series of different lengths, data frames, and further times."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stochdyn as sd
from stochdyn.errors import DataError, DtypeError, ShapeError, TimeError

FEW = settings(deadline=None, max_examples=15)
TICKS = st.lists(st.integers(0, 40), min_size=1, max_size=7, unique=True).map(sorted)


@st.composite
def rows(draw):
    """[(times_i, values_i, mask_i), ...] whose values say which series and time they belong to."""
    out = []
    for i, ticks in enumerate(draw(st.lists(TICKS, min_size=1, max_size=5))):
        times = np.array(ticks) / 8
        seen = draw(st.lists(st.booleans(), min_size=len(ticks), max_size=len(ticks)))
        out.append((times, (100 * i + times)[:, None], np.array(seen)))
    return out


@FEW
@given(rows())
def test_padding_repeats_the_last_time_and_is_masked(data):
    series = sd.Series.from_list(data)
    assert series.lengths.tolist() == [len(times) for times, *_ in data]
    own = series.times.expand(len(series), -1)
    for i, (times, values, seen) in enumerate(data):
        n = len(times)
        assert own[i, :n].tolist() == times.tolist()
        assert (own[i, n:] == times[-1]).all()
        assert series.mask[i, :n, 0].tolist() == seen.tolist()
        assert not series.mask[i, n:].any()
        assert series.values[i, n:].isfinite().all()
        assert series.values[i, :n, 0][torch.tensor(seen)].tolist() == pytest.approx(values[seen, 0].tolist())


@FEW
@given(rows())
def test_a_padded_series_is_taken_back_by_the_constructor(data):
    series = sd.Series.from_list(data)
    again = sd.Series(series.times, series.values, series.mask)
    assert again.lengths.equal(series.lengths)
    assert again.values.equal(series.values)


@FEW
@given(rows())
def test_order_of_the_list_permutes_the_result(data):
    series, turned = sd.Series.from_list(data), sd.Series.from_list(data[::-1])
    assert turned.values.flip(0).equal(series.values)
    assert turned.mask.flip(0).equal(series.mask)
    assert turned.lengths.flip(0).equal(series.lengths)


@FEW
@given(rows(), TICKS)
def test_extend_keeps_the_data_and_adds_unobserved_times(data, ticks):
    series = sd.Series.from_list(data)
    ts = [t / 8 for t in ticks]
    ahead = series.extend(ts[::-1])
    own = ahead.times.expand(len(ahead), -1)
    for i, (times, values, seen) in enumerate(data):
        n = int(ahead.lengths[i])
        assert own[i, :n].tolist() == sorted({*times.tolist(), *ts})
        at = torch.searchsorted(own[i, :n].contiguous(), torch.tensor(times))
        assert ahead.mask[i, at, 0].tolist() == seen.tolist()
        assert ahead.values[i, at[torch.tensor(seen)], 0].tolist() == pytest.approx(values[seen, 0].tolist())
        assert int(ahead.mask[i].sum()) == int(seen.sum())
        assert (own[i, n:] == own[i, n - 1]).all()
    assert ahead.values.isfinite().all()


def test_a_shared_grid_stays_shared():
    data = [([0, 1], [[1.0], [2.0]]), ([0.0, 1.0], [[3.0], [4.0]])]
    series = sd.Series.from_list(data)
    assert series.times.tolist() == [0.0, 1.0]
    assert series.extend([5.0]).times.tolist() == [0.0, 1.0, 5.0]
    assert series.lengths.tolist() == [2, 2]


def test_tensors_keep_their_dtype():
    series = sd.Series.from_list([(torch.arange(2), torch.ones(2, 1, dtype=torch.float64))])
    assert series.values.dtype == torch.float64


def test_covariates_of_different_lengths_are_padded_and_carried():
    data = [([0, 2], [[1.0], [2.0]]), ([1], [[3.0]])]
    series = sd.Series.from_list(data, covariates=[[[5.0], [6.0]], [[7.0]]])
    assert series.covariates.squeeze(-1).tolist() == [[5, 6], [7, 7]]
    ahead = series.extend([0.5, 3.0])
    assert ahead.times.tolist() == [[0, 0.5, 2, 3], [0.5, 1, 3, 3]]
    assert ahead.covariates.squeeze(-1).tolist() == [[5, 5, 6, 6], [7, 7, 7, 7]]
    static = sd.Series.from_list(data, covariates=[[1.0, 2.0], [3.0, 4.0]])
    assert static.covariates.tolist() == [[1, 2], [3, 4]]
    assert static.extend([9.0]).covariates.equal(static.covariates)
    with pytest.raises(ShapeError, match=r"`covariates of series 1` must have shape \(1, 1\), got \(2, 1\)"):
        sd.Series.from_list(data, covariates=[[[5.0], [6.0]], [[7.0], [8.0]]])


def test_an_empty_list_and_a_series_without_times():
    with pytest.raises(DataError, match=r"no series in the list"):
        sd.Series.from_list([])
    with pytest.raises(DataError, match=r"series b has no times. Leave it out, or give it one masked time"):
        sd.Series.from_list([([0], [[1.0]]), ([], np.zeros((0, 1)))], ids=["a", "b"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([0, 1], [1.0, 2.0]), r"`values of series 1` must have shape .*`values\[:, None\]`"),
        (([0, 1], [[1.0]]), r"`values of series 1` must have shape \(2, channel\), got \(1, 1\)"),
        (([0], [[1.0, 2.0]]), r"`values of series 1` must have shape \(time, 1\).*same channels"),
        (([[0]], [[1.0]]), r"`times of series 1` must have shape \(time\)"),
        (([0], [[1.0]], [True, False]), r"`mask of series 1` must have shape \(1, 1\)"),
        (([0],), r"series 1 must be \(times, values\) or \(times, values, mask\)"),
        (np.zeros((2, 1)), r"series 1 must be .* got ndarray"),
    ],
)
def test_a_row_whose_shapes_disagree_is_named(row, message):
    with pytest.raises(ShapeError, match=message):
        sd.Series.from_list([([0], [[1.0]]), row])


def test_bad_entries_of_a_row_are_named():
    good = ([0], [[1.0]])
    with pytest.raises(TimeError, match=r"series 1, index 1: time 0 comes after 1"):
        sd.Series.from_list([good, ([1, 0], [[1.0], [1.0]])])
    with pytest.raises(TimeError, match=r"series 1, index 2: time 1 is there twice"):
        sd.Series.from_list([good, ([0, 1, 1], [[1.0]] * 3, [True, True, False])])
    with pytest.raises(DataError, match=r"series b, time 0.5, channel 0: value is nan"):
        sd.Series.from_list([good, ([0.5], [[float("nan")]])], ids=["a", "b"])


def frame():
    return pd.DataFrame(
        {
            "id": ["b", "a", "b", "a", "b"],
            "day": [2, 0, 0, 3, 1],
            "hare": [5.0, 1.0, np.nan, 2.0, 4.0],
            "lynx": [7, 8, 9, 10, 11],
            "name": list("vwxyz"),
        }
    )


def test_from_frame_sorts_groups_and_masks():
    series = sd.Series.from_frame(frame(), time="day", values=["hare", "lynx"], series="id")
    assert series.ids == ("b", "a")
    assert series.channels == ("hare", "lynx")
    assert series.times.tolist() == [[0, 1, 2], [0, 3, 3]]
    assert series.mask[0].tolist() == [[False, True], [True, True], [True, True]]
    assert series.values[0].tolist() == [[5, 9], [4, 11], [5, 7]]
    assert series.values.dtype == torch.get_default_dtype()


@FEW
@given(rows())
def test_from_frame_round_trip(data):
    tables = [
        pd.DataFrame({"id": i, "t": t, "y": np.where(m, v[:, 0], np.nan)}) for i, (t, v, m) in enumerate(data)
    ]
    long = pd.concat(tables).sample(frac=1.0, random_state=0).sort_values("id", kind="stable")
    series, back = sd.Series.from_list(data), sd.Series.from_frame(long, "t", "y", series="id")
    assert back.times.equal(series.times)
    assert back.values.equal(series.values)
    assert back.mask.equal(series.mask)
    assert back.ids == series.ids


def test_from_frame_with_covariates_and_nullable_integers():
    table = frame().assign(lynx=pd.array([7, None, 9, 10, 11], dtype="Int64"))
    series = sd.Series.from_frame(table, "day", "lynx", "id", covariates="day", dtype=torch.float64)
    assert series.mask[1].flatten().tolist() == [False, True, False]
    assert series.covariates[1].flatten().tolist() == [0, 3, 3]
    with pytest.raises(DataError, match=r"`covariates` at .* is nan"):
        sd.Series.from_frame(table, "day", "lynx", "id", covariates=["hare"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"values": ["wolf"]},
            DataError,
            r"Column 'wolf' is not in the data frame. It has: 'id', 'day', 'hare'",
        ),
        ({"values": ["name"]}, DataError, r"Column 'name' must be numeric, got"),
        ({"time": "name"}, DataError, r"Column 'name' must be numeric"),
        ({"series": "subject"}, DataError, r"Column 'subject' is not in"),
        ({"values": []}, DataError, r"no column to read"),
        ({"series": None}, TimeError, r"times, index 1: time 0 is there twice"),
    ],
)
def test_columns_that_will_not_do(options, error, message):
    with pytest.raises(error, match=message):
        sd.Series.from_frame(frame(), **{"time": "day", "values": ["hare"], "series": "id", **options})


def test_frames_that_will_not_do():
    table = frame()
    with pytest.raises(DataError, match=r"no row to read"):
        sd.Series.from_frame(table[:0], "day", "hare")
    with pytest.raises(DataError, match=r"series b, time 1, channel hare: value is inf"):
        sd.Series.from_frame(table.replace(4.0, np.inf), "day", "hare", "id")
    with pytest.raises(TimeError, match=r"time is nan"):
        sd.Series.from_frame(table.replace({"day": {1: np.nan}}), "day", "hare", "id")
    with pytest.raises(DataError, match=r"Row 1 has no series: column 'id' is missing there"):
        sd.Series.from_frame(table.replace({"id": {"a": None}}), "day", "hare", "id")
    with pytest.raises(DtypeError, match=r"Column 'day' holds dates.*Timedelta"):
        sd.Series.from_frame(table.assign(day=pd.to_datetime(table["day"], unit="D")), "day", "hare", "id")
    with pytest.raises(DataError, match=r"Column 'hare' is there more than once"):
        sd.Series.from_frame(table.rename(columns={"lynx": "hare"}), "day", "hare", "id")


def test_extend_by_times_that_will_not_do():
    series = sd.Series([0.0], [[[1.0]]])
    with pytest.raises(TimeError, match=r"`ts`, index 1: time is nan"):
        series.extend([1.0, float("nan")])
    with pytest.raises(ShapeError, match=r"`ts` must have shape \(time\).*shared by all series"):
        series.extend([[1.0]])
    with pytest.raises(TimeError, match=r"too coarse"):
        sd.Series([0.0], [[[1.0]]], dtype=torch.float32).extend([1.7e9, 1.7e9 + 60, 1.7e9 + 120, 1.7e9 + 180])
