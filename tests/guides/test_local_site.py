"""Amortised latents: exact for linear-Gaussian hierarchies, for series and groups never seen, in every engine."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

import stochdyn as sd
from stochdyn.errors import GuideError
from stochdyn.guides.local_site import AmortizedSite, SiteHead, pooled_scales
from tests.hierarchies import (
    LOWER,
    TOP,
    Y_EVIDENCE,
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
from tests.programs import F64, elbos, mean_and_error, normal, observe, ou_path, ou_series, own_times

PLATES = {"theta": "subject", "mu": "site"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def set_guide(model, batch, **options):
    guide = sd.AmortizedGuide(model, sd.SetEncoder(1, 8).double(), amortize=PLATES, **options)
    guide(batch)
    return moved(guide)


# Exact answers.


def test_the_family_holds_the_posterior_of_a_hierarchy():
    batch = ragged(Y)
    guide = exact_guide(two_levels, batch)
    values = elbos(two_levels, guide, batch, draws=20)
    assert values.mean().item() == pytest.approx(Y_EVIDENCE, abs=1e-8)
    assert values.var() < 1e-20
    Trace_ELBO().differentiable_loss(two_levels, guide, batch).backward()
    assert guide.amortized.sites["theta"].head.shift.grad.abs() < 1e-8
    assert guide.joint.loc.grad.abs() < 1e-8
    with torch.no_grad():
        guide.amortized.sites["theta"].head.shift += 0.3
    mean, error = mean_and_error(elbos(two_levels, guide, batch, draws=4000))
    assert mean + 4 * error < Y_EVIDENCE - 0.02


@pytest.mark.parametrize(("model", "top"), [(by_site, None), (three_levels, TOP)])
def test_a_groups_message_is_the_sum_of_its_members(model, top):
    batch = simulated(4, seed=0)
    guide = exact_guide(model, batch)
    values = elbos(model, guide, batch, draws=20)
    assert values.mean().item() == pytest.approx(evidence(batch, top), abs=1e-8)
    assert values.var() < 1e-20
    Trace_ELBO().differentiable_loss(model, guide, batch).backward()
    assert guide.amortized.sites["mu"].head.shift.grad.abs() < 1e-8


def test_the_mean_of_the_members_messages_is_not_enough(monkeypatch):
    batch = simulated(4, seed=0)
    guide = exact_guide(by_site, batch)
    site = guide.amortized.sites["mu"]
    full = site.messages

    def mean(*args):
        return tuple(type(m)(m.information / 3, m.precision / 3) for m in full(*args))

    monkeypatch.setattr(site, "messages", mean)
    value, error = mean_and_error(elbos(by_site, guide, batch, draws=1000))
    assert value + 4 * error < evidence(batch) - 1


def test_exact_heads_know_new_series_and_new_groups():
    guide = exact_guide(by_site, simulated(4, seed=0))
    for groups, members in ((1, 1), (7, 2), (4, 3)):
        new = simulated(groups, seed=5, members=members)
        for mode in (True, False):
            guide.train(mode)
            values = elbos(by_site, guide, new, draws=5)
            assert values.mean().item() == pytest.approx(evidence(new), abs=1e-8)
            assert values.var() < 1e-20


def gap(model, guide, batch, top=None, draws=200):
    """Per group: evidence minus ELBO, and its standard error."""
    guide.eval()
    mean, error = mean_and_error(elbos(model, guide, batch, draws=draws))
    guide.train()
    groups = len(batch.grouping("site"))
    return (evidence_by_group(batch) - mean) / groups if top is None else evidence(
        batch, top
    ) - mean, error / groups


def evidence_by_group(batch):
    site = batch.groups["site"]
    return sum(evidence(batch[site == k]) for k in range(len(batch.grouping("site"))))


@pytest.mark.slow
def test_trained_it_knows_ragged_groups_never_seen():
    data, new = simulated(300, seed=1), simulated(200, seed=2)
    guide = sd.AmortizedGuide(by_site, sd.SetEncoder(1, 32).double(), amortize=PLATES)
    guide(data)
    before, error = gap(by_site, guide, new)
    assert before - 4 * error > 1
    sd.fit(by_site, guide, data, steps=900, lr=0.01, progress=False)
    after, error = gap(by_site, guide, new)
    assert -4 * error < after < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "steps", "most"), [(None, 1000, 0.6), (60, 700, 2.0)])
def test_three_levels_trained(batch_size, steps, most):
    """Sixty groups; mini-batches take longer, since a group's message then does not train the encoder."""
    data = simulated(60, seed=3)
    guide = sd.AmortizedGuide(three_levels, sd.SetEncoder(1, 32).double(), amortize=PLATES)
    guide(data)
    sd.fit(three_levels, guide, data, steps=steps, lr=0.01, batch_size=batch_size, progress=False)
    guide.eval()
    mean, error = mean_and_error(elbos(three_levels, guide, data, draws=500))
    exact = evidence(data, TOP)
    assert exact - mean < most
    assert exact - mean > -4 * error


# Every engine.


def test_vectorised_particles_agree_with_a_loop():
    batch = simulated(3, seed=0)
    guide = set_guide(three_levels, batch)
    many = mean_and_error(elbos(three_levels, guide, batch, draws=2000))
    with torch.no_grad():
        one = mean_and_error(
            torch.tensor([-Trace_ELBO().loss(three_levels, guide, batch) for _ in range(150)])
        )
    assert abs(many[0] - one[0]) < 4 * (many[1] ** 2 + one[1] ** 2) ** 0.5
    Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1).differentiable_loss(
        three_levels, guide, batch
    ).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in guide.parameters() if p.numel() > 1)


def test_densities_of_replayed_values():
    batch = simulated(3, seed=0)
    guide = set_guide(three_levels, batch)
    first = poutine.trace(guide).get_trace(batch)
    again = poutine.trace(poutine.replay(guide, first)).get_trace(batch)
    for trace in (first, again):
        trace.compute_log_prob()
    for name in ("top", "mu", "theta"):
        torch.testing.assert_close(again.nodes[name]["log_prob"], first.nodes[name]["log_prob"])


def test_the_head_sees_what_was_sampled_before_it():
    batch = simulated(3, seed=0)
    guide = set_guide(three_levels, batch)

    def messages(values):
        trace = poutine.trace(poutine.condition(guide, values)).get_trace(batch)
        return {n: (trace.nodes[n]["fn"].loc, trace.nodes[n]["fn"].factor) for n in ("mu", "theta")}

    mu = torch.tensor([0.1, -0.4, 0.3], dtype=F64)
    a = messages({"top": torch.tensor(0.0, dtype=F64), "mu": mu})
    b = messages({"top": torch.tensor(0.0, dtype=F64), "mu": mu + torch.tensor([0.0, 1.0, 0.0], dtype=F64)})
    c = messages({"top": torch.tensor(1.0, dtype=F64), "mu": mu})
    changed = (a["theta"][1] != b["theta"][1])[:, 0]
    assert changed.tolist() == (batch.groups["site"] == 1).tolist()
    assert (a["mu"][1] == b["mu"][1]).all()
    assert (a["mu"][1] != c["mu"][1]).all()
    assert (a["theta"][1] != c["theta"][1]).all()


def test_sticking_the_landing_leaves_out_the_guides_own_score():
    batch = simulated(3, seed=0)
    guide = set_guide(three_levels, batch)
    trace = poutine.trace(guide).get_trace(batch)
    q, value = trace.nodes["theta"]["fn"], trace.nodes["theta"]["value"].detach()
    head = guide.amortized.sites["theta"].head.outer.bias
    entropy = q.score_parts(value).entropy_term
    torch.testing.assert_close(entropy, q.log_prob(value))
    held = torch.autograd.grad(entropy.sum(), head, retain_graph=True, allow_unused=True)[0]
    plain = torch.autograd.grad(q.log_prob(value).sum(), head, retain_graph=True)[0]
    assert held is None or not held.any()
    assert plain.abs().min() > 1e-3
    through = torch.autograd.grad(entropy.sum(), trace.nodes["mu"]["value"], allow_unused=True)[0]
    assert through.abs().min() > 1e-6


def test_pyros_svi_and_predictive():
    batch = simulated(3, seed=0)
    guide = sd.AmortizedGuide(three_levels, sd.SetEncoder(1, 8).double(), amortize=PLATES)
    guide(batch)
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    svi = SVI(three_levels, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(batch) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10
    still = [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]
    assert still == ["joint.lower"]
    draws = Predictive(three_levels, guide=guide, num_samples=7, parallel=True)(batch)
    assert draws["mu"].shape[-1] == 3
    assert draws["theta"].shape[-1] == len(batch)
    assert not list(pyro.get_param_store().keys())


def test_a_fresh_instance_loads_a_trained_state():
    batch = simulated(4, seed=0)
    guide = set_guide(three_levels, batch)
    sd.fit(three_levels, guide, batch, steps=3, lr=0.01, batch_size=5, progress=False)
    fresh = sd.AmortizedGuide(three_levels, sd.SetEncoder(1, 8).double(), amortize=PLATES)
    state = {key: value.clone() for key, value in guide.state_dict().items()}
    assert fresh.load_state_dict(state).missing_keys == []
    for data in (batch, batch[[0, 5]]):  # the encodings of absent members came along
        for part in (guide, fresh):
            part.eval()
        torch.manual_seed(1)
        expected = elbos(three_levels, guide, data, draws=3)
        torch.manual_seed(1)
        assert torch.equal(elbos(three_levels, fresh, data, draws=3), expected)
    other = copy.deepcopy(guide)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in guide.parameters()}


# Priors of other kinds, and other shapes.


def shapes(batch):
    """A rate per series that is no transformed normal, and a correlated pair."""
    with batch.plate("subject"):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0, dtype=F64), 2.0))
        tril = torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=F64)
        pair = pyro.sample("pair", dist.MultivariateNormal(torch.zeros(2, dtype=F64), scale_tril=tril))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=F64)))
        observe_levels(batch, rate.log() + pair.sum(-1) + weights[..., 0])


def test_any_prior_gives_a_proper_density():
    batch = ragged(Y)
    plates = dict.fromkeys(("rate", "pair", "weights"), "subject")
    guide = sd.AmortizedGuide(shapes, sd.SetEncoder(1, 8).double(), amortize=plates)
    guide(batch)
    moved(guide)
    trace = poutine.trace(guide).get_trace(batch)
    x = torch.linspace(1e-4, 40, 400001, dtype=F64)
    q = trace.nodes["rate"]["fn"]
    for i in range(3):
        one = type(q)(q.loc[i], q.factor[i], q.transform, (q.event_shape, q.free_shape), q.score)
        area = torch.trapezoid(one.log_prob(x).exp(), x)
        assert area.item() == pytest.approx(1, abs=1e-3)
    assert trace.nodes["pair"]["value"].shape == (3, 2)
    assert trace.nodes["weights"]["value"].sum(-1).tolist() == pytest.approx([1, 1, 1])
    mean, error = mean_and_error(elbos(shapes, guide, batch, draws=500))
    assert mean + 4 * error < 0
    assert elbos(shapes, guide, ragged(Y[:2]), draws=5).isfinite().all()


def test_a_path_sees_the_rate_of_its_series_and_the_level_of_its_group():
    def model(batch):
        with batch.group_plate("site"):
            level = pyro.sample("level", normal(0.0, 1.0))
        grid = sd.TimeGrid(batch.times, substeps=2)
        with batch.plate("series"):
            rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.3, dtype=F64), 0.5))
            mean = level[..., batch.groups["site"]]
            observe(grid, pyro.sample("z", ou_path(grid.ts, rate, mean, 0.8)), batch, 0.2)

    data = ou_series(4, own_times(4, 5))
    batch = sd.Series(data.times, data.values, groups={"site": [0, 1, 1, 0]})
    plates = {"rate": "series", "level": "site"}
    for paths in (sd.FilterMessage(), sd.FreeMessage()):
        guide = sd.AmortizedGuide(model, sd.GRUEncoder(1, 6).double(), amortize=plates, paths=paths)
        guide(batch)
        guide.eval()
        head = guide.paths["z"].head
        assert head[0].in_features == 6 + 2 + 2
        with torch.no_grad():
            head[2].weight.normal_(std=0.1)
        values = {"level": torch.zeros(2, dtype=F64), "rate": torch.ones(4, dtype=F64)}

        def message(guide=guide, values=values, **changes):
            held = poutine.condition(guide, values | changes)
            return poutine.trace(held).get_trace(batch).nodes["z"]["fn"].message.information

        a, b = message(), message(level=torch.tensor([0.0, 1.0], dtype=F64))
        assert ((a != b).flatten(1).any(-1)).tolist() == [False, True, True, False]
        c = message(rate=torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=F64))
        assert ((a != c).flatten(1).any(-1)).tolist() == [False, True, False, False]
        assert torch.isfinite(elbos(model, guide, batch[[0, 3]], draws=20)).all()


def standing(batch):
    """`by_site` with its plates at dimension -2."""
    with batch.group_plate("site", dim=-2):
        mu = pyro.sample("mu", normal(0.0, TOP))
    with batch.plate("subject", dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu[..., batch.groups["site"], :], LOWER))
        observe_levels(batch, theta)


def test_plates_may_stand_at_another_dimension():
    batch = simulated(3, seed=0, most=1)
    lying, guide = set_guide(by_site, batch), set_guide(standing, batch)
    guide.load_state_dict(lying.state_dict())
    torch.manual_seed(1)
    a = poutine.trace(guide).get_trace(batch).nodes
    torch.manual_seed(1)
    b = poutine.trace(lying).get_trace(batch).nodes
    for name in ("mu", "theta"):
        assert a[name]["value"].shape == (*b[name]["value"].shape, 1)
        torch.testing.assert_close(a[name]["value"][:, 0], b[name]["value"])
        torch.testing.assert_close(a[name]["fn"].factor[:, 0], b[name]["fn"].factor)
    with pyro.plate("particles", 4, dim=-3):
        assert guide(batch)["theta"].shape == (4, len(batch), 1)


# What the pieces do.


def test_heads_begin_constant():
    start = torch.tensor([0.3, -0.1])
    head = SiteHead(4, 8, 2).begin(start)
    torch.testing.assert_close(head(torch.randn(5, 4)), start.expand(5, 2))
    head(torch.randn(5, 4)).sum().backward()
    assert head.outer.weight.grad.abs().min() > 0
    assert head.linear.weight.grad.abs().min() > 0


def test_a_site_is_made_again_from_its_state():
    scale = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    site = AmortizedSite.begin(scale, [scale], 5, 7)
    twin = AmortizedSite.of_state(site.state_dict())
    twin.load_state_dict(site.state_dict())
    x, upstream = torch.randn(3, 5, dtype=F64), [torch.randn(2, 1, 2, dtype=F64)]
    assert torch.equal(twin.messages(x, upstream)[0].precision, site.messages(x, upstream)[0].precision)
    assert site.messages(x, upstream)[0].precision.shape == (2, 3, 2, 2)


def test_scales_are_those_of_all_runs_and_members():
    runs = [{"x": dist.LogNormal(torch.full((50,), m, dtype=F64), 0.1)} for m in (-2.0, 0.0, 2.0, 0.0)]
    centre, unit = pooled_scales(runs, {})["x"]
    assert abs(centre.item()) < 0.1
    assert unit.item() > 0.5


# Errors.


def nested(batch):
    with batch.plate("subject", dim=-1), pyro.plate("arm", 2, dim=-2):
        observe_levels(batch, pyro.sample("theta", normal(0.0, 1.0))[0])


def in_arms(batch):
    with pyro.plate("arm", 5):
        theta = pyro.sample("theta", normal(0.0, 1.0))
    with batch.plate("subject"):
        observe_levels(batch, theta.sum(-1))


@pytest.mark.parametrize(
    ("model", "amortize", "message"),
    [
        (
            two_levels,
            {"thetta": "subject"},
            r"no latent 'thetta' that is not a path; it has \['mu', 'theta'\]",
        ),
        (two_levels, {"theta": "patient"}, r"site 'theta' stands in plates \['subject'\].*over 'patient'"),
        (
            two_levels,
            {"mu": "subject"},
            r"site 'mu' stands in plates \[\].*inside batch.plate\('subject'\) alone",
        ),
        (
            by_site,
            {"theta": "site"},
            r"site 'theta' stands in plates \['subject'\].*batch.group_plate\('site'\)",
        ),
        (by_site, {"mu": "subject"}, r"site 'mu' stands in plates \['site'\].*over 'subject'"),
        (nested, {"theta": "subject"}, r"site 'theta' stands in plates \['subject', 'arm'\].*alone"),
        (
            in_arms,
            {"theta": "arm"},
            r"plate 'arm' of site 'theta' is neither over the 6 series nor over groups",
        ),
    ],
)
def test_errors_name_site_and_plate(model, amortize, message):
    batch = simulated(2, seed=0)
    with pytest.raises(GuideError, match=message):
        sd.AmortizedGuide(model, Moments(), amortize=amortize)(batch)


def test_more_errors():
    with pytest.raises(GuideError, match=r"amortize=\{'theta': 'subject'\} needs an encoder.*GRUEncoder"):
        sd.AmortizedGuide(two_levels, amortize={"theta": "subject"})

    def on_values(values):
        two_levels(ragged(Y))

    guide = sd.AmortizedGuide(on_values, Moments(), amortize={"theta": "subject"})
    with pytest.raises(GuideError, match="needs a Series as the model's first argument, got Tensor"):
        guide(torch.zeros(3))
