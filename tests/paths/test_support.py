"""The bijection from an unconstrained vector on to a path."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

import stochdyn as sd

F64 = torch.float64
WIDE = torch.tensor([[0.5, 0.1, 0.2], [0.2, 0.6, -0.1]], dtype=F64)


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def build(noise, start, ts):
    given = {
        "diagonal": tensor(0.3, 0.5),
        "state": lambda t, z: 0.3 + 0.1 * z.square(),
        "wide": sd.MatrixDiffusion(WIDE),
        "tall": sd.MatrixDiffusion(WIDE[:, :1]),
    }[noise]
    initial = {
        "known": tensor(0.3, -0.2),
        "normal": dist.Normal(tensor(0.3, -0.2), 1.0).to_event(1),
        "lognormal": dist.LogNormal(tensor(0.3, -0.2), 1.0).to_event(1),
        "gamma": dist.Gamma(tensor(2.0, 3.0), tensor(1.0, 2.0)).to_event(1),
    }[start]
    return sd.SDEPath(lambda t, z: -z.sin() * (1 + t), given, initial, ts)


@pytest.mark.parametrize("start", ["known", "normal", "lognormal", "gamma"])
@pytest.mark.parametrize("noise", ["diagonal", "state", "wide", "tall"])
def test_round_trip_and_determinant(noise, start):
    path = build(noise, start, tensor(0.0, 0.1, 0.35, 0.4))
    transform = biject_to(path.support)
    torch.manual_seed(0)
    z = path.rsample((3,))
    x = transform.inv(z)
    assert x.shape == (3, *transform.inverse_shape(path.event_shape))
    assert transform.forward_shape(x.shape[-1:]) == path.event_shape
    again = biject_to(path.support)(x)
    assert (again - z).abs().max() < 1e-10
    ladj = transform.log_abs_det_jacobian(x, z)
    assert ladj.shape == (3,)
    if noise == "tall":
        # x are noise coordinates: the density in them is a standard normal's, times that of the start.
        free = 0 if start == "known" else 2
        first = path.chain.start.log_prob(z[..., 0, :])
        if free:
            first = first + biject_to(path.chain.start.prior.support).log_abs_det_jacobian(
                x[..., :2], z[..., 0, :]
            ).reshape(3, -1).sum(-1)
        expected = dist.Normal(0.0, 1.0).log_prob(x[..., free:]).sum(-1) + first
        assert (path.log_prob(z) + ladj - expected).abs().max() < 1e-10
        return
    for i in range(3):
        J = torch.autograd.functional.jacobian(transform, x[i])
        rows = J.flatten(0, 1) if start != "known" else J[1:].flatten(0, 1)
        assert abs(torch.linalg.slogdet(rows)[1] - ladj[i]) < 1e-10


@pytest.mark.parametrize("noise", ["diagonal", "tall"])
@pytest.mark.parametrize("start", ["known", "lognormal"])
def test_padding_has_no_flat_directions(noise, start):
    """The density in the unconstrained space integrates: idle coordinates have a normal density of their own."""
    ts = torch.tensor([[0.0, 0.1, 0.35, 0.35], [0.0, 0.1, 0.3, 0.4]], dtype=F64)
    path = build(noise, start, ts)
    transform = biject_to(path.support)
    torch.manual_seed(0)
    x = torch.randn(2, *transform.inverse_shape(path.event_shape), dtype=F64, requires_grad=True)
    z = transform(x)
    assert torch.equal(z[0, 3], z[0, 2])
    assert path.support.check(z).all()
    target = path.log_prob(z) + transform.log_abs_det_jacobian(x, z)
    (gradient,) = torch.autograd.grad(target.sum(), x)
    n = path.chain.noise_dim
    assert (gradient.abs() > 0).all()
    assert (gradient[0, -n:] + x[0, -n:]).abs().max() < 1e-12
    own = build(noise, start, ts[0, :3])
    alone = biject_to(own.support)
    free = x[0, :-n]
    rest = own.log_prob(alone(free)) + alone.log_abs_det_jacobian(free, alone(free))
    idle = -0.5 * (x[0, -n:].square() + math.log(2 * math.pi)).sum()
    assert abs(target[0] - rest - idle) < 1e-12
    back = transform.inv(z.detach())
    assert (back[0, -n:] == 0).all()
    assert (back[1] - x[1]).abs().max() < 1e-8


def test_shapes_and_caches():
    path = build("diagonal", "normal", tensor(0.0, 0.1, 0.35)).expand([4])
    transform = biject_to(path.support)
    x = torch.randn(5, 4, 6, dtype=F64)
    assert transform(x).shape == (5, 4, 3, 2)
    assert transform.log_abs_det_jacobian(x, transform(x)).shape == (5, 4)
    assert transform.with_cache(0)._cache_size == 0
    assert transform == biject_to(path.support)
    assert transform != biject_to(build("diagonal", "normal", path.ts).support)


def test_support_refuses_what_cannot_come_from_the_path():
    path = build("diagonal", "known", tensor(0.0, 0.1, 0.1))
    z = path.rsample()
    assert path.support.check(z)
    for row, message in ((0, "starts up to 1 away"), (2, "the step has zero length, yet the value moves")):
        wrong = z.clone()
        wrong[row] += 1.0
        assert not path.support.check(wrong)
        with pytest.raises(sd.SupportError, match=message):
            path.log_prob(wrong)
    wrong = z.clone()
    wrong[1, 0] = torch.nan
    assert not path.support.check(wrong)
    with pytest.raises(sd.DivergedError, match=r"series 0, time 0.1 .step 1.: the path is not finite"):
        path.log_prob(wrong)
