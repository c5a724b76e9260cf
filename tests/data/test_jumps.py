import math

import numpy as np
import pyro
import pytest
import torch

import stochdyn as sd


def test_ragged_lists_are_padded():
    jumps = sd.Jumps.from_list([[0.5, 1.0], [], np.array([0.25])], t0=0.0, t1=2.0)
    assert jumps.values.tolist() == [[[0.5], [1.0]], [[math.inf], [math.inf]], [[0.25], [math.inf]]]
    assert jumps.counts.tolist() == [2, 0, 1]
    assert jumps.mask.tolist() == [[True, True], [False, False], [True, False]]
    assert jumps.t1.tolist() == [2.0, 2.0, 2.0]
    assert jumps.values.dtype == torch.float64
    assert sd.Jumps.from_list([[], []], t1=1.0).values.shape == (2, 0, 1)
    assert sd.Jumps.from_list([[0.5], []], t1=1.0, max_jumps=7).values.shape == (2, 7, 1)


def test_marks_of_both_kinds():
    classes = sd.Jumps.from_list([([0.5, 1.0], [2, 0]), ([], [])], t1=2.0, classes=3)
    assert classes.values.tolist() == [[[0.5, 2.0], [1.0, 0.0]], [[math.inf, 0.0], [math.inf, 0.0]]]
    assert "3 classes" in repr(classes)
    vectors = sd.Jumps.from_list([([0.5], [[1.5, -2.0]])], t1=2.0, marks=["size", "depth"])
    assert vectors.values.shape == (1, 1, 3) and vectors.marks == ("size", "depth")
    with pytest.raises(sd.DataError, match=r"series b, jump 0, time 0.5: mark is 3, .*classes 0, 1, ... 2"):
        sd.Jumps.from_list([([0.1], [0]), ([0.5], [3])], t1=1.0, classes=3, ids=["a", "b"])


@pytest.mark.parametrize(
    ("rows", "named", "error", "message"),
    [
        ([[0.7, 0.5]], {"t1": 1.0}, sd.TimeError, "series 0, jump 1: time 0.5 comes after 0.7"),
        ([[0.5, 0.5]], {"t1": 1.0, "ids": ["A"]}, sd.TimeError, "series A, jump 1: time 0.5 is there twice"),
        ([[0.5], [1.5]], {"t1": 1.0}, sd.TimeError, "series 1, jump 0: time 1.5 is outside"),
        (
            [[0.5, 0.6, 0.7]],
            {"t1": 1.0, "max_jumps": 2},
            sd.PaddingError,
            "series 0: has 3 jumps.*at least 3",
        ),
        ([[0.5]], {}, sd.TimeError, "`t1` is missing"),
        ([[0.5]], {"t0": 2.0, "t1": 1.0}, sd.TimeError, "series 0: the window"),
        ([[0.5]], {"t1": [1.0, 2.0]}, sd.ShapeError, "`t1`.*series"),
        ([], {"t1": 1.0}, sd.DataError, "empty"),
        ([([0.5, 0.6], [1])], {"t1": 1.0}, sd.ShapeError, "series 0: 2 times and 1 marks"),
        ([([0.5], [1]), [0.5]], {"t1": 1.0}, sd.ShapeError, "series 1: has 0 marks"),
        ([[[0.5]]], {"t1": 1.0}, sd.ShapeError, "series 0: times must have shape"),
        ([["a"]], {"t1": 1.0}, sd.DtypeError, "`times` must hold real numbers"),
        ([[0.5]], {"t1": 1.0, "covariates": [[math.nan]]}, sd.DataError, "series 0: covariates"),
    ],
)
def test_faults_are_named(rows, named, error, message):
    with pytest.raises(error, match=message):
        sd.Jumps.from_list(rows, **named)


def test_times_in_single_precision_at_the_end_of_the_window():
    jumps = sd.Jumps(torch.tensor([[[0.1]], [[float("inf")]]]), t1=0.1)
    assert jumps.values.tolist() == [[[0.1]], [[math.inf]]] and jumps.values.dtype == torch.float64
    assert torch.isfinite(sd.PoissonProcess(1.0, jumps.t0, jumps.t1).log_prob(jumps.values)).all()
    single = sd.Jumps([[[0.1]]], t1=0.1, dtype=torch.float32)
    assert single.to(torch.float64).values.tolist() == [[[0.1]]]
    with pytest.raises(sd.TimeError, match="outside"):
        sd.Jumps(torch.tensor([[[0.10001]]]), t1=0.1)
    with pytest.raises(sd.TimeError, match="twice"):
        sd.Jumps([[[0.5], [0.5 + 1e-12]]], t1=1.0, dtype=torch.float32)
    assert sd.Jumps([[[1]]], t1=1.5).values.tolist() == [[[1.0]]]


def test_classes_of_no_marks():
    with pytest.raises(sd.DataError, match="`classes` says what the marks are"):
        sd.Jumps([[[0.1]]], t1=1.0, classes=2)


def test_a_mini_batch_scales_its_plate():
    jumps = sd.Jumps.from_list(
        [[0.5], [], [0.1, 0.2]], t0=0.0, t1=[1.0, 2.0, 3.0], covariates=[[1.0], [2.0], [3.0]]
    )
    batch = jumps[[2]]
    assert (
        batch.t1.tolist() == [3.0] and batch.covariates.tolist() == [[3.0]] and batch.counts.tolist() == [2]
    )

    def model(batch):
        with batch.plate("series"):
            batch.observe("jumps", sd.PoissonProcess(2.0, batch.t0, batch.t1))

    trace = pyro.poutine.trace(model).get_trace(batch)
    expected = 3 * (2 * math.log(2) - 6)
    assert float(trace.log_prob_sum()) == pytest.approx(expected, abs=1e-12)


def test_observe_refuses_another_window():
    jumps = sd.Jumps.from_list([[0.5], [0.2]], t0=0.0, t1=[1.0, 2.0], ids=["a", "b"])
    with (
        jumps.plate("series"),
        pytest.raises(sd.TimeError, match=r"series b: .* t1 = 2, the process has t1 = 1"),
    ):
        jumps.observe("jumps", sd.PoissonProcess(2.0, 0.0, 1.0))


def test_as_series_marks_both_ends_of_the_window():
    jumps = sd.Jumps.from_list([([0.5, 0.7], [3.0, 4.0]), ([], [])], t0=0.25, t1=1.0)
    series = jumps.as_series()
    assert series.channels == ("jump", "mark")
    assert series.times.tolist() == [[0.25, 0.5, 0.7, 1.0], [0.25, 1.0, 1.0, 1.0]]
    assert series.values[0].tolist() == [[0, 0], [1, 3], [1, 4], [0, 0]]
    assert series.mask[..., 0].tolist() == [[True] * 4, [True, True, False, False]]
    assert series.lengths.tolist() == [4, 2]


def test_an_encoder_reads_jumps_and_not_their_padding():
    torch.manual_seed(0)
    encoder = sd.GRUEncoder(obs_dim=1, hidden=4).double()
    rows = [[0.5, 0.7], [0.3]]
    short = encoder(sd.Jumps.from_list(rows, t1=1.0))
    long = encoder(sd.Jumps.from_list(rows, t1=1.0, max_jumps=5))
    assert torch.allclose(short[:, 0], long[:, 0], atol=1e-12)
    later = encoder(sd.Jumps.from_list(rows, t1=2.0))
    assert not torch.allclose(short[:, 0], later[:, 0], atol=1e-3)


def test_rounding_to_single_precision_is_checked():
    jumps = sd.Jumps.from_list([[0.5, 0.5 + 1e-12]], t1=1.0)
    with pytest.raises(sd.TimeError, match="twice"):
        jumps.to(torch.float32)
    assert sd.Jumps.from_list([[0.5]], t1=1.0).to(torch.float32).values.dtype == torch.float32


def test_the_times_of_a_series_are_jumps_of_the_same_population():
    series = sd.Series.from_list(
        [([0.2, 0.5, 0.7], [[1.0], [0.0], [2.0]], [True, False, True]), ([0.4], [[3.0]])],
        ids=["Ada", "Bo"],
    )
    part = sd.Jumps.of_times(series[[1, 0]], 0.0, 1.0)
    assert part.times.tolist() == [[0.4, math.inf], [0.2, 0.7]]
    assert part.index.tolist() == [1, 0] and part.population == 2 and list(part.ids) == ["Bo", "Ada"]
    with pytest.raises(sd.TimeError, match="series Ada"):
        sd.Jumps.of_times(series, 0.0, 0.6)


def test_times_of_a_series_given_in_single_precision_may_lie_at_the_end_of_the_window():
    series = sd.Series(torch.tensor([0.1, 0.3]), torch.zeros(1, 2, 1))
    assert sd.Jumps.of_times(series, 0.0, 0.3).times.tolist() == [[0.10000000149011612, 0.3]]
    with pytest.raises(sd.TimeError, match="outside the window"):
        sd.Jumps.of_times(sd.Series([0.1, 0.3 + 1e-9], torch.zeros(1, 2, 1)), 0.0, 0.3)
