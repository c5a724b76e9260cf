"""Implicit methods by scipy: what only they decide (accuracy is tested with odeint)."""

import pytest
import torch

import stochdyn as sd
from tests.orders import F64


@pytest.mark.parametrize("method", [sd.Radau, sd.BDF])
def test_a_budget_of_calls_ends_in_a_named_error(method):
    """In float32 the rates of a stiff field are too rough for a tight tolerance: no hang."""
    ts = torch.tensor([0.0, 1.0])
    with pytest.raises(sd.DivergedError, match=r"series 0, time .*more than 200 calls of the field"):
        sd.odeint(
            lambda t, z: 1e6 * (t.cos() - z), torch.zeros(1), ts, solver=method(1e-9, 1e-11, max_steps=100)
        )


@pytest.mark.parametrize("method", [sd.Radau, sd.BDF])
def test_a_field_that_is_not_finite_is_named(method):
    ts = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    with pytest.raises(sd.DivergedError, match=r"series 1, time [12]"):
        sd.odeint(
            lambda t, z: torch.where((t > 1.5) & (z > 1.5), torch.nan, torch.ones_like(z)),
            torch.tensor([[-5.0], [0.0]], dtype=F64), ts, solver=method(),
        )  # fmt: skip
