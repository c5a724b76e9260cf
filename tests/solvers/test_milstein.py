"""Milstein: strong order 1 along noise, the moments of its Gaussian stand-in, what it refuses."""

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.fields import as_diffusion
from stochdyn.testing import check_kernel
from tests.orders import F64, gbm, slope, strong_errors


def test_strong_order_one_for_multiplicative_noise():
    errors = strong_errors(sd.Milstein(), lambda t, z: 0.3 * z, lambda t, z: 0.5 * z, gbm)
    assert abs(slope(errors) - 1) < 0.15
    euler = strong_errors(sd.EulerMaruyama(), lambda t, z: 0.3 * z, lambda t, z: 0.5 * z, gbm)
    assert not abs(slope(euler) - 1) < 0.15


def test_a_net_of_closed_slope_gives_the_same_step():
    field = sd.ElementwiseField(3, hidden=8).double()
    z, dt = torch.randn(5, 3, dtype=F64), torch.tensor([[0.1]], dtype=F64)
    dW = torch.randn(5, 3, dtype=F64) * math.sqrt(0.1)
    args = torch.zeros(1, 1, dtype=F64), dt, z, dW
    closed = sd.Milstein().along(lambda t, z: -z, as_diffusion(field), *args)
    auto = sd.Milstein().along(lambda t, z: -z, as_diffusion(lambda t, z: field(t, z)), *args)
    assert (closed - auto).abs().max() < 1e-14


def test_in_a_path_the_step_has_the_scheme_s_mean_and_variance():
    torch.manual_seed(0)
    z0, dt = torch.tensor([1.3], dtype=F64), torch.tensor([0.2], dtype=F64)
    dW = torch.randn(200_000, 1, dtype=F64) * math.sqrt(0.2)

    def spread(t, z):
        return 0.3 + 0.4 * z.square()

    t = torch.zeros(1, dtype=F64)
    scheme = sd.Milstein().along(lambda t, z: -z, as_diffusion(spread), t, dt, z0.expand(len(dW), 1), dW)[
        :, 0
    ]
    step = sd.Milstein().transition(lambda t, z: -z, spread, t, dt, z0)
    square = (scheme - step.mean).square()
    assert abs(scheme.mean() - step.mean) < 5 * scheme.std() / math.sqrt(len(dW))
    assert abs(square.mean() - step.variance) < 5 * square.std() / math.sqrt(len(dW))
    euler = sd.EulerMaruyama().transition(lambda t, z: -z, spread, t, dt, z0)
    assert abs(square.mean() - euler.variance) > 5 * square.std() / math.sqrt(len(dW))


def test_it_conforms_for_diagonal_noise_and_refuses_the_rest():
    with pytest.raises(sd.DiffusionError, match=r"Milstein: for diagonal noise only"):
        check_kernel(sd.Milstein())
    ts = torch.linspace(0, 1, 3)
    with pytest.raises(sd.DiffusionError, match=r"diffusion of state 1 depends on state 0"):
        sd.sdeint(lambda t, z: z, lambda t, z: z.flip(-1), torch.ones(4, 2), ts, solver=sd.Milstein())


def test_gradients_are_finite_where_the_slope_is_zero():
    sigma = torch.tensor([0.5], dtype=F64, requires_grad=True)
    path = sd.SDEPath(
        lambda t, z: -z, lambda t, z: sigma * torch.ones_like(z), torch.ones(1, dtype=F64),
        torch.linspace(0, 1, 5, dtype=F64), solver=sd.Milstein(),
    )  # fmt: skip
    path.log_prob(path.rsample().detach()).backward()
    assert torch.isfinite(sigma.grad).all()
