"""Every observation time is on the grid, and states are read off there."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stochdyn as sd
from stochdyn.errors import DtypeError, ShapeError, TimeError

FEW = settings(deadline=None, max_examples=20)
GAPS = st.lists(st.floats(1e-3, 3.0), min_size=0, max_size=5)
CUTS = st.one_of(
    st.integers(1, 6).map(lambda n: {"substeps": n}), st.floats(0.05, 5.0).map(lambda dt: {"dt": dt})
)
NAN, INF = float("nan"), float("inf")


@st.composite
def padded(draw):
    """Own times (series, time), ragged: rows end in repeats of their last time."""
    rows = draw(st.lists(st.tuples(st.floats(-5, 5), GAPS), min_size=1, max_size=4))
    times = [np.cumsum([first, *gaps]) for first, gaps in rows]
    width = max(map(len, times))
    return torch.tensor(np.stack([np.pad(t, (0, width - len(t)), mode="edge") for t in times]))


@FEW
@given(padded(), CUTS, st.booleans())
def test_times_are_on_the_grid_bitwise(times, cut, early):
    grid = sd.TimeGrid(times, **cut, start=times[:, 0] - 0.3 if early else None)
    assert grid.ts.dtype == torch.float64
    assert grid.ts.gather(1, grid.index).equal(times)
    assert (grid.ts.diff(dim=1) >= 0).all()
    if early:
        assert grid.ts[:, 0].equal(times[:, 0] - 0.3)


@FEW
@given(padded(), CUTS, st.booleans())
def test_observed_returns_the_states_at_the_times(times, cut, early):
    grid = sd.TimeGrid(times, **cut, start=-6.0 if early else None)
    path = torch.stack([grid.ts, -grid.ts], -1) + torch.arange(3.0)[:, None, None, None]
    seen = grid.observed(path)
    assert seen.shape == (3, *times.shape, 2)
    assert seen[0, ..., 0].equal(times)
    assert seen[2, ..., 1].equal(2 - times)


@FEW
@given(padded(), st.floats(0.05, 5.0))
def test_no_step_is_longer_than_dt_and_gaps_are_cut_evenly(times, dt):
    grid = sd.TimeGrid(times, dt=dt)
    steps = grid.ts.diff(dim=1)
    assert (steps <= dt * (1 + 1e-6)).all()
    for row, index, gaps in zip(steps, grid.index, times.diff(dim=1), strict=True):
        for k, gap in enumerate(gaps.tolist()):
            cut = row[index[k] : index[k + 1]]
            assert len(cut) == (0 if gap == 0 else max(1, int(np.ceil(gap / dt - 1e-9))))
            np.testing.assert_allclose(cut, gap / max(len(cut), 1), rtol=1e-9, atol=1e-12)


@FEW
@given(padded(), CUTS)
def test_after_the_last_time_steps_have_length_zero(times, cut):
    grid = sd.TimeGrid(times, **cut)
    for row, last, index in zip(grid.ts, times[:, -1], grid.index[:, -1], strict=True):
        assert (row[index:] == last).all()


@FEW
@given(padded(), CUTS)
def test_order_of_the_batch_permutes_the_grid(times, cut):
    grid, turned = sd.TimeGrid(times, **cut), sd.TimeGrid(times.flip(0), **cut)
    assert turned.ts.flip(0).equal(grid.ts)
    assert turned.index.flip(0).equal(grid.index)


@FEW
@given(padded(), CUTS)
def test_one_row_alone_is_the_row_of_the_batch(times, cut):
    grid = sd.TimeGrid(times, **cut)
    for row, ts in zip(times, grid.ts, strict=True):
        alone = sd.TimeGrid(row, **cut)
        assert alone.ts.equal(ts[: alone.steps + 1])


def test_substeps_are_rectangular_and_shared_times_stay_shared():
    grid = sd.TimeGrid([0, 1, 4], substeps=2)
    assert grid.ts.tolist() == [0, 0.5, 1, 2.5, 4]
    assert grid.index.tolist() == [0, 2, 4]
    assert sd.TimeGrid([0, 1]).steps == 5
    assert sd.TimeGrid([0.0, 0.3], dt=0.1).steps == 3
    assert sd.TimeGrid([0.1, 0.4], dt=0.1).steps == 3  # 0.4 - 0.1 is a little more than 0.3
    assert sd.TimeGrid(torch.zeros(2, 3, 1), dt=0.1).ts.shape == (2, 3, 1)


@pytest.mark.parametrize("cut", [{"substeps": 2}, {"dt": 1.0}])
def test_a_start_per_series_makes_the_grid_one_per_series(cut):
    grid = sd.TimeGrid([1.0, 2.0], **cut, start=[0.0, 1.0])
    assert grid.ts.shape[0] == 2
    assert grid.ts[:, 0].tolist() == [0.0, 1.0]
    assert grid.ts.gather(1, grid.index).tolist() == [[1.0, 2.0]] * 2
    assert grid.observed(grid.ts[..., None]).squeeze(-1).tolist() == [[1.0, 2.0]] * 2


def test_a_start_cuts_the_first_gap_too():
    grid = sd.TimeGrid([1.0, 2.0], substeps=2, start=0.0)
    assert grid.ts.tolist() == [0, 0.5, 1, 1.5, 2]
    assert grid.index.tolist() == [2, 4]


def test_observed_is_a_view_on_even_grids():
    grid = sd.TimeGrid(torch.arange(6.0).reshape(2, 3), substeps=4)
    path = torch.zeros(7, 2, 9, 1)
    assert grid.observed(path).data_ptr() == path.data_ptr()


def test_gradients_flow_through_observed():
    grid = sd.TimeGrid(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), dt=0.5)
    path = torch.zeros(2, grid.steps + 1, 1, requires_grad=True)
    grid.observed(path).sum().backward()
    assert path.grad.squeeze(-1).tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 0, 1]]


def test_a_ragged_series_goes_straight_in():
    series = sd.Series.from_list([([0, 1, 3], [[1.0]] * 3), ([0.5], [[2.0]])])
    grid = sd.TimeGrid(series.times, substeps=3)
    assert grid.ts.shape == (2, 7)
    assert (grid.ts[1] == 0.5).all()


@pytest.mark.parametrize("cut", [{"substeps": 2}, {"dt": 0.5}])
def test_a_path_of_another_grid(cut):
    grid = sd.TimeGrid(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), **cut)
    with pytest.raises(
        ShapeError, match=r"`path` must have shape .*3.*, got \(2, 4, 1\). Build the path on `grid.ts`"
    ):
        grid.observed(torch.zeros(2, 4, 1))


def test_a_path_of_another_batch():
    grid = sd.TimeGrid(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), dt=0.5)
    with pytest.raises(ShapeError, match=r"got \(3, 5, 1\). Build the path on `grid.ts`"):
        grid.observed(torch.zeros(3, 5, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dt": 0.0}, r"`dt` must be positive and finite, got 0.0"),
        ({"dt": -1.0}, r"`dt` must be positive and finite, got -1.0"),
        ({"dt": NAN}, r"`dt` must be positive and finite, got nan"),
        ({"dt": INF}, r"`dt` must be positive and finite, got inf"),
        ({"substeps": 0}, r"`substeps` must be an integer of at least 1, got 0"),
        ({"substeps": 2.0}, r"`substeps` must be an integer of at least 1, got 2.0"),
        ({"substeps": True}, r"`substeps` must be an integer of at least 1, got True"),
        ({"substeps": 2, "dt": 0.1}, r"got both: substeps=2, dt=0.1"),
        ({"dt": 1e-9}, r"dt=1e-09 makes 4e\+09 steps, more than 1000000; the longest gap is 3"),
        ({"substeps": 1_000_000}, r"substeps=1000000 makes 2000000 steps, more than 1000000"),
        ({"start": 0.5}, r"`start` must be .* got 0.5 with first time 0. Start the path earlier"),
        ({"start": NAN}, r"`start` must be a finite time"),
        ({"start": -INF}, r"`start` must be a finite time"),
    ],
)
def test_steps_that_will_not_do(options, message):
    with pytest.raises(TimeError, match=message):
        sd.TimeGrid([0.0, 1.0, 4.0], **options)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 2.0, 1.0], r"`times`, index 2: time 1 comes after 2"),
        ([0.0, 0.0, 1.0], r"`times`, index 1: time 0 comes after 0. .*drop repeats"),
        ([[0.0, 1.0], [3.0, 2.0]], r"`times` of series 1, index 1: time 2 comes after 3"),
        ([0.0, NAN], r"`times`, index 1: time is nan"),
        ([NAN], r"`times`, index 0: time is nan"),
        ([0.0, INF], r"`times`, index 1: time is inf"),
        ([], r"`times` of shape \(0,\) holds no time"),
    ],
)
@pytest.mark.parametrize("cut", [{"substeps": 2}, {"dt": 0.5}])
def test_times_that_will_not_do(times, message, cut):
    with pytest.raises(TimeError, match=message):
        sd.TimeGrid(times, **cut)


def test_other_arguments_that_will_not_do():
    with pytest.raises(ShapeError, match=r"`start` must be a number or have shape \(2,\), got \(3,\)"):
        sd.TimeGrid([[0.0, 1.0]] * 2, start=[-1.0] * 3)
    with pytest.raises(ShapeError, match=r"`start` must be a number or have shape \(series,\), got \(0,\)"):
        sd.TimeGrid([0.0, 1.0], start=[])
    with pytest.raises(ShapeError, match=r"`times` must have shape \(\*batch, time\), got \(\)"):
        sd.TimeGrid(1.0)
    with pytest.raises(DtypeError, match=r"`times` must hold real numbers"):
        sd.TimeGrid(["a", "b"])
    with pytest.raises(DtypeError, match=r"`dt` must hold real numbers"):
        sd.TimeGrid([0.0, 1.0], dt="fine")
    with pytest.raises(ShapeError, match=r"got a Series. Pass `series.times`"):
        sd.TimeGrid(sd.datasets.lynx_hare())


def test_repr():
    shown = repr(sd.TimeGrid([0, 1, 4], substeps=2))
    assert shown == "TimeGrid(4 steps, 2 per gap, from 0 to 4, ts of shape (5,))"
    assert "by dt" in repr(sd.TimeGrid([0, 1, 4], dt=2.0))


def test_further_times_on_the_grid():
    """Each series has its own; the observation times keep their positions, padding its zero steps."""
    through = torch.tensor([[0.0, 3.0], [1.0, float("inf")]])
    grid = sd.TimeGrid([[0.0, 2.0, 5.0], [1.0, 2.0, 2.0]], substeps=2, through=through)
    assert grid.ts[0].tolist() == [0.0, 1.0, 2.0, 2.5, 3.0, 4.0, 5.0]
    assert grid.ts[1].tolist() == [1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert grid.observed(grid.ts[..., None])[..., 0].tolist() == [[0.0, 2.0, 5.0], [1.0, 2.0, 2.0]]
    by_length = sd.TimeGrid([1.0, 2.0], dt=0.3, start=0.0, through=[0.5])
    assert 0.5 in by_length.ts.tolist() and by_length.observed(by_length.ts[:, None])[:, 0].tolist() == [
        1.0,
        2.0,
    ]


@pytest.mark.parametrize("time", [0.5, 2.5, float("nan")])
def test_further_times_outside_the_grid_are_refused(time):
    with pytest.raises(sd.TimeError, match="`through` has time .*, but the grid goes from 1 to 2"):
        sd.TimeGrid([1.0, 2.0], through=[time])
