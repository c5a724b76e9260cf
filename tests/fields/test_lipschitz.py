"""Bounds on the slope, and that they can be reached."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import stochdyn as sd

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def scrambled(net):
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 2)
    return net


@pytest.mark.parametrize("group", [2, 3])
def test_sorting_is_a_permutation_in_every_group(group):
    x = torch.randn(50, 12, dtype=F64)
    y = sd.GroupSort(group)(x)
    assert (y.unflatten(-1, (-1, group)).diff(dim=-1) >= 0).all()
    assert torch.equal(y.unflatten(-1, (-1, group)), x.unflatten(-1, (-1, group)).sort(-1).values)
    left = 12 - group
    shorter = sd.GroupSort(group)(x[:, :-1])  # the last group is not whole: it stays
    assert torch.equal(shorter, torch.cat([y[:, :left], x[:, left:-1]], -1))
    J = torch.autograd.functional.jacobian(sd.GroupSort(group), x[0])
    assert torch.equal(J @ J.mT, torch.eye(12, dtype=F64))


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (1, 6)])
def test_bjorck_is_the_nearest_orthonormal_matrix(shape):
    W = torch.randn(3, *shape, dtype=F64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rounds = 40 if S.min() < 0.05 else 30
    torch.testing.assert_close(sd.Bjorck(rounds)(W), U @ Vh, rtol=0, atol=1e-8)
    for k in (1, 2, 5):  # never above 1, however few iterations
        singular = torch.linalg.svdvals(sd.Bjorck(k)(100 * W))
        assert singular.max() <= 1 + 1e-12
    assert torch.linalg.svdvals(sd.Bjorck(1)(W)).min() < 0.95 or shape[0] == 1
    assert torch.isfinite(sd.Bjorck()(torch.zeros(shape))).all()


def largest_slope(f, inputs, pairs=4000):
    x = 3 * torch.randn(pairs, inputs, dtype=F64)
    y = torch.cat(
        [x[: pairs // 2] + 1e-3 * torch.randn(pairs // 2, inputs, dtype=F64), x[pairs // 2 :].flip(0) + 1]
    )
    with torch.no_grad():
        return ((f(x) - f(y)).norm(dim=-1) / (x - y).norm(dim=-1)).max().item()


@pytest.mark.parametrize("lipschitz", [1.0, 0.3])
def test_the_bound_holds_for_any_weights(lipschitz):
    for hidden in ((8,), (16, 4, 16)):
        net = scrambled(sd.LipschitzMLP(3, 2, hidden, lipschitz=lipschitz, iterations=3).double())
        assert largest_slope(net, 3) <= lipschitz + 1e-6
    control = scrambled(sd.MLP(3, 2, (8,)).double())
    assert largest_slope(control, 3) > 1


def fitted_to_the_absolute_value(net, steps=250):
    x = torch.linspace(-1, 1, 101, dtype=F64)[:, None]
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (net(x) - x.abs()).square().mean()
        loss.backward()
        optimiser.step()
    return loss.item()


class NormalisedReLU(torch.nn.Sequential):
    """The control: spectral norms of 1 and ReLU between."""

    def __init__(self):
        layers = [
            spectral_norm(torch.nn.Linear(a, b).double(), n_power_iterations=3) for a, b in ((1, 16), (16, 1))
        ]
        super().__init__(layers[0], torch.nn.ReLU(), layers[1])


def test_it_fits_the_absolute_value_and_a_relu_net_does_not():
    net = sd.LipschitzMLP(1, 1, (16,)).double()
    loss = fitted_to_the_absolute_value(net)
    assert loss < 1e-3
    assert 0.9 < largest_slope(net, 1) <= 1 + 1e-6
    relu = NormalisedReLU()
    assert fitted_to_the_absolute_value(relu) > 20 * loss


def test_copies_and_states():
    net = scrambled(sd.LipschitzMLP(2, 2, (8,)).double())
    x = torch.randn(5, 2, dtype=F64)
    other = copy.deepcopy(net)
    assert torch.equal(other(x), net(x))
    scrambled(other)
    assert not torch.equal(other(x), net(x))
    fresh = sd.LipschitzMLP(2, 2, (8,)).double()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))
    with parametrize.cached():
        assert torch.equal(fresh(x), net(x))


def test_as_a_drift_it_does_not_explode():
    net = scrambled(sd.LipschitzMLP(2, 2, (8,), lipschitz=0.5).double())
    z = torch.randn(100, 2, dtype=F64)
    apart = [(z[:50] - z[50:]).norm(dim=-1)]
    with torch.no_grad():
        for _ in range(100):
            z = z + 0.05 * net(z)
            apart.append((z[:50] - z[50:]).norm(dim=-1))
    growth = torch.stack(apart)
    assert (growth[1:] <= (1 + 0.05 * 0.5) * growth[:-1] + 1e-9).all()


def test_refused():
    with pytest.raises(sd.ShapeError, match="at least 2 members, got 1"):
        sd.GroupSort(1)
    with pytest.raises(sd.FieldError, match="at least 1 iteration, got 0"):
        sd.Bjorck(0)
    with pytest.raises(sd.ShapeError, match=r"at least 1, got \[1, 0, 1\]"):
        sd.LipschitzMLP(1, 1, (0,))
    with pytest.raises(sd.FieldError, match="`lipschitz` must be positive, got 0"):
        sd.LipschitzMLP(1, 1, lipschitz=0)
