"""The bound without simulation: against the exact evidence in continuous time, and what it costs."""

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from stochdyn.guides.marginals import KnotsOnly
from stochdyn.paths.marginal import Knots
from tests.paths.test_marginal import rate_by_quadrature
from tests.problems import OU
from tests.programs import (
    F64,
    elbos,
    mean_and_error,
    observe,
    ou,
    ou_evidence,
    ou_path,
    ou_series,
    rotating,
    rotating_evidence,
    rotating_series,
)


def continuous_evidence(batch, noise=OU["noise"]):
    """The log evidence of every series with the exact transitions of the OU process."""
    theta, mu, sigma = OU["theta"], OU["mu"], OU["sigma"]
    out = []
    for times, values, seen in zip(
        batch.times.expand(len(batch), -1), batch.values[..., 0], batch.mask[..., 0], strict=True
    ):
        m, P, before, total = mu, sigma**2 / (2 * theta), None, 0.0
        for t, y, s in zip(times.tolist(), values.tolist(), seen.tolist(), strict=True):
            keep = math.exp(-theta * (t - before)) if before is not None else 1.0
            m, P = mu + (m - mu) * keep, P * keep**2 + sigma**2 * (1 - keep**2) / (2 * theta)
            before = t
            if s:
                S, r = P + noise**2, y - m
                total += -0.5 * (r * r / S + math.log(2 * math.pi * S))
                m, P = m + P / S * r, P - P * P / S
        out.append(total)
    return torch.tensor(out, dtype=F64)


def estimate(model, guide, batch, draws=60, **options):
    pyro.set_rng_seed(0)
    with torch.no_grad():
        values = [
            -sd.PathELBO(times=5, particles=20, **options).loss(model, guide, batch) for _ in range(draws)
        ]
    return mean_and_error(torch.stack(values))


BATCH = ou_series(3, torch.arange(12, dtype=F64) * 0.3, seed=1, hold=[(0, 3), (0, 11), (1, 5)])


def test_the_exact_evidence_by_another_route():
    """With ever finer steps the discretised evidence gets there."""
    fine = ou_evidence(BATCH, substeps=100)
    torch.testing.assert_close(continuous_evidence(BATCH), fine, rtol=1e-3, atol=1e-2)


def train(model, batch, steps=300, particles=4, lr=0.1, **options):
    guide = sd.AmortizedGuide(model, paths=sd.Marginals())
    objective = sd.PathELBO(times=4, particles=particles)
    return sd.fit(model, guide, batch, objective=objective, steps=steps, lr=lr, progress=False, **options)


@pytest.fixture(scope="module")
def fitted():
    return train(ou, BATCH)


def ou_model(noise):
    def model(batch):
        grid = sd.TimeGrid(batch.times)
        with batch.plate("series"):
            path = ou_path(grid.ts, OU["theta"], OU["mu"], OU["sigma"])
            observe(grid, pyro.sample("z", path), batch, noise)

    return model


def marginal_of(guide, batch):
    return poutine.trace(KnotsOnly()(guide)).get_trace(batch).nodes["z"]["fn"]


def exact_bound(q, batch, noise, nodes=48):
    """The bound of marginals of an OU prior without any draw: its integrals in closed form and by quadrature."""
    A = torch.tensor([[-OU["theta"]]], dtype=F64)
    kl = rate_by_quadrature(q, A, shift=torch.tensor([OU["theta"] * OU["mu"]], dtype=F64), nodes=nodes)
    loc = q.knots.loc.gather(-2, q.observed[..., None])
    spread = q.knots.scale_tril[..., 0].gather(-2, q.observed[..., None])
    expected = dist.Normal(loc, noise).log_prob(batch.values) - 0.5 * (spread / noise).square()
    return (expected * batch.mask).sum() - kl.sum()


def smooth_bound(q, batch, noise, rounds=3):
    """The best bound of the same marginals with one slope at every knot: the control."""
    k = q.knots
    slope = torch.cat([k.slopes[..., :1, 0, :], k.slopes[..., 1, :]], -2)
    free = [
        x.detach().clone().requires_grad_() for x in (k.loc, k.scale_tril.log(), slope, k.coupling.atanh())
    ]

    def bound(nodes):
        loc, log_scale, slope, coupling = free
        slopes = torch.stack([slope[..., :-1, :], slope[..., 1:, :]], -2)
        own = Knots(k.times, loc, log_scale.exp(), slopes, coupling.tanh())
        return exact_bound(sd.MarginalPath(q.prior, own, q.observed), batch, noise, nodes)

    optimizer = torch.optim.LBFGS(free, max_iter=40, history_size=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -bound(12)
        loss.backward()
        return loss

    for _ in range(rounds):
        optimizer.step(closure)
    return bound(48).item()


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [0.1, 0.5])
@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_reaches_the_continuous_evidence(spacing, noise):
    """Within .005 nat per observation, never above; marginals that are smooth through the knots lose far more."""
    points, model = 40, ou_model(noise)
    torch.manual_seed(2)
    times = torch.arange(points, dtype=F64) * spacing
    fine = sd.TimeGrid(times, substeps=50)
    x = fine.observed(ou_path(fine.ts, OU["theta"], OU["mu"], OU["sigma"]).sample((1,)))
    batch = sd.Series(times, x + noise * torch.randn_like(x))
    fit = train(model, batch, steps=1000, particles=8, lr=0.05)
    q, exact = marginal_of(fit.guide, batch), float(continuous_evidence(batch, noise).sum())
    lost = (exact - exact_bound(q, batch, noise).item()) / points
    assert 0 < lost < 0.005
    value, error = estimate(model, fit.guide, batch)
    assert abs(value - exact_bound(q, batch, noise).item()) < 4 * error
    assert (exact - smooth_bound(q, batch, noise)) / points > 4 * lost


def test_trained_on_ragged_series_with_holes(fitted):
    value, exact = (
        exact_bound(marginal_of(fitted.guide, BATCH), BATCH, OU["noise"]),
        continuous_evidence(BATCH),
    )
    assert value < exact.sum()
    assert exact.sum() - value < 0.01 * int(BATCH.mask.sum())
    untrained = sd.AmortizedGuide(ou, paths=sd.Marginals())
    assert exact_bound(marginal_of(untrained, BATCH), BATCH, OU["noise"]) < exact.sum() - 10


def test_the_same_guide_is_simulated_elsewhere(fitted):
    """Trained without a solver, it guides the path on a grid: the ELBO there is near the grid's evidence."""
    draws = elbos(ou, fitted.guide.eval(), BATCH, draws=500)
    on_grid, error = mean_and_error(draws)
    exact = float(ou_evidence(BATCH).sum())
    assert exact - 0.5 < on_grid < exact + 4 * error
    assert sd.pareto_k(draws).k < 0.67
    evidence = sd.evidence(fitted, BATCH, particles=200)
    torch.testing.assert_close(evidence.total.double(), torch.tensor(exact, dtype=F64), rtol=0, atol=0.2)
    smoothed = sd.predict(fitted, BATCH, draws=50)
    assert smoothed.states.shape == (50, 3, 12, 1)


def test_an_encoder_learns_series_that_it_never_saw():
    train_set = ou_series(64, torch.arange(8, dtype=F64) * 0.3, seed=3)
    fresh = ou_series(32, torch.arange(8, dtype=F64) * 0.3, seed=4)
    guide = sd.AmortizedGuide(ou, sd.GRUEncoder(1, hidden=16).double(), paths=sd.Marginals(), hidden=16)
    before = estimate(ou, guide, fresh, draws=10)[0]
    objective = sd.PathELBO(particles=2)
    sd.fit(ou, guide, train_set, objective=objective, steps=200, batch_size=32, lr=2e-2, progress=False)
    after, error = estimate(ou, guide.eval(), fresh, draws=10)
    exact = float(continuous_evidence(fresh).sum())
    assert before < after < exact + 4 * error
    assert exact - after < 0.3 * (exact - before)


def test_other_latents_enter_as_in_the_elbo():
    """A latent rate: its log p - log q is in the bound, and its gradient passes through the path's divergence."""

    def model(batch):
        theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.4, dtype=F64), 0.3))
        grid = sd.TimeGrid(batch.times)
        with batch.plate("series"):
            observe(
                grid, pyro.sample("z", ou_path(grid.ts, theta, OU["mu"], OU["sigma"])), batch, OU["noise"]
            )

    guide = sd.AmortizedGuide(model, paths=sd.Marginals())
    sd.PathELBO(particles=3).loss(model, guide, BATCH).backward()
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
    assert guide.joint.loc.grad.abs() > 0


def test_minibatches_are_unbiased(fitted):
    whole, error = estimate(ou, fitted.guide, BATCH, draws=20)
    parts = [estimate(ou, fitted.guide, BATCH[[i]], draws=20) for i in range(3)]
    mean, errors = (sum(p[k] for p in parts) / 3 for k in (0, 1))
    assert abs(mean - whole) < 4 * math.hypot(error, errors)


def test_kl_weight_and_seed():
    losses = [
        train(ou, BATCH, steps=20, seed=s, kl_weight=w).losses for s, w in ((1, 1.0), (1, 1.0), (1, 0.5))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_cost_does_not_grow_with_the_grid():
    """A gradient step on a grid ten times finer; the simulated one is the control."""
    batch = ou_series(32, torch.arange(20, dtype=F64) * 0.3, seed=5)

    def ready(substeps):
        def model(b):
            return ou(b, substeps=substeps)

        return model, sd.AmortizedGuide(
            model, sd.GRUEncoder(1, hidden=8).double(), paths=sd.Marginals(), hidden=8
        )

    def ratio(objective, substeps, rounds):
        """In turn, and of the processor's time: what else runs on the machine hits both alike."""
        pairs = [ready(n) for n in substeps]
        spent = [[], []]
        for k in range(rounds + 1):
            for (model, guide), out in zip(pairs, spent, strict=True):
                started = time.process_time()
                objective.loss(model, guide, batch).backward()
                out.extend([time.process_time() - started] if k else [])
        return sorted(spent[1])[rounds // 2] / sorted(spent[0])[rounds // 2]

    with pyro.validation_enabled(False):
        assert ratio(sd.PathELBO(), (10, 100), 15) < 1.3
        assert ratio(sd.ELBO(), (5, 20), 3) > 2


class TestRefused:
    def test_a_guide_by_messages(self):
        guide = sd.AmortizedGuide(ou)
        with pytest.raises(sd.GuideError, match=r"gives path 'z' by simulation. Use sd.AmortizedGuide"):
            sd.PathELBO().loss(ou, guide, BATCH)

    def test_a_guide_without_paths(self):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))

        with pytest.raises(sd.GuideError, match="has no path by marginals"):
            sd.PathELBO().loss(model, model)

    def test_other_data_without_an_encoder(self):
        fit = train(ou, BATCH, steps=3)
        with pytest.raises(sd.GuideError, match="knows only the series that it was trained on"):
            sd.PathELBO().loss(ou, fit.guide.eval(), ou_series(3, BATCH.times, seed=9))

    @pytest.mark.parametrize("options", [{"times": 0}, {"particles": 0}])
    def test_numbers(self, options):
        with pytest.raises(sd.FitError, match="must be at least 1"):
            sd.PathELBO(**options)


@pytest.mark.slow
def test_rotation_is_in_reach():
    """Two turning coordinates, one of them seen: the coupling of a gap's ends is not symmetric."""
    batch = rotating_series(1, torch.arange(30, dtype=F64) * 0.2)
    fit = train(rotating, batch, steps=2500)
    value, error = estimate(rotating, fit.guide, batch)
    fine = float(rotating_evidence(batch, substeps=100).sum())
    assert value < fine + 4 * error + 0.05
    assert (fine - value) / 30 < 0.02 + 4 * error / 30


def test_a_bound_also_where_only_some_series_start_before_their_first_observation():
    """Two knots at the start of the others would make the start free: 2 nats above the evidence here."""
    batch = ou_series(3, torch.arange(6, dtype=F64) * 0.3, seed=1, hold=[(0, 0)])
    guide = sd.AmortizedGuide(ou, paths=sd.Marginals())
    objective = sd.PathELBO(times=2, particles=4)
    sd.fit(ou, guide, batch, objective=objective, steps=150, lr=0.1, progress=False)
    value, error = estimate(ou, guide, batch, draws=20)
    exact = float(continuous_evidence(batch).sum())
    assert error < 0.3
    assert exact - 1.0 < value < exact + 4 * error


class TestWhatAModelReads:
    """At observed times a path has values; anywhere else it has none, and a model that reads them is told."""

    BATCH = ou_series(2, torch.arange(6, dtype=F64) * 0.3, seed=1, hold=[(0, 0), (1, 2)])

    def check(self, read):
        def model(batch):
            grid = sd.TimeGrid(batch.times, substeps=4)
            with batch.plate("series"):
                z = pyro.sample("z", ou_path(grid.ts, OU["theta"], OU["mu"], OU["sigma"]))
                observe(grid, z, batch, OU["noise"])
                read(batch, grid, z)

        guide = sd.AmortizedGuide(model, paths=sd.Marginals())
        sd.fit(model, guide, self.BATCH, objective=sd.PathELBO(), steps=1, progress=False)

    @pytest.mark.parametrize(
        "read",
        [
            lambda batch, grid, z: None,
            lambda batch, grid, z: pyro.deterministic("seen", grid.observed(z)),
            lambda batch, grid, z: pyro.factor("f", -(grid.observed(z[..., :1])[..., 1, 0] ** 2)),
            lambda batch, grid, z: pyro.factor("f", -(grid.observed(z.exp()) * batch.mask).nansum((-1, -2))),
        ],
    )
    def test_observed_times_are_there(self, read):
        self.check(read)

    @pytest.mark.parametrize(
        "read",
        [
            lambda batch, grid, z: pyro.factor("f", -z.square().mean((-1, -2))),
            lambda batch, grid, z: pyro.factor("f", -(z[..., 0, 0] ** 2)),
            lambda batch, grid, z: pyro.factor("f", -(z[..., 10, 0] ** 2)),
            lambda batch, grid, z: pyro.factor("f", -(grid.observed(z)[..., 2, 0] ** 2)),
            lambda batch, grid, z: pyro.sample(
                "f", dist.Normal(z, 1.0).to_event(2), obs=torch.zeros(2, 21, 1, dtype=F64)
            ),
        ],
        ids=["mean", "start", "between", "hole", "whole"],
    )
    def test_others_are_refused(self, read):
        with pytest.raises(sd.GuideError, match=r"site 'f' reads the path at times without an observation"):
            self.check(read)

    def test_without_fit_an_error_of_shapes_is_explained(self):
        def model(batch):
            grid = sd.TimeGrid(batch.times, substeps=4)
            with batch.plate("series"):
                z = pyro.sample("z", ou_path(grid.ts, OU["theta"], OU["mu"], OU["sigma"]))
                pyro.factor("f", z[..., 10, 0])

        guide = sd.AmortizedGuide(model, paths=sd.Marginals())
        with pytest.raises(sd.GuideError, match=r"grid.observed\(z\)"):
            sd.PathELBO().loss(model, guide, self.BATCH)

    def test_a_model_that_fails_by_itself_says_so(self):
        def read(batch, grid, z):
            raise RuntimeError("of its own")

        with pytest.raises(RuntimeError, match="of its own"):
            self.check(read)
