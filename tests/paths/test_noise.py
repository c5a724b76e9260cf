"""The algebra of a step and of its twist, against dense linear algebra."""

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.noise import DiagonalNoise, MatrixNoise, square_factor

F64 = torch.float64


def make(kind, batch=(5, 3)):
    generator = torch.manual_seed(0)
    if kind == "diagonal":
        return DiagonalNoise(0.3 + torch.rand(*batch, 3, dtype=F64, generator=generator))
    columns = {"square": 3, "tall": 2, "wide": 4}[kind]
    return MatrixNoise(torch.randn(*batch, 3, columns, dtype=F64, generator=generator))


def draw(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.manual_seed(1))


@pytest.mark.parametrize("kind", ["diagonal", "square", "tall", "wide"])
def test_noise(kind):
    noise = make(kind)
    G = noise.factor()
    xi, v = draw(5, 3, G.shape[-1]), draw(5, 3, 3)
    assert (noise.apply(xi) - (G @ xi[..., None])[..., 0]).abs().max() < 1e-12
    assert (noise.pull(v) - (G.mT @ v[..., None])[..., 0]).abs().max() < 1e-12
    assert (noise.solve(noise.apply(xi)) - xi).abs().max() < 1e-9
    assert (noise.logdet() - 0.5 * torch.logdet(G.mT @ G)).abs().max() < 1e-9
    assert (noise.covariance() - G @ G.mT).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["diagonal", "square", "tall", "wide"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_twist(kind, diagonal):
    noise, n = make(kind), 3
    A = draw(5, 3, n, n)
    J = A.square().sum(-1) if diagonal else A @ A.mT
    twist, G = noise.twist(J, diagonal), noise.factor()
    full = torch.diag_embed(J) if diagonal else J
    precision = torch.eye(G.shape[-1], dtype=F64) + G.mT @ full @ G
    S, v = torch.linalg.inv(precision), draw(5, 3, G.shape[-1])
    assert (twist.smooth(v) - (S @ v[..., None])[..., 0]).abs().max() < 1e-10
    assert (twist.half_logdet() - 0.5 * torch.logdet(S)).abs().max() < 1e-10
    assert (twist.whiten(twist.colour(v)) - v).abs().max() < 1e-10
    unit = torch.eye(G.shape[-1], dtype=F64).reshape(-1, 1, 1, G.shape[-1]).expand(-1, 5, 3, -1)
    C = twist.colour(unit).movedim(0, -1)
    assert (C @ C.mT - S).abs().max() < 1e-10
    assert (C @ C.mT - precision).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["diagonal", "square", "tall", "wide"])
def test_a_step_of_zero_length(kind):
    noise = make(kind, (2,))
    keep = torch.tensor([1.0, 0.0], dtype=F64)
    scaled = (
        DiagonalNoise(noise.scale * keep[:, None])
        if kind == "diagonal"
        else MatrixNoise(make(kind, (2,)).factor() * keep[:, None, None])
    )
    safe = scaled.safe(keep > 0)
    assert torch.isfinite(safe.logdet()).all()
    assert safe.logdet()[1] == 0
    assert torch.equal(safe.factor()[0], scaled.factor()[0])


def test_a_wide_factor_that_is_zero_stays_zero_and_has_gradients():
    G = torch.stack([make("wide", ()).factor().new_ones(2, 3), torch.zeros(2, 3, dtype=F64)])
    G[0, 0, 0] = 2.0
    G.requires_grad_()
    C = square_factor(G)
    assert (C[1] == 0).all()
    assert (C[0] @ C[0].mT - G[0] @ G[0].mT).abs().max() < 1e-12
    C.sum().backward()
    assert torch.isfinite(G.grad).all()


def test_singular_matrices():
    ones = torch.ones(2, 2, dtype=F64)
    with pytest.raises(sd.DiffusionError, match=r"matrix is singular .*linearly independent"):
        MatrixNoise(ones).solve(ones[0])
    with pytest.raises(sd.DiffusionError, match=r"singular"):
        MatrixNoise(torch.zeros(3, 2, dtype=F64)).solve(torch.zeros(3, dtype=F64))
    with pytest.raises(sd.DiffusionError, match=r"singular"):
        square_factor(torch.ones(2, 3, dtype=F64))
    with pytest.raises(sd.DivergedError, match=r"must be positive semi-definite and finite"):
        MatrixNoise(ones).twist(-10 * torch.eye(2, dtype=F64), False)
