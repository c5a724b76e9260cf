"""Messages: their shapes, the likelihood of observations, and the backward information filter."""

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.message import LinearStep, backward_information, linearise

F64 = torch.float64


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def draw(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.manual_seed(0))


def test_kinds_of_precision():
    h = torch.zeros(4, 2)
    assert sd.Message(h, torch.zeros(4, 2)).diagonal
    assert not sd.Message(h, torch.zeros(4, 2, 2)).diagonal
    assert sd.Message(h.expand(3, 4, 2), torch.zeros(4, 2)).diagonal
    assert not sd.Message(h.expand(3, 4, 2), torch.zeros(4, 2, 2)).diagonal
    assert sd.Message(h, torch.zeros(3, 4, 2)).diagonal
    square = torch.zeros(2, 2)
    assert sd.Message(square, square).diagonal
    assert not sd.Message(square, torch.zeros(2, 2, 2)).diagonal
    assert sd.Message(torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)).diagonal
    assert sd.Message(h.expand(3, 4, 2), torch.zeros(5, 1, 4, 2)).batch_shape == (5, 3)
    for bad in (torch.zeros(4, 3), torch.zeros(3, 2, 2), torch.zeros(2), torch.zeros(())):
        with pytest.raises(sd.ShapeError, match=r"precision must have shape \(\*batch, time, state\) or"):
            sd.Message(h, bad)
        with pytest.raises(sd.ShapeError, match=r"loc"):
            sd.Message.at(h, bad)


def test_values():
    h, A, z = draw(5, 3, 2), draw(5, 3, 2, 2), draw(3, 2)
    message = sd.Message(h, A @ A.mT)
    expected = (h * z).sum(-1) - 0.5 * ((A.mT @ z[..., None]) ** 2).sum((-2, -1))
    assert (message.log_value(z) - expected).abs().max() < 1e-12
    at_z = z.expand(5, 3, 2).clone().requires_grad_()
    (grad,) = torch.autograd.grad(message.log_value(at_z).sum(), at_z)
    assert (message.gradient(z) - grad).abs().max() < 1e-12
    at = sd.Message.at(z, draw(4, 3, 2).square())
    assert at.information.shape == (4, 3, 2)
    assert at.gradient(z).abs().max() < 1e-12
    low = sd.Message.low_rank(h, A[..., 0].square(), A[..., 1:])
    assert (
        low.full() - torch.diag_embed(A[..., 0].square()) - A[..., 1:] @ A[..., 1:].mT
    ).abs().max() < 1e-12


def test_time_major_with_different_batches():
    """h has a batch and J has none, with as many series as times: each is lifted on its own."""
    h, J = draw(3, 3, 2), draw(3, 2).square()
    path = sd.SDEPath(lambda t, z: -z, tensor(0.5, 0.4), tensor(0.1, 0.2), tensor(0.0, 0.3, 1.0))
    shared, own = path.guided(sd.Message(h, J)), path.guided(sd.Message(h, J.expand(3, 3, 2)))
    z = own.rsample()
    assert (shared.log_prob(z) - own.log_prob(z)).abs().max() < 1e-12
    for i in range(3):
        alone = path.guided(sd.Message(h[i], J)).log_prob(z[i])
        assert abs(own.log_prob(z)[i] - alone) < 1e-12


class TestObserved:
    def test_is_the_likelihood(self):
        grid = sd.TimeGrid(tensor(0.0, 1.0, 1.5), substeps=2)
        y, mask, H = draw(4, 3, 2), draw(4, 3, 2) > -0.5, draw(2, 3)
        message = sd.Message.observed(grid, y, mask, tensor(0.2, 0.4), H)
        z, origin = draw(4, 5, 3), torch.zeros(5, 3, dtype=F64)

        def log_likelihood(z):
            residual = (grid.observed(z) @ H.mT - y) / tensor(0.2, 0.4)
            return torch.where(mask, -0.5 * residual.square(), 0.0).sum((-2, -1))

        expected = log_likelihood(z) - log_likelihood(origin)
        assert (message.log_value(z).sum(-1) - expected).abs().max() < 1e-10
        assert not mask.all()

    def test_a_scale_is_not_rounded_to_single_precision(self):
        grid = sd.TimeGrid(tensor(0.0))
        one = torch.ones(1, 1, dtype=F64)
        assert sd.Message.observed(grid, one, one > 0, 0.2).precision.item() == 0.2**-2

    def test_own_grids_and_broadcasting(self):
        times = torch.tensor([[0.0, 1.0, 1.5], [0.0, 0.2, 0.2]], dtype=F64)
        grid = sd.TimeGrid(times, dt=0.5)
        mask = torch.tensor([[True] * 3, [True, True, False]])[..., None]
        message = sd.Message.observed(
            grid, torch.ones(3, 1, dtype=F64), mask, torch.ones(4, 1, 1, 1, dtype=F64)
        )
        assert message.information.shape == (4, 2, 4, 1)
        assert message.information[0, :, :, 0].tolist() == [[1, 0, 1, 1], [1, 1, 0, 0]]

    def test_refusals(self):
        grid = sd.TimeGrid(tensor(0.0, 1.0))
        y, mask = tensor(1.0, math.nan)[:, None], torch.tensor([True, False])[:, None]
        assert torch.isfinite(sd.Message.observed(grid, y, mask, 0.1).information).all()
        with pytest.raises(sd.DataError, match=r"`values` at \(1, 0\) is nan. Missing values go into `mask`"):
            sd.Message.observed(grid, y, mask | True, 0.1)
        for scale in (0.0, -1.0, math.nan):
            with pytest.raises(sd.DataError, match=r"`scale` must be positive"):
                sd.Message.observed(grid, y, mask, scale)


class TestBackward:
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
    def test_scan_equals_the_recursion(self, n):
        d = 2
        F, b, R = draw(n - 1, d, d), draw(n - 1, d) + 1, 0.5 * draw(n - 1, d, d)
        Q, A, h = R @ R.mT, draw(n, d, d), draw(n, d) - 0.3
        J = A @ A.mT
        message = backward_information(LinearStep(F, b, Q), sd.Message(h, J))
        hh, JJ = h[-1], J[-1]
        eye = torch.eye(d, dtype=F64)
        expected = [(hh, JJ)]
        for k in reversed(range(n - 1)):
            M = torch.linalg.inv(eye + JJ @ Q[k])
            hh, JJ = F[k].mT @ M @ (hh - JJ @ b[k]) + h[k], F[k].mT @ M @ JJ @ F[k] + J[k]
            expected.insert(0, (hh, JJ))
        for k in range(n):
            assert (message.information[k] - expected[k][0]).abs().max() < 1e-9
            assert (message.precision[k] - expected[k][1]).abs().max() < 1e-9

    def test_linearise(self):
        def drift(t, z):
            return torch.stack([z[..., 0] * z[..., 1], z[..., 0].sin()], -1)

        path = sd.SDEPath(drift, tensor(0.5, 0.4), tensor(0.1, 0.2), tensor(0.0, 0.3, 1.0))
        around = draw(3, 2)
        step = linearise(path.chain, around)
        for k, dt in enumerate((0.3, 0.7)):
            jacobian = torch.autograd.functional.jacobian(
                lambda z, k=k, dt=dt: z + drift(path.ts[k], z) * dt, around[k]
            )
            assert (step.F[k] - jacobian).abs().max() < 1e-12
            a = around[k] + drift(path.ts[k], around[k]) * dt
            assert (step.F[k] @ around[k] + step.b[k] - a).abs().max() < 1e-12
            assert (step.Q[k] - torch.diag(tensor(0.25, 0.16)) * dt).abs().max() < 1e-12

    def test_gradients_reach_parameters_and_stop_under_no_grad(self):
        theta = tensor(1.3).requires_grad_()
        path = sd.SDEPath(lambda t, z: -theta * z, tensor(0.5), tensor(0.1), tensor(0.0, 0.3, 1.0))
        potential = sd.Message(torch.ones(3, 1, dtype=F64), torch.ones(3, 1, dtype=F64))

        def information(theta):
            path = sd.SDEPath(lambda t, z: -theta * z, tensor(0.5), tensor(0.1), tensor(0.0, 0.3, 1.0))
            return sd.information_filter(path, potential).information

        assert torch.autograd.gradcheck(information, theta)
        with torch.no_grad():
            assert not sd.information_filter(path, potential).precision.requires_grad

    def test_refusals(self):
        path = sd.SDEPath(lambda t, z: -z, tensor(0.5), tensor(0.1), tensor(0.0, 0.3, 1.0))
        ones = torch.ones(4, 1, dtype=F64)
        with pytest.raises(
            sd.GuideError, match=r"message ends in \(4, 1\), the path needs \(time=3, state=1\)"
        ):
            sd.information_filter(path, sd.Message(ones, ones))
        path = sd.SDEPath(lambda t, z: z**99, tensor(0.5), tensor(99.0), tensor(0.0, 0.3, 1.0, 1.5))
        with pytest.raises(sd.DivergedError, match=r"the path is not finite"):
            sd.information_filter(path, sd.Message(ones, ones))
