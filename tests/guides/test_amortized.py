"""The guide equals the exact posterior of linear-Gaussian models, stores what it must, and refuses what it cannot do."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

import stochdyn as sd
from stochdyn.errors import GuideError
from stochdyn.guides.passes import Run
from tests.problems import OU
from tests.programs import (
    F64,
    elbos,
    local_theta,
    mean_and_error,
    normal,
    observe,
    ou,
    ou_evidence,
    ou_path,
    ou_series,
    own_times,
    rotating,
    rotating_evidence,
    rotating_series,
    trained,
)

RAGGED = ou_series(5, own_times(5, 7), hold=[(0, 3), (2, 0), (4, 6)])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Exact answers.


def test_untrained_it_is_the_posterior_of_an_ou():
    values = elbos(ou, sd.AmortizedGuide(ou), RAGGED, draws=20)
    assert values.mean().item() == pytest.approx(ou_evidence(RAGGED).sum().item(), abs=1e-8)
    assert values.var().item() < 1e-10


def test_untrained_it_is_the_posterior_of_a_rotation_seen_from_the_side():
    batch = rotating_series(3, torch.linspace(0, 3, 7))
    values = elbos(rotating, sd.AmortizedGuide(rotating), batch, draws=20)
    assert values.mean().item() == pytest.approx(rotating_evidence(batch).sum().item(), abs=1e-8)
    assert values.var().item() < 1e-10


def test_without_messages_it_is_far_from_the_posterior():
    guide = sd.AmortizedGuide(ou, paths=sd.FreeMessage(init=1e-9))
    mean, error = mean_and_error(elbos(ou, guide, RAGGED, draws=400))
    assert mean + 4 * error < ou_evidence(RAGGED).sum().item() - 5


def test_the_first_call_need_not_be_in_training():
    guide = sd.AmortizedGuide(ou)
    with torch.no_grad():
        assert -Trace_ELBO().loss(ou, guide, RAGGED) == pytest.approx(
            ou_evidence(RAGGED).sum().item(), abs=1e-8
        )
    guide = sd.AmortizedGuide(ou).eval()
    assert -Trace_ELBO().loss(ou, guide, RAGGED) == pytest.approx(ou_evidence(RAGGED).sum().item(), abs=1e-8)


def test_at_the_exact_guide_the_gradient_is_zero():
    guide = sd.AmortizedGuide(ou)
    Trace_ELBO().differentiable_loss(ou, guide, RAGGED).backward()
    assert guide.paths["z"].numbers.grad.abs().max() < 1e-8
    with torch.no_grad():
        guide.paths["z"].numbers += 0.1
    guide.zero_grad()
    Trace_ELBO().differentiable_loss(ou, guide, RAGGED).backward()
    assert guide.paths["z"].numbers.grad.abs().max() > 1e-3


def test_a_filter_that_learns_nothing_is_the_posterior_of_any_series():
    guide = sd.AmortizedGuide(ou, paths=sd.FilterMessage(learned=False))
    others = ou_series(6, own_times(6, 9), seed=3)
    for mode in (True, False):
        guide.train(mode)
        for batch in (RAGGED, others):
            values = elbos(ou, guide, batch, draws=5)
            assert values.mean().item() == pytest.approx(ou_evidence(batch).sum().item(), abs=1e-8)
            assert values.var().item() < 1e-10
    assert list(guide.parameters()) == []
    fresh = sd.AmortizedGuide(ou, paths=sd.FilterMessage(learned=False))
    fresh.load_state_dict(guide.state_dict())
    assert elbos(ou, fresh, RAGGED, draws=2).var() < 1e-10


def test_a_filter_that_learns_nothing_gives_the_gradient_of_the_evidence_without_noise(monkeypatch):
    theta = torch.tensor(OU["theta"], dtype=F64, requires_grad=True)

    def slope():
        def model(batch):
            ou(batch, theta=theta)

        guide = sd.AmortizedGuide(model, paths=sd.FilterMessage(learned=False))
        return -torch.autograd.grad(Trace_ELBO().differentiable_loss(model, guide, RAGGED), theta)[0].item()

    above, below = (ou_evidence(RAGGED, theta=OU["theta"] + step).sum().item() for step in (1e-5, -1e-5))
    exact = (above - below) / 2e-5
    assert [slope(), slope()] == pytest.approx([exact, exact], rel=1e-5)
    # The control: messages whose dependence on the model is cut in the score.
    guided = sd.SDEPath.guided
    monkeypatch.setattr(sd.SDEPath, "guided", lambda path, message=None, **_: guided(path, message))
    assert abs(slope() - slope()) > 1e-2 * abs(exact)


@pytest.mark.slow
def test_trained_from_nothing_it_reaches_the_evidence():
    batch, exact = RAGGED[:2], ou_evidence(RAGGED[:2]).sum().item()
    batch = sd.Series(batch.times, batch.values, mask=batch.mask)
    guide = sd.AmortizedGuide(ou, paths=sd.FreeMessage())
    trained(ou, guide, batch, steps=1500, lr=0.05)
    mean, error = mean_and_error(elbos(ou, guide, batch, draws=2000))
    assert mean > exact - 0.01
    assert mean < exact + 4 * error + 1e-9


TURNING = rotating_series(1, torch.linspace(0, 3, 7))


def test_free_messages_can_hold_the_posterior_if_full():
    exact = rotating_evidence(TURNING).sum().item()
    filtered = sd.AmortizedGuide(rotating)
    message = poutine.trace(filtered).get_trace(TURNING).nodes["z"]["fn"].message
    J = (message.precision + 1e-9 * torch.eye(2, dtype=F64)).detach()
    loc = torch.linalg.solve(J, message.information[..., None])[..., 0].detach()
    for keep, reaches in ((1.0, True), (0.0, False)):
        guide = sd.AmortizedGuide(rotating, paths=sd.FreeMessage())
        guide(TURNING)
        site = guide.paths["z"]
        L = torch.linalg.cholesky(J) * site.unit[:, None]
        with torch.no_grad():
            site.numbers[..., :2] = L.diagonal(dim1=-2, dim2=-1).log()
            site.numbers[..., 2:4] = (loc - site.centre) / site.unit
            site.numbers[..., 4] = keep * L[..., 1, 0]
        mean, error = mean_and_error(elbos(rotating, guide, TURNING, draws=500))
        assert (abs(mean - exact) < 1e-6) == reaches
        assert mean < exact + 4 * error + 1e-6


@pytest.mark.slow
def test_a_rotation_needs_full_messages():
    exact = rotating_evidence(TURNING).sum().item()
    guide = sd.AmortizedGuide(rotating, paths=sd.FreeMessage(rank=0))
    trained(rotating, guide, TURNING, steps=1500, lr=0.05)
    mean, error = mean_and_error(elbos(rotating, guide, TURNING, draws=2000))
    assert mean + 4 * error < exact - 0.1


# Mini-batches.


def test_a_mini_batch_moves_its_members_only():
    guide = sd.AmortizedGuide(local_theta, paths=sd.FreeMessage(), latents=sd.MeanField())
    Trace_ELBO().differentiable_loss(local_theta, guide, RAGGED)
    index = torch.tensor([3, 1])
    Trace_ELBO().differentiable_loss(local_theta, guide, RAGGED[index]).backward()
    for table in (guide.paths["z"].numbers, guide.locals["theta"].loc, guide.locals["theta"].log_scale):
        moved = table.grad.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("latents", [sd.FullRank(), sd.MeanField()])
def test_mini_batches_are_unbiased(latents):
    guide = sd.AmortizedGuide(local_theta, latents=latents)
    full, error = mean_and_error(elbos(local_theta, guide, RAGGED, draws=1500))
    parts, square = [], 0.0
    for index in ([0, 1], [2, 3], [4, 0], [1, 2], [3, 4]):
        mean, se = mean_and_error(elbos(local_theta, guide, RAGGED[torch.tensor(index)], draws=600))
        parts.append(mean)
        square += se**2 / 25
    assert abs(sum(parts) / 5 - full) < 4 * (square + error**2) ** 0.5
    assert max(abs(part - full) for part in parts) > 1.0


def test_a_path_shared_by_a_mini_batch_is_refused():
    def model(batch):
        grid = sd.TimeGrid(batch.times)
        z = pyro.sample("z", ou_path(grid.ts, 1.0, 0.0, 1.0))
        with batch.plate("series"):
            observe(grid, z, batch, 0.2)

    batch = ou_series(4, torch.linspace(0, 1, 3))
    guide = sd.AmortizedGuide(model)
    assert elbos(model, guide, batch, draws=5).var() < 1e-10
    with pytest.raises(GuideError, match=r"shared by the members of plate 'series'.*2 of 4.*no bound"):
        guide(batch[:2])
    guide = sd.AmortizedGuide(model, paths=sd.FreeMessage())
    guide(batch)
    guide(batch[:2])
    with pytest.raises(GuideError, match=r"its guide gives one posterior for each of 4 series"):
        sd.AmortizedGuide(model, sd.GRUEncoder(1, hidden=4))(batch)


# Plates.


def grouped(batch, groups=2):
    """A level per group, of which every series reads its own group's."""
    group = batch.index % groups
    grid = sd.TimeGrid(batch.times, substeps=3)
    with pyro.plate("group", groups):
        level = pyro.sample("level", normal(0.0, 1.0))
    with batch.plate("series"):
        z = pyro.sample("z", ou_path(grid.ts, 1.5, level[..., group], 0.8))
        observe(grid, z, batch, 0.2)


@pytest.mark.parametrize("encoder", [False, True])
def test_latents_of_other_plates_may_stand_before_a_path(encoder):
    batch = ou_series(4, own_times(4, 5))
    guide = sd.AmortizedGuide(grouped, sd.GRUEncoder(1, hidden=4) if encoder else None)
    guide(batch)
    values = elbos(grouped, guide, batch, draws=50)
    assert torch.isfinite(values).all()
    assert guide.locals["level"].loc.shape == (2, 1)


def crossed(batch, groups=3):
    """Groups at dim -2, the series at dim -1, a path for each pair; another path in the series plate alone."""
    grid = sd.TimeGrid(batch.times, substeps=2)
    with pyro.plate("group", groups, dim=-2):
        level = pyro.sample("level", normal(0.0, 1.0))
    series = batch.plate("series")
    with series:
        w = pyro.sample("w", ou_path(grid.ts, 1.0, 0.0, 0.5))
        observe(grid, w, batch, 0.3)
    with pyro.plate("group again", groups, dim=-2), series:
        z = pyro.sample("z", ou_path(grid.ts, 1.5, level, 0.8))
        seen = dist.Normal(grid.observed(z), 0.2).to_event(2)
        pyro.sample("x", seen, obs=batch.values.expand(groups, *batch.values.shape))


def test_nested_plates_with_particles_and_mini_batches():
    batch = ou_series(4, torch.linspace(0, 2, 5))
    guide = sd.AmortizedGuide(crossed)
    guide(batch)
    assert guide.paths["z"].numbers.shape[:2] == (3, 4)
    assert guide.paths["w"].numbers.shape[:1] == (4,)
    values = elbos(crossed, guide, batch, draws=400, plates=2)
    with torch.no_grad():
        loop = torch.tensor([-Trace_ELBO().loss(crossed, guide, batch) for _ in range(60)])
    (a, s), (b, t) = mean_and_error(values), mean_and_error(loop)
    assert abs(a - b) < 4 * (s**2 + t**2) ** 0.5
    parts = [elbos(crossed, guide, batch[i], draws=400, plates=2) for i in ([0, 1], [2, 3])]
    c, u = mean_and_error(sum(parts) / 2)
    assert abs(a - c) < 4 * (s**2 + u**2) ** 0.5


# State.


def test_instances_and_copies_share_nothing():
    a, b = sd.AmortizedGuide(local_theta), sd.AmortizedGuide(local_theta)
    a(RAGGED), b(RAGGED)
    c = copy.deepcopy(a)
    pointers = [{p.data_ptr() for p in guide.parameters()} for guide in (a, b, c)]
    assert not (pointers[0] & pointers[1] or pointers[0] & pointers[2])
    names = [set(poutine.trace(guide).get_trace(RAGGED).param_nodes) for guide in (a, b, c)]
    assert not (names[0] & names[1] or names[0] & names[2])


class Learned(nn.Module):
    """Plain torch parameters."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3, dtype=F64))
        self.level = nn.Parameter(torch.tensor(0.0, dtype=F64))

    def forward(self, batch):
        grid = sd.TimeGrid(batch.times, substeps=3)
        with batch.plate("series"):
            gain = pyro.sample("gain", dist.LogNormal(torch.tensor(0.0, dtype=F64), 0.3))
            z = pyro.sample("z", ou_path(grid.ts, self.rate.exp(), self.level, 0.8))
            observe(grid, gain[..., None, None] * z, batch, 0.2)


@pytest.mark.parametrize(
    ("message", "encoder"), [(sd.FilterMessage(), False), (sd.FreeMessage(), False), (sd.FreeMessage(), True)]
)
def test_a_fresh_instance_loads_a_trained_state(message, encoder):
    def make(model):
        return sd.AmortizedGuide(
            model, sd.GRUEncoder(1, hidden=4).double() if encoder else None, paths=message
        )

    model = Learned()
    guide = make(model)
    trained(model, guide, RAGGED, steps=5, lr=0.05)
    fresh = make(model)
    state = {key: value.clone() for key, value in guide.state_dict().items()}
    assert not any("rate" in key or "model" in key for key in state)
    assert fresh.load_state_dict(state).missing_keys == []
    for part in (guide, fresh):
        part.eval()
    torch.manual_seed(1)
    expected = elbos(model, guide, RAGGED, draws=3)
    torch.manual_seed(1)
    assert torch.equal(elbos(model, fresh, RAGGED, draws=3), expected)
    before = [id(p) for p in fresh.parameters()]
    fresh.load_state_dict(state)
    assert [id(p) for p in fresh.parameters()] == before


def test_names_that_modules_own_are_fine():
    def model(batch):
        keys = pyro.sample("keys", normal(0.0, 1.0))
        grid = sd.TimeGrid(batch.times)
        with batch.plate("series"):
            rate = pyro.sample("a.values", dist.LogNormal(torch.tensor(0.0, dtype=F64), 0.3))
            z = pyro.sample("values", ou_path(grid.ts, rate, keys, 0.8))
            observe(grid, z, batch, 0.2)

    assert torch.isfinite(
        elbos(model, sd.AmortizedGuide(model, latents=sd.MeanField()), RAGGED, draws=3)
    ).all()


# Other data than the guide was trained on.


def test_without_an_encoder_other_data_are_refused():
    guide = sd.AmortizedGuide(ou)
    trained(ou, guide, RAGGED, steps=2)
    guide.eval()
    guide(RAGGED), guide(RAGGED[[4, 2]]), guide(RAGGED.extend([9.0]))
    other = sd.Series(RAGGED.times, RAGGED.values + RAGGED.mask * 0.1, mask=RAGGED.mask)
    later = sd.Series(RAGGED.times + 0.1, RAGGED.values, mask=RAGGED.mask)
    for data in (other, later, ou_series(5, own_times(5, 7), seed=1)):
        with pytest.raises(GuideError, match=r"knows only the series that it was trained on.*GRUEncoder"):
            guide(data)
    with pytest.raises(GuideError, match=r"messages for \(5,\) members.*'series': 6.*GRUEncoder"):
        guide(ou_series(6, torch.linspace(0, 1, 7)))


def test_latents_of_series_are_not_handed_to_other_series():
    guide = sd.AmortizedGuide(local_theta, sd.GRUEncoder(1, hidden=4).double())
    trained(local_theta, guide, RAGGED, steps=2)
    guide.eval()
    guide(RAGGED)
    with pytest.raises(GuideError, match=r"site 'theta'.*5.*6"):
        guide(ou_series(6, torch.linspace(0, 1, 7)))


def test_a_longer_grid_than_the_first_is_refused_in_training():
    def model(batch):
        grid = sd.TimeGrid(batch.times, dt=0.1)
        with batch.plate("series"):
            z = pyro.sample("z", ou_path(grid.ts, 1.5, 0.5, 0.8))
            observe(grid, z, batch, 0.2)

    times = torch.stack([torch.linspace(0, 1, 5), torch.linspace(0, 4, 5)]).double()
    batch = ou_series(2, times)
    guide = sd.AmortizedGuide(model)
    guide(batch[:1])
    with pytest.raises(GuideError, match=r"the grid has 4\d times, the guide was made with 1\d.*whole data"):
        guide(batch[1:])
    guide = sd.AmortizedGuide(model)
    guide(batch), guide(batch[:1])
    assert elbos(model, guide, batch[:1], draws=5).var() < 1e-10


def test_with_an_encoder_new_series_are_welcome():
    guide = sd.AmortizedGuide(ou, sd.GRUEncoder(1, hidden=4).double())
    trained(ou, guide, RAGGED, steps=2, lr=1e-9)
    new = ou_series(9, own_times(9, 8), seed=3)
    for mode in (True, False):
        guide.train(mode)
        for batch in (new, new[[8, 1]]):
            values = elbos(ou, guide, batch, draws=5)
            assert values.var() < 1e-6
            scale = len(new) / len(batch)
            assert values.mean().item() == pytest.approx(scale * ou_evidence(batch).sum().item(), abs=1e-4)
    guide.train()
    Trace_ELBO().differentiable_loss(ou, guide, new).backward()


# Errors.


def test_errors_say_what_to_do():
    def discrete(batch):
        with batch.plate("series"):
            pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))

    def blind(batch):
        grid = sd.TimeGrid(batch.times)
        with batch.plate("series"):
            pyro.sample("z", ou_path(grid.ts, 1.5, 0.5, 0.8))

    with pytest.raises(GuideError, match=r"site 'k' is discrete.*enumerate.*TraceEnum_ELBO"):
        sd.AmortizedGuide(discrete)(RAGGED)
    with pytest.raises(GuideError, match=r"observes nothing.*obs="):
        sd.AmortizedGuide(blind)(RAGGED)
    sd.AmortizedGuide(blind, paths=sd.FreeMessage())(RAGGED)

    def on_tensors(values):
        ou(RAGGED)

    with pytest.raises(GuideError, match=r"needs a Series as the model's first argument, got Tensor"):
        sd.AmortizedGuide(on_tensors, sd.GRUEncoder(1))(RAGGED.values)
    with pytest.raises(sd.ShapeError, match=r"made for 2 channels, the batch has 1"):
        sd.AmortizedGuide(ou, sd.GRUEncoder(2))(RAGGED)


def test_sites_must_stay_the_same():
    extra = []

    def model(batch):
        for name in extra:
            pyro.sample(name, normal(0.0, 1.0))
        ou(batch, mu=pyro.sample("mu", normal(0.0, 1.0)))

    guide = sd.AmortizedGuide(model)
    guide(RAGGED)
    extra.append("new")
    with pytest.raises(GuideError, match=r"site 'new' was not there when the guide first ran.*'mu', 'z'"):
        guide(RAGGED)
    state = sd.AmortizedGuide(model)
    state.load_state_dict(guide.state_dict())
    with pytest.raises(GuideError, match=r"holds 1 numbers.*the model has 2 \(new, mu\)"):
        state(RAGGED)


def test_a_plate_made_outside_is_refused():
    outside = pyro.plate("series", 10, subsample=torch.arange(5))

    def model(batch):
        grid = sd.TimeGrid(batch.times)
        with outside:
            z = pyro.sample("z", ou_path(grid.ts, 1.5, 0.5, 0.8))
            observe(grid, z, batch, 0.2)

    with pytest.raises(GuideError, match=r"plate 'series' holds 5 of 10.*made outside the model"):
        sd.AmortizedGuide(model)(RAGGED)


def test_the_set_up_survives_a_prior_that_explodes():
    def model(batch):
        grid = sd.TimeGrid(batch.times)
        with batch.plate("series"):
            start = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
            path = sd.SDEPath(lambda t, z: 40 * z**3, torch.ones(1, dtype=F64), start, grid.ts)
            observe(grid, pyro.sample("z", path), batch, 0.2)

    batch = sd.Series(torch.linspace(0, 1, 5), torch.zeros(2, 5, 1, dtype=F64))
    state = torch.get_rng_state()
    guide = sd.AmortizedGuide(model)
    with torch.no_grad():
        guide._set_up(Run((batch,), {}))
    assert torch.equal(state, torch.get_rng_state())
    assert 0 < guide.paths["z"].unit.item() < float("inf")
