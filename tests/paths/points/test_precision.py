import pytest
import torch

from stochdyn.paths.points.precision import at_least, first_that_works


def test_double_where_it_works_else_that_of_networks():
    assert first_that_works(None, lambda dtype: 1) == (torch.float64, 1)
    single = torch.nn.Linear(1, 1)
    dtype, out = first_that_works(None, lambda dtype: single(torch.zeros(1, dtype=dtype)))
    assert dtype == out.dtype == torch.float32
    assert first_that_works(torch.zeros(1), lambda dtype: 1) == (torch.float32, 1)


def test_the_reason_that_is_told_is_not_the_dtype():
    single = torch.nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        first_that_works(None, lambda dtype: single(torch.zeros(1, 3, dtype=dtype)))


def test_results_are_never_coarser_than_the_times():
    coarse, fine = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert at_least(coarse, fine).dtype == at_least(fine, coarse).dtype == torch.float64
    assert at_least(coarse, coarse).dtype == torch.float32
