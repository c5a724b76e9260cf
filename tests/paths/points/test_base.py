import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.paths.points.base import Rows, joint, parameter, window
from tests.jumps import END, value
from tests.problems import within

F64 = torch.float64
PROCESSES = {
    "poisson": lambda: sd.PoissonProcess(1.5, 0.0, END),
    "log-linear": lambda: sd.PoissonProcess(0.7, 0.0, END, slope=0.4),
    "any": lambda: sd.PoissonProcess(lambda t: 1.5 + torch.sin(3 * t), 0.0, END),
    "on a grid": lambda: sd.CoxProcess(
        torch.tensor([0.3, -0.5, 0.9, 0.9], dtype=F64), torch.tensor([0.0, 0.6, 2.5, END], dtype=F64)
    ),
    "hawkes": lambda: sd.Hawkes(0.5, 0.8, 1.6, 0.0, END),
    "self-correcting": lambda: sd.SelfCorrecting(1.0, 0.4, 0.0, END),
    "general": lambda: sd.PointProcess(lambda t, h: 0.5 + h.sum(lambda s: s * torch.exp(-2 * s)), 0.0, END),
}


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]()


def test_intensity_is_the_slope_of_the_compensator(process):
    ts = torch.linspace(0.05, 3.97, 27, dtype=F64)
    step = 1e-5
    slope = (process.compensator(ts + step, value()) - process.compensator(ts - step, value())) / (2 * step)
    assert torch.allclose(slope, process.intensity(ts, value()), atol=1e-6)


def test_log_prob_is_log_intensities_less_compensator(process):
    times = value()[:8, 0]
    rates = process.intensity(times, value())
    whole = process.compensator([END], value())[0]
    assert float(process.log_prob(value())) == pytest.approx(float(rates.log().sum() - whole), abs=1e-10)
    own, after = process.residuals(value())
    assert float(own[:8].sum() + after) == pytest.approx(float(whole), abs=1e-10)
    assert bool(own[8:].isnan().all())


def test_unused_rows_change_nothing(process):
    assert torch.allclose(process.log_prob(value()), process.log_prob(value()[:8]), atol=1e-12)


def test_the_density_has_mass_one(process):
    # E_q[p / q] = 1 under Poisson draws q. Control: without the compensator it is not.
    torch.manual_seed(0)
    q = sd.PoissonProcess(2.0, 0.0, 1.5)
    drawn = q.sample((4000,))
    process.t1 = torch.tensor(1.5, dtype=F64)
    weights = (process.log_prob(drawn) - q.log_prob(drawn)).exp()
    assert within(weights, 1.0)
    whole = process.compensator([1.5], drawn)[..., 0]
    assert not within(weights * (0.1 * whole).exp(), 1.0)


def test_expand_is_lazy_and_right(process):
    wide = process.expand((2, 3))
    assert type(wide) is type(process) and wide.batch_shape == (2, 3)
    assert torch.allclose(wide.log_prob(value()), process.log_prob(value()).expand(2, 3))
    torch.manual_seed(0)
    drawn = wide.sample()
    assert drawn.shape[:2] == (2, 3) and not torch.equal(drawn[0, 0], drawn[1, 2])
    with pytest.raises(sd.ShapeError):
        wide.expand((2, 2))
    with pytest.raises(sd.ShapeError, match="Cannot expand"):
        wide.expand((3,))


def test_it_is_a_pyro_site_in_a_plate():
    jumps = sd.Jumps.from_list([[0.5, 1.0], [], [2.0]], t0=0.0, t1=[3.0, 4.0, 5.0])

    def model(batch):
        mu = pyro.sample("mu", dist.LogNormal(0.0, 1.0))
        with batch.plate("series"):
            pyro.sample("jumps", sd.Hawkes(mu, 0.5, 1.0, batch.t0, batch.t1), obs=batch.values)

    with pyro.plate("particles", 4, dim=-2):
        trace = pyro.poutine.trace(model).get_trace(jumps)
    trace.compute_log_prob()
    assert trace.nodes["jumps"]["log_prob"].shape == (4, 3)
    masked = sd.Hawkes(0.5, 0.5, 1.0, jumps.t0, jumps.t1).mask(torch.tensor([True, False, True]))
    assert float(masked.log_prob(jumps.values)[1]) == 0.0
    with pytest.raises(sd.FieldError, match="`mu` must be not negative"):
        sd.Hawkes(-1.0, 0.5, 1.0, 0.0, 1.0)


def test_predictive_with_padding():
    def model():
        mu = pyro.sample("mu", dist.LogNormal(0.0, 0.2))
        with pyro.plate("series", 3):
            pyro.sample("jumps", sd.Hawkes(mu, 0.5, 1.0, 0.0, 5.0, max_jumps=60))

    torch.manual_seed(0)
    drawn = pyro.infer.Predictive(model, num_samples=6)()
    assert drawn["jumps"].shape == (6, 3, 60, 1)


def test_times_of_each_sequence_and_outside_the_window():
    process = sd.Hawkes(0.5, 0.8, 1.6, 0.0, torch.tensor([2.0, 4.0]))
    pair = torch.stack([value([0.5]), value([1.0])])
    ts = torch.tensor([[0.6, 2.0], [0.6, 3.0]])
    found = process.intensity(ts, pair)
    assert found.shape == (2, 2) and float(found[1, 0]) == 0.5
    assert float(found[0, 0]) == pytest.approx(0.5 + 0.8 * math.exp(-0.16), abs=1e-6)
    with pytest.raises(sd.TimeError, match="time 3 is outside"):
        process.intensity([3.0], pair)
    with pytest.raises(sd.ShapeError, match=r"Write \[t\]"):
        process.intensity(1.0, pair)
    jumps = sd.Jumps(pair, 0.0, [2.0, 4.0])
    assert torch.equal(process.intensity(ts, jumps), found)


def test_without_validation_faults_are_not_looked_for():
    process = sd.PoissonProcess(1.5, 0.0, 1.0, validate_args=False)
    process.log_prob(torch.tensor([[0.7], [0.5]]))
    with pytest.raises(sd.TimeError):
        sd.PoissonProcess(1.5, 0.0, 1.0, validate_args=True).log_prob(torch.tensor([[0.7], [0.5]]))


def test_helpers():
    rows = Rows((torch.arange(6.0).reshape(3, 2),), 1)
    assert rows.take(torch.tensor([[0, 2]])).parts[0].tolist() == [[0.0, 5.0]]
    assert window(0, 1)[1].dtype == F64
    assert parameter("a", 1, positive=True, owner="A", validate=True).dtype == F64
    with pytest.raises(sd.ShapeError, match="A: the batch shapes"):
        joint("A", (2,), (3,))
