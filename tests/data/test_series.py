"""Mini-batches, plates, splits: what a set of series can do."""

import copy
from dataclasses import FrozenInstanceError

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine

import stochdyn as sd
from stochdyn.errors import DataError, DtypeError

FEW = settings(deadline=None, max_examples=15)
SIZE = 6


def make(own=True):
    start = torch.arange(float(SIZE)).double()
    times = start[:, None] + torch.arange(3.0) if own else torch.arange(3.0)
    values = start[:, None, None] * 10 + torch.arange(3.0)[:, None]
    names = list("abcdef")
    return sd.Series(times, values, ids=names, channels=["y"], covariates=start[:, None])


def test_the_whole_population():
    series = make()
    assert len(series) == series.population == SIZE
    assert series.index.tolist() == list(range(SIZE))
    assert series.obs_dim == 1
    assert series.mask.dtype == torch.bool
    assert series.times.dtype == torch.float64


@pytest.mark.parametrize("own", [True, False])
def test_a_mini_batch_takes_everything_along(own):
    series = make(own)
    batch = series[torch.tensor([4, 1])]
    assert batch.ids == ("e", "b")
    assert batch.index.tolist() == [4, 1]
    assert batch.population == SIZE
    assert batch.values.equal(series.values[[4, 1]])
    assert batch.times.equal(series.times[[4, 1]] if own else series.times)
    assert batch.covariates.flatten().tolist() == [4, 1]
    assert batch.lengths.tolist() == [3, 3]


@FEW
@given(st.data())
def test_index_population_and_ids_survive_nested_slicing(data):
    series, where = make(), list(range(SIZE))
    for _ in range(3):
        pick = data.draw(st.lists(st.integers(0, len(where) - 1), min_size=1, max_size=SIZE))
        series, where = series[pick], [where[i] for i in pick]
        assert series.index.tolist() == where
        assert series.ids == tuple("abcdef"[i] for i in where)
        assert series.values[:, 0, 0].tolist() == [10.0 * i for i in where]
        assert series.times[:, 0].tolist() == [float(i) for i in where]
        assert series.population == SIZE


def model(batch):
    with batch.plate("series"):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()).double(), 1.0))
        noise = dist.Normal(theta[:, None, None], 1.0).mask(batch.mask).to_event(2)
        pyro.sample("obs", noise, obs=batch.values)


@FEW
@given(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=SIZE))
def test_the_plate_of_a_mini_batch_scales_by_population_over_length(pick):
    batch = make()[pick]
    trace = poutine.trace(model).get_trace(batch)
    assert trace.nodes["obs"]["scale"] == pytest.approx(SIZE / len(pick))
    assert trace.nodes["series"]["value"].tolist() == pick
    assert trace.nodes["theta"]["value"].shape == (len(pick),)


def test_the_plate_of_all_is_plain():
    trace = poutine.trace(model).get_trace(make())
    assert trace.nodes["obs"]["scale"] == 1.0
    assert make().plate("subject", dim=-2).dim == -2
    assert make()[:2].plate("subject", dim=-2).dim == -2


def test_mini_batches_add_up_to_the_whole():
    series = make()
    theta = {"theta": torch.zeros(SIZE).double()}
    whole = poutine.trace(poutine.condition(model, data=theta)).get_trace(series).log_prob_sum()
    parts = []
    for batch in (series[:2], series[2:4], series[4:]):
        chain = poutine.condition(model, data={"theta": theta["theta"][batch.index]})
        parts.append(poutine.trace(chain).get_trace(batch).log_prob_sum())
    torch.testing.assert_close(sum(parts) / 3, whole)


def test_a_series_without_observations_has_likelihood_zero():
    series = sd.Series([0.0, 1.0], [[[float("nan")], [float("nan")]]], mask=torch.zeros(1, 2, 1).bool())
    series = series.to(torch.float64)
    trace = poutine.trace(model).get_trace(series)
    trace.compute_log_prob()
    assert trace.nodes["obs"]["log_prob_sum"] == 0


def test_last_observed():
    mask = [[[True], [True], [False]], [[False], [False], [False]]]
    series = sd.Series([0.0, 1.0, 2.0], torch.zeros(2, 3, 1), mask)
    assert series.last_observed.tolist() == [1.0, -float("inf")]
    assert series[1:].last_observed.tolist() == [-float("inf")]
    assert series.extend([9.0]).last_observed.tolist() == [1.0, -float("inf")]


def test_to_casts_the_values_and_leaves_the_times():
    series = make()[1:3].to(torch.float32)
    assert series.values.dtype == series.covariates.dtype == torch.float32
    assert series.times.dtype == torch.float64
    assert series.index.tolist() == [1, 2]
    assert series.to("cpu", torch.float64).values.dtype == torch.float64
    with pytest.raises(DtypeError, match=r"must be a floating torch dtype"):
        series.to(torch.int64)
    big = sd.Series([0.5], [[[1e300]]], dtype=torch.float64)
    with pytest.raises(DataError, match=r"series 0, time 0.5, channel 0: value 1e\+300 does not fit"):
        big.to(torch.float32)


def test_to_moves_every_tensor():
    moved = make()[:2].to("meta")
    held = [moved.times, moved.values, moved.mask, moved.lengths, moved.index, moved.covariates]
    assert {tensor.device.type for tensor in held} == {"meta"}


@FEW
@given(st.floats(0.2, 0.8), st.integers(0, 100))
def test_split_makes_two_populations_of_everyone_once(fraction, seed):
    series = make()
    train, test = series.split(fraction, seed=seed)
    assert len(train) == round(fraction * SIZE)
    assert sorted(train.ids + test.ids) == list("abcdef")
    for part in (train, test):
        assert part.population == len(part)
        assert part.index.tolist() == list(range(len(part)))
        assert part.values[:, 0, 0].tolist() == [10.0 * "abcdef".index(name) for name in part.ids]
        assert part[1:].ids == part.ids[1:] if len(part) > 1 else True


def test_split_is_repeatable_and_leaves_the_global_seed_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (make().split(0.5, seed=seed)[0].ids for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    assert first == again
    assert first != other


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0, 0.01, 0.99, float("nan")])
def test_split_refuses_an_empty_side(fraction):
    with pytest.raises(DataError, match=r"split\(.*\) of 6 series leaves one side empty"):
        make().split(fraction)


def test_extend_keeps_index_and_population():
    batch = make()[[5, 2]].extend([100.0])
    assert batch.ids == ("f", "c")
    assert batch.population == SIZE
    assert batch.times.tolist() == [[5, 6, 7, 100], [2, 3, 4, 100]]
    assert batch.extend([]).times.equal(batch.times)
    trace = poutine.trace(model).get_trace(batch)
    assert trace.nodes["obs"]["scale"] == 3.0


def test_one_time_is_enough():
    series = sd.Series([3.0], [[[1.0]]])
    assert series.lengths.tolist() == [1]
    assert sd.TimeGrid(series.times).observed(series.values).equal(series.values)


def test_it_is_immutable_and_copies():
    series = make()
    with pytest.raises(FrozenInstanceError):
        series.values = None
    twin = copy.deepcopy(series[1:])
    assert twin.values.equal(series.values[1:])
    assert twin.ids == series.ids[1:]


def test_repr_says_what_is_inside():
    assert repr(make()) == (
        "Series(6 series, 3 to 3 own times from 0 to 7, channels ('y',), 100% observed, torch.float64)"
    )
    assert repr(make(own=False)[:2]).startswith("Series(2 of 6 series, 3 shared times from 0 to 2, ")
