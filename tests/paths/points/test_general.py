import copy
import math

import pyro.distributions as dist
import pytest
import torch
from scipy import integrate

import stochdyn as sd
from stochdyn.paths.points.general import History
from tests.jumps import END, TIMES, hawkes_log_prob, mean_count, value
from tests.problems import within


def inhibited(t, history):
    return torch.nn.functional.softplus(1 - history.sum(lambda lag: 2 * torch.exp(-lag)))


def test_log_prob_against_quadrature_of_the_definition():
    def rate(t, count):
        pull = sum(2 * math.exp(-(t - s)) for s in TIMES[:count])
        return math.log1p(math.exp(1 - pull))

    edges = [0.0, *TIMES, END]
    expected = sum(math.log(rate(t, k)) for k, t in enumerate(TIMES))
    for k, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        expected -= integrate.quad(rate, a, b, args=(k,), epsabs=1e-12)[0]
    process = sd.PointProcess(inhibited, 0.0, END)
    assert float(process.log_prob(value())) == pytest.approx(expected, abs=1e-9)
    at = process.intensity([0.2, 0.3, 3.9], value())
    assert torch.allclose(
        at, torch.tensor([rate(0.2, 0), rate(0.3, 1), rate(3.9, 8)], dtype=torch.float64), atol=1e-12
    )


def test_marks_that_excite_and_marks_that_depend_on_history():
    marks = torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5, 0.7, 0.2, 0.9, 0.0, 0.0], dtype=torch.float64)
    marked = torch.cat([value(), marks[:, None]], 1)

    def intensity(t, history):
        return 0.5 + history.sum(lambda lag, mark: mark[..., 0] * torch.exp(-2 * lag), marks=True)

    def law(t, history):
        return dist.Exponential(1 + history.count)

    process = sd.PointProcess(intensity, 0.0, END, marks=law)
    assert process.event_shape == (0, 2)
    expected, edges = 0.0, [0.0, *TIMES, END]

    def rate(t, count):
        return 0.5 + sum(
            float(m) * math.exp(-2 * (t - s)) for s, m in zip(TIMES[:count], marks, strict=False)
        )

    for k, t in enumerate(TIMES):
        expected += math.log(rate(t, k)) + math.log(1 + k) - (1 + k) * float(marks[k])
    for k, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        expected -= integrate.quad(rate, a, b, args=(k,), epsabs=1e-12)[0]
    assert float(process.log_prob(marked)) == pytest.approx(expected, abs=1e-9)
    torch.manual_seed(0)
    drawn = process.sample((3,))
    assert drawn.shape[0] == 3 and drawn.shape[2] == 2
    assert process.log_prob(drawn).shape == (3,)


def test_parameters_of_batch_shape_and_ragged_rows():
    theta = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def intensity(t, history):
        return theta + history.sum(lambda lag: 0.4 * torch.exp(-theta * lag))

    hidden = sd.PointProcess(lambda t, h: 1 + h.sum(lambda lag: theta * torch.exp(-lag)), 0.0, END)
    assert hidden.batch_shape == (3,)
    torch.manual_seed(0)
    process = sd.PointProcess(intensity, 0.0, END, bound=intensity)
    drawn = process.sample((4,))
    assert process.batch_shape == (3,) and drawn.shape[:2] == (4, 3)
    closed = sd.Hawkes(theta, 0.4, theta, 0.0, END).log_prob(drawn)
    assert torch.allclose(process.log_prob(drawn), closed, atol=1e-9)
    alone = hawkes_log_prob(
        [(float(t), 0) for t in drawn[1, 2, :, 0] if math.isfinite(t)],
        theta[[2]], torch.tensor([[0.4]], dtype=torch.float64), theta[[2]][:, None], END,
    )  # fmt: skip
    assert float(closed[1, 2]) == pytest.approx(alone, abs=1e-7)


def test_memory_is_bounded_by_parts(monkeypatch):
    whole = sd.PointProcess(inhibited, 0.0, END).log_prob(value())
    monkeypatch.setattr("stochdyn.paths.points.general._MEMORY", 1)
    assert torch.allclose(sd.PointProcess(inhibited, 0.0, END).log_prob(value()), whole, atol=1e-12)


def test_what_history_knows():
    times, none = torch.tensor([0.2, 0.5], dtype=torch.float64), torch.zeros(2, 0)
    history = History(
        torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64),
        torch.tensor([0, 1, 2]),
        torch.tensor(0.0, dtype=torch.float64),
        times,
        none,
    )
    assert torch.allclose(history.since, torch.tensor([0.1, 0.1, 0.4], dtype=torch.float64))
    assert history.count.tolist() == [0.0, 1.0, 2.0] and history.count.dtype == torch.float64
    assert history.past.T.tolist() == [[False, False], [True, False], [True, True]]
    assert torch.allclose(history.sum(lambda lag: lag), torch.tensor([0.0, 0.1, 1.1], dtype=torch.float64))


@pytest.mark.slow
def test_renewal_by_the_time_since_the_last_jump():
    # Gaps of a Weibull law with shape 2 and scale 1: hazard 2 s.
    torch.manual_seed(0)
    process = sd.PointProcess(lambda t, h: 2 * h.since, 0.0, 12.0, tolerance=1e-6)
    drawn = process.sample((100,))
    gaps = drawn[..., 0].diff(dim=-1, prepend=torch.zeros(100, 1))[:, :5]
    assert within(gaps.reshape(-1), math.sqrt(math.pi) / 2)
    assert not within(gaps.reshape(-1), 1.0)


def test_both_samplers_draw_the_same_law():
    torch.manual_seed(0)
    thinned = sd.PointProcess(inhibited, 0.0, 10.0, bound=1.3133).sample((250,))
    inverted = sd.PointProcess(inhibited, 0.0, 10.0, tolerance=1e-6).sample((250,))
    a, b = mean_count(thinned), mean_count(inverted)
    error = math.sqrt(float(a.var() + b.var()) / 250)
    assert abs(float(a.mean() - b.mean())) < 4 * error
    free = mean_count(sd.PoissonProcess(math.log1p(math.e), 0.0, 10.0).sample((250,)))
    assert abs(float(free.mean() - b.mean())) > 4 * error
    assert not sd.time_rescaling(sd.PointProcess(inhibited, 0.0, 10.0), inverted).rejects()


@pytest.mark.parametrize("given", [None, torch.float32])
def test_networks_in_single_precision(given):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1), torch.nn.Softplus()
    )
    twin = copy.deepcopy(net).double()
    context = None if given is None else torch.zeros(1, dtype=given)

    def field(net):
        return lambda t, h, *c: net(torch.stack([t, h.count], -1))[..., 0]

    process = sd.PointProcess(field(net), 0.0, END, context=context)
    expected = sd.PointProcess(field(twin), 0.0, END).log_prob(value())
    found = process.log_prob(value())
    assert found.dtype == torch.float64 and float(found.detach()) == pytest.approx(
        float(expected.detach()), abs=1e-4
    )
    found.backward()
    assert all(p.grad is not None for p in net.parameters())
    assert process.sample((2,)).dtype == torch.float64
    assert process.intensity([0.5], value()).dtype == torch.float64


def test_faults():
    with pytest.raises(sd.FieldError, match="must be callable"):
        sd.PointProcess(2.0, 0.0, 1.0)
    with pytest.raises(sd.FieldError, match="failed on t"):
        sd.PointProcess(lambda t: t, 0.0, 1.0)
    with pytest.raises(sd.FieldError, match="the intensity is -2 at time"):
        sd.PointProcess(lambda t, h: t - 2, 0.0, 1.0).log_prob(torch.tensor([[0.5]]))
    pole = sd.PointProcess(lambda t, h: (t - 1).abs().clamp_min(1e-12) ** -0.9, 0.0, END)
    with pytest.raises(sd.FieldError, match="near time 1"):
        pole.log_prob(torch.tensor([[0.5], [2.0]], dtype=torch.float64))


@pytest.mark.parametrize(("tolerance", "error"), [(1e-9, 1e-9), (1e-3, 1e-2)])
def test_steps_inside_a_gap(tolerance, error):
    process = sd.PointProcess(lambda t, h: 1 + (t > 1.1).double(), 0.0, END, tolerance=tolerance)
    assert float(process.log_prob(torch.zeros(0, 1).double())) == pytest.approx(-6.9, abs=error)
