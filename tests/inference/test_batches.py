"""Batches: every row once per pass, the data's own indexing, refusals."""

from itertools import islice

import pytest
import torch

from stochdyn.data import Series
from stochdyn.errors import FitError
from stochdyn.inference.batches import arguments, batches, moved, population


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_whole_data_are_passed_as_they_are():
    data = object()
    assert list(islice(batches(data, None, generator()), 3)) == [(data,)] * 3
    assert next(batches((1, 2), None, generator())) == (1, 2)


def test_each_pass_holds_every_row_once_in_a_new_order():
    stream = batches(torch.arange(10), 4, generator())
    passes = [torch.cat([next(stream)[0] for _ in range(3)]) for _ in range(2)]
    assert [sorted(rows.tolist()) for rows in passes] == [list(range(10))] * 2
    assert passes[0].tolist() != passes[1].tolist()


def test_the_generator_alone_decides():
    state = torch.get_rng_state()
    first, second = (
        torch.cat([b[0] for b in islice(batches(torch.arange(9), 2, generator(5)), 9)]) for _ in "12"
    )
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_a_series_keeps_index_and_population():
    values = torch.arange(10.0)[:, None, None].expand(10, 3, 1)
    series = Series([0.0, 1.0, 2.0], values)
    (batch,) = next(batches(series, 4, generator()))
    assert (len(batch), batch.population) == (4, 10)
    assert torch.equal(batch.values[:, 0, 0], batch.index.to(batch.values))


def test_the_arguments_of_a_tuple_share_their_rows():
    x, y = next(batches((torch.arange(6), torch.arange(6) * 10), 3, generator()))
    assert torch.equal(10 * x, y)


@pytest.mark.parametrize("size", [0, -1, 7])
def test_sizes_that_do_not_fit(size):
    with pytest.raises(FitError, match=rf"between 1 and the 6 rows of the data, got {size}"):
        batches(torch.arange(6), size, generator())


@pytest.mark.parametrize("data", [[1, 2], {"a": 1}, None, 3.0, (torch.arange(3), [1, 2, 3])])
def test_data_without_rows_are_refused(data):
    with pytest.raises(FitError, match="indexed by rows, got a"):
        batches(data, 1, generator())


def test_unequal_rows_are_refused():
    with pytest.raises(FitError, match=r"same number of rows, got \[2, 3\]"):
        batches((torch.arange(3), torch.arange(2)), 1, generator())


def test_moving_arguments_population():
    assert moved((torch.zeros(1), None, "a"), "meta")[0].device.type == "meta"
    assert arguments(None) == (None,)
    assert arguments(()) == ()
    assert population(None) is None
    assert population(Series([0.0], [[[1.0]]] * 3)[:2]) == 3
