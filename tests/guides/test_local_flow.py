"""Flows for the latents of series and groups: the twisted normal at the start, then any shape, in every engine."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

import stochdyn as sd
from stochdyn.errors import GuideError
from stochdyn.guides.local_flow import SiteFlow
from tests.hierarchies import (
    TOP,
    Moments,
    Y,
    by_site,
    evidence,
    exact_guide,
    moved,
    observe_levels,
    ragged,
    simulated,
    three_levels,
    two_levels,
)
from tests.programs import F64, elbos, mean_and_error, normal

PLATES = {"theta": "subject", "mu": "site"}
SMALL = {"hidden": (8,), "bins": 6}
FLOWS = {name: sd.LocalFlow(plate, **SMALL) for name, plate in PLATES.items()}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(model, batch, amortize=FLOWS, by=0.3):
    guide = sd.AmortizedGuide(model, sd.SetEncoder(1, 8).double(), amortize=amortize)
    guide(batch)
    return moved(guide, by)


# Where it starts.


def test_it_starts_as_the_twisted_normal():
    batch = simulated(3, seed=0)
    guide = made(three_levels, batch, PLATES)
    bent = sd.AmortizedGuide(three_levels, copy.deepcopy(guide.encoder), amortize=FLOWS)
    bent(batch)
    assert bent.load_state_dict(guide_state(guide, bent)).missing_keys == []
    runs = []
    for part in (guide, bent):
        torch.manual_seed(1)
        trace = poutine.trace(part).get_trace(batch)
        trace.compute_log_prob()
        runs.append(trace.nodes)
    for name in PLATES:
        for key in ("value", "log_prob"):
            assert (runs[0][name][key] - runs[1][name][key]).abs().max() < 1e-10
        far = runs[0][name]["value"].detach() + 30.0
        assert (runs[0][name]["fn"].log_prob(far) - runs[1][name]["fn"].log_prob(far)).abs().max() < 1e-10
    moved(bent)
    torch.manual_seed(1)
    assert (bent(batch)["mu"] - runs[0]["mu"]["value"]).abs().max() > 1e-2


def guide_state(guide, bent):
    return bent.state_dict() | guide.state_dict()


@pytest.mark.parametrize(("model", "top"), [(by_site, None), (three_levels, TOP)])
def test_hierarchies_of_normals_stay_exact(model, top):
    batch = simulated(4, seed=0)
    guide = exact_guide(model, batch)
    for site in guide.amortized.sites.values():
        site.flow = SiteFlow(len(site.before[0]) + 2, len(site.unit), FLOWS["theta"]).double()
    values = elbos(model, guide, batch, draws=20)
    assert values.mean().item() == pytest.approx(evidence(batch, top), abs=1e-8)
    assert values.var() < 1e-20
    Trace_ELBO().differentiable_loss(model, guide, batch).backward()
    for site in guide.amortized.sites.values():
        assert all(p.grad.abs().max() < 1e-8 for p in site.flow.parameters())
    moved(guide)
    mean, error = mean_and_error(elbos(model, guide, batch, draws=2000))
    assert mean + 4 * error < evidence(batch, top) - 0.02


# Its density.


def shapes(batch):
    with batch.plate("subject"):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0, dtype=F64), 2.0))
        tril = torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=F64)
        pair = pyro.sample("pair", dist.MultivariateNormal(torch.zeros(2, dtype=F64), scale_tril=tril))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=F64)))
        observe_levels(batch, rate.log() + pair.sum(-1) + weights[..., 0])


def shaped(batch, by=0.5):
    plates = dict.fromkeys(("rate", "pair", "weights"), sd.LocalFlow("subject", transforms=2, **SMALL))
    return made(shapes, batch, plates, by)


def across(q):
    """Unconstrained values over the width of a density of single numbers: (value, *batch)."""
    return (q.loc + q.factor * torch.linspace(-9, 9, 20001, dtype=F64)[:, None, None])[..., 0].detach()


def test_densities_are_normalised():
    batch = ragged(Y)
    trace = poutine.trace(shaped(batch)).get_trace(batch)
    q = trace.nodes["rate"]["fn"]
    u = across(q)
    rate = q.log_prob(u.exp()) + u
    area = torch.trapezoid(rate.exp(), u, dim=0)
    assert area.tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    q = trace.nodes["pair"]["fn"]
    side = torch.linspace(-7, 7, 351, dtype=F64)
    square = q.loc + (torch.cartesian_prod(side, side)[:, None, None] @ q.factor.mT)[..., 0, :]
    volume = q.factor.diagonal(dim1=-2, dim2=-1).prod(-1) * (side[1] - side[0]) ** 2
    mass = q.log_prob(square).exp().sum(0) * volume
    assert mass.tolist() == pytest.approx([1, 1, 1], abs=2e-3)
    w = q.warp.normal(torch.randn(3, 2, dtype=F64))[1]
    assert w.abs().max() > 0.05


def test_draws_follow_the_density():
    """The distribution function by quadrature makes draws uniform; those of the twisted normal it does not."""
    batch = ragged(Y[:1])
    q = poutine.trace(shaped(batch)).get_trace(batch).nodes["rate"]["fn"]
    u = across(q)
    F = ((q.log_prob(u.exp()) + u).exp() * (u[1] - u[0])).cumsum(0)[:, 0]
    for draws, uniform in (
        (q.sample((4000,)), True),
        ((q.loc + q.factor * torch.randn(4000, 1)).exp(), False),
    ):
        p = F[torch.searchsorted(u[:, 0], draws.log().reshape(-1)).clamp(max=len(u) - 1)].sort().values
        distance = (p - torch.linspace(0, 1, 4000, dtype=F64)).abs().max()
        assert (distance < 1.95 / math.sqrt(4000)) == uniform


def test_densities_of_replayed_values_and_expanded_ones():
    batch = simulated(3, seed=0)
    guide = made(three_levels, batch)
    first = poutine.trace(guide).get_trace(batch)
    again = poutine.trace(poutine.replay(guide, first)).get_trace(batch)
    for trace in (first, again):
        trace.compute_log_prob()
    for name in ("top", "mu", "theta"):
        torch.testing.assert_close(again.nodes[name]["log_prob"], first.nodes[name]["log_prob"])
    q = first.nodes["theta"]["fn"]
    many = q.expand(torch.Size((4, len(batch)))).rsample()
    assert many.shape == (4, len(batch))
    torch.testing.assert_close(q.expand(many.shape).log_prob(many)[2], q.log_prob(many[2]))


def test_the_flow_sees_the_data_and_what_was_sampled_before():
    batch = simulated(3, seed=0)
    guide = made(three_levels, batch)
    mu = torch.tensor([0.1, -0.4, 0.3], dtype=F64)

    def contexts(data=batch, **values):
        held = {"top": torch.tensor(0.0, dtype=F64), "mu": mu} | values
        nodes = poutine.trace(poutine.condition(guide, held)).get_trace(data).nodes
        return {n: nodes[n]["fn"].warp.context for n in PLATES}

    a, b = contexts(), contexts(mu=mu + torch.tensor([0.0, 1.0, 0.0], dtype=F64))
    changed = (a["theta"] != b["theta"]).any(-1)
    assert changed.tolist() == (batch.groups["site"] == 1).tolist()
    assert torch.equal(a["mu"], b["mu"])
    assert (contexts(top=torch.tensor(1.0, dtype=F64))["mu"] != a["mu"]).any(-1).all()
    fewer = contexts(data=batch[1:], mu=mu)["mu"]
    assert ((fewer != a["mu"]).any(-1)).tolist() == [False, False, False]  # members not at hand count too


def test_sticking_the_landing_leaves_out_the_guides_own_score():
    batch = simulated(3, seed=0)
    guide = made(three_levels, batch)
    trace = poutine.trace(guide).get_trace(batch)
    q, value = trace.nodes["theta"]["fn"], trace.nodes["theta"]["value"].detach()
    own = list(guide.amortized.sites["theta"].parameters()) + list(guide.encoder.parameters())
    entropy = q.score_parts(value).entropy_term
    torch.testing.assert_close(entropy, q.log_prob(value))
    held = torch.autograd.grad(entropy.sum(), own, retain_graph=True, allow_unused=True)
    site = sum(1 for _ in guide.amortized.sites["theta"].parameters())
    assert all(g is None or not g.any() for g in held[:site])
    plain = torch.autograd.grad(q.log_prob(value).sum(), own, retain_graph=True, allow_unused=True)
    assert all(g.abs().max() > 0 for g in plain[:site])
    through = torch.autograd.grad(entropy.sum(), trace.nodes["mu"]["value"])[0]
    assert through.abs().min() > 1e-6


# Every engine.


def test_vectorised_particles_agree_with_a_loop():
    batch = simulated(3, seed=0)
    guide = made(three_levels, batch)
    many = mean_and_error(elbos(three_levels, guide, batch, draws=2000))
    with torch.no_grad():
        one = mean_and_error(
            torch.tensor([-Trace_ELBO().loss(three_levels, guide, batch) for _ in range(150)])
        )
    assert abs(many[0] - one[0]) < 4 * (many[1] ** 2 + one[1] ** 2) ** 0.5


def test_mini_batches_agree_with_the_whole():
    """The mean over the mini-batches of the ELBO at the same draws is the ELBO."""
    batch = simulated(2, seed=0)
    guide = made(by_site, batch)
    guide(batch)
    guide.eval()
    whole = mean_and_error(elbos(by_site, guide, batch, draws=3000))
    parts = [mean_and_error(elbos(by_site, guide, batch[[k, k + 3]], draws=3000)) for k in range(3)]
    mean = sum(m for m, _ in parts) / 3
    error = math.hypot(whole[1], *[e / 3 for _, e in parts])
    assert abs(mean - whole[0]) < 4 * error


def test_training_moves_everything_and_state_travels():
    batch = simulated(4, seed=0)
    guide = sd.AmortizedGuide(three_levels, sd.SetEncoder(1, 8).double(), amortize=FLOWS)
    guide(batch)
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    svi = SVI(three_levels, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(batch) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10
    still = [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]
    assert still == ["joint.lower"]
    fresh = sd.AmortizedGuide(three_levels, sd.SetEncoder(1, 8).double(), amortize=FLOWS)
    fresh.load_state_dict({k: v.clone() for k, v in guide.state_dict().items()})
    twin, outcomes = copy.deepcopy(guide), []
    for part in (guide, fresh, twin):
        part.eval()
        torch.manual_seed(1)
        outcomes.append(elbos(three_levels, part, batch[[0, 5]], draws=3))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in guide.parameters()}
    draws = Predictive(three_levels, guide=guide, num_samples=7, parallel=True)(batch)
    assert draws["mu"].shape[-1] == 4


def test_a_fit_of_jumps_goes_to_iwae_arviz_and_diagnosis():
    def model(batch):
        with batch.plate("series"):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), 1.5))
            batch.observe("jumps", sd.PoissonProcess(rate, batch.t0, batch.t1, max_jumps=60))

    jumps = sd.Jumps.from_list([[0.5], [], [0.1, 0.2]], t0=0.0, t1=[1.0, 2.0, 3.0])
    guide = sd.AmortizedGuide(
        model, sd.SetEncoder(1, 8).double(), amortize={"rate": sd.LocalFlow("series", **SMALL)}
    )
    for objective, size in ((sd.IWAE(particles=4), None), (sd.ELBO(particles=2), 2)):
        fit = sd.fit(
            model, guide, jumps, steps=4, batch_size=size, lr=1e-2, objective=objective, progress=False
        )
        assert math.isfinite(fit.elbo)
    idata = sd.to_arviz(fit, jumps, draws=6)
    assert idata["posterior"]["rate"].shape == (1, 6, 3)
    shape, speed = 2 + jumps.counts.double(), 1.5 + jumps.t1
    exact = (2 * math.log(1.5) + torch.lgamma(shape) - shape * speed.log()).sum().item()
    bound = sd.IWAE(particles=20000, doubly_reparametrised=False).loss(model, guide, jumps)
    assert -bound.item() == pytest.approx(exact, abs=0.03)


def test_the_doubly_reparametrised_gradient_leaves_out_the_guides_own_score():
    """With one particle it is the gradient that sticks the landing, at the same draws."""
    batch = simulated(2, seed=0)

    def model(batch):
        with batch.plate("subject"):
            observe_levels(batch, pyro.sample("theta", normal(0.0, 1.0)))

    guide = made(model, batch, {"theta": FLOWS["theta"]})
    gradients = []
    for objective in (sd.IWAE(particles=1), sd.ELBO(), sd.ELBO(estimator=sd.LogRatio())):
        torch.manual_seed(1)
        guide.zero_grad()
        objective.loss(model, guide, batch).backward()
        gradients.append([p.grad.clone() for p in guide.amortized.parameters()])
    for doubly, sticking, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(doubly, sticking)
        assert (plain - sticking).abs().max() > 1e-3


def standing(batch):
    """`by_site` with its plates at dimension -2."""
    with batch.group_plate("site", dim=-2):
        mu = pyro.sample("mu", normal(0.0, TOP))
    with batch.plate("subject", dim=-2):
        observe_levels(batch, pyro.sample("theta", dist.Normal(mu[..., batch.groups["site"], :], 0.7)))


def test_plates_may_stand_at_another_dimension():
    batch = simulated(3, seed=0, most=1)
    lying, guide = made(by_site, batch), made(standing, batch)
    guide.load_state_dict(lying.state_dict())
    runs = []
    for part in (guide, lying):
        torch.manual_seed(1)
        runs.append(part(batch))
    for name in PLATES:
        torch.testing.assert_close(runs[0][name][:, 0], runs[1][name])
    with pyro.plate("particles", 4, dim=-3):
        assert guide(batch)["theta"].shape == (4, len(batch), 1)


# Errors.


def test_errors():
    for options in ({"transforms": 0}, {"bins": 1}, {"hidden": ()}):
        with pytest.raises(GuideError, match="transforms must be at least 1, bins at least 2, hidden not"):
            sd.LocalFlow("series", **options)
    with pytest.raises(GuideError, match=r"`plate` must be the name of a plate, got 3"):
        sd.LocalFlow(3)
    batch = simulated(2, seed=0)
    with pytest.raises(GuideError, match=r"site 'theta' stands in plates \['subject'\].*over 'patient'"):
        sd.AmortizedGuide(two_levels, Moments(), amortize={"theta": sd.LocalFlow("patient")})(batch)
    with pytest.raises(GuideError, match="needs an encoder"):
        sd.AmortizedGuide(two_levels, amortize={"theta": sd.LocalFlow("subject")})
    bent, plain = made(by_site, batch), made(by_site, batch, PLATES)
    with pytest.raises(GuideError, match=r"site '\w+' has no flow, this guide was made with LocalFlow"):
        bent.load_state_dict(plain.state_dict())
    with pytest.raises(GuideError, match=r"site '\w+' has a flow, this guide was made with none"):
        plain.load_state_dict(bent.state_dict())


# What it is for.


def curved(batch):
    """Two latents of each series, of which the second follows the square of the first."""
    with batch.plate("subject"):
        a = pyro.sample("a", normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        seen = dist.Normal((b + a.square())[..., None, None], 0.4).mask(batch.mask).to_event(2)
        pyro.sample("y", seen, obs=batch.values)


def curved_evidence(batch):
    side = torch.linspace(-6, 6, 1201, dtype=F64)
    a, b = torch.meshgrid(side, side, indexing="ij")
    prior = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(a, 1.0).log_prob(b)
    out = []
    for y, mask in zip(batch.values, batch.mask, strict=True):
        seen = dist.Normal((b + a**2)[..., None], 0.4).log_prob(y[mask]).sum(-1)
        out.append((prior + seen).flatten().logsumexp(0) + 2 * (side[1] - side[0]).log())
    return torch.stack(out).sum().item()


@pytest.mark.slow
def test_latents_of_a_series_that_bend_together():
    a = torch.randn(60, dtype=F64)
    b = a + torch.randn(60, dtype=F64)
    batch = ragged([(b + a**2)[k] + 0.4 * torch.randn(2, dtype=F64) for k in range(60)])
    exact, gaps = curved_evidence(batch), []
    for kind in ("subject", sd.LocalFlow("subject")):
        torch.manual_seed(0)
        guide = sd.AmortizedGuide(
            curved, sd.SetEncoder(1, 16).double(), amortize=dict.fromkeys(("a", "b"), kind)
        )
        sd.fit(curved, guide, batch, steps=1500, lr=5e-3, objective=sd.ELBO(particles=8), progress=False)
        mean, error = mean_and_error(elbos(curved, guide, batch, draws=1000))
        assert mean < exact + 4 * error
        gaps.append((exact - mean) / len(batch))
    assert gaps[0] > 2 * gaps[1], gaps
