"""PosteriorDrift: the guide's path against explicit steps, forecasts by the prior, gradients, and what it cannot reach."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

import stochdyn as sd
from stochdyn.encoders import align
from stochdyn.guides.messages import FreeMessage
from stochdyn.guides.posterior_drift import DriftSite
from tests import problems
from tests.programs import F64, elbos, mean_and_error, observe, ou, ou_evidence, ou_path, ou_series, own_times

THETA, MU, SIGMA, NOISE = (problems.OU[k] for k in ("theta", "mu", "sigma", "noise"))
BATCH = ou_series(3, own_times(3, 5), hold=[(1, 4)])
SMALL = sd.PosteriorDrift(hidden=(8,), context=3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    assert not list(pyro.get_param_store().keys())


def guide_of(model, family=SMALL, batch=BATCH):
    """A guide that has seen its model once, its network moved away from where it starts."""
    guide = sd.AmortizedGuide(model, sd.GRUEncoder(1, 4).double(), paths=family)
    guide(batch)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return guide


def path_of(guide, batch):
    return poutine.trace(guide).get_trace(batch).nodes["z"]["fn"]


def inner(fn):
    while not isinstance(fn, sd.GuidedPath | sd.SDEPath):
        fn = fn.base_dist
    return fn


@pytest.mark.parametrize("family", [SMALL, sd.PosteriorDrift(hidden=(8,))])
def test_density_against_explicit_steps(family):
    """The drift sees the encoding at the next observation; after the last one it is the prior's."""
    guide = guide_of(ou, family)
    q = inner(path_of(guide, BATCH))
    z = q.rsample()
    site, ts = guide.paths["z"], q.ts.expand(3, -1)
    assert isinstance(site, DriftSite)
    code = guide.encoder(BATCH)
    code = code if site.reduce is None else site.reduce(code)
    context, _, valid = align(code, BATCH, ts)
    message = FreeMessage().build(
        site.start(context[:, 0]), torch.ones(1, dtype=F64), torch.zeros(3, 1, dtype=F64), None
    )
    J, h = message.precision[:, 0, 0], message.information[:, 0]
    J0 = 2 * THETA / SIGMA**2
    start = dist.Normal((h + J0 * MU) / (J + J0), (J + J0) ** -0.5)
    total = start.log_prob(z[:, 0, 0])
    for k in range(ts.shape[1] - 1):
        x, dt = z[:, k], (ts[:, k + 1] - ts[:, k])[:, None]
        f = torch.where(
            valid[:, k + 1, None], site.drift(ts[:, k, None], x, context[:, k + 1]), THETA * (MU - x)
        )
        total = total + dist.Normal(x + f * dt, SIGMA * dt.sqrt()).log_prob(z[:, k + 1])[:, 0]
    torch.testing.assert_close(q.log_prob(z), total, rtol=0, atol=1e-8)
    prior = ou_path(q.ts, THETA, MU, SIGMA)
    assert (prior.log_prob(z) - total).abs().min() > 1e-3


def test_after_the_last_observation_it_is_the_prior():
    """On those steps the densities are equal; the model may have learned anything."""
    times = torch.linspace(0, 2, 6, dtype=F64)
    batch = ou_series(2, times, hold=[(i, k) for i in range(2) for k in (4, 5)])
    guide = guide_of(ou, batch=batch)
    q = inner(path_of(guide, batch))
    prior = ou_path(q.ts, THETA, MU, SIGMA)
    z = q.rsample()
    last = 3 * 5  # five steps per gap
    moved = z.clone()
    moved[:, last + 1 :] += torch.randn_like(moved[:, last + 1 :]).cumsum(1)
    gap_q, gap_p = (p.log_prob(moved) - p.log_prob(z) for p in (q, prior))
    torch.testing.assert_close(gap_q, gap_p, rtol=0, atol=1e-8)
    assert gap_p.abs().min() > 1
    early = z.clone()
    early[:, 2] += 0.5
    gap_q, gap_p = (p.log_prob(early) - p.log_prob(z) for p in (q, prior))
    assert (gap_q - gap_p).abs().min() > 1e-3


def with_context(batch):
    """A prior whose own drift and noise have a context, and a latent drawn before the path."""
    rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.2, dtype=F64), 0.3))
    grid = sd.TimeGrid(batch.times, substeps=2)
    with batch.plate("series"):
        context = torch.tensor([[0.1], [0.5], [0.9]], dtype=F64)[: len(batch)]
        start = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
        z = pyro.sample(
            "z",
            sd.SDEPath(
                lambda t, z, c: c - rate[..., None] * z,
                lambda t, z, c: 0.3 + c,
                start,
                grid.ts,
                context=context,
            ),
        )
        observe(grid, z, batch, NOISE)


def test_a_prior_with_a_context_and_a_latent_before_the_path():
    guide = guide_of(with_context)
    site = guide.paths["z"]
    assert site.drift.context_dim == 3 + 1
    found = elbos(with_context, guide, BATCH, draws=50)
    assert torch.isfinite(found).all()
    trace = poutine.trace(guide).get_trace(BATCH)
    entropy = inner(trace.nodes["z"]["fn"]).score_parts(trace.nodes["z"]["value"].detach()).entropy_term
    owned = [*guide.encoder.parameters(), *site.parameters()]
    assert all(
        g is None for g in torch.autograd.grad(entropy.sum(), owned, retain_graph=True, allow_unused=True)
    )
    # The latent drawn before is not the path's own: through it the gradient stays.
    latents = torch.autograd.grad(entropy.sum(), list(guide.joint.parameters()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in latents)


class Plain(Trace_ELBO):
    """log p - log q, differentiated as it stands."""

    def differentiable_loss(self, model, guide, *args):
        q = poutine.trace(guide).get_trace(*args)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*args)
        return q.log_prob_sum() - p.log_prob_sum()


def test_sampled_latents_have_the_whole_gradient():
    """d ELBO / d loc of the latent's posterior: sticking the landing and the plain log ratio have one mean."""
    guide = guide_of(with_context)
    loc = guide.joint.loc
    found = {}
    for name, elbo in (("stick", Trace_ELBO()), ("plain", Plain())):
        torch.manual_seed(1)
        losses = (elbo.differentiable_loss(with_context, guide, BATCH) for _ in range(100))
        found[name] = torch.stack([torch.autograd.grad(loss, loc)[0] for loss in losses])
    gap = found["stick"] - found["plain"]  # the same seeds: paired
    assert problems.within(gap, 0.0)
    assert not problems.within(gap + 1.5 * gap.std(0), 0.0)


def test_elbo_is_below_the_evidence():
    exact = ou_evidence(BATCH).sum()
    mean, se = mean_and_error(elbos(ou, guide_of(ou), BATCH, draws=400))
    assert mean < exact + 4 * se


class Best(nn.Module):
    """The best drift that there is for one Ornstein-Uhlenbeck series: the mean of the exact posterior's steps."""

    def __init__(self, grid, exact):
        super().__init__()
        self.grid, self.h, self.J = grid, exact.information[:, 0], exact.precision[:, 0, 0]

    def forward(self, t, z):
        steps = self.grid.ts.diff()
        k = torch.searchsorted(self.grid.ts, t.flatten()).reshape(t.shape)
        a, G2 = z + THETA * (MU - z) * steps[k], SIGMA**2 * steps[k]
        gain = G2 * (self.h[k + 1] - self.J[k + 1] * a) / (1 + G2 * self.J[k + 1])
        return THETA * (MU - z) + gain / steps[k]


@pytest.mark.parametrize(("dt", "nats"), [(0.05, 1.3975), (0.0125, 0.296)])
def test_no_drift_closes_the_gap(dt, nats):
    """The best posterior drift loses sum_k (rho_k - 1 - log rho_k) / 2, rho = 1 + sigma^2 dt J: see TestWithoutItsOwnCovariance."""
    grid = sd.TimeGrid(problems.OU_TIMES, dt=dt, start=0.0)
    path = ou_path(grid.ts, THETA, MU, SIGMA)
    seen = torch.ones_like(problems.OU_VALUES, dtype=torch.bool)
    exact = sd.information_filter(path, sd.Message.observed(grid, problems.OU_VALUES, seen, NOISE))
    drift = Best(grid, exact)
    first = exact.information[:1], exact.precision[:1]
    model = problems.ou_discretised(grid.ts.diff(), **problems.OU)
    evidence = problems.kalman_log_evidence(
        model, dict(zip(grid.index.tolist(), problems.OU_VALUES, strict=True))
    )
    rho = 1 + SIGMA**2 * grid.ts.diff() * exact.precision[1:, 0, 0]
    best = float(0.5 * (rho - 1 - rho.log()).sum())
    assert best == pytest.approx(nats, abs=1e-3)

    def gap(drift):
        q = path.guided(sd.Message(*first), drift=drift)
        torch.manual_seed(0)
        with torch.no_grad():
            z = q.rsample((4000,))
            seen = dist.Normal(grid.observed(z), NOISE).log_prob(problems.OU_VALUES).sum((-2, -1))
            return evidence - (path.log_prob(z) + seen - q.log_prob(z))

    assert problems.within(gap(drift), best)
    assert not problems.within(gap(drift), 0.0)
    for shift in (0.3, -0.3):  # any other drift loses more
        worse = gap(lambda t, z, shift=shift: drift(t, z) + shift)
        assert not problems.within(worse, best)
        assert worse.mean() > best


def test_save_and_load():
    for family in (SMALL, sd.PosteriorDrift(hidden=(8, 4))):
        trained = guide_of(ou, family)
        fresh = sd.AmortizedGuide(ou, sd.GRUEncoder(1, 4).double(), paths=family)
        fresh.load_state_dict(trained.state_dict())
        values = []
        for guide in (trained, fresh):
            torch.manual_seed(3)
            values.append(guide(BATCH)["z"])
        assert torch.equal(*values)
        assert fresh.paths["z"].plates == trained.paths["z"].plates == 1


def test_needs_an_encoder_and_a_series():
    with pytest.raises(sd.GuideError, match="PosteriorDrift needs an encoder: sd.GRUEncoder"):
        sd.AmortizedGuide(ou, paths=SMALL)(BATCH)

    def model(x):
        pyro.sample("z", ou_path(torch.linspace(0, 1, 5, dtype=F64), THETA, MU, SIGMA))

    with pytest.raises(sd.GuideError, match="a Series as the model's first argument"):
        sd.AmortizedGuide(model, sd.GRUEncoder(1, 4), paths=SMALL)(torch.zeros(3))


def test_the_loop_is_plain_where_the_guide_follows_the_prior(monkeypatch):
    """There the drift is a new module in every run, which would be compiled again and again."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: calls.append(f) or f)
    model = sd.LatentSDE(1, 2, hidden=4, paths=SMALL, loop=sd.Compiled(chunk=2))
    whole = sd.Series(torch.linspace(0, 1, 5), torch.randn(3, 5, 1))
    holed = sd.Series(whole.times, whole.values, mask=whole.times[None, :, None].expand(3, 5, 1) < 0.6)
    for _ in range(3):
        model.guide(holed)
    assert calls == []
    for _ in range(3):
        model.guide(whole)
    assert len(calls) == 1
