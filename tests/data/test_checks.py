"""Every rule for times and values, with the words of its message."""

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.data.checks import as_tensor, check_devices, check_resolution, real_lengths
from stochdyn.errors import DataError, DtypeError, ShapeError, TimeError

ONES = [[[1.0], [2.0], [3.0]]]
NAN, INF = float("nan"), float("inf")


def two_channels():
    return torch.ones(4, 3, 2), torch.tensor([0.0, 0.7, 1.5])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_is_named(bad):
    values, times = two_channels()
    values[3, 1, 1] = bad
    message = (
        rf"series 3, time 0.7, channel 1: value is {bad}. Missing values go into `mask`, not into `values`."
    )
    with pytest.raises(DataError, match=message):
        sd.Series(times, values)


def test_a_bad_value_is_named_by_the_users_names_and_own_times():
    values = torch.ones(2, 3, 2)
    values[1, 2, 0] = NAN
    times = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.5]])
    with pytest.raises(DataError, match=r"series b, time 2.5, channel hare: value is nan"):
        sd.Series(times, values, channels=["hare", "lynx"], ids=["a", "b"])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_masked_may_be_anything_and_gets_a_value_of_its_channel(bad):
    values, times = two_channels()
    values[3, 1, 1] = bad
    series = sd.Series(times, values, mask=values.isfinite())
    assert series.values.isfinite().all()
    assert series.values[3, 1, 1] == series.values[..., 1][series.mask[..., 1]].max()
    assert not series.mask[3, 1, 1]


def test_a_value_too_large_for_the_dtype_is_not_called_missing():
    with pytest.raises(DataError, match=r"value 1e\+300 does not fit in torch.float32. Rescale the channel"):
        sd.Series([0.0], [[[1e300]]], dtype=torch.float32)
    assert sd.Series([0.0], [[[1e300]]], dtype=torch.float64).values.item() == 1e300


def test_a_single_series_without_its_dimension():
    with pytest.raises(ShapeError, match=r"\(series, time, channel\), got \(3, 1\).*`values\[None\]`"):
        sd.Series([0.0, 1.0, 2.0], ONES[0])


@pytest.mark.parametrize("times", [[0.0, 1.0], [[0.0, 1.0, 2.0]] * 2, [[[0.0]]], 0.0])
def test_times_that_do_not_go_with_values(times):
    with pytest.raises(ShapeError, match=r"`times` must have shape .* \(3,\) or .* \(1, 3\)"):
        sd.Series(times, ONES)


@pytest.mark.parametrize(
    ("shape", "dim"), [((0, 2, 1), "series"), ((2, 0, 1), "time"), ((2, 2, 0), "channel")]
)
def test_empty_data(shape, dim):
    with pytest.raises(DataError, match=rf"`values` has 0 along {dim}, .* at least one {dim}"):
        sd.Series(torch.zeros(shape[1]), torch.zeros(shape))


def test_rows_of_different_lengths_point_to_from_list():
    with pytest.raises(ShapeError, match=r"`values` has rows of different lengths.*Series.from_list"):
        sd.Series([0.0, 1.0], [[[1.0], [2.0]], [[1.0]]])
    with pytest.raises(ShapeError, match=r"from_list"):
        sd.Series([0.0, 1.0], [torch.zeros(2, 1), torch.zeros(1, 1)])


def test_unsorted_shared_times():
    with pytest.raises(TimeError, match=r"times, index 2: time 0.5 comes after 1. .*sort.*from_frame"):
        sd.Series([0.0, 1.0, 0.5], ONES)


def test_unsorted_own_times_name_the_series():
    with pytest.raises(TimeError, match=r"series 1, index 1: time 3 comes after 4"):
        sd.Series([[0.0, 1.0, 2.0], [4.0, 3.0, 5.0]], ONES * 2)


def test_duplicate_times():
    with pytest.raises(TimeError, match=r"times, index 1: time 0 is there twice. Average .* another channel"):
        sd.Series([0.0, 0.0, 1.0], ONES)
    with pytest.raises(TimeError, match=r"times, index 2: time 1 is there twice"):
        sd.Series([0.0, 1.0, 1.0], ONES, mask=[[True, True, False]])  # shared times have no padding


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_times_that_are_not_finite(bad):
    with pytest.raises(
        TimeError, match=rf"times, index 1: time is {bad}. Every time must be a finite number"
    ):
        sd.Series([0.0, bad, 1.0], ONES)
    with pytest.raises(TimeError, match=rf"series 0, index 2: time is {bad}"):
        sd.Series([[0.0, 1.0, bad]], ONES)


def test_integers_are_promoted():
    series = sd.Series([0, 1, 2], np.ones((1, 3, 1), dtype=int))
    assert series.times.dtype == torch.float64
    assert series.values.dtype == torch.get_default_dtype()
    assert sd.Series(torch.arange(3), torch.ones(1, 3, 1).long()).times.dtype == torch.float64


@pytest.mark.parametrize("name", ["times", "values"])
@pytest.mark.parametrize("bad", [bool, complex, str, object])
def test_other_kinds_of_numbers_are_refused(name, bad):
    data = {"times": np.arange(3.0), "values": np.ones((1, 3, 1))}
    data[name] = data[name].astype(bad)
    with pytest.raises(DtypeError, match=rf"`{name}` must hold real numbers, got .*"):
        sd.Series(**data)


def test_complex_and_bool_tensors_are_refused():
    for dtype in (torch.complex64, torch.bool):
        with pytest.raises(DtypeError, match=r"`values` must hold real numbers"):
            sd.Series([0.0, 1.0, 2.0], torch.ones(1, 3, 1, dtype=dtype))


def test_dates_are_told_how_to_become_numbers():
    days = np.array(["2020-01-01", "2020-01-02", "2020-01-03"], dtype="datetime64[D]")
    with pytest.raises(DtypeError, match=r"datetime64.*np.timedelta64\(1, 'D'\)"):
        sd.Series(days, ONES)


def test_unix_seconds_are_refused_with_the_fix():
    times = 1.7e9 + 60.0 * np.arange(3)
    with pytest.raises(
        TimeError, match=r"1700000120 are 128 apart, too coarse for gaps of 60. Subtract .*86400"
    ):
        sd.Series(times, ONES, dtype=torch.float32)
    assert sd.Series(times, ONES, dtype=torch.float64).times[0] == 1.7e9
    with pytest.raises(TimeError, match=r"series 1: .*128 apart"):
        sd.Series(np.stack([times - 1.7e9, times]), ONES * 2, dtype=torch.float32)
    with pytest.raises(TimeError, match=r"128 apart"):
        sd.Series(times, ONES, dtype=torch.float64).to(torch.float32)


def test_years_are_fine_and_so_is_one_close_pair():
    sd.Series(np.arange(1900.0, 1903.0), ONES, dtype=torch.float32)
    sd.Series([0.0, 1.0, 1.0 + 1e-9], ONES, dtype=torch.float32)
    sd.Series([1.7e9], [[[1.0]]], dtype=torch.float32)


def test_resolution_ignores_padding():
    times = torch.tensor([[1900.0, 1901.0] + [1901.0] * 5], dtype=torch.float64)
    check_resolution(times, torch.tensor([2]), torch.float32, ["series 0"])


def test_random_irregular_times_in_single_precision_are_not_refused():
    times = (
        torch.rand(500, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(-1).values
    )
    assert len(sd.Series(10.0 * times, torch.zeros(500, 100, 1, dtype=torch.float32))) == 500


@pytest.mark.parametrize("mask", [[[[0.0], [1.0], [1.0]]], [[0.5, 1.0, 1.0]]])
def test_a_mask_of_floats_is_refused(mask):
    with pytest.raises(DtypeError, match=r"`mask` must be bool, got torch.float64. .*True = observed"):
        sd.Series([0.0, 1.0, 2.0], ONES, mask=mask)


def test_a_mask_of_zeros_and_ones_is_taken_other_integers_are_not():
    assert sd.Series([0.0, 1.0, 2.0], ONES, mask=[[1, 0, 1]]).mask.flatten().tolist() == [True, False, True]
    with pytest.raises(DtypeError, match=r"got the value 2"):
        sd.Series([0.0, 1.0, 2.0], ONES, mask=[[1, 0, 2]])


def test_dtype_is_the_tensors_own_or_the_default_or_the_one_asked_for():
    times = [0.0, 1.0, 2.0]
    assert sd.Series(times, torch.ones(1, 3, 1, dtype=torch.float64)).values.dtype == torch.float64
    assert sd.Series(times, [torch.ones(3, 1, dtype=torch.float64)]).values.dtype == torch.float64
    assert sd.Series(times, np.ones((1, 3, 1))).values.dtype == torch.get_default_dtype()
    assert sd.Series(times, ONES, dtype=torch.float16).values.dtype == torch.float16
    for bad in (torch.int64, "float64"):
        with pytest.raises(DtypeError, match=r"`dtype` must be a floating torch dtype"):
            sd.Series(times, ONES, dtype=bad)


def test_mixed_dtypes_in_a_list_are_named():
    rows = [([0.0], torch.ones(1, 1, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    with pytest.raises(DtypeError, match=r"`values` mixes torch.float32, torch.float64"):
        sd.Series.from_list(rows)
    assert sd.Series.from_list(rows, dtype=torch.float64).values.dtype == torch.float64


def test_mixed_devices_are_named():
    with pytest.raises(DtypeError, match=r"`times` on cpu, `values` on meta.*\.to\(device\)"):
        sd.Series(torch.zeros(3), torch.zeros(1, 3, 1, device="meta"))
    assert check_devices(times=[1.0], values=[torch.zeros(1)], mask=None) == torch.device("cpu")


def test_arrays_of_any_layout_become_tensors():
    assert as_tensor("values", np.arange(6.0).reshape(2, 3)[:, ::-1].astype(">f4")).tolist() == [
        [2, 1, 0],
        [5, 4, 3],
    ]
    assert as_tensor("values", np.arange(3, dtype=np.uint16)).dtype == torch.int64


def test_real_lengths_see_padding_only_where_nothing_is_observed():
    times = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [2.0, 2.0, 2.0], [0.0, 1.0, 2.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()[..., None]
    assert real_lengths(times, mask).tolist() == [2, 3, 1, 3]
    with pytest.raises(TimeError, match=r"series 1, index 2: time 1 is there twice"):
        sd.Series(times, torch.ones(4, 3, 1), mask)
