"""The likelihood's message is exact for Gaussian observations, and a density for all others."""

import pyro.distributions as dist
import pytest
import torch

from stochdyn.guides.linearise import likelihood_message
from tests.programs import F64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


H = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=F64)
NOISE = torch.tensor([0.3, 0.7], dtype=F64)


@pytest.mark.parametrize("batch", [(), (2,), (4, 2)])
def test_exact_for_gaussian_observations(batch):
    y, z = torch.randn(*batch, 5, 2, dtype=F64), torch.randn(*batch, 5, 3, dtype=F64)
    message = likelihood_message(lambda z: dist.Normal(z @ H.mT, NOISE).log_prob(y).sum(), z)
    J = H.mT @ torch.diag(NOISE**-2) @ H
    torch.testing.assert_close(message.precision, J.expand(*batch, 5, 3, 3))
    torch.testing.assert_close(message.information, (y * NOISE**-2) @ H)


def student(z, y=4.0):
    return dist.StudentT(3.0, z, 0.5).log_prob(torch.full_like(z, y)).sum()


def test_a_likelihood_that_is_not_log_concave_is_shifted():
    z = torch.linspace(-2, 6, 33, dtype=F64)[:, None]
    message = likelihood_message(student, z)
    J = message.precision[:, 0, 0]
    raw = torch.autograd.functional.hessian(student, z)[:, 0].diagonal().sum(0)
    assert (J >= 0).all()
    assert (raw > 0).any()  # without the shift some would be negative
    torch.testing.assert_close(J, (-raw).clamp(min=0))
    # Whatever the curvature, the gradient at the point of expansion is right.
    z.requires_grad_()
    torch.testing.assert_close(message.gradient(z.detach()), torch.autograd.grad(student(z), z)[0])


def test_the_shift_is_that_of_the_lowest_eigenvalue():
    def saddle(z):
        return z[..., 0] * z[..., 1] * 3 - z[..., 0].square()

    message = likelihood_message(lambda z: saddle(z).sum(), torch.randn(4, 2, dtype=F64))
    raw = torch.tensor([[2.0, -3.0], [-3.0, 0.0]], dtype=F64)
    lowest = torch.linalg.eigvalsh(raw)[0]
    torch.testing.assert_close(message.precision[0], raw - lowest * torch.eye(2, dtype=F64))
    assert torch.linalg.eigvalsh(message.precision).min() > -1e-12


def test_it_is_differentiable_where_gradients_are_on():
    scale = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def log_likelihood(z):
        return dist.Normal(z, scale).log_prob(torch.ones_like(z)).sum()

    message = likelihood_message(log_likelihood, torch.zeros(3, 1, dtype=F64))
    gradient = torch.autograd.grad(message.precision.sum(), scale)[0]
    assert gradient.item() == pytest.approx(3 * -2 * 0.5**-3)
    with torch.no_grad():
        message = likelihood_message(log_likelihood, torch.zeros(3, 1, dtype=F64))
    assert not message.precision.requires_grad
    assert message.precision[0, 0, 0].item() == pytest.approx(4.0)


def test_what_does_not_depend_on_the_path_says_nothing():
    message = likelihood_message(lambda z: torch.zeros(()), torch.zeros(3, 2))
    assert not message.information.any()
    assert not message.precision.any()
