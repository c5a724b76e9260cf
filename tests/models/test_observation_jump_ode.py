"""With the flow and the jump of a filter the likelihood is the exact one; it trains, predicts, copies and loads."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import stochdyn as sd
from tests.linear_filters import (
    F64,
    AsModule,
    evidence,
    exact_processes,
    joint,
    kalman_filter,
    known,
    ragged,
    transition,
    transitions_log_prob,
    update,
)
from tests.waves import waves


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    assert not list(pyro.get_param_store().keys())


def small(**options):
    torch.manual_seed(1)
    return sd.ObservationJumpODE(2, 6, **options)


def site(model, batch):
    trace = poutine.trace(model).get_trace(batch)
    trace.compute_log_prob()
    return trace.nodes["y"]


def per_series(model, batch):
    return site(model, batch)["log_prob"]


def worst(found, exact):
    return float((found - exact).detach().abs().max())


def test_the_moments_of_processes_without_noise_give_their_transition_densities():
    batch = ragged()
    assert worst(per_series(exact_processes(), batch), transitions_log_prob(batch)) < 1e-8


def test_a_jump_that_ignores_the_mask_is_another_likelihood():
    def careless(t, h, y, mask, seen):
        return known(t, h, y, torch.ones_like(mask), seen)

    batch = ragged()
    assert worst(per_series(exact_processes(careless), batch), transitions_log_prob(batch)) > 1


def test_the_kalman_bucy_filter_gives_the_evidence_of_noisy_partly_masked_channels():
    batch = ragged(one_channel=True)
    assert worst(per_series(kalman_filter(), batch), evidence(batch)) < 1e-8


@pytest.mark.parametrize("what", ["the mask ignored", "read after the jump"])
def test_other_filters_miss_the_evidence(what):
    batch, model = ragged(one_channel=True), kalman_filter()
    if what == "the mask ignored":
        model = kalman_filter(lambda t, h, y, mask, seen: update(t, h, y, torch.ones_like(mask), seen))
        found = per_series(model, batch)
    else:
        found = model.predictive(batch).mask(batch.mask).log_prob(batch.values).sum((-1, -2))
    assert worst(found, evidence(batch)) > 0.5


def test_channels_of_one_time_are_independent_given_the_past():
    """So where they are not, observed together, the likelihood is another: that is said in the docstring."""
    batch = ragged()
    assert worst(per_series(kalman_filter(), batch), evidence(batch)) > 1e-2


@pytest.mark.parametrize("anchored", [False, True])
def test_times_without_observations_change_nothing(anchored):
    batch, model = ragged(), small(anchored=anchored).double()
    before = per_series(model, batch)
    ahead = batch.extend([1.37, 2.5, 6.0])
    assert ahead.times.shape[1] > batch.times.shape[1]
    assert worst(per_series(model, ahead), before) < 1e-12
    values = torch.where(ahead.mask, ahead.values, torch.full_like(ahead.values, 9.0))
    other = ahead._with(values=values)
    assert worst(per_series(model, other), before) < 1e-12
    seen = ahead._with(values=values, mask=torch.ones_like(ahead.mask))
    assert worst(per_series(model, seen), before) > 1


@pytest.mark.parametrize("anchored", [False, True])
def test_a_batch_is_its_series(anchored):
    batch, model = ragged(), small(anchored=anchored).double()
    alone = torch.cat([per_series(model, batch[[i]]) for i in range(3)]) / 3  # of a population of 3
    torch.testing.assert_close(alone, per_series(model, batch), rtol=0, atol=1e-12)


def test_a_mini_batch_is_scaled_to_the_population():
    batch, model = ragged(), small().double()
    found = poutine.trace(model).get_trace(batch[:2]).nodes["y"]
    assert found["scale"] == pytest.approx(1.5)
    assert [f.name for f in found["cond_indep_stack"]] == ["series"]


def moved(model, directions, step, batch):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p, d in zip(other.parameters(), directions, strict=True):
            p.add_(step * d)
        return float(per_series(other, batch).sum())


@pytest.mark.parametrize("anchored", [False, True])
def test_gradients(anchored):
    batch, model = ragged(), small(anchored=anchored).double()
    loss = per_series(model, batch).sum()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    for _ in range(3):
        directions = [torch.randn_like(p) for p in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        ahead, back = (moved(model, directions, step, batch) for step in (1e-5, -1e-5))
        assert float(slope.detach()) == pytest.approx((ahead - back) / 2e-5, rel=1e-6, abs=1e-6)
    assert all(bool(g.abs().sum() > 0) for g in gradients)


def test_trains_under_pyros_svi():
    model, batch = small(), waves()
    before = {name: p.clone() for name, p in model.named_parameters()}
    svi = SVI(model, model.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(batch) for _ in range(40)]
    assert losses[-1] < losses[0] - 20
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())
    pyro.clear_param_store()


def test_fits_loads_and_copies(tmp_path):
    model, batch = small(), waves()
    fit = sd.fit(model, model.guide, batch, steps=40, lr=0.02, progress=False)
    assert fit.losses[-1] < fit.losses[0] - 20
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = sd.ObservationJumpODE(2, 6)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(per_series(fresh, batch), per_series(model, batch), rtol=0, atol=0)
    twin = copy.deepcopy(model)
    assert twin.guide is not model.guide and twin.guide.model is twin
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    sd.fit(twin, twin.guide, batch, steps=3, progress=False)
    assert torch.equal(per_series(fresh, batch), per_series(model, batch))
    assert not torch.equal(per_series(twin, batch), per_series(model, batch))


def test_the_fit_finds_the_parameters_of_a_process():
    """A filter whose rate is learned: the maximum of the exact transition densities."""

    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_rate = nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self, t, h):
            m, v = h.chunk(2, -1)
            return torch.cat([-self.log_rate.exp() * m, 1 - 2 * self.log_rate.exp() * v], -1)

    times = torch.rand(40, 20, dtype=F64).cumsum(1)
    x = [torch.randn(40, dtype=F64) * (1 / 6) ** 0.5]
    for dt in times.diff(dim=1).unbind(1):
        x.append(x[-1] * torch.exp(-3 * dt) + torch.randn(40) * ((1 - torch.exp(-6 * dt)) / 6).sqrt())
    batch, model = sd.Series(times, torch.stack(x, 1)[..., None]), exact_processes()
    model = sd.ObservationJumpODE(
        1,
        2,
        flow=Decay(),
        jump=model.jump,
        decoder=model.decoder,
        start=torch.tensor([0.0, 0.2]).double(),
        solver=sd.RungeKutta4(4),
    )
    sd.fit(model, model.guide, batch, steps=50, lr=0.1, progress=False)
    assert 2.65 < model.flow.log_rate.exp().item() < 3.35


def test_predictions_at_any_time_are_the_transitions_from_the_last_observation():
    batch, model = ragged(), exact_processes()
    ts = batch.times[:, :1] + torch.rand(3, 6, dtype=F64) * 6
    found = model.predictive(batch, ts)
    for i in range(3):
        for c in range(2):
            t, y = (x[i][batch.mask[i, :, c]] for x in (batch.times.expand(3, -1), batch.values[..., c]))
            k = (ts[i, :, None] >= t).sum(-1) - 1
            later = k >= 0
            exact = transition(y[k], ts[i] - t[k], c)
            torch.testing.assert_close(found.mean[i, later, c], exact.mean[later], rtol=0, atol=1e-8)
            torch.testing.assert_close(found.stddev[i, later, c], exact.stddev[later], rtol=0, atol=1e-6)
    shared = model.predictive(batch, [5.0, 6.0])
    assert shared.mean.shape == (3, 2, 2)
    torch.testing.assert_close(model.predictive(batch, torch.tensor([[5.0]] * 3)).mean, shared.mean[:, :1])


def test_at_an_observed_time_the_prediction_is_after_the_jump_and_the_likelihood_before():
    batch, model = ragged(), exact_processes()
    after, before = model.predictive(batch), model.one_step_ahead(batch)
    assert torch.equal(after.mean[batch.mask], batch.values[batch.mask])
    assert (before.mean - batch.values)[batch.mask].abs().min() > 1e-3


@pytest.mark.parametrize("ts", [[0.0], [float("nan")], [[5.0], [0.0], [5.0]]])
def test_a_time_before_the_start_is_named(ts):
    with pytest.raises(
        sd.TimeError, match=r"series \d: `ts` has time (0|nan), and the series starts at \d\.\d+"
    ):
        small().double().predictive(ragged(), ts)


def test_a_long_gap_is_cut_into_pieces_and_named_where_it_diverges():
    batch = ragged()
    far = small(flow=AsModule(lambda t, h: 0.3 * h), dt=None).double()
    with pytest.raises(
        sd.DivergedError, match=r"^series 0: the state .* in the gap of 1e\+80 after time \d\.\d+. Bound"
    ):
        far.predictive(batch, [1e80])
    model, cut = small(dt=None).double(), small(dt=0.25).double()
    with torch.no_grad():
        for m in (model, cut):
            m.flow.candidate.weight.mul_(3)
    fine = small(solver=sd.RungeKutta4(400), dt=None).double()
    fine.load_state_dict(model.state_dict())
    exact = fine.predictive(batch, [40.0]).mean
    assert worst(cut.predictive(batch, [40.0]).mean, exact) < 1e-5
    assert worst(model.predictive(batch, [40.0]).mean, exact) > 1e-3
    alone = torch.cat([cut.predictive(batch[[i]], [40.0]).mean for i in range(3)])
    torch.testing.assert_close(alone, cut.predictive(batch, [40.0]).mean, rtol=0, atol=1e-12)
    with pytest.raises(sd.TimeError, match="`dt` must be positive and finite, got 0"):
        small(dt=0)


def test_the_series_whose_state_diverges_is_named():
    batch = sd.Series([0.0, 1.0, 2.0], torch.zeros(3, 3, 2), ids=["Ada", "Bo", "Cy"])
    batch.values[1, 1] = 7.0

    def bursts(t, h, y, mask, seen):
        return torch.where(y.sum(-1, keepdim=True) > 1, float("nan"), h)

    with pytest.raises(sd.DivergedError, match=r"series Bo: the state leaves .* in the jump at time 1\. "):
        small(jump=AsModule(bursts))(batch)
    flow, keeps = AsModule(lambda t, h: h**3), AsModule(lambda t, h, y, mask, seen: h)
    model = small(flow=flow, jump=keeps, start=torch.full((6,), 3.0), dt=None)
    with pytest.raises(
        sd.DivergedError, match=r"series Cy: the state leaves .* in the gap of 9 after time 0\."
    ):
        model.predictive(sd.Series([0.0], torch.zeros(3, 1, 2), ids=batch.ids), [[0.0], [1e-3], [9.0]])


def test_bad_input_is_named():
    batch = ragged()
    with pytest.raises(sd.ShapeError, match="made for 3 channels, the batch has 2"):
        sd.ObservationJumpODE(3)(batch)
    with pytest.raises(sd.ShapeError, match="made for 1 covariates, the batch has none"):
        small(covariates=1)(batch)
    with pytest.raises(sd.ShapeError, match=r"`ts` must have shape \(k,\) or \(series, k\) = \(3, k\)"):
        small().double().predictive(batch, torch.ones(2, 4))
    with pytest.raises(sd.TimeError, match=r"`ts` of shape \(0,\) holds no time"):
        small().double().predictive(batch, torch.zeros(0))
    with pytest.raises(sd.ShapeError, match="channels and hidden must be at least 1"):
        sd.ObservationJumpODE(0)
    with pytest.raises(sd.ShapeError, match="anchored=True or a decoder"):
        small(anchored=True, decoder=sd.NormalDecoder(nn.Linear(6, 2), 2))
    with pytest.raises(sd.FieldError, match=r"jump returned shape \(3, 2\) for h of shape \(3, 6\)"):
        small(jump=exact_processes(lambda t, h, y, mask, seen: y).jump).double()(batch)
    for start in (torch.zeros(5), torch.zeros(1), torch.tensor(0.0)):
        with pytest.raises(
            sd.ShapeError, match=r"`start` must have shape \(hidden,\) = \(6,\), got \((5,|1,|)\)"
        ):
            small(start=start)


@pytest.mark.parametrize(
    "flow", [AsModule(lambda t, h: -h[..., :1]), AsModule(lambda t, h: -h[..., :4]), sd.DecayFlow(1)]
)
def test_a_flow_of_another_size_is_named_and_does_not_broadcast(flow):
    with pytest.raises(
        sd.FieldError, match=r"The flow returned (dh/dt|shift) of shape \(3, (1|4)\) for h of shape \(3, 6"
    ):
        small(flow=flow).double()(ragged())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_decoder_of_other_channels_is_named_and_does_not_broadcast(channels):
    normal = sd.NormalDecoder(nn.Linear(6, channels), channels)
    with pytest.raises(
        sd.ShapeError, match=r"batch shape \(3, \d\) .* expected \(3, 2\). Make it for obs_dim=2"
    ):
        small(decoder=normal).double()(ragged())
    with pytest.raises(sd.ShapeError, match=rf"made for {channels} channels, the memory has 2"):
        small(decoder=sd.AnchoredDecoder(6, channels)).double()(ragged())


def test_forecasts_are_joint():
    """Of the exact model the draws have the law of the process; drawn one by one they would not vary together."""
    rows = [([0.0, 0.4], [[0.3, 0.0], [1.5, -2.0]]), ([0.1], [[0.0, 0.5]])]
    batch, model = sd.Series.from_list(rows, dtype=F64), exact_processes()
    found = sd.predict((model, model.guide), batch, ts=[0.6, 0.9], draws=20000).observations
    assert found.shape == (20000, 2, 4, 2)
    for i, (last, y) in enumerate((((0.4), (1.5, -2.0)), ((0.1), (0.0, 0.5)))):
        a, b = found[:, i, -2 if i == 0 else 1], found[:, i, -1 if i == 0 else 2]
        for c in range(2):
            exact = transition(torch.tensor(y[c], dtype=F64), torch.tensor([0.6, 0.9]) - last, c)
            for k, x in enumerate((a[:, c], b[:, c])):
                assert abs(float(x.mean() - exact.mean[k])) < 4 * float(exact.stddev[k]) / 20000**0.5
                assert float(x.std()) == pytest.approx(float(exact.stddev[k]), rel=0.025)
            slope = float(torch.cov(torch.stack([a[:, c], b[:, c]]))[0, 1] / a[:, c].var())
            decay = float(transition(torch.ones(()), torch.tensor(0.3), c).mean) - float(
                transition(torch.zeros(()), torch.tensor(0.3), c).mean
            )
            assert slope == pytest.approx(decay, abs=0.03)
    apart = model.predictive(batch, [0.6, 0.9]).sample((20000,))
    assert torch.corrcoef(apart[:, 0, :, 0].T)[0, 1].abs() < 0.03


def test_a_channel_missing_beside_others_is_drawn_given_those():
    times = torch.tensor([0.0, 0.5], dtype=F64)
    y = torch.tensor([[[0.2, 0.0], [1.3, 0.0]]], dtype=F64)
    mask = torch.tensor([[[True, False], [True, False]]])
    model, batch = kalman_filter(), sd.Series(times, y, mask)
    found = sd.predict((model, model.guide), batch, draws=20000).observations[:, 0, 1, 1]
    C = joint(times[[0, 1, 1]], torch.tensor([0, 0, 1]))
    weights = torch.linalg.solve(C[:2, :2], C[:2, 2])
    mean, spread = weights @ torch.tensor([0.2, 1.3]).double(), (C[2, 2] - weights @ C[:2, 2]).sqrt()
    assert abs(float(found.mean() - mean)) < 4 * float(spread) / 20000**0.5
    assert float(found.std()) == pytest.approx(float(spread), rel=0.025)
    before = model.one_step_ahead(batch).mean[0, 1, 1]
    assert abs(float(before - mean)) > 20 * float(spread) / 20000**0.5


def test_draws_in_a_hole_follow_each_other_and_start_again_at_an_observation():
    times = torch.tensor([0.0, 0.01, 0.02, 3.0, 3.01], dtype=F64)
    mask = torch.tensor([True, False, False, True, False])[None, :, None].expand(1, 5, 2)
    batch, model = sd.Series(times, torch.ones(1, 5, 2).double(), mask), exact_processes()
    found = sd.predict((model, model.guide), batch, draws=4000).observations[:, 0, :, 0]
    c = torch.corrcoef(found.T)
    assert c[1, 2] > 0.6
    assert c[2, 4].abs() < 0.07
    assert abs(float(found[:, 4].mean()) - 1) < 0.05


def test_a_given_first_observation_has_no_density():
    batch = ragged()
    seen = batch.mask.clone()
    seen[:, 0] = True
    batch = sd.Series(batch.times, batch.values, seen, dtype=F64)
    full, model = exact_processes(), exact_processes()
    model.given_first = True
    first = full.one_step_ahead(batch).log_prob(batch.values)[:, 0].sum(-1)
    assert worst(per_series(full, batch) - first, per_series(model, batch)) < 1e-10


def test_censored_values_count_as_tails():
    batch, model = ragged(), small().double()
    cut = sd.Series(batch.times, batch.values, batch.mask, lower=-0.5, dtype=F64)
    found = site(model, cut)
    seen = model.one_step_ahead(cut)
    exact = torch.where(
        cut.censored,
        dist.Normal(seen.mean, seen.variance.sqrt()).cdf(cut.values).log(),
        seen.log_prob(cut.values),
    )
    assert int(cut.censored.sum()) > 2
    torch.testing.assert_close(found["log_prob"], (exact * cut.mask).sum((-1, -2)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("timed", [False, True])
def test_covariates_act_from_their_time_on(timed):
    class Driven(nn.Module):
        def forward(self, t, h, context):
            return context.expand(h.shape)

    rows = (
        torch.tensor([[[1.0], [3.0], [0.0]], [[2.0], [0.0], [0.0]]])
        if timed
        else torch.tensor([[1.0], [2.0]])
    )
    times = torch.tensor([0.0, 1.0, 4.0])
    mask = torch.tensor([[[True], [False], [True]]] * 2)
    batch = sd.Series(times, torch.zeros(2, 3, 1), mask, covariates=rows)
    model = sd.ObservationJumpODE(
        1, 1, flow=Driven(), jump=exact_processes(lambda t, h, y, mask, seen, context: h).jump,
        decoder=sd.NormalDecoder(nn.Identity(), 1), covariates=1,
    )  # fmt: skip
    expected = [[0.0, 1.0, 10.0], [0.0, 2.0, 2.0]] if timed else [[0.0, 1.0, 4.0], [0.0, 2.0, 8.0]]
    found = model.one_step_ahead(batch).mean[..., 0]
    torch.testing.assert_close(found, torch.tensor(expected))
    ahead = model.predictive(batch, [2.0]).mean.flatten()
    torch.testing.assert_close(ahead, torch.tensor([4.0, 2.0] if timed else [2.0, 4.0]))
    defaults = small_with_covariates(batch)
    assert sd.predict(defaults, batch, ts=[5.0], draws=3).observations.shape == (3, 2, 4, 1)


def small_with_covariates(batch):
    model = sd.ObservationJumpODE(1, 4, covariates=1, anchored=True)
    return sd.fit(model, model.guide, batch, steps=2, progress=False)


def test_anchored_predictions_start_at_the_last_value_of_each_channel():
    batch, model = ragged(), small(anchored=True).double()
    after = model.predictive(batch)
    assert torch.equal(after.mean[batch.mask], batch.values[batch.mask])
    assert after.stddev[batch.mask].max() < 1e-6
    ts = batch.times[:, -1:] + torch.tensor([1e-8, 1e-4])
    near = model.predictive(batch, ts)
    for c in range(2):
        last = torch.stack([y[m][-1] for y, m in zip(batch.values[..., c], batch.mask[..., c], strict=True)])
        together = batch.mask[torch.arange(3), batch.lengths - 1, c]
        assert (near.mean[:, 0, c] - last)[together].abs().max() < 1e-6
    assert (near.stddev[:, 1] > near.stddev[:, 0]).all()


@pytest.mark.parametrize("solver", [sd.Heun(3), sd.Dopri5(1e-9, 1e-10)], ids=repr)
def test_solvers_agree(solver):
    batch = ragged()
    fine = per_series(small(solver=sd.RungeKutta4(30)).double(), batch)
    assert worst(per_series(small(solver=solver).double(), batch), fine) < 1e-2
    assert worst(per_series(small(solver=sd.Euler(1)).double(), batch), fine) > 1e-2


def test_a_flow_in_closed_form_needs_no_solver():
    class Decays(nn.Module):
        def forward(self, t, h):
            return torch.stack([torch.full_like(h[..., 0], -0.3), -h[..., 1] / 2.0], -1)

    flow = sd.DecayFlow(2, push=-0.3)
    with torch.no_grad():
        flow.place[:] = torch.logit(torch.log(torch.tensor(2.0) / 0.5) / torch.log(torch.tensor(10.0)))
    parts = {"jump": sd.GRUJump(2, 2), "decoder": sd.NormalDecoder(nn.Identity(), 2)}
    batch = ragged()
    exact = per_series(sd.ObservationJumpODE(2, 2, flow=flow, **parts).double(), batch)
    solved = sd.ObservationJumpODE(2, 2, flow=Decays(), solver=sd.RungeKutta4(20), **parts).double()
    assert worst(per_series(solved, batch), exact) < 1e-4
    assert (
        worst(
            per_series(sd.ObservationJumpODE(2, 2, flow=sd.DecayFlow(2, push=3.0), **parts).double(), batch),
            exact,
        )
        > 0.1
    )


@pytest.mark.parametrize(
    ("decoder", "value"),
    [
        (lambda: sd.PoissonDecoder(nn.Linear(6, 2), 2), 3.0),
        (lambda: sd.BernoulliDecoder(nn.Linear(6, 2), 2), 1.0),
        (lambda: sd.CategoricalDecoder(nn.Linear(6, 6), 2, classes=3), 2.0),
        (lambda: sd.StudentTDecoder(nn.Linear(6, 2), 2), -1.0),
    ],
)
def test_other_decoders_train_and_are_drawn_ahead(decoder, value):
    batch = sd.Series([0.0, 1.0, 2.0], torch.full((4, 3, 2), value))
    model = small(decoder=decoder())
    fit = sd.fit(model, model.guide, batch, steps=10, lr=0.02, progress=False)
    assert fit.losses[-1] < fit.losses[0]
    found = sd.predict(fit, batch, ts=[3.0, 4.0], draws=5).observations
    assert found.shape == (5, 4, 5, 2)
    assert torch.isfinite(found).all()
