import math

import pytest
import torch

import stochdyn as sd
from tests.jumps import HAWKES, mean_count
from tests.problems import within

SAMPLERS = [sd.Thinning(), sd.Inversion()]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_draws_are_in_the_support_and_padded(sampler):
    torch.manual_seed(0)
    process = sd.Hawkes(
        torch.tensor([0.2, 2.0]), 0.8, 1.6, torch.tensor([0.0, 5.0]), 9.0, max_jumps=80, sampler=sampler
    )
    drawn = process.sample((3,))
    assert drawn.shape == (3, 2, 80, 1) and process.event_shape == (80, 1)
    assert bool(process.support.check(drawn).all())
    assert drawn.dtype == torch.float64


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides(sampler):
    process = sd.Hawkes(**HAWKES, t0=0.0, t1=20.0, sampler=sampler)
    torch.manual_seed(3)
    one = process.sample((2,))
    torch.manual_seed(3)
    assert torch.equal(one, process.sample((2,)))


def test_without_jumps():
    assert sd.PoissonProcess(1e-12, 0.0, 1.0).sample((2,)).shape == (2, 0, 1)
    assert sd.PoissonProcess(1e-12, 0.0, 1.0, max_jumps=3).sample().tolist() == [[math.inf]] * 3


def test_more_jumps_than_the_padding_holds():
    torch.manual_seed(0)
    process = sd.PoissonProcess(torch.tensor([0.1, 30.0]), 0.0, 1.0, max_jumps=8)
    with pytest.raises(
        sd.PaddingError, match=r"series 1: .* more than max_jumps=8 jumps by time 0\.\d+. Raise"
    ):
        process.sample()


def test_a_violated_bound_is_named():
    def rate(t):
        return 2 + torch.sin(t)

    torch.manual_seed(0)
    message = (
        r"series \d: *.*time \d+\.\d+: the intensity is 2\.\d+, above its bound 2\.5.*Give a larger `bound`"
    )
    with pytest.raises(sd.BoundError, match=message.replace(": *.*", ", ")):
        sd.PoissonProcess(rate, torch.zeros(3), 41.0, bound=2.5).sample()
    sd.PoissonProcess(rate, torch.zeros(3), 40.0, bound=3.0).sample()
    with pytest.raises(sd.BoundError):
        sd.PointProcess(lambda t, h: rate(t), 0.0, 41.0, bound=lambda t, h: 2.5 + 0 * t).sample()


@pytest.mark.parametrize("bound", [math.nan, math.inf, 0.0, -1.0, 1e-4])
def test_a_useless_bound_is_noticed(bound):
    message = "above its bound 0.0001" if bound == 1e-4 else "must be finite and positive"
    with pytest.raises(sd.BoundError, match=message):
        sd.PoissonProcess(lambda t: 2 + 0 * t, 0.0, 100.0, bound=bound).sample()
    with pytest.raises(sd.BoundError, match=message):
        sd.PointProcess(lambda t, h: 2 + 0 * t, 0.0, 100.0, bound=bound).sample()
    with pytest.raises(sd.BoundError, match="the intensity is 2, "):
        sd.PointProcess(lambda t, h: 2 + 0 * t, 0.0, 100.0, bound=lambda t, h: bound + 0 * t).sample()


@pytest.mark.slow
def test_an_explosion_ends_in_an_error():
    torch.manual_seed(0)
    with pytest.raises(sd.PaddingError, match="more than max_jumps=20000"):
        sd.Hawkes(1.0, 2.0, 1.0, 0.0, 1e3, explosive=True).sample()


def test_thinning_needs_a_bound():
    with pytest.raises(sd.FieldError, match=r"knows no bound.*sd.Inversion"):
        sd.PoissonProcess(torch.exp, 0.0, 1.0, sampler=sd.Thinning()).sample()


@pytest.mark.slow
def test_inversion_looks_no_further_than_it_needs_to():
    # A pulse far ahead of a nearly silent start, and one that has passed.
    torch.manual_seed(0)

    def pulse(t):
        return 1e-3 + 6 * torch.exp(-0.5 * ((t - 50.0) / 0.5) ** 2)

    counts = mean_count(sd.PoissonProcess(pulse, 0.0, 100.0, tolerance=1e-6).sample((1000,)))
    expected = 0.1 + 3 * math.sqrt(2 * math.pi)
    assert within(counts, expected)
    assert not within(counts, 0.9 * expected)


def test_inversion_refuses_a_negative_intensity():
    with pytest.raises(sd.FieldError, match="the intensity is -"):
        sd.PoissonProcess(lambda t: torch.cos(t), 0.0, 10.0).sample()
