import math

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.points.occurrences import Occurrences
from stochdyn.paths.points.pieces import Pieces


def cut(rows, end, step):
    longest = max(len(row) for row in rows)
    padded = torch.tensor([row + [math.inf] * (longest - len(row)) for row in rows], dtype=torch.float64)
    padded = padded.reshape(len(rows), longest, 1)
    jumps = Occurrences.of(padded, torch.zeros(len(rows)).double(), torch.tensor(end, dtype=torch.float64))
    return Pieces.cut(jumps, torch.as_tensor(step, dtype=torch.float64))


def test_every_sequence_is_cut_by_its_own_gaps():
    pieces = cut([[0.5, 0.6], [3.0]], [1.6, 4.0], 1.0)
    assert torch.allclose(pieces.edges[:, 0], torch.tensor([0.0, 0.5, 0.6, 1.6, 1.6], dtype=torch.float64))
    assert pieces.edges[:, 1].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert pieces.real.T.tolist() == [[True, True, False], [False, False, True]]
    assert float(pieces.edges[1, 0]) == 0.5 and float(pieces.edges[2, 0]) == 0.6  # to the last bit


def test_a_batch_has_the_rows_of_its_longest_sequence():
    generator = torch.Generator().manual_seed(0)
    rows = [sorted((10 * torch.rand(n, generator=generator).double()).tolist()) for n in (0, 3, 17, 40)]
    alone = [len(cut([row], [10.0], 0.3).times) for row in rows]
    together = cut(rows, [10.0] * 4, 0.3)
    assert len(together.times) == max(alone)
    assert together.real.sum(0).tolist() == [0, 3, 17, 40]
    assert float(together.edges.diff(dim=0).max()) <= 0.3 + 1e-12
    assert float(together.edges.diff(dim=0).min()) >= 0.0


def test_unused_rows_cost_nothing_and_a_step_may_differ():
    padded = cut([[0.5] + [math.inf] * 50], [1.0], 10.0)
    assert len(padded.times) == 1
    assert len(cut([[]], [1.0], 10.0).times) == 0
    own = cut([[], []], [4.0, 4.0], [1.0, 4.0])
    assert own.edges.T.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 4.0, 4.0, 4.0, 4.0]]


def test_a_jump_at_the_start_and_the_piece_of_a_time():
    pieces = cut([[0.0, 2.0]], [3.0], 1.0)
    assert pieces.edges[:, 0].tolist() == [0.0, 0.0, 1.0, 2.0, 3.0]
    assert pieces.real[:, 0].tolist() == [True, False, True]
    at = torch.tensor([[0.0], [0.5], [1.0], [1.5], [2.0], [2.5], [3.0]]).double()
    assert pieces.before(at)[:, 0].tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_a_jump_at_the_end_of_the_longest_sequence_is_kept():
    pieces = cut([[0.5, 2.0], [1.0]], [2.0, 2.0], 1.0)
    assert pieces.real.sum(0).tolist() == [2, 1]
    assert pieces.edges[:, 0].tolist() == [0.0, 0.5, 1.25, 2.0, 2.0]
    assert pieces.edges[-1].tolist() == [2.0, 2.0]


def test_a_step_in_the_wrong_units_is_an_error():
    with pytest.raises(sd.TimeError, match=r"step of 1e-09 cuts a sequence into 1000000000 pieces"):
        cut([[0.5]], [1.0], 1e-9)
