"""Fields: how they are called and what is refused."""

import pytest
import torch

import stochdyn as sd
from stochdyn.fields import (
    call_field,
    evaluate,
)

F64 = torch.float64
T, Z = torch.zeros(1, dtype=F64), torch.ones(3, 2, dtype=F64)


def test_context_gets_the_batch_of_the_state():
    context = torch.arange(4, dtype=F64)
    out = evaluate("drift", lambda t, z, c: torch.cat([z, c], -1), T, Z, context)
    assert out.shape == (3, 6)
    timed = torch.zeros(5, 1, 4, dtype=F64)
    out = evaluate("drift", lambda t, z, c: torch.cat([z, c], -1), T, Z.expand(5, 3, 2), timed)
    assert out.shape == (5, 3, 6)
    assert evaluate("drift", lambda t, z: z, T, Z, None) is Z


def test_not_implemented_is_not_swallowed():
    def unwritten(t, z):
        raise NotImplementedError("soon")

    for call in (evaluate, call_field):
        with pytest.raises(sd.FieldError, match=r"The drift raised NotImplementedError: soon"):
            call("drift", unwritten, T, Z, None)


def test_other_errors_of_a_field_in_use_are_its_own():
    with pytest.raises(ZeroDivisionError):
        evaluate("drift", lambda t, z: 1 / 0, T, Z, None)


def test_a_context_is_named_in_the_message():
    with pytest.raises(
        sd.FieldError, match=r"z of shape \(3, 2\), context of shape \(3, 4\): .*third argument"
    ):
        call_field("drift", lambda t, z: z, T, Z, torch.zeros(4, dtype=F64))
