"""Steps whose numbers are read together, and gradients clipped without looking at them."""

import math

import pytest
import torch

from stochdyn.inference.outcomes import Clip, Outcome, Outcomes, Step


def test_all_are_read_at_once_and_in_order():
    outcomes = Outcomes(block=3)
    assert outcomes.read() == []
    for k in range(3):
        assert not outcomes.due
        outcomes.add(Step(k, 0.5, k != 1), torch.tensor(float(k), requires_grad=True), torch.tensor(2.0))
    assert outcomes.due
    found = outcomes.read()
    assert [(o.step.number, o.loss, o.square, o.step.counts) for o in found] == [
        (0, 0.0, 2.0, True),
        (1, 1.0, 2.0, False),
        (2, 2.0, 2.0, True),
    ]
    assert not outcomes.due


@pytest.mark.parametrize(("loss", "square", "what"), [(math.nan, 1.0, "loss"), (1.0, math.inf, "gradient")])
def test_what_was_not_finite_is_named_with_its_step(loss, square, what):
    assert what in str(Outcome(Step(7, 1.0, True), loss, square).error)
    assert "step 7" in str(Outcome(Step(7, 1.0, True), loss, square).error)
    assert Outcome(Step(7, 1.0, True), 1.0, 1.0).error is None


def test_clipping_on_the_device_is_that_on_the_host():
    host, device = Clip(2.0), Clip(2.0)
    for length in (3.0, 1.0, 40.0, 2.0):
        a, b = min(length, float(host.limit())), torch.tensor(length).clamp(max=device.limit())
        host.record(a)
        device.record_if(torch.tensor(True), b)
        assert float(device.limit()) == pytest.approx(host.limit(), rel=1e-6)


def test_what_was_not_accepted_is_not_recorded():
    clip = Clip(2.0)
    clip.record_if(torch.tensor(False), torch.tensor(math.nan))
    assert float(clip.limit()) == math.inf
    clip.record_if(torch.tensor(True), torch.tensor(3.0))
    clip.record_if(torch.tensor(False), torch.tensor(math.nan))
    assert float(clip.limit()) == 6.0
    clip = Clip(2.0)
    clip.record(3.0)  # on the host first, as in the steps that are looked at
    clip.record_if(torch.tensor(False), torch.tensor(math.inf))
    assert float(clip.limit()) == 6.0
    assert Clip(None).limit() == math.inf
