import pytest
import torch

import stochdyn as sd
from stochdyn.data import AbstractPopulation


@pytest.fixture(params=["series", "jumps"])
def data(request):
    named = {"ids": list("abcdef"), "groups": {"site": ["n", "s", "n", "s", "n", "n"]}}
    if request.param == "series":
        return sd.Series([0.0, 1.0], torch.arange(12.0).reshape(6, 2, 1).tolist(), **named)
    rows = [[0.1 * (k + 1)] * bool(k) for k in range(6)]
    return sd.Jumps.from_list(rows, t0=0.0, t1=[1.0 + k for k in range(6)], **named)


def test_both_kinds_are_populations(data):
    assert isinstance(data, AbstractPopulation)
    assert len(data) == data.population == 6
    assert data.ids == tuple("abcdef")


def test_a_mini_batch_keeps_index_population_labels_and_groups(data):
    batch = data[[4, 1]]
    assert type(batch) is type(data)
    assert batch.index.tolist() == [4, 1] and batch.population == 6
    assert batch.ids == ("e", "b")
    assert batch.groups["site"].tolist() == [0, 1]
    assert torch.equal(batch.values, data.values[[4, 1]])
    assert batch.group_plate("site").size == 2
    with batch.plate("series") as index:
        assert index.tolist() == [4, 1]


def test_a_split_is_two_populations(data):
    first, second = data.split(0.5, seed=1)
    assert first.population == second.population == 3
    assert sorted(first.ids + second.ids) == list("abcdef")
    assert first.index.tolist() == [0, 1, 2]
    one, other = data.split(0.5, by="site")
    assert {len(one), len(other)} == {2, 4}
    with pytest.raises(sd.DataError, match="one side empty"):
        data.split(0.01)


def test_dtype_and_device(data):
    assert data.to(torch.float64).values.dtype == torch.float64
    assert data.to("cpu", torch.float64).index.tolist() == list(range(6))


def test_as_series_is_the_same_population(data):
    read = data[[3, 2]].as_series()
    assert isinstance(read, sd.Series)
    assert read.index.tolist() == [3, 2] and read.population == 6 and read.ids == ("d", "c")
    assert "site" in read.groups
