"""Doses: the event table, and the closed forms of pharmacokinetics."""

import math

import pytest
import torch

import stochdyn as sd
from tests.hybrids import number

KA, KE, VOLUME = 1.2, 0.15, 20.0
TIGHT = sd.Dopri5(1e-10, 1e-12)


def oral(ka, ke):
    def field(t, z):
        gut, blood = z.unbind(-1)
        return torch.stack([-ka * gut, ka * gut - ke * blood], -1)

    return field


def absorbed(t, ka=KA, ke=KE):
    """What one unit, given at 0, leaves in the blood."""
    return ka / (ka - ke) * (math.exp(-ke * t) - math.exp(-ka * t)) if t > 0 else 0.0


def concentration(doses, times, ka=KA, ke=KE, **options):
    start = torch.zeros(2, dtype=torch.float64)
    return (
        sd.odeint(oral(ka, ke), start, number(times), jumps=[doses], solver=TIGHT, **options)[..., 1] / VOLUME
    )


def test_oracle_of_an_oral_dose():
    """Oracle 2.16, and the limit of equal rates, where the usual formula is 0 / 0."""
    doses = sd.Doses([sd.Dose(0.0, 100.0, "gut")], compartments=["gut", "blood"])
    doses = doses.adjusted(bioavailability=number(0.9))
    found = concentration(doses, [0.0, 1.9804205159, 2.0])
    assert (found[1:] - number([3.3434871506, 3.3433728037])).abs().max() < 1e-9
    equal = concentration(doses, [0.0, 2.0], ka=0.15)
    assert equal[1].item() == pytest.approx(1.0001045979, abs=1e-9)


def test_oracle_of_three_boluses_and_of_the_steady_state():
    course = sd.Doses([sd.Dose(0.0, 100.0, additional=2, interval=8.0)])
    field, start = (lambda t, z: -KE * z), number([0.0])
    z = sd.odeint(field, start, number([0.0, 20.0]), jumps=[course], solver=TIGHT)
    assert z[-1, 0].item() / VOLUME == pytest.approx(3.8194879634, abs=1e-9)
    long = sd.Doses([sd.Dose(0.0, 100.0, additional=25, interval=8.0)])
    peak = sd.odeint(field, start, number([0.0, 200.0]), jumps=[long], solver=TIGHT)[-1, 0]
    assert peak.item() / VOLUME == pytest.approx(7.1550638035, abs=1e-9)
    none = sd.odeint(field, start, number([0.0, 20.0]), solver=TIGHT)[-1, 0]
    assert none.item() == 0.0  # a solver that does not see the doses


@pytest.mark.parametrize(
    "solver",
    [TIGHT, pytest.param(sd.RungeKutta4(400), marks=pytest.mark.slow)],
    ids=lambda x: type(x).__name__,
)
def test_every_kind_of_event(solver):
    """Boluses, infusions that overlap, lag, bioavailability, a reset that stops an infusion: sums of closed forms."""
    doses = sd.Doses([
        [sd.Dose(0.0, 10.0), sd.Dose(1.0, 6.0, 2, rate=3.0), sd.Dose(2.0, 8.0, 2, duration=4.0), sd.Dose(9.0, 5.0, 2)],
        [sd.Dose(0.5, 20.0, 2, rate=4.0), sd.Dose(3.0, 7.0, 2, reset=True), sd.Dose(4.0, reset=True), sd.Dose(4.0, 2.0)],
    ]).adjusted(lag={2: number(0.25)}, bioavailability={1: number(0.5), 2: number([0.8, 1.0])})  # fmt: skip
    ts = number([0.0, 0.4, 2.0, 3.9, 7.0, 10.0])
    z = sd.odeint(oral(KA, KE), number([[0.0, 0.0]]), ts, jumps=[doses], solver=solver)[..., 1]

    def infused(t, start, length, rate):
        begin, end = max(t - start, 0.0), max(t - start - length, 0.0)
        return rate / KE * (math.exp(-KE * end) - math.exp(-KE * begin))

    def gone(t, start, amount):
        return amount * math.exp(-KE * (t - start)) if t >= start else 0.0

    for k, t in enumerate(ts.tolist()):
        # The rate that was given stays and the time shrinks; the duration that was given stays and the rate shrinks.
        first = (
            5.0 * absorbed(t) + infused(t, 1.25, 1.6, 3.0) + infused(t, 2.25, 4.0, 1.6) + gone(t, 9.25, 4.0)
        )
        second = (
            infused(t, 0.75, 5.0, 4.0) if t < 3 else gone(t, 3.25, 7.0) if t < 4 else 1.0 * absorbed(t - 4.0)
        )
        assert z[0, k].item() == pytest.approx(first, abs=1e-6)
        assert z[1, k].item() == pytest.approx(second, abs=1e-6)


def test_gradients_by_lag_and_bioavailability():
    """Of lags that move doses across times of the path, against the closed form."""
    lag, fraction = number([0.7, 0.2]).requires_grad_(), number(0.6).requires_grad_()
    doses = sd.Doses([sd.Dose(0.0, 100.0, additional=2, interval=8.0), sd.Dose(17.0, 50.0, rate=20.0)])
    z = sd.odeint(
        lambda t, z: -KE * z, number([0.0]), number([0.0, 0.5, 20.0]), solver=TIGHT,
        jumps=[doses.adjusted(lag=lag, bioavailability=fraction)],
    )[:, -1, 0]  # fmt: skip
    boluses = sum(100 * fraction * (-KE * (20 - 8 * k - lag)).exp() for k in range(3))
    end = 20 - 17 - lag - 2.5 * fraction
    infusion = 20 / KE * ((-KE * end).exp() - (-KE * (3 - lag)).exp())
    wanted = boluses + infusion
    assert (z - wanted).abs().max() < 1e-8
    for a, b in zip(
        torch.autograd.grad(z.sum(), (lag, fraction)),
        torch.autograd.grad(wanted.sum(), (lag, fraction)),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-7 and (a.abs() > 0.1).all()


def test_an_sde_path_with_boluses_and_infusions():
    """z - given has no jumps: its moments are those of the linear SDE with the input, and so is its density."""
    doses = sd.Doses([sd.Dose(0.0, 3.0), sd.Dose(1.0, 2.0, rate=4.0), sd.Dose(1.5, 1.0)])
    times = number([0.0, 1.0, 2.0, 3.0])
    grid = sd.TimeGrid(times, substeps=40, through=torch.cat([doses.times, number([1.5])]))
    given, rates = doses.given(grid.ts, 1), doses.rates(grid.ts, 1)
    path = sd.SDEPath(
        lambda t, y, u: -0.7 * (y + u[..., :1]) + u[..., 1:], number([0.3]), number([0.0]), grid.ts,
        solver=sd.GaussianStep(mean=sd.Heun()), context=torch.cat([given, rates], -1),
    )  # fmt: skip
    torch.manual_seed(0)
    z = grid.observed(path.rsample((4000,)) + given)[..., 0]
    mean = sd.odeint(lambda t, z: -0.7 * z, number([0.0]), times, jumps=[doses], solver=TIGHT)[:, 0]
    spread = 0.3 * ((1 - (-1.4 * times).exp()) / 1.4).sqrt()
    assert ((z.mean(0) - mean).abs()[1:] < 4 * spread[1:] / 4000**0.5).all()
    assert ((z.std(0) / spread)[1:] - 1).abs().max() < 4 / (2 * 4000) ** 0.5
    assert path.log_prob(path.rsample()).isfinite()


def test_mini_batches_and_the_end_of_each_series():
    doses = sd.Doses(
        [[sd.Dose(0.0, 1.0, additional=3, interval=1.0)], [sd.Dose(0.5, 2.0)], []], ids=["a", "b", "c"]
    )
    assert doses.times.shape == (3, 4) and len(doses) == 3
    part = doses[torch.tensor([2, 1])]
    assert part.ids == ("c", "b") and part.times[:, 0].tolist() == [math.inf, 0.5]
    assert doses[1:].amounts[0, 0] == 2.0 and doses[0].ids == ("a",)
    assert doses.until(number([1.0, 0.2, 9.0])).times.isfinite().sum(-1).tolist() == [2, 0, 0]
    with pytest.raises(
        sd.TimeError, match=r"jumps\[0\]: series 0, jump 2: time 2 is after the path.*doses.until"
    ):
        concentration(doses, [0.0, 1.5])
    assert concentration(doses.until(number(1.5)), [0.0, 1.5]).shape == (3, 2)


def test_lags_and_fractions_go_with_their_series():
    """Of particles and series, of one compartment, and for all series alike."""
    plain = sd.Doses([[sd.Dose(0.0, 8.0)], [sd.Dose(1.0, 4.0)], [sd.Dose(2.0, 2.0)]])
    lag = number([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    doses = plain.adjusted(lag=lag, bioavailability={1: number([0.5, 0.25, 1.0])})
    for index in (torch.tensor([2, 0]), [2, 0], slice(None, None, 2), 1, torch.tensor([True, False, True])):
        times, amounts, _ = doses[index].acting()
        wanted = [x[..., [index] if isinstance(index, int) else index, :] for x in doses.acting()]
        assert times.tolist() == wanted[0].tolist() and amounts.tolist() == wanted[1].tolist()
    shared = sd.Doses([sd.Dose(0.0, 8.0)]).adjusted(lag=number([0.1, 0.2, 0.3]), bioavailability=number(0.5))
    assert shared[torch.tensor([2, 0])].acting()[0][:, 0].tolist() == [0.3, 0.1]
    assert plain.adjusted(lag=number([0.7]))[1:].acting()[0][:, 0].tolist() == [1.7, 2.7]  # one for all


def test_adjusting_one_compartment_keeps_the_other():
    doses = sd.Doses([sd.Dose(0.0, 1.0), sd.Dose(0.0, 1.0, 2)])
    both = doses.adjusted(lag={1: number(0.5)}, bioavailability=number(0.9)).adjusted(lag={2: number(2.0)})
    assert both.acting()[0].tolist() == [0.5, 2.0] and both.acting()[1].tolist() == [0.9, 0.9]
    assert both.adjusted(lag={1: number(0.25)}).acting()[0].tolist() == [0.25, 2.0]
    assert both.adjusted(lag=number(1.0)).acting()[0].tolist() == [1.0, 1.0]


def test_a_dose_whose_lag_ends_after_the_path_does_not_act_on_it():
    doses = sd.Doses([sd.Dose(0.0, 1.0), sd.Dose(1.0, 2.0)])
    z = sd.odeint(
        lambda t, z: 0 * z,
        number([0.0]),
        number([0.0, 1.5]),
        jumps=[doses.adjusted(lag=number([[0.5], [1.0]])[:, 0])],
    )
    assert z[:, -1, 0].tolist() == [3.0, 1.0]


def test_a_grid_in_float32_has_the_doses_at_its_times():
    """.7 in float32 is below .7."""
    ts = torch.tensor([0.0, 0.7, 1.4])
    doses = sd.Doses([sd.Dose(0.7, 2.0), sd.Dose(1.4, 1.0)])
    for dtype in (torch.float32, torch.float64):
        z = sd.odeint(lambda t, z: 0 * z, torch.zeros(1, dtype=dtype), ts, jumps=[doses])
        assert z[:, 0].tolist() == [0.0, 2.0, 3.0]
    assert doses.given(ts, 1)[:, 0].tolist() == [0.0, 2.0, 3.0]
    assert doses.until(ts[1]).times.tolist() == [0.7, math.inf]
    assert sd.Doses([sd.Dose(0.0, 0.7, rate=1.0)]).rates(ts, 1)[:, 0].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(sd.TimeError, match=r"time 1.41 is after the path"):
        sd.odeint(lambda t, z: 0 * z, torch.zeros(1), ts, jumps=[sd.Doses([sd.Dose(1.41, 1.0)])])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sd.Dose(0.0, 1.0, duration=-1.0), sd.TimeError, r"time 0.0: `duration` is -1.0"),
        (lambda: sd.Dose(math.nan, 1.0), sd.TimeError, r"must be a finite number"),
        (lambda: sd.Dose(0.0, math.inf), sd.DataError, r"`amount` is inf"),
        (lambda: sd.Dose(0.0, -1.0), sd.DataError, r"`amount` is -1.0"),
        (lambda: sd.Dose(0.0, 1.0, rate=-2.0), sd.DataError, r"`rate` is -2.0"),
        (lambda: sd.Dose(0.0, 1.0, rate=1.0, duration=1.0), sd.DataError, r"Give one of them"),
        (lambda: sd.Dose(0.0, rate=1.0), sd.DataError, r"infusion of amount 0"),
        (lambda: sd.Dose(0.0, 1.0, additional=2), sd.TimeError, r"2 additional doses need an `interval`"),
        (lambda: sd.Dose(0.0, 1.0, additional=-1), sd.DataError, r"It counts doses"),
        (lambda: sd.Dose(0.0, 1.0, 0), sd.DataError, r"counted from 1"),
        (lambda: sd.Doses([[sd.Dose(1.0, 1.0), sd.Dose(0.0, 1.0)]]), sd.TimeError, r"series 0, dose 1: time 0 comes after 1"),
        (lambda: sd.Doses([sd.Dose(0.0, 1.0, "gut")]), sd.DataError, r"unknown compartment 'gut'"),
        (lambda: sd.Doses([sd.Dose(0.0, 1.0, 3)], compartments=["gut", "blood"]), sd.DataError, r"unknown compartment 3"),
        (lambda: sd.Doses([sd.Dose(0.0, 1.0)]).adjusted(lag={"gut": number(1.0)}), sd.DataError, r"lag: unknown compartment"),
        (lambda: sd.Doses([sd.Dose(0.0, 1.0)]).adjusted(lag=number([0.1, math.nan])), sd.DataError, r"series 1: lag is nan"),
        (lambda: sd.Doses([sd.Dose(0.0, 1.0)]).adjusted(lag={1: number(-0.5)}), sd.DataError, r"series 0: lag of compartment 1 is -0.5"),
        (lambda: sd.Doses([sd.Dose(0.0, 1.0)]).adjusted(bioavailability=number(-1.0)), sd.DataError, r"bioavailability is -1"),
        (lambda: sd.Doses([["no"]]), sd.DataError, r"expected an sd.Dose, got str"),
        (lambda: sd.Doses([[]], ids=[1, 2]), sd.ShapeError, r"1 lists of doses and 2 ids"),
        (lambda: concentration(sd.Doses([sd.Dose(0.0, 1.0, 3)]), [0.0, 1.0]), sd.DataError, r"dose 0: compartment 3 of a state with 2"),
        (lambda: sd.Doses([sd.Dose(0.0, reset=True)]).given(number([0.0]), 1), sd.DataError, r"a reset sets the state to zero"),
    ],
)  # fmt: skip
def test_faults_have_names(make, error, message):
    with pytest.raises(error, match=message):
        make()
