import math

import pytest
import torch

import stochdyn as sd
from tests.jumps import END, HAWKES_LOG_PROB, TIMES, hawkes_log_prob, value
from tests.problems import within

MU = torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64)
ALPHA = torch.tensor([[0.2, 0.5, 0.0], [0.1, 0.3, 0.4], [0.0, 0.0, 0.6]], dtype=torch.float64)
BETA = torch.tensor([[1.0, 2.0, 3.0], [1.5, 2.5, 0.9], [1.0, 1.0, 1.7]], dtype=torch.float64)
KINDS = [0, 1, 1, 2, 0, 2, 2, 1]


def marked():
    rows = [[t, k] for t, k in zip(TIMES, KINDS, strict=True)]
    return torch.tensor([*rows, [math.inf, 0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "beta",
    [BETA, torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.tensor(1.6, dtype=torch.float64)],
)
def test_log_prob_is_that_of_the_definition(beta):
    rows = list(zip(TIMES, KINDS, strict=True))
    expected = hawkes_log_prob(rows, MU, ALPHA, beta.expand(3, 3), END)
    process = sd.MultivariateHawkes(MU, ALPHA, beta, 0.0, END)
    assert float(process.log_prob(marked())) == pytest.approx(expected, abs=1e-11)


def test_one_kind_is_the_univariate_process():
    process = sd.MultivariateHawkes(
        torch.tensor([0.5], dtype=torch.float64), torch.tensor([[0.8]], dtype=torch.float64), 1.6, 0.0, END
    )
    one = torch.cat([value(), torch.zeros(10, 1)], 1)
    assert float(process.log_prob(one)) == pytest.approx(HAWKES_LOG_PROB, abs=1e-10)


def test_batches():
    alpha = torch.stack([ALPHA, 0.5 * ALPHA])
    beta = torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None, None]
    process = sd.MultivariateHawkes(MU, alpha, beta, 0.0, torch.tensor([[END], [5.0]]))
    assert process.batch_shape == (2, 2)
    found = process.log_prob(marked())
    for i, end in enumerate((END, 5.0)):
        for j in range(2):
            alone = sd.MultivariateHawkes(MU, alpha[j], beta[j], 0.0, end).log_prob(marked())
            assert float(found[i, j]) == pytest.approx(float(alone), abs=1e-11)


def test_intensities_add_up_and_are_those_before_the_jump():
    process = sd.MultivariateHawkes(MU, ALPHA, BETA, 0.0, END)
    ts = [0.1, 0.2, 0.3, 2.4]
    each = process.intensities(ts, marked())
    assert each.shape == (4, 3)
    assert torch.allclose(each.sum(-1), process.intensity(ts, marked()), atol=1e-12)
    assert torch.allclose(each[:2], MU.expand(2, 3), atol=1e-12)
    assert torch.allclose(each[2], MU + ALPHA[:, 0] * (-0.1 * BETA[:, 0]).exp(), atol=1e-12)


@pytest.mark.parametrize("sampler", [sd.Thinning(), pytest.param(sd.Inversion(), marks=pytest.mark.slow)])
def test_draws_have_the_long_run_rates_of_each_kind(sampler):
    torch.manual_seed(0)
    process = sd.MultivariateHawkes(MU, ALPHA, BETA, 0.0, 40.0, sampler=sampler)
    drawn = process.sample((250,))
    late = drawn[..., 0].gt(20.0) & drawn[..., 0].isfinite()
    counts = torch.stack([(late & (drawn[..., 1] == k)).sum(-1) for k in range(3)], -1).double() / 20.0
    rates = torch.linalg.solve(torch.eye(3).double() - ALPHA / BETA, MU)
    assert within(counts, rates)
    assert not within(counts, MU)
    assert not sd.time_rescaling(process, drawn).rejects()
    wrong = sd.MultivariateHawkes(MU, ALPHA.mT, BETA.mT, 0.0, 40.0)
    assert sd.time_rescaling(wrong, drawn).rejects()


def test_faults():
    with pytest.raises(sd.StabilityError, match=r"\(spectral radius of alpha / beta\) is 1\.2"):
        sd.MultivariateHawkes(torch.ones(2), torch.tensor([[0.2, 1.0], [1.0, 0.2]]), 1.0, 0.0, END)
    with pytest.raises(sd.ShapeError, match="mu must be"):
        sd.MultivariateHawkes(torch.ones(2), torch.ones(3, 3), 9.0, 0.0, END)
    process = sd.MultivariateHawkes(MU, ALPHA, BETA, 0.0, END)
    with pytest.raises(sd.DataError, match=r"jump 1, time 0.7: mark is 3, .* classes 0, 1, ... 2"):
        process.log_prob(torch.tensor([[0.2, 0.0], [0.7, 3.0]]))
    with pytest.raises(sd.ShapeError, match="1 mark, got"):
        process.log_prob(value())
