import math

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.paths.points.support import JumpSupport, member

RIGHT = [[0.2, 1.0], [0.7, 0.0], [math.inf, 0.0]]
WRONG = {
    "order": ([[0.7, 1.0], [0.2, 0.0], [math.inf, 0.0]], sd.TimeError, "series 1, jump 1.*Sort"),
    "tie": ([[0.7, 1.0], [0.7, 0.0], [math.inf, 0.0]], sd.TimeError, "series 1, jump 1.*twice"),
    "window": ([[0.7, 1.0], [1.7, 0.0], [math.inf, 0.0]], sd.TimeError, "series 1, jump 1.*outside"),
    "padding": ([[0.7, 1.0], [math.inf, 0.0], [0.8, 0.0]], sd.TimeError, "series 1, jump 2.*unused"),
    "class": ([[0.7, 2.0], [0.8, 0.0], [math.inf, 0.0]], sd.DataError, "series 1, jump 0.*mark is 2"),
    "mark": ([[0.7, math.nan], [0.8, 0.0], [math.inf, 0.0]], sd.DataError, r"series 1, jump 0.*\[nan\]"),
}


CLASSES = dist.Categorical(torch.ones(2) / 2).support


def support(marks=CLASSES, width=2):
    return JumpSupport(torch.tensor(0.0), torch.tensor(1.0), width, marks)


@pytest.mark.parametrize("fault", WRONG)
def test_check_and_explanation_agree(fault):
    rows, error, message = WRONG[fault]
    value = torch.tensor([RIGHT, rows], dtype=torch.float64)
    assert support().check(value).tolist() == [True, False]
    with pytest.raises(error, match=message):
        support().explain(value, "Process")


def test_what_is_right_is_not_complained_of():
    support().explain(torch.tensor([RIGHT]), "Process")
    assert support(None, 1).check(torch.zeros(3, 0, 1)).tolist() == [True] * 3


def test_marks_of_a_positive_law_and_the_number_of_marks():
    positive = support(dist.LogNormal(0.0, 1.0).support)
    value = torch.tensor([[[0.5, -1.0]]])
    assert positive.check(value).tolist() == [False]
    with pytest.raises(sd.DataError, match=r"series 0, jump 0, time 0.5: mark is \[-1.0\]"):
        positive.explain(value, "Process")
    with pytest.raises(sd.ShapeError, match="Process.*1 mark, got"):
        positive.explain(value[..., :1], "Process")


def test_names_of_members():
    assert [member([]), member([2]), member([1, 2])] == ["the sequence", "series 2", "series (1, 2)"]
