import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.fields import AbstractLinearFlow
from tests.jumps import (
    END,
    HAWKES_COMPENSATOR,
    HAWKES_LOG_PROB,
    SELF_CORRECTING_LOG_PROB,
    TIMES,
    mean_count,
    value,
)

Z0 = torch.zeros(1, dtype=torch.float64)


class Decay(AbstractLinearFlow):
    """dz/dt = -rate z."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def over(self, t, dt, context=None):
        return torch.exp(-self.rate * dt), torch.zeros_like(dt)

    def forward(self, t, z, context=None):
        return -self.rate * z


class Rise(sd.AdditiveJump):
    def size(self, t, mark, context=None):
        return torch.tensor([0.8], dtype=torch.float64)


def rise(t, z, mark):
    return z + 0.8


def hawkes_rate(t, z):
    return 0.5 + z


FLOWS = {"linear": Decay(1.6), "solved": lambda t, z: -1.6 * z}
MAPS = {"additive": Rise(1), "any": rise}


def hawkes(flow="linear", jump="additive", **options):
    return sd.JumpODE(FLOWS[flow], MAPS[jump], hawkes_rate, Z0, 0.0, END, **options)


@pytest.mark.parametrize("nodes", [None, 4])
@pytest.mark.parametrize("jump", MAPS)
@pytest.mark.parametrize("flow", FLOWS)
def test_it_is_the_hawkes_process(flow, jump, nodes):
    process, peer = hawkes(flow, jump, nodes=nodes), sd.Hawkes(0.5, 0.8, 1.6, 0.0, END)
    assert float(process.log_prob(value())) == pytest.approx(HAWKES_LOG_PROB, abs=1e-6)
    ts = [0.1, 0.2, 1.0, 2.41, 3.9]
    assert torch.allclose(process.intensity(ts, value()), peer.intensity(ts, value()), atol=1e-6)
    assert torch.allclose(process.compensator(ts, value()), peer.compensator(ts, value()), atol=1e-6)
    found = process.compensator(TIMES, value())
    assert torch.allclose(found, torch.tensor(HAWKES_COMPENSATOR, dtype=torch.float64), atol=1e-6)
    own, after = process.residuals(value())
    known, rest = peer.residuals(value())
    assert own.shape == known.shape and bool(own[len(TIMES) :].isnan().all())
    assert torch.allclose(own[: len(TIMES)], known[: len(TIMES)], atol=1e-6)
    assert float(after) == pytest.approx(float(rest), abs=1e-6)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_jump_at_the_end_of_the_window_counts(flow):
    jumps = torch.tensor([[0.5], [2.0], [END]], dtype=torch.float64)
    process, peer = hawkes(flow), sd.Hawkes(0.5, 0.8, 1.6, 0.0, END)
    assert float(process.log_prob(jumps)) == pytest.approx(float(peer.log_prob(jumps)), abs=1e-6)
    assert torch.allclose(process.residuals(jumps)[0], peer.residuals(jumps)[0], atol=1e-6)


def test_another_decay_is_another_process():
    wrong = sd.JumpODE(Decay(1.61), Rise(1), hawkes_rate, Z0, 0.0, END)
    assert abs(float(wrong.log_prob(value())) - HAWKES_LOG_PROB) > 1e-3


@pytest.mark.parametrize("solved", [False, True])
def test_it_is_the_self_correcting_process(solved):
    flow = sd.DecayFlow(1, push=-1 / 0.4).double()
    field = (lambda t, z: flow(t, z)) if solved else flow
    process = sd.JumpODE(field, sd.AdditiveJump(1).double(), lambda t, z: torch.exp(-0.4 * z), Z0, 0.0, END)
    assert float(process.log_prob(value()).detach()) == pytest.approx(SELF_CORRECTING_LOG_PROB, abs=1e-6)


def test_a_nonlinear_jump_map_and_flow_against_a_fine_solution():
    """Relief: a jump halves the state; the flow is logistic, whose solution is known."""

    def flow(t, z):
        return z * (1 - z)

    def halve(t, z, mark):
        return 0.5 * z

    start = torch.tensor([0.2], dtype=torch.float64)
    process = sd.JumpODE(flow, halve, lambda t, z: 2 * z, start, 0.0, END, tolerance=1e-10)
    expected, z, now = 0.0, 0.2, 0.0
    for t in [*TIMES, END]:
        grown = z * math.exp(t - now) / (1 + z * (math.exp(t - now) - 1))
        # The integral of z is that of (1 - z)'s logarithm, by d log(1 - z) / dt = -z.
        expected += 2 * (math.log(1 - grown) - math.log(1 - z))
        expected += math.log(2 * grown) if t < END else 0.0
        z, now = 0.5 * grown, t
    assert float(process.log_prob(value())) == pytest.approx(expected, abs=1e-6)
    coarse = sd.JumpODE(flow, halve, lambda t, z: 2 * z, start, 0.0, END, step=2.0)
    half = sd.JumpODE(flow, halve, lambda t, z: 2 * z, start, 0.0, END, step=0.02)
    errors = [abs(float(p.log_prob(value())) - expected) for p in (coarse, half)]
    assert errors[1] < 1e-7 < 1e-5 < errors[0]


def test_long_gaps_are_cut():
    """One jump, then a long silence in which the intensity decays and rises again."""
    rows = torch.tensor([[1.0], [math.inf]], dtype=torch.float64)
    fields = (lambda t, z: -z, lambda t, z, m: z + 1, lambda t, z: 1.5 + torch.sin(t) + z)
    process = sd.JumpODE(*fields, Z0, 0.0, 40.0, step=0.1)
    integral = 60 + (1 - math.cos(40.0)) + (1 - math.exp(-39.0))
    expected = math.log(1.5 + math.sin(1.0)) - integral
    assert float(process.log_prob(rows)) == pytest.approx(expected, abs=1e-6)
    fixed = sd.JumpODE(*fields, Z0, 0.0, 40.0, nodes=4, step=0.1)
    assert float(fixed.log_prob(rows)) == pytest.approx(expected, abs=1e-6)
    uncut = sd.JumpODE(*fields, Z0, 0.0, 40.0, nodes=4, step=40.0)
    assert abs(float(uncut.log_prob(rows)) - expected) > 1


@pytest.mark.parametrize("flow", FLOWS)
def test_a_batch_is_its_sequences(flow):
    ends = torch.tensor([4.0, 3.0, 5.0], dtype=torch.float64)
    rows = [[0.2, 0.5, 0.9, 2.0], [], [0.0, 4.9]]
    jumps = sd.Jumps.from_list(rows, t0=0.0, t1=ends)
    process = sd.JumpODE(FLOWS[flow], rise, hawkes_rate, Z0, 0.0, ends)
    whole, residuals = process.log_prob(jumps.values), process.residuals(jumps)[0]
    assert whole.shape == (3,) and residuals.shape == (3, 4)
    for k, row in enumerate(rows):
        one = torch.tensor(row, dtype=torch.float64)[:, None]
        alone = sd.JumpODE(FLOWS[flow], rise, hawkes_rate, Z0, 0.0, float(ends[k]))
        assert float(alone.log_prob(one)) == pytest.approx(float(whole[k]), abs=1e-12)
        assert torch.allclose(alone.residuals(one)[0], residuals[k, : len(row)], atol=1e-12)
    padded = torch.nn.functional.pad(jumps.values, (0, 0, 0, 7), value=math.inf)
    assert torch.equal(process.log_prob(padded), whole)


@pytest.mark.parametrize("jump", MAPS)
@pytest.mark.parametrize("flow", ["linear", "solved"])
def test_gradients(flow, jump):
    def score(rate, size, base, start):
        field = Decay(rate) if flow == "linear" else lambda t, z: -rate * z
        if jump == "additive":
            jump_map = Rise(1)
            jump_map.size = lambda t, mark, context=None: size[None]
        else:
            jump_map = lambda t, z, mark: z + size  # noqa: E731
        return sd.JumpODE(
            field, jump_map, lambda t, z: base + z, start, 0.0, END, nodes=3, step=2.0
        ).log_prob(value())

    given = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.6, 0.8, 0.5, [0.3])]
    assert torch.autograd.gradcheck(score, given)


def test_parameters_of_every_series_and_context():
    rate = torch.tensor([0.5, 1.6, 3.0], dtype=torch.float64)
    process = sd.JumpODE(lambda t, z: -rate[..., None] * z, rise, hawkes_rate, Z0, 0.0, END)
    assert process.batch_shape == (3,)
    found = process.log_prob(value().expand(3, -1, -1))
    for k in range(3):
        expected = sd.Hawkes(0.5, 0.8, rate[k], 0.0, END, explosive=True).log_prob(value())
        assert float(found[k]) == pytest.approx(float(expected), abs=1e-5)
    by_context = sd.JumpODE(
        lambda t, z, c: -c * z,
        lambda t, z, m, c: z + 0.8,
        lambda t, z, c: 0.5 + z,
        Z0,
        0.0,
        END,
        context=rate[:, None],
    )
    assert by_context.batch_shape == (3,)
    assert torch.allclose(by_context.log_prob(value()), found, atol=1e-12)
    particles = torch.tensor([0.2, 0.4], dtype=torch.float64)[:, None]
    outer = sd.JumpODE(
        FLOWS["linear"], rise, lambda t, z: particles[..., None] + z, Z0, 0.0, torch.full((3,), END)
    )
    assert outer.batch_shape == (2, 3)
    assert outer.log_prob(value().expand(2, 3, -1, -1)).shape == (2, 3)


def test_kinds_are_those_of_the_multivariate_hawkes_process():
    alpha = torch.tensor([[0.2, 0.5], [0.1, 0.3]], dtype=torch.float64)
    mu = torch.tensor([0.5, 0.1], dtype=torch.float64)
    kinds = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    marked = torch.cat([value(), kinds[:, None]], 1)
    jump = sd.AdditiveJump(2, classes=2).double()
    with torch.no_grad():
        jump.sizes.copy_(torch.eye(2))
    process = sd.JumpODE(
        Decay(1.5), jump, lambda t, z: mu + z @ alpha.mT, torch.zeros(2, dtype=torch.float64), 0.0, END
    )
    peer = sd.MultivariateHawkes(mu, alpha, 1.5, 0.0, END)
    assert process.event_shape == (0, 2)
    assert float(process.log_prob(marked).detach()) == pytest.approx(float(peer.log_prob(marked)), abs=1e-6)
    ts = [0.3, 2.0]
    assert torch.allclose(process.intensities(ts, marked), peer.intensities(ts, marked), atol=1e-9)
    with pytest.raises(sd.DataError, match="jump 1, time 0.5"):
        process.log_prob(
            torch.where(torch.arange(10)[:, None] == 1, torch.tensor([0.5, 2.0]).double(), marked)
        )


def test_marks_with_a_law_that_reads_the_state():
    sizes = torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5, 0.7, 0.2, 0.9, 0.0, 0.0], dtype=torch.float64)
    marked = torch.cat([value(), sizes[:, None]], 1)
    process = sd.JumpODE(
        Decay(2.0),
        lambda t, z, mark: z + mark,
        hawkes_rate,
        Z0,
        0.0,
        END,
        marks=lambda t, z: dist.Exponential(1 + z[..., 0]),
    )
    expected = 0.0
    for k, t in enumerate(TIMES):
        z = sum(float(m) * math.exp(-2 * (t - s)) for s, m in zip(TIMES[:k], sizes, strict=False))
        expected += math.log(0.5 + z) + math.log(1 + z) - (1 + z) * float(sizes[k])
        expected -= float(sizes[k]) / 2 * (1 - math.exp(-2 * (END - t)))
    assert float(process.log_prob(marked)) == pytest.approx(expected - 0.5 * END, abs=1e-6)
    torch.manual_seed(0)
    drawn = process.sample((4,))
    assert drawn.shape[-1] == 2 and bool(torch.isfinite(process.log_prob(drawn)).all())


@pytest.mark.parametrize(
    "options",
    [{"nodes": 8, "step": 1.0}, {"sampler": sd.Thinning(), "bound": lambda t, z: hawkes_rate(t, z)}],
)
def test_samples_have_the_law(options):
    torch.manual_seed(1)
    drawn = hawkes(**options).sample((400,))
    expected = sd.Hawkes(0.5, 0.8, 1.6, 0.0, END).sample((4000,))
    counts, known = mean_count(drawn), mean_count(expected)
    spread = math.sqrt(float(counts.var()) / 400 + float(known.var()) / 4000)
    assert abs(float(counts.mean() - known.mean())) < 4 * spread
    assert not sd.time_rescaling(sd.Hawkes(0.5, 0.8, 1.6, 0.0, END), drawn).rejects()
    rate = float(counts.mean()) / END
    assert sd.time_rescaling(sd.PoissonProcess(rate, 0.0, END), drawn).rejects()


def test_samples_of_a_solved_flow():
    torch.manual_seed(2)
    drawn = sd.JumpODE(
        FLOWS["solved"], rise, hawkes_rate, Z0, 0.0, END, step=0.5, nodes=6, max_jumps=40
    ).sample((200,))
    assert drawn.shape == (200, 40, 1)
    assert not sd.time_rescaling(sd.Hawkes(0.5, 0.8, 1.6, 0.0, END), drawn).rejects()


def test_states_jump_after_their_jump():
    found = hawkes().states([0.2, 0.2 + 1e-9, 0.5], torch.tensor([[0.2]], dtype=torch.float64))
    assert found[:, 0].tolist() == pytest.approx([0.0, 0.8, 0.8 * math.exp(-0.48)], abs=1e-6)


def test_as_a_site_in_a_plate_with_subject_parameters():
    ends = torch.tensor([4.0, 3.0, 5.0, 4.0], dtype=torch.float64)
    jumps = sd.Jumps.from_list([[0.2, 0.5], [], [1.0, 4.9], [3.0]], t0=0.0, t1=ends)

    def model(batch):
        with batch.plate("series"):
            base = pyro.sample("base", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
            batch.observe(
                "jumps",
                sd.JumpODE(Decay(1.6), Rise(1), lambda t, z: base[..., None] + z, Z0, batch.t0, batch.t1),
            )

    values = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    trace = pyro.poutine.trace(pyro.condition(model, {"base": values[[2, 0]]})).get_trace(jumps[[2, 0]])
    total = trace.log_prob_sum(lambda name, _: name == "jumps")
    expected = sum(
        float(sd.Hawkes(values[k], 0.8, 1.6, 0.0, ends[k]).log_prob(jumps.values[k])) for k in (2, 0)
    )
    assert float(total) == pytest.approx(2 * expected, abs=1e-5)  # scaled to the population of four
    guide = sd.AmortizedGuide(model, sd.SetEncoder(1, 8).double(), amortize={"base": "series"})
    fit = sd.fit(model, guide, jumps, steps=3, batch_size=2, progress=False)
    assert math.isfinite(fit.elbo)


def test_faults_are_named():
    with pytest.raises(sd.TimeError, match="series 1"):
        sd.JumpODE(Decay(1.6), rise, hawkes_rate, Z0, 0.0, torch.full((2,), 4.0)).log_prob(
            torch.tensor([[[0.1], [0.2]], [[0.2], [0.1]]], dtype=torch.float64)
        )
    negative = sd.JumpODE(Decay(1.6), rise, lambda t, z: 0.5 - z, Z0, 0.0, END)
    with pytest.raises(sd.FieldError, match="intensity is -"):
        negative.log_prob(value())
    with pytest.raises(sd.FieldError, match="jump map must be callable"):
        sd.JumpODE(Decay(1.6), 0.8, hawkes_rate, Z0, 0.0, END)
    with pytest.raises(sd.FieldError, match="jump map returned shape"):
        sd.JumpODE(Decay(1.6), lambda t, z, m: torch.cat([z, z], -1), hawkes_rate, Z0, 0.0, END)
    with pytest.raises(sd.FieldError, match="flow returned shape"):
        sd.JumpODE(lambda t, z: torch.cat([z, z], -1), rise, hawkes_rate, Z0, 0.0, END)
    with pytest.raises(sd.FieldError, match="kinds, which are the marks"):
        sd.JumpODE(
            Decay(1.6),
            rise,
            lambda t, z: z.expand(*z.shape[:-1], 2) + 1,
            Z0,
            0.0,
            END,
            marks=dist.Normal(0.0, 1.0),
        )
    with pytest.raises(sd.FieldError, match="`initial`"):
        sd.JumpODE(Decay(1.6), rise, hawkes_rate, 0.0, 0.0, END)
    with pytest.raises(sd.TimeError, match="`step` must be positive"):
        hawkes(step=0.0)
    with pytest.raises(sd.FieldError, match="`nodes`"):
        hawkes(nodes=0)
    with pytest.raises(sd.BoundError, match="above its bound"):
        hawkes(bound=0.6).sample((50,))
    with pytest.raises(sd.PaddingError, match="max_jumps=1"):
        hawkes(max_jumps=1).sample((50,))
