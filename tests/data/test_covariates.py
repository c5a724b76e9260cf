"""Covariates as inputs of a path: a driven Ornstein-Uhlenbeck process against its mean in closed form."""

import math

import numpy as np
import pytest
import torch

import stochdyn as sd
from tests import problems

F64 = torch.float64
TIMES = torch.tensor([0.0, 0.3, 1.0, 1.8, 3.0], dtype=F64)
INPUT = torch.tensor([[1.0, -2.0, 0.5, 3.0, 10.0], [0.0, 1.0, -1.0, 2.0, -7.0]], dtype=F64)[..., None]
START = 0.7
SOLVERS = {
    "euler": (sd.EulerMaruyama(), 1),
    "heun": (sd.GaussianStep(mean=sd.Heun()), 2),
    "rk4": (sd.GaussianStep(mean=sd.RungeKutta4()), 4),
}


def driven(times=TIMES, inputs=INPUT):
    return sd.Series(times, torch.zeros(len(inputs), times.shape[-1], 1, dtype=F64), covariates=inputs)


def exact(linear):
    """(series, time): the mean of dz = (u - z) dt + s dW, from gap to gap."""
    rows = []
    for u in INPUT[..., 0].tolist():
        m, row = START, [START]
        for k in range(len(TIMES) - 1):
            d = float(TIMES[k + 1] - TIMES[k])
            b = (u[k + 1] - u[k]) / d if linear else 0.0
            m = u[k] + b * d - b + (m - u[k] + b) * math.exp(-d)
            row.append(m)
        rows.append(row)
    return torch.tensor(rows, dtype=F64)


def driven_path(grid, context, solver, sigma=0.3):
    return sd.SDEPath(
        lambda t, z, u: u - z,
        torch.tensor([sigma], dtype=F64),
        torch.tensor([START], dtype=F64),
        grid.ts,
        solver=solver,
        context=context,
    )


def errors(interpolation, solver, change=lambda c, n: c):
    """The largest error of the mean at the observation times, for three numbers of substeps."""
    batch, found = driven(), []
    for n in (8, 16, 32):
        grid = sd.TimeGrid(batch.times, substeps=n)
        path = driven_path(grid, change(grid.context(batch, interpolation), n), solver)
        still = path.guided().transport(torch.zeros(grid.steps + 1, 2, 1, dtype=F64))
        linear = isinstance(interpolation, sd.LinearInterpolation)
        found.append(float((grid.observed(still)[..., 0] - exact(linear)).abs().max()))
    return found


def orders(found):
    return [math.log2(a / b) for a, b in zip(found, found[1:], strict=False)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_function_keeps_the_order_of_the_solver(solver):
    kernel, order = SOLVERS[solver]
    found = errors(sd.Carried(), kernel)
    assert all(abs(got - order) < 0.25 for got in orders(found)), found
    assert found[-1] < 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_linear_input_is_of_order_two_at_most(solver):
    kernel, order = SOLVERS[solver]
    found = errors(sd.LinearInterpolation(), kernel)
    assert all(abs(got - min(order, 2)) < 0.25 for got in orders(found)), found
    assert found[-1] < 0.2


@pytest.mark.parametrize("solver", SOLVERS)
def test_controls_looking_ahead_and_the_wrong_interpolation_do_not_converge(solver):
    def ahead(context, n):
        return torch.cat([context[:, n:], context[:, -1:].expand(-1, n, -1)], 1)

    assert errors(sd.Carried(), SOLVERS[solver][0], ahead)[-1] > 1.0
    late = errors(sd.LinearInterpolation(), SOLVERS[solver][0], lambda c, n: c.roll(1, 1))
    assert all(abs(got - 1) < 0.3 for got in orders(late)), late  # a step late: one order lost
    wrong = sd.TimeGrid(TIMES, substeps=4).context(driven(), sd.LinearInterpolation())
    assert not torch.allclose(wrong, sd.TimeGrid(TIMES, substeps=4).context(driven()))


def test_mean_of_draws():
    batch = driven()
    grid = sd.TimeGrid(batch.times, substeps=10)
    torch.manual_seed(0)
    z = driven_path(grid, grid.context(batch), SOLVERS["rk4"][0]).rsample((4000,))
    assert problems.within(grid.observed(z)[:, :, 1:, 0], exact(linear=False)[:, 1:], errors=4.5)
    assert not problems.within(grid.observed(z)[:, :, 1:, 0], exact(linear=True)[:, 1:], errors=4.5)


@pytest.mark.parametrize("grid", [{"substeps": 3}, {"dt": 0.13}])
def test_a_value_does_not_act_before_its_time(grid):
    one = driven()
    changed = INPUT.clone()
    changed[:, 2] += 100.0  # given at time 1
    other = driven(inputs=changed)
    grid = sd.TimeGrid(TIMES, **grid)
    a, b = grid.context(one), grid.context(other)
    differs = ((a != b).any(0))[:, 0]
    assert torch.equal(differs, (grid.ts >= 1.0) & (grid.ts < 1.8))
    noise = torch.randn(grid.steps + 1, 2, 1, dtype=F64)
    x, y = (driven_path(grid, c, sd.GaussianStep(mean=sd.Heun())).guided().transport(noise) for c in (a, b))
    moved = ((x != y).any(0))[:, 0]
    assert torch.equal(moved, grid.ts > 1.0)
    # The control: straight lines do know the next value.
    a, b = (grid.context(s, sd.LinearInterpolation()) for s in (one, other))
    assert ((a != b).any(0)[:, 0] & (grid.ts < 1.0)).any()


def test_rows_of_different_lengths_are_those_alone():
    rows = [([0.0, 1.0, 4.0], 3), ([0.5, 2.0], 2), ([-1.0], 1)]
    inputs = [[[1.0], [2.0], [3.0]], [[4.0], [5.0]], [[6.0]]]
    series = sd.Series.from_list([(t, [[0.0]] * n) for t, n in rows], covariates=inputs)
    for interpolation in (sd.Carried(), sd.LinearInterpolation()):
        together = sd.TimeGrid(series.times, substeps=2).context(series, interpolation)
        for i, (t, n) in enumerate(rows):
            alone = sd.Series(t, [[[0.0]] * n], covariates=[inputs[i]])
            own = sd.TimeGrid(alone.times, substeps=2).context(alone, interpolation)
            assert torch.equal(together[i, : own.shape[1]], own[0])
            assert (together[i, own.shape[1] :] == inputs[i][-1][0]).all()


def test_static_covariates_and_batches():
    series = sd.Series(TIMES, torch.zeros(5, 5, 1), covariates=torch.randn(5, 3))
    grid = sd.TimeGrid(TIMES, substeps=1)
    assert torch.equal(grid.context(series), series.covariates[:, None])
    # As many series as grid times: the context is static all the same.
    path = sd.SDEPath(
        lambda t, z, c: c[..., :1] - z, torch.ones(1), torch.zeros(1), grid.ts, context=grid.context(series)
    )
    assert path.batch_shape == (5,)
    timed = driven()
    assert torch.equal(grid.context(timed[[1]]), grid.context(timed)[[1]])


class TestExtended:
    def test_carried_on_and_linear_up_to_the_last(self):
        ahead = driven().extend([0.15, 1.4, 5.0, 6.0])
        for interpolation in (sd.Carried(), sd.LinearInterpolation()):
            before, after = (sd.TimeGrid(s.times, dt=0.05) for s in (driven(), ahead))
            a, b = before.context(driven(), interpolation), after.context(ahead, interpolation)
            shared = before.steps
            assert (a[:, :shared] - b[:, :shared]).abs().max() < 1e-12
            assert (b[:, shared:] == INPUT[:, -1:]).all()

    def test_twice_and_in_a_batch(self):
        ahead = driven().extend([1.4]).extend([0.6, 4.0])[[1]]
        grid = sd.TimeGrid(ahead.times, substeps=1)
        middle = 0.5 * (grid.ts[:-1] + grid.ts[1:])
        expected = np.interp(middle, TIMES, INPUT[1, :, 0])
        assert (
            grid.context(ahead, sd.LinearInterpolation())[0, :-1, 0] - torch.as_tensor(expected)
        ).abs().max() < 1e-12


class TestOfTheirOwnTimes:
    doses = sd.Series.from_list(
        [([1.0, 1.5], [[100.0], [0.0]]), ([0.5, 9.0], [[7.0], [8.0]])], ids=["b", "a"], dtype=F64
    )
    data = sd.Series.from_list(
        [([0.0, 4.0], [[1.0], [2.0]]), ([0.0, 2.0, 3.0], [[1.0], [2.0], [3.0]])], ids=["a", "b"], dtype=F64
    )

    def test_union_by_id(self):
        both = self.data.with_covariates(self.doses, before=0.0)
        assert both.ids == ("a", "b")
        assert both.lengths.tolist() == [4, 5]
        assert both.times.tolist() == [[0, 0.5, 4, 9, 9], [0, 1, 1.5, 2, 3]]
        assert both.covariates[..., 0].tolist() == [[0, 7, 7, 8, 8], [0, 100, 0, 0, 0]]
        assert both.mask[..., 0].tolist() == [
            [True, False, True, False, False],
            [True, False, False, True, True],
        ]
        assert torch.equal(both.values[both.mask], self.data.values[self.data.mask])
        assert torch.equal(both.last_observed, self.data.last_observed)
        again = both[[1]].to(torch.float32)
        assert torch.equal(again._knots, both._knots[[1]])

    def test_shared_times_stay_shared(self):
        doses = sd.Series([0.0, 0.7], torch.ones(2, 2, 3, dtype=F64))
        assert driven().with_covariates(doses).times.tolist() == [0.0, 0.3, 0.7, 1.0, 1.8, 3.0]

    def test_a_bolus_is_exact_between_observations(self):
        """Infusion at rate r from 1 to 1.5, elimination k: known in closed form."""
        k, rate = 0.8, 100.0
        both = self.data.with_covariates(self.doses, before=0.0)[[1]]
        grid = sd.TimeGrid(both.times, substeps=50)
        path = sd.SDEPath(
            lambda t, z, u: u - k * z,
            torch.tensor([1.0], dtype=F64),
            torch.zeros(1, dtype=F64),
            grid.ts,
            solver=sd.GaussianStep(mean=sd.RungeKutta4()),
            context=grid.context(both),
        )
        z = grid.observed(path.guided().transport(torch.zeros(grid.steps + 1, 1, 1, dtype=F64)))[0, :, 0]
        peak = rate / k * (1 - math.exp(-0.5 * k))
        expected = torch.tensor([0, 0, peak, peak * math.exp(-0.5 * k), peak * math.exp(-1.5 * k)], dtype=F64)
        assert (z - expected).abs().max() < 1e-7

    def test_a_masked_value_goes_on(self):
        given = sd.Series([0.0, 1.0, 2.0], [[[1.0, 5.0], [2.0, 0.0], [0.0, 6.0]]],
                          mask=[[[True, True], [True, False], [False, True]]], dtype=F64)  # fmt: skip
        both = sd.Series([0.0, 3.0], torch.zeros(1, 2, 1, dtype=F64)).with_covariates(given)
        assert both.covariates[0].tolist() == [[1, 5], [2, 5], [2, 6], [2, 6]]
        grid = sd.TimeGrid(both.times, substeps=1)
        linear = grid.context(both, sd.LinearInterpolation())[0]
        assert linear.tolist() == [[1.5, 5.25], [2, 5.75], [2, 6], [2, 6]]

    def test_refuses(self):
        with pytest.raises(
            sd.DataError, match=r"series a, covariate 0: .*time 0, before the first.*before=0\.0"
        ):
            self.data.with_covariates(self.doses)
        with pytest.raises(sd.DataError, match=r"series a is not among those of the covariates, 1 with ids"):
            self.data.with_covariates(self.doses[[0]])
        with pytest.raises(sd.ShapeError, match=r"`before` must be a number, or one for each of 1"):
            self.data.with_covariates(self.doses, before=[0.0, 1.0])


def test_refuses():
    batch = driven()
    grid = sd.TimeGrid(TIMES)
    with pytest.raises(sd.DataError, match="no covariates"):
        grid.context(sd.datasets.lynx_hare())
    with pytest.raises(sd.DataError, match="It is an object"):
        grid.context(batch, "linear")
    with pytest.raises(sd.DataError, match=r"series 0, covariate 0: .*time -1, before the first was given"):
        sd.TimeGrid(TIMES, start=-1.0).context(batch)
    with pytest.raises(sd.ShapeError, match="Build it from batch.times"):
        sd.TimeGrid(TIMES.expand(3, -1)).context(batch)
