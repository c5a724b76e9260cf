"""Masks, names and covariates of a series."""

import pytest
import torch

import stochdyn as sd
from stochdyn.errors import DataError, ShapeError

TIMES = [0.0, 1.0, 2.0]


def values(series=2, channels=2):
    return torch.ones(series, 3, channels)


def test_a_mask_per_time_covers_all_channels():
    series = sd.Series(TIMES, values(), mask=[[True, False, True]] * 2)
    assert series.mask[:, :, 0].equal(series.mask[:, :, 1])
    assert series.values[:, 1].eq(series.values[:, [0, 2]].amax((0, 1))).all()


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 3, 1), (3, 3, 2), (1, 2, 3, 2)])
def test_a_mask_of_another_shape(shape):
    with pytest.raises(ShapeError, match=r"`mask` must have shape \(2, 3.*True = observed"):
        sd.Series(TIMES, values(), mask=torch.ones(shape, dtype=torch.bool))


def test_default_names():
    series = sd.Series(TIMES, values())
    assert series.channels == ("0", "1")
    assert series.ids == (0, 1)


def test_one_channel_may_be_named_by_a_string():
    assert sd.Series(TIMES, values(2, 1), channels="hare").channels == ("hare",)


@pytest.mark.parametrize("name", ["channels", "ids"])
def test_names_must_be_as_many_and_unique(name):
    with pytest.raises(ShapeError, match=rf"`{name}` must have 2 names, got 1"):
        sd.Series(TIMES, values(), **{name: ["a"]})
    with pytest.raises(DataError, match=rf"`{name}` must be unique, got 'a' more than once"):
        sd.Series(TIMES, values(), **{name: ["a", "a"]})


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4)])
def test_covariates_static_or_in_time(shape):
    series = sd.Series(TIMES, values().double(), covariates=torch.ones(shape))
    assert series.covariates.shape == shape
    assert series.covariates.dtype == torch.float64


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 2, 4), (3, 3, 4)])
def test_covariates_of_another_shape(shape):
    with pytest.raises(ShapeError, match=r"`covariates` must have shape \(2, .*first the series"):
        sd.Series(TIMES, values(), covariates=torch.ones(shape))


def test_a_hole_in_the_covariates():
    with pytest.raises(DataError, match=r"`covariates` at \(1, 0\) is nan.*fill the hole"):
        sd.Series(TIMES, values(), covariates=[[1.0], [float("nan")]])


def test_holes_in_the_padding_of_covariates_are_filled():
    times, inputs = torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[[1.0], [2.0], [float("nan")]]])
    series = sd.Series(times, torch.ones(1, 3, 1), mask=[[True, True, False]], covariates=inputs)
    assert series.covariates.flatten().tolist() == [1.0, 2.0, 2.0]


def test_nothing_is_shared_with_the_caller():
    times, data, mask = torch.tensor(TIMES).double(), values(), torch.ones(2, 3, 2, dtype=torch.bool)
    inputs = torch.ones(2, 1)
    series = sd.Series(times, data, mask, covariates=inputs)
    for tensor in (times, data, mask, inputs):
        tensor.zero_()
    assert series.times[-1] == 2
    assert series.values.min() == 1
    assert series.mask.all()
    assert series.covariates.min() == 1
