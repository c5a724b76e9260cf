"""What hybrid solutions are made of."""

import torch

from stochdyn.paths.hybrid import gather_jumps, limit


def test_jumps_of_series_are_gathered_in_order():
    times = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.5]], dtype=torch.float64)
    fired = torch.tensor([[-1, 0], [1, -1], [0, 0]])
    jumps = gather_jumps(times, fired, torch.tensor([0, 1]))
    assert jumps.times.tolist() == [[2.0, 3.0], [1.0, 3.5]]
    assert jumps.triggers.tolist() == [[1, 0], [0, 0]]
    assert jumps.stopped.tolist() == [float("inf"), 3.5] and jumps.counts.tolist() == [2, 2]


def test_no_jump_at_all():
    jumps = gather_jumps(torch.zeros(2, 3), torch.full((2, 3), -1), torch.zeros(3))
    assert jumps.values.shape == (3, 0, 2) and jumps.counts.tolist() == [0, 0, 0]


def test_the_limit_of_shrinking_gaps():
    ratio = torch.tensor([0.5, 0.9], dtype=torch.float64)
    times = torch.stack([(1 - ratio**k) / (1 - ratio) for k in range(6)])
    assert (limit(times, torch.tensor([6, 6])) - 1 / (1 - ratio)).abs().max() < 1e-12
    even = torch.arange(4.0)[:, None]
    assert limit(even, torch.tensor([4])).tolist() == [3.0]  # gaps that do not shrink have none
