import math

import torch

from stochdyn.paths.points.occurrences import Occurrences


def test_time_major_with_unused_rows_at_the_end():
    value = torch.tensor([[[0.5, 1.0], [0.7, 2.0]], [[0.2, 3.0], [math.inf, 0.0]]], dtype=torch.float64)
    jumps = Occurrences.of(value, torch.tensor([0.0, 0.1]), torch.tensor(1.0))
    assert jumps.times.T.tolist() == [[0.5, 0.7], [0.2, 1.0]]
    assert jumps.real.T.tolist() == [[True, True], [True, False]]
    assert jumps.marks[..., 0].T.tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert torch.allclose(jumps.edges[0], torch.tensor([0.0, 0.1], dtype=torch.float64), atol=1e-7)
    assert jumps.edges[-1].tolist() == [1.0, 1.0]


def test_a_jump_does_not_come_before_its_own_time():
    value = torch.tensor([[[0.5], [0.7]], [[0.2], [math.inf]]], dtype=torch.float64)
    jumps = Occurrences.of(value, torch.tensor(0.0), torch.tensor(1.0))
    ts = torch.tensor([0.5, 0.6, 1.0], dtype=torch.float64)[:, None].expand(3, 2)
    assert jumps.before(ts).T.tolist() == [[0, 1, 2], [1, 1, 1]]


def test_an_empty_tensor_and_a_broadcast_window():
    jumps = Occurrences.of(torch.zeros(0, 1).double(), torch.zeros(3), torch.ones(3))
    assert jumps.times.shape == (0, 3) and jumps.edges.shape == (2, 3)
    assert jumps.before(torch.full((4, 3), 0.5)).shape == (4, 3)
