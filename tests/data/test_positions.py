"""What may index a set of series."""

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import DataError, DtypeError, ShapeError

SERIES = sd.Series([0.0], torch.arange(5.0)[:, None, None])


@pytest.mark.parametrize(
    ("index", "picked"),
    [
        (2, [2]),
        (-1, [4]),
        (np.int64(1), [1]),
        (torch.tensor(3), [3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [4, 2, 0]),
        ([3, 0, 3], [3, 0, 3]),
        (np.array([1, -1]), [1, 4]),
        (torch.tensor([2, 1]), [2, 1]),
        ([True, False, False, True, False], [0, 3]),
        (torch.arange(5) > 2, [3, 4]),
        (range(2), [0, 1]),
    ],
)
def test_every_kind_of_index(index, picked):
    batch = SERIES[index]
    assert batch.values.shape == (len(picked), 1, 1)
    assert batch.values.flatten().tolist() == [float(i) for i in picked if i >= 0]
    assert batch.index.tolist() == [i % 5 for i in picked]


def test_a_for_loop_ends():
    assert [len(one) for one in SERIES] == [1] * 5


@pytest.mark.parametrize("index", [5, -6, [7], torch.tensor([5])])
def test_out_of_range(index):
    with pytest.raises(IndexError, match=r"out of (range|bounds)"):
        SERIES[index]


@pytest.mark.parametrize("index", [[], slice(3, 1), torch.zeros(5, dtype=torch.bool)])
def test_nothing_selected(index):
    with pytest.raises(DataError, match=r"selects none of 5 series"):
        SERIES[index]


@pytest.mark.parametrize("index", [[0.5], torch.zeros(2, 2).long(), 1.5, "a", None])
def test_an_index_of_another_kind(index):
    with pytest.raises(DtypeError, match=r"An index must be 1-D, integers or bools"):
        SERIES[index]


def test_indexing_times_or_a_bool_mask_of_another_size():
    with pytest.raises(ShapeError, match=r"indexed by series alone"):
        SERIES[0, 1]
    with pytest.raises(ShapeError, match=r"A bool index must have shape \(series,\) = \(5,\), got \(2,\)"):
        SERIES[[True, False]]
    with pytest.raises(ShapeError, match=r"A bool index must have shape"):
        SERIES[True]
