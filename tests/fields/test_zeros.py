"""Jacobians against closed forms, Newton's method against known zeros."""

import torch

from stochdyn.fields.zeros import find_zeros, jacobian

F64 = torch.float64


def cubic(z):
    return torch.stack([z[..., 0] - z[..., 0] ** 3, z[..., 0] * z[..., 1]], -1)


def test_jacobian_of_a_batch_with_parameters():
    theta, z = torch.randn(4, dtype=F64), torch.randn(5, 4, 2, dtype=F64)
    got = jacobian(lambda x: theta[..., None] * cubic(x), z)
    rows = [
        torch.stack([1 - 3 * z[..., 0] ** 2, 0 * z[..., 0]], -1),
        torch.stack([z[..., 1], z[..., 0]], -1),
    ]
    assert (got - theta[:, None, None] * torch.stack(rows, -2)).abs().max() < 1e-14
    assert not got.requires_grad or torch.is_grad_enabled()


def test_jacobian_is_differentiable_in_parameters_and_state():
    theta = torch.tensor([1.5, -0.3], dtype=F64, requires_grad=True)
    z = torch.randn(3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, x: jacobian(lambda y: p * cubic(y), x), (theta, z))
    with torch.no_grad():
        assert not jacobian(lambda y: theta * cubic(y), z).requires_grad


def test_jacobian_of_a_constant_is_zero():
    assert torch.equal(jacobian(lambda z: torch.ones(3, 2), torch.randn(3, 2)), torch.zeros(3, 2, 2))
    assert torch.equal(jacobian(lambda z: 0 * z + 1, torch.randn(2)), torch.zeros(2, 2))


def test_zeros_are_found_from_everywhere():
    starts = torch.linspace(-3, 3, 31, dtype=F64)[:, None] * torch.ones(2, dtype=F64)
    z, speed = find_zeros(cubic, starts, torch.ones(31, dtype=F64), tolerance=1e-10)
    # Where z0 is -1 or 1 the second state must be 0; at z0 = 0 it is free.
    assert (speed < 1e-10).all()
    assert (cubic(z).abs() < 1e-10).all()
    assert ((z[:, 0].abs() - 1).abs() < 1e-8).sum() > 20


def test_without_a_zero_the_speed_says_so():
    z, speed = find_zeros(
        lambda x: x**2 + 1,
        torch.linspace(-2, 2, 7, dtype=F64)[:, None],
        torch.ones(7, dtype=F64),
        tolerance=1e-8,
    )
    assert (speed >= 1 - 1e-12).all()
    assert z.isfinite().all()


def test_a_field_that_leaves_the_finite_numbers():
    z, speed = find_zeros(
        lambda x: torch.log(x),
        torch.tensor([[3.0], [-1.0]], dtype=F64),
        torch.ones(2, dtype=F64),
        tolerance=1e-8,
    )
    assert abs(z[0, 0] - 1) < 1e-10
    assert speed[1] == torch.inf
