"""odeint: right against closed forms and other libraries, ragged, and clear about what goes wrong."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torchdiffeq
from scipy.integrate import solve_ivp

import stochdyn as sd
from tests.orders import F64


def lotka_volterra(t, z):
    x, y = z[..., 0], z[..., 1]
    return torch.stack([0.55 * x - 0.028 * x * y, -0.84 * y + 0.026 * x * y], -1)


def pendulum(t, z):
    return torch.stack([z[..., 1], -z[..., 0].sin() - 0.1 * z[..., 1] + 0.3 * t.cos()[..., 0]], -1)


def robertson(t, z):
    a, b, c = z.unbind(-1)
    fast, slow = 1e4 * b * c, 0.04 * a
    return torch.stack([-slow + fast, slow - fast - 3e7 * b.square(), 3e7 * b.square()], -1)


PROBLEMS = {
    "lotka-volterra": (lotka_volterra, [33.9, 5.9], np.linspace(0, 20, 21)),
    "driven pendulum": (pendulum, [2.0, 0.0], np.linspace(0, 10, 11)),
    "robertson": (robertson, [1.0, 0.0, 0.0], np.array([0.0, 0.4, 4.0, 40.0])),
}


def by_scipy(name, rtol=1e-11, atol=1e-13):
    field, z0, ts = PROBLEMS[name]

    def rates(t, y):
        return field(torch.tensor([t], dtype=F64), torch.from_numpy(y)).numpy()

    found = solve_ivp(rates, (ts[0], ts[-1]), z0, "LSODA", t_eval=ts, rtol=rtol, atol=atol)
    assert found.success
    return torch.from_numpy(found.y.T)


ANY = [sd.Radau(1e-9, 1e-11), sd.BDF(1e-9, 1e-11)]
NOT_STIFF = [
    sd.Dopri5(1e-9, 1e-10), sd.Tsit5(1e-9, 1e-10), sd.Dopri8(1e-10, 1e-11), sd.RungeKutta4(50), sd.Rosenbrock(10)
]  # fmt: skip
CASES = [(n, s) for n in PROBLEMS for s in (ANY if n == "robertson" else ANY + NOT_STIFF)]


@pytest.mark.parametrize(
    ("name", "solver"), CASES, ids=lambda x: x if isinstance(x, str) else type(x).__name__
)
def test_three_problems_against_scipy(name, solver):
    field, z0, ts = PROBLEMS[name]
    if name == "robertson" and not isinstance(solver, (sd.Radau, sd.BDF)):
        return  # the others end in an error there: see below
    start = torch.tensor(z0, dtype=F64)
    with torch.no_grad():
        z = sd.odeint(field, start, torch.from_numpy(ts), solver=solver)
        other = sd.odeint(field, start * (1 + 8e-2), torch.from_numpy(ts), solver=solver)
    wanted, scale = by_scipy(name), by_scipy(name).abs().amax(0)
    assert ((z - wanted).abs() / scale).max() < (2e-2 if isinstance(solver, sd.Rosenbrock) else 1e-6)
    assert ((other - wanted).abs() / scale).max() > 3e-2


def test_other_methods_on_a_stiff_problem_end_in_a_named_error():
    ts = torch.tensor([0.0, 40.0], dtype=F64)
    z0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    with pytest.raises(sd.DivergedError, match=r"series 0, time \d.*more than 200 steps .* sd\.Rosenbrock"):
        sd.odeint(robertson, z0, ts, solver=sd.Dopri5(max_steps=200))
    with pytest.raises(sd.DivergedError, match=r"series 0, time 40 \(step 1\): the path is not finite"):
        sd.odeint(robertson, z0, ts, solver=sd.RungeKutta4(100))


@pytest.mark.parametrize("solver", [sd.Dopri5(), sd.Tsit5(), sd.Radau(), sd.RungeKutta4(50)])
def test_an_explosion_names_series_and_time(solver):
    """z' = z^2 explodes at 1 / z0: at 2 for the first series, at .5 for the second."""
    z0, ts = torch.tensor([[0.5], [2.0]], dtype=F64), torch.linspace(0, 3, 16, dtype=F64)
    with pytest.raises(sd.DivergedError, match=r"series 1, time 0\.[456]"), torch.no_grad():
        sd.odeint(lambda t, z: z.square(), z0, ts, solver=solver)


@pytest.mark.parametrize(
    "solver", [sd.Dopri5(1e-8, 1e-9), sd.Tsit5(1e-8, 1e-9), sd.Radau(1e-8, 1e-10), sd.Heun(300)]
)
def test_series_of_their_own_times(solver):
    ts = torch.tensor([[0.0, 0.5, 2.0, 2.0], [1.0, 1.1, 1.2, 5.0]], dtype=F64)
    rate = torch.tensor([0.5, 1.5], dtype=F64)
    with torch.no_grad():
        z = sd.odeint(lambda t, z: -rate[..., None] * (z - t), torch.ones(1, dtype=F64), ts, solver=solver)
        alone = [
            sd.odeint(lambda t, z, r=r: -r * (z - t), torch.ones(1, dtype=F64), s[:n], solver=solver)
            for s, r, n in zip(ts, rate, (3, 4), strict=True)
        ]
    k, t0 = rate[:, None], ts[:, :1]
    exact = ts - 1 / k + (1 - t0 + 1 / k) * torch.exp(-k * (ts - t0))
    assert (z[..., 0] - exact).abs().max() < 1e-5
    assert torch.equal(z[0, 2], z[0, 3])
    for row, single in zip(z, alone, strict=True):
        assert (row[: len(single)] - single).abs().max() < 1e-6
    assert (z[..., 0] - exact.flip(0)).abs().max() > 0.1


def test_the_tolerance_holds_for_the_worst_series():
    """One fast series among many slow ones: an average error over the batch lets it through."""
    rate = torch.full((1000,), 0.1, dtype=F64)
    rate[7] = 30.0

    def field(t, z):
        return -rate[..., None] * (z - (10 * t).cos())

    z0, ts = torch.zeros(1000, 1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    tight = sd.odeint(field, z0, ts, solver=sd.Dopri8(1e-11, 1e-12))[7, -1]
    ours = sd.odeint(field, z0, ts, solver=sd.Dopri5(1e-6, 1e-6))[7, -1]
    library = torchdiffeq.odeint(lambda t, z: field(t, z), z0, ts, rtol=1e-6, atol=1e-6)[-1, 7]
    assert (ours - tight).abs() < 5e-6
    assert (library - tight).abs() > 5 * (ours - tight).abs()


def test_contexts_by_time_hold_from_their_row_on():
    ts = torch.tensor([0.0, 1.0, 3.0], dtype=F64)
    context = torch.tensor([[[1.0], [2.0], [9.0]]], dtype=F64)
    for solver in (sd.Dopri5(), sd.RungeKutta4()):
        z = sd.odeint(lambda t, z, c: c, torch.zeros(1, 1, dtype=F64), ts, context=context, solver=solver)
        assert (z[0, :, 0] - torch.tensor([0.0, 1.0, 5.0], dtype=F64)).abs().max() < 1e-10


def test_in_a_pyro_model_with_plates_and_particles():
    data = torch.exp(-torch.tensor([0.5, 1.0, 2.0])[:, None] * torch.linspace(0, 2, 6))[..., None]

    def model():
        with pyro.plate("series", 3):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            z = sd.odeint(
                lambda t, z: -rate[..., None] * z, torch.ones(1), torch.linspace(0, 2, 6), solver=sd.Heun(5)
            )
            pyro.deterministic("z", z, event_dim=2)
            pyro.sample("y", dist.Normal(z, 0.01).to_event(2), obs=data)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = pyro.infer.autoguide.AutoNormal(model, init_scale=0.05)
    elbo = pyro.infer.Trace_ELBO(num_particles=4, vectorize_particles=True)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    for _ in range(250):
        svi.step()
    found = guide.median()["rate"]
    assert (found - torch.tensor([0.5, 1.0, 2.0])).abs().max() < 0.05
    draws = pyro.infer.Predictive(model, guide=guide, num_samples=7)()
    assert draws["z"].shape == (7, 3, 6, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z0": torch.ones(2, dtype=torch.int64)}, sd.ShapeError, r"`z0` must be a floating tensor"),
        ({"z0": torch.tensor([np.nan, 0.0])}, sd.DivergedError, r"`z0` is not finite"),
        ({"solver": sd.EulerMaruyama()}, sd.FieldError, r"`solver` must be an ODE solver.*sdeint"),
        ({"solver": "dopri5"}, sd.FieldError, r"`solver` must be an ODE solver"),
        ({"gradient": "adjoint"}, sd.FieldError, r"`gradient` must be sd\.Direct"),
        ({"ts": torch.tensor([0.0, 1.0, 0.5])}, sd.TimeError, r"goes back from 1 to 0\.5"),
        ({"ts": torch.tensor([0.0, np.inf])}, sd.TimeError, r"inf"),
        ({"field": lambda t, z: z[..., :1].expand(*z.shape[:-1], 3)}, sd.FieldError, r"The field returned shape \(3,\)"),
        ({"field": lambda t, z: z.double()}, sd.DtypeError, r"float64"),
        ({"field": lambda t, z: z / 0 * 0}, sd.DivergedError, r"series 0, time 0"),
        ({"ts": torch.rand(3, 4).cumsum(-1), "z0": torch.ones(2, 2)}, sd.ShapeError, r"do not broadcast"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(change, error, message):
    given = {"field": lambda t, z: -z, "z0": torch.ones(2), "ts": torch.linspace(0, 1, 5)} | change
    with pytest.raises(error, match=message):
        sd.odeint(given.pop("field"), given.pop("z0"), given.pop("ts"), **given)


@pytest.mark.parametrize("draws", [1, 3, 4])
@pytest.mark.parametrize("points", [3, 5])
def test_static_contexts_of_series_under_draws_of_their_starts(draws, points):
    """Three series, as many draws or times as there may be: every draw of a series has the series' context."""
    context = torch.tensor([[[1.0]], [[2.0]], [[3.0]]])
    z = sd.odeint(lambda t, z, c: c, torch.zeros(draws, 3, 1), torch.linspace(0, 1, points), context=context)
    assert (z[:, :, -1, 0] - torch.tensor([1.0, 2.0, 3.0])).abs().max() < 1e-5
    by_time = context.expand(3, points, 1)
    if draws == points == 3:
        with pytest.raises(sd.ShapeError, match=r"may be \(\*batch, context_dim\) or"):
            sd.odeint(
                lambda t, z, c: c, torch.zeros(draws, 3, 1), torch.linspace(0, 1, points), context=by_time
            )
        return
    z = sd.odeint(lambda t, z, c: c, torch.zeros(draws, 3, 1), torch.linspace(0, 1, points), context=by_time)
    assert (z[:, :, -1, 0] - torch.tensor([1.0, 2.0, 3.0])).abs().max() < 1e-5
