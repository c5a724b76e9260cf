import time

import pytest
import torch

import stochdyn as sd
from tests.jumps import (
    END,
    HAWKES,
    HAWKES_COMPENSATOR,
    HAWKES_LOG_PROB,
    TIMES,
    hawkes_log_prob,
    mean_count,
    value,
)
from tests.problems import within


def parameters():
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in HAWKES.values()]


def test_log_prob_and_compensator_in_closed_form():
    process = sd.Hawkes(**HAWKES, t0=0.0, t1=END)
    assert float(process.log_prob(value())) == pytest.approx(HAWKES_LOG_PROB, abs=1e-10)
    expected = torch.tensor(HAWKES_COMPENSATOR, dtype=torch.float64)
    assert torch.allclose(process.compensator(TIMES, value()), expected, atol=1e-9, rtol=0)
    assert float(process.branching) == 0.5


def test_the_general_process_agrees_and_so_do_gradients():
    mu, alpha, beta = parameters()

    def intensity(t, history):
        return mu + history.sum(lambda lag: alpha * torch.exp(-beta * lag))

    closed = sd.Hawkes(mu, alpha, beta, 0.0, END).log_prob(value())
    general = sd.PointProcess(intensity, 0.0, END).log_prob(value())
    assert torch.allclose(general, closed, atol=1e-9, rtol=0)
    one = torch.autograd.grad(closed, (mu, alpha, beta))
    other = torch.autograd.grad(general, (mu, alpha, beta))
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, atol=1e-8)


def test_a_batch_is_its_members():
    mu = torch.tensor([0.2, 0.5], dtype=torch.float64)
    beta = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    end = torch.tensor([3.5, END])
    process = sd.Hawkes(mu, 0.8, beta, 0.0, end)
    assert process.batch_shape == (3, 2) and process.event_shape == (0, 1)
    found = process.log_prob(value())
    for i in range(3):
        for j in range(2):
            alone = hawkes_log_prob(
                [(t, 0) for t in TIMES], mu[[j]], torch.tensor([[0.8]]), beta[i][:, None], float(end[j])
            )
            assert float(found[i, j]) == pytest.approx(alone, abs=1e-7)
    wide = process.expand((5, 3, 2))
    assert torch.allclose(wide.log_prob(value()), found.expand(5, 3, 2), atol=1e-12)
    assert wide.sample().shape[:3] == (5, 3, 2)


def test_five_thousand_jumps_forward_and_backward_in_a_tenth_of_a_second():
    torch.manual_seed(0)
    drawn = torch.rand(5000, dtype=torch.float64).mul(5000).sort().values[:, None]
    own = parameters()
    seconds = []
    for _ in range(5):
        start = time.process_time()
        sd.Hawkes(*own, 0.0, 5000.0).log_prob(drawn).backward()
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
    assert all(bool(torch.isfinite(p.grad)) for p in own)


@pytest.mark.parametrize("sampler", [sd.Thinning(), sd.Inversion()])
def test_mean_number_of_jumps(sampler):
    # E N(T) = m T + (m - mu) (exp(-(beta - alpha) T) - 1) / (beta - alpha), m = mu / (1 - alpha / beta).
    torch.manual_seed(0)
    counts = mean_count(sd.Hawkes(**HAWKES, t0=0.0, t1=20.0, sampler=sampler).sample((1500,)))
    expected = 20.0 + 0.5 * (torch.tensor(-16.0).exp() - 1) / 0.8
    assert within(counts, expected)
    assert not within(counts, expected * 1.05)


def test_mean_and_variance_of_the_rate():
    torch.manual_seed(0)
    rates = mean_count(sd.Hawkes(0.5, 0.5, 2.0, 0.0, 200.0).sample((800,))) / 200
    start = (2 / 3 - 0.5) / 1.5 / 200  # nothing is known of jumps before 0
    assert within(rates, 2 / 3 - start)
    assert within((rates - rates.mean()) ** 2, 0.005917283950617282)
    assert not within((rates - rates.mean()) ** 2, 2 / 3 / 200)  # Poisson's


def test_explosive_parameters_are_refused_unless_asked_for():
    with pytest.raises(
        sd.StabilityError, match=r"Hawkes, batch member 1: .* alpha / beta is 1\.25.*explosive=True"
    ):
        sd.Hawkes(0.5, 2.0, torch.tensor([3.0, 1.6]), 0.0, END)
    allowed = sd.Hawkes(0.5, 2.0, 1.6, 0.0, END, explosive=True, max_jumps=5)
    expected = hawkes_log_prob([(t, 0) for t in TIMES], *(torch.tensor([[x]]) for x in (0.5, 2.0, 1.6)), END)
    assert float(allowed.log_prob(value())) == pytest.approx(expected, abs=1e-5)
    torch.manual_seed(0)
    with pytest.raises(sd.PaddingError, match="more than max_jumps=5 jumps"):
        allowed.sample((100,))
    assert sd.Hawkes(0.5, 2.0, 1.6, 0.0, END, validate_args=False).log_prob(value()).isfinite()


def test_other_parameters_are_checked():
    with pytest.raises(sd.FieldError, match="`beta` must be positive, got 0"):
        sd.Hawkes(0.5, 0.0, 0.0, 0.0, END)
    with pytest.raises(sd.FieldError, match="`mu` must be not negative, got nan"):
        sd.Hawkes(float("nan"), 0.1, 1.0, 0.0, END)


def test_single_precision_parameters_lose_nothing_of_the_times():
    single = [torch.tensor([x]) for x in HAWKES.values()]
    found = sd.Hawkes(*single, 0.0, END).log_prob(value())
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(HAWKES_LOG_PROB, abs=1e-5)
