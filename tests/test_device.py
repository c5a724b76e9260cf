"""Factorisations that do not wait: the same numbers, and NaN where the checked ones raise."""

import pytest
import torch

from stochdyn.device import (
    _lowest_by_squaring,
    cholesky,
    inverse,
    lowest_eigenvalue,
    readable,
    solve,
    without_waiting,
)
from tests.synchronisation import FAR, pretended

F64 = torch.float64


def matrices(number=20, size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, size, size, generator=generator, dtype=F64)


def far(compute, *args):
    """What `compute` gives on an accelerator, without waiting."""
    with pretended() as log:
        args = [x.to(FAR) for x in args]
        log.clear()
        with without_waiting():
            out = compute(*args)
        assert log == []
        return out.near


def test_numbers_are_readable_outside_and_on_a_cpu():
    with pretended():
        x = torch.zeros(1, device=FAR)
        assert readable(x)
        with without_waiting():
            assert not readable(x)
            assert readable(torch.zeros(1))
            with without_waiting(False):
                assert readable(x)
        assert readable(x)


def test_the_same_factors():
    G, B = matrices(), matrices(seed=1)
    S = G @ G.mT + torch.eye(3, dtype=F64)
    assert torch.equal(far(cholesky, S), torch.linalg.cholesky(S))
    assert torch.equal(far(inverse, G), torch.linalg.inv(G))
    torch.testing.assert_close(far(solve, G, B), torch.linalg.solve(G, B), rtol=1e-12, atol=0)


@pytest.mark.parametrize("compute", [cholesky, inverse, lambda A: solve(A, A)])
def test_nan_where_a_checked_factor_raises(compute):
    A = torch.eye(2, dtype=F64).repeat(3, 1, 1)
    A[1] = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) if compute is not cholesky else -A[1]
    with pytest.raises(torch.linalg.LinAlgError):
        compute(A)
    out = far(compute, A)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_gradients_are_those_of_the_checked_factor():
    G = matrices()
    S = G @ G.mT + torch.eye(3, dtype=F64)
    here = S.clone().requires_grad_()
    cholesky(here).sum().backward()
    with pretended():
        there = S.to(FAR).requires_grad_()
        with without_waiting():
            cholesky(there).sum().backward()
        torch.testing.assert_close(there.grad.near, here.grad, rtol=1e-12, atol=1e-14)


def test_the_lowest_eigenvalue_is_never_too_low_and_nearly_right():
    A = matrices(200, 4)
    A = A + A.mT
    exact, found = torch.linalg.eigvalsh(A)[:, 0], _lowest_by_squaring(A, 10)
    bound = A.abs().sum(-1).amax(-1)
    assert (found > exact - 1e-12 * bound).all()
    assert (found < exact + bound * torch.tensor(4.0).log() / 2**10).all()
    # The control: fewer squarings are further off.
    assert (_lowest_by_squaring(A, 3) > exact + bound * torch.tensor(4.0).log() / 2**10).any()
    assert torch.equal(lowest_eigenvalue(A), exact)


def test_semidefinite_matrices_are_not_shifted():
    U = matrices(200, 4)[..., :2]
    J = U @ U.mT  # of rank 2
    assert (_lowest_by_squaring(J, 10) > -1e-14 * J.abs().sum(-1).amax(-1)).all()
    assert abs(_lowest_by_squaring(torch.zeros(1, 3, 3), 10).item()) < 1e-6
