"""Fields: diffusions, and what is refused."""

import pytest
import torch

import stochdyn as sd
from stochdyn.fields import (
    DiagonalDiffusion,
    as_diffusion,
    check_diffusion,
    probe,
)

F64 = torch.float64
T, Z = torch.zeros(1, dtype=F64), torch.ones(3, 2, dtype=F64)


def test_kinds_of_diffusion():
    g = torch.tensor([0.1, 0.2], dtype=F64)
    assert as_diffusion(g).diagonal
    assert as_diffusion(g).constant
    assert as_diffusion(torch.nn.Parameter(g)).constant
    assert not as_diffusion(lambda t, z: z).constant
    matrix = sd.MatrixDiffusion(torch.ones(2, 3, dtype=F64))
    assert as_diffusion(matrix) is matrix
    assert not matrix.diagonal
    dt = torch.tensor([[2.0], [3.0]], dtype=F64)
    assert as_diffusion(g).scale(g, dt).tolist() == [[0.2, 0.4], [pytest.approx(0.3), pytest.approx(0.6)]]
    assert matrix.scale(matrix(T, Z), dt).shape == (2, 2, 3)
    assert (matrix.scale(matrix(T, Z), dt)[1] == 3).all()
    for number in (1, 0.5):
        with pytest.raises(sd.FieldError, match=rf"Write torch.tensor\(\[{number}\]\)"):
            as_diffusion(number)


def test_probe_finds_the_batch_and_the_noises():
    theta = torch.ones(4, 1, 1, dtype=F64)
    assert probe(lambda t, z: theta * z, as_diffusion(Z[0]), T, Z, None) == ((4, 3), 2)
    wide = sd.MatrixDiffusion(torch.ones(4, 1, 2, 5, dtype=F64))
    assert probe(lambda t, z: z, wide, T, Z, None) == ((4, 3), 5)
    with pytest.raises(
        sd.FieldError, match=r"drift \(7,\), diffusion \(\) and state \(3,\) do not broadcast"
    ):
        probe(lambda t, z: z.new_ones(7, 2), as_diffusion(Z[0]), T, Z, None)
    grad = torch.ones(2, dtype=F64, requires_grad=True)
    seen = []
    probe(lambda t, z: seen.append(torch.is_grad_enabled()) or z, as_diffusion(grad), T, Z, None)
    assert seen == [False]


def test_check_diffusion():
    diagonal = DiagonalDiffusion(lambda t, z: z)
    check_diffusion(diagonal, Z, 0.0)
    with pytest.raises(sd.DiffusionError, match=r"time 1.5, state 1: the diffusion is inf"):
        check_diffusion(diagonal, torch.tensor([1.0, torch.inf]), 1.5)
    matrix = sd.MatrixDiffusion(lambda t, z: z)
    check_diffusion(matrix, torch.tensor([[1.0, 0.0], [1.0, 1e-3]]), 0.0)
    with pytest.raises(sd.DiffusionError, match=r"time 2: the diffusion matrix is singular"):
        check_diffusion(matrix, torch.stack([torch.eye(2), torch.ones(2, 2)]), 2.0)
