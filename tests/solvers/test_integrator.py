"""The loop of one-step methods: times of every series, pieces."""

import torch

import stochdyn as sd
from tests.orders import F64


def test_fine_times_are_the_pieces_of_all_gaps():
    times = torch.tensor([[0.0, 1.0], [1.0, 1.0], [3.0, 2.0]], dtype=F64)[..., None]
    fine = sd.Heun(2).fine(times)[..., 0]
    assert fine.T.tolist() == [[0.0, 0.5, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.5, 2.0]]


def test_solve_takes_every_series_own_times():
    times = torch.tensor([[0.0, 0.5], [1.0, 0.7], [3.0, 0.7]], dtype=F64)[..., None]
    rate = torch.tensor([[1.0], [2.0]], dtype=F64)
    z = sd.RungeKutta4(50).solve(lambda t, x: -rate * x, torch.ones(2, 1, dtype=F64), times)
    exact = torch.exp(-rate * (times - times[0]))
    assert (z - exact).abs().max() < 1e-6
    assert (z - torch.exp(-rate.flip(0) * (times - times[0]))).abs().max() > 0.05
