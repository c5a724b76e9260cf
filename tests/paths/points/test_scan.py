import pytest
import torch

from stochdyn.paths.points.scan import linear_scan


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 64, 100])
def test_the_scan_is_the_loop(steps):
    torch.manual_seed(steps)
    decay, rise = torch.rand(steps, 3).double(), torch.randn(steps, 3).double()
    level, expected = torch.zeros(3).double(), []
    for a, b in zip(decay, rise, strict=True):
        level = a * level + b
        expected.append(level)
    found = linear_scan(decay, rise)
    assert found.shape == rise.shape
    if steps:
        assert torch.allclose(found, torch.stack(expected), atol=1e-13)


def test_gradients_and_long_decays():
    decay = torch.rand(9).double().requires_grad_()
    rise = torch.rand(9).double().requires_grad_()
    assert torch.autograd.gradcheck(linear_scan, (decay, rise))
    gone = torch.full((5000,), 1e-200).double().requires_grad_()
    out = linear_scan(gone, torch.ones(5000).double())
    out.sum().backward()
    assert bool(torch.isfinite(out).all() and torch.isfinite(gone.grad).all())
