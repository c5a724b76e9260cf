"""The importance-weighted bound: its value by quadrature, its order, its gradients, mini-batches, refusals."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import stochdyn as sd
from stochdyn.errors import FitError
from stochdyn.inference import ELBO, IWAE
from stochdyn.inference.iwae import _Gates, _gradients
from stochdyn.inference.parameters import leaves
from tests.problems import OU
from tests.programs import F64, normal, observe, ou, ou_evidence, ou_path, ou_series, own_times

R = 0.7  # noise of an observation
Y = torch.tensor([0.9, -0.4, 1.7], dtype=F64)


@pytest.fixture(autouse=True)
def _seed():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


class Repeated:
    """level -> z_i -> y_i and its guide, in `copies` independent copies: one loss is the sum of as many draws."""

    def __init__(self, copies, y=Y, population=None):
        self.copies, self.y, self.population = copies, y, population or len(y)

    def rows(self, index=None):
        if index is None:
            return pyro.plate("rows", len(self.y), dim=-1)
        return pyro.plate("rows", self.population, subsample=index, dim=-1)

    def model(self, index=None):
        y = self.y if index is None else self.y[index]
        with pyro.plate("copies", self.copies, dim=-2):
            level = pyro.sample("level", normal(0.0, 1.0))
            with self.rows(index):
                z = pyro.sample("z", dist.Normal(level, 1.0))
                pyro.sample("y", dist.Normal(z, R), obs=y)

    def guide(self, index=None):
        with pyro.plate("copies", self.copies, dim=-2):
            level = pyro.sample("level", normal(0.3, 0.8))
            with self.rows(index):
                pyro.sample("z", dist.Normal(0.2 * level + 0.3, 0.8))

    def evidence(self):
        covariance = (1 + R**2) * torch.eye(len(self.y), dtype=F64) + 1.0
        return (
            dist.MultivariateNormal(torch.zeros(len(self.y), dtype=F64), covariance).log_prob(self.y).item()
        )


def bounds(objective, pair, *args, times=40):
    """Mean and standard error of the bound of one copy."""
    with torch.no_grad():
        draws = torch.stack([-objective.loss(pair.model, pair.guide, *args) for _ in range(times)])
    draws = draws / pair.copies
    return draws.mean().item(), draws.std().item() / math.sqrt(times)


def by_quadrature(particles, y=Y, points=24):
    """E log 1/K sum w, by Gauss-Hermite in the level and in the particles of each row."""
    x, w = (torch.as_tensor(a, dtype=F64) for a in np.polynomial.hermite_e.hermegauss(points))
    w = w / w.sum()
    level = 0.3 + 0.8 * x[:, None, None]
    loc = 0.2 * level + 0.3
    z = loc + 0.8 * x[:, None]
    log_w = (
        dist.Normal(level, 1.0).log_prob(z)
        + dist.Normal(z, R).log_prob(y)
        - dist.Normal(loc, 0.8).log_prob(z)
    )
    expected = torch.zeros(points, dtype=F64)
    for index in itertools.product(range(points), repeat=particles):
        weight = math.prod(w[i].item() for i in index)
        mean = log_w[:, list(index)].logsumexp(1) - math.log(particles)
        expected += weight * mean.sum(-1)
    shared = normal(0.0, 1.0).log_prob(level) - normal(0.3, 0.8).log_prob(level)
    return (w * (shared.flatten() + expected)).sum().item()


def iwae(particles, **options):
    return IWAE(particles, plate="rows", **options)


@pytest.mark.parametrize("particles", [1, 2])
def test_the_value_is_that_of_quadrature(particles):
    mean, error = bounds(iwae(particles), Repeated(2000))
    assert error < 0.01
    assert abs(mean - by_quadrature(particles)) < 4 * error
    assert abs(mean - by_quadrature(3 - particles)) > 4 * error  # control: the other number of particles


def test_more_particles_give_a_tighter_bound():
    pair = Repeated(500)
    (one, e1), (five, e5), (fifty, e50) = (bounds(iwae(k), pair, times=15) for k in (1, 5, 50))
    assert five - one > 4 * math.hypot(e1, e5)
    assert fifty - five > 4 * math.hypot(e5, e50)
    # Global latents are drawn once, so the gap of the level stays.
    assert pair.evidence() - fifty > 4 * e50


def wide(y):
    """A global level with its exact posterior, and local latents with a poor guide."""
    level = pyro.sample("level", normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(level, 1.0))
        pyro.sample("y", dist.Normal(z, R), obs=y)


def wide_guide(y):
    precision = 1 + len(y) / (1 + R**2)
    level = pyro.sample("level", normal(y.sum() / (1 + R**2) / precision, precision**-0.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(level, 1.2))


def trap_21(particles=50, rows=64, times=60):
    """Evidence, ELBO, Pyro's RenyiELBO and the bound with weights per row, per row, with standard errors."""
    torch.manual_seed(3)
    y = torch.randn((), dtype=F64) + math.sqrt(1 + R**2) * torch.randn(rows, dtype=F64)
    covariance = (1 + R**2) * torch.eye(rows, dtype=F64) + 1.0
    evidence = dist.MultivariateNormal(torch.zeros(rows, dtype=F64), covariance).log_prob(y).item() / rows
    renyi = RenyiELBO(alpha=0.0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)

    def mean_of(loss):
        with torch.no_grad():
            draws = torch.tensor([-float(loss()) for _ in range(times)]) / rows
        return draws.mean().item(), draws.std().item() / math.sqrt(times)

    elbo = mean_of(lambda: ELBO().loss(wide, wide_guide, y))
    stock = mean_of(lambda: renyi.loss(wide, wide_guide, y))
    ours = mean_of(lambda: IWAE(particles).loss(wide, wide_guide, y))
    return evidence, elbo, stock, ours


def test_weights_per_series_where_pyro_has_one_for_all():
    evidence, _, (stock, e1), (ours, e2) = trap_21()
    assert evidence - 0.06 < ours < evidence + 4 * e2
    assert ours - stock > 0.2 > 4 * math.hypot(e1, e2)


def test_mini_batches_are_unbiased():
    whole = bounds(iwae(4), Repeated(500), times=30)
    pairs = [torch.tensor(pair) for pair in itertools.combinations(range(3), 2)]
    parts = [bounds(iwae(4), Repeated(500), pair, times=30) for pair in pairs]
    mean = sum(m for m, _ in parts) / 3
    error = math.hypot(whole[1], math.sqrt(sum(e**2 for _, e in parts)) / 3)
    assert abs(mean - whole[0]) < 4 * error
    assert abs(mean - whole[0] - 0.1) > 4 * error  # control
    assert max(m for m, _ in parts) - min(m for m, _ in parts) > 0.1  # the batches differ


BATCH = ou_series(3, own_times(3, 5), hold=[(1, 2)])


def test_the_exact_guide_gives_the_evidence_without_noise():
    guide = sd.AmortizedGuide(ou)
    exact = ou_evidence(BATCH).sum().item()
    for particles in (1, 3, 8):
        assert -IWAE(particles).loss(ou, guide, BATCH).item() == pytest.approx(exact, abs=1e-9)
    IWAE(3).loss(ou, guide, BATCH).backward()
    assert guide.paths["z"].numbers.grad.abs().max() < 1e-10
    other = sd.AmortizedGuide(ou, paths=sd.FreeMessage())
    assert abs(exact + IWAE(8).loss(ou, other, BATCH).item()) > 0.01  # control


class Local(nn.Module):
    """A global level; in the plate a rate and, given it, a path with a learned noise."""

    def __init__(self):
        super().__init__()
        self.sigma = nn.Parameter(torch.tensor(0.7, dtype=F64))

    def forward(self, batch):
        level = pyro.sample("level", normal(0.0, 1.0))
        grid = sd.TimeGrid(batch.times, substeps=2)
        with batch.plate("series"):
            theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.3, dtype=F64), 0.5))
            z = pyro.sample("z", ou_path(grid.ts, theta, level, self.sigma))
            observe(grid, z, batch, OU["noise"])


@pytest.mark.parametrize("batch", [BATCH, BATCH[:2]], ids=["all", "mini-batch"])
def test_one_particle_is_the_elbo(batch):
    model = Local()
    guide = sd.AmortizedGuide(model)
    guide(BATCH)

    def of(objective):
        pyro.set_rng_seed(1)
        model.zero_grad(), guide.zero_grad()
        loss = objective.loss(model, guide, batch)
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in [*model.parameters(), *guide.parameters()]]

    reference = of(ELBO())
    for mine, theirs in zip(of(IWAE(1)), reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert abs(of(IWAE(2))[0] - reference[0]) > 1e-6  # control


def grouped(y):
    """A factor outside all plates, a latent per group, one per member."""
    level = pyro.sample("level", normal(0.0, 1.0))
    pyro.factor("bonus", -0.5 * level.square())
    with pyro.plate("group", 2, dim=-2):
        centre = pyro.sample("centre", dist.Normal(level, 1.0))
        with pyro.plate("member", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Normal(z, R), obs=y)


def test_groups_are_global_and_members_local():
    y = torch.stack([Y, Y + 1])
    guide = sd.AmortizedGuide(grouped)
    guide(y)
    pyro.set_rng_seed(1)
    one = ELBO().loss(grouped, guide, y)
    pyro.set_rng_seed(1)
    objective = IWAE(1, plate="member").prepared(grouped, guide, y)
    torch.testing.assert_close(objective.loss(grouped, guide, y), one, rtol=1e-10, atol=1e-10)

    def mean(objective):
        with torch.no_grad():
            draws = torch.stack([-objective.loss(grouped, guide, y) for _ in range(40)])
        return draws.mean().item(), draws.std().item() / math.sqrt(40)

    with torch.no_grad():
        guide.locals["z"].log_scale.add_(1.0)
    (single, e1), (many, e2) = (mean(IWAE(k, plate="member")) for k in (1, 20))
    assert many - single > 4 * math.hypot(e1, e2)


def test_validation_and_aggression_take_it_too():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self, y):
            with pyro.plate("rows", len(y)):
                pyro.sample("z", dist.Normal(self.gain * y, 1.0))

    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self, y):
            with pyro.plate("rows", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, self.log_scale.exp()))
                pyro.sample("y", dist.Normal(z, R), obs=y)

    options = {"validate": Y + 0.1, "aggressive": sd.Aggressive(max_inner=3, every=2), "progress": False}
    fit = sd.fit(Spread(), Guide(), Y, objective=IWAE(4), steps=4, lr=0.1, **options)
    assert len(fit.validation) == 4
    assert fit.inner == 12
    assert fit.guide.gain > 0


class ChainedModel(nn.Module):
    """top -> level -> (in rows) a -> b -> y; parameters with a value per copy, so that each copy gives its own gradient."""

    def __init__(self, copies):
        super().__init__()
        self.copies = copies
        self.drift = nn.Parameter(torch.full((copies, 1), 0.4, dtype=F64))

    def forward(self):
        with pyro.plate("copies", self.copies, dim=-2):
            top = pyro.sample("top", normal(0.0, 1.0))
            level = pyro.sample("level", dist.Normal(top, 1.0))
            with pyro.plate("rows", 2, dim=-1):
                a = pyro.sample("a", dist.Normal(level, 1.0))
                b = pyro.sample("b", dist.Normal(a + self.drift, 0.5 + self.drift.square()))
                pyro.sample("y", dist.Normal(b, R), obs=Y[:2])


class ChainedGuide(nn.Module):
    """The model's `drift` enters; all other parameters are its own."""

    def __init__(self, model):
        super().__init__()
        self._model = (model,)
        start = {"top": 0.1, "level": 0.2, "loc": 0.5, "slope": 0.6, "log_scale": -0.2}
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(torch.full((model.copies, 1), value, dtype=F64)))

    def forward(self):
        model, scale = self._model[0], self.log_scale.exp()
        with pyro.plate("copies", model.copies, dim=-2):
            top = pyro.sample("top", dist.Normal(self.top, 0.6))
            level = pyro.sample("level", dist.Normal(self.level + 0.5 * top, scale))
            with pyro.plate("rows", 2, dim=-1):
                a = pyro.sample("a", dist.Normal(self.loc + 0.3 * level, scale))
                loc = self.slope * a + model.drift + 0.2 * top + 0.1 * level
                pyro.sample("b", dist.Normal(loc, 0.4 + model.drift.square()))


def gradients(objective, copies, times=1):
    """The gradient of every parameter, one draw per copy."""
    model = ChainedModel(copies)
    guide = ChainedGuide(model)
    parameters = {**dict(model.named_parameters()), **dict(guide.named_parameters())}
    out = {name: [] for name in parameters}
    for _ in range(times):
        found = torch.autograd.grad(objective.loss(model, guide), list(parameters.values()))
        for name, gradient in zip(parameters, found, strict=True):
            out[name].append(gradient.flatten())
    return {name: torch.cat(parts) for name, parts in out.items()}


def differences():
    """How many standard errors the two mean gradients are apart, by parameter."""
    doubly = gradients(iwae(4), 4000, times=5)
    plain = gradients(iwae(4, doubly_reparametrised=False), 4000, times=5)
    out = {}
    for name, mine in doubly.items():
        error = math.hypot(mine.std().item(), plain[name].std().item()) / math.sqrt(len(mine))
        out[name] = ((mine.mean() - plain[name].mean()) / error).abs().item()
    return out


def one_pass(self, inner, weights, own):
    """Every gradient through local draws is weighted again, also that of what stays in log q."""
    self.local, self.shared = weights, 1.0
    inputs = list(leaves(inner))
    return sum((g * p).sum() for p, g in zip(inputs, _gradients(inner, inputs), strict=True) if g is not None)


def test_doubly_reparametrised_gradients_are_unbiased(monkeypatch):
    for name, apart in differences().items():
        assert apart < 4, name
    monkeypatch.setattr(_Gates, "surrogate", one_pass)  # control: one backward pass for all parameters
    biased = differences()
    assert min(biased["drift"], biased["level"], biased["top"]) > 8
    assert biased["loc"] < 4


def signal_to_noise(name, particles, **options):
    found = gradients(iwae(particles, **options), 2000)[name]
    return (found.mean().abs() / found.std()).item()


def test_the_signal_does_not_drown_with_more_particles():
    doubly = [signal_to_noise("loc", k) for k in (2, 100)]
    plain = [signal_to_noise("loc", k, doubly_reparametrised=False) for k in (2, 100)]
    assert doubly[1] > 0.7 * doubly[0]
    assert plain[1] < 0.2 * plain[0]
    assert doubly[1] > 10 * plain[1]
    model = [signal_to_noise("drift", k) for k in (2, 100)]
    assert model[1] > model[0]


def test_fit_reaches_the_exact_parameters():
    series = sd.Series([0.0], 1.0 + torch.randn(30, 1, 1, dtype=F64))

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self, batch):
            with batch.plate("series"):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("y", dist.Normal(z[..., None], R).to_event(1), obs=batch.values[:, 0])

    model = Mean()
    options = {"objective": IWAE(5), "steps": 150, "lr": 0.1, "progress": False, "batch_size": 10}
    fit = sd.fit(model, AutoNormal(model, init_scale=0.5), series, **options)
    assert model.loc.item() == pytest.approx(series.values.mean().item(), abs=0.1)
    assert math.isfinite(fit.elbo)


def test_the_guide_learns_from_its_draws_once():
    """FilterMessage follows the drawn paths in training: both runs must see the same guide."""

    def model(batch):
        grid = sd.TimeGrid(batch.times, substeps=2)
        start = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
        with batch.plate("series"):
            path = sd.SDEPath(
                lambda t, z: 2 * torch.sin(2 * z), torch.tensor([0.5], dtype=F64), start, grid.ts
            )
            observe(grid, pyro.sample("z", path), batch, OU["noise"])

    results = []
    for objective in (ELBO(), IWAE(1)):
        guide = sd.AmortizedGuide(model, paths=sd.FilterMessage(follow=0.5))
        pyro.set_rng_seed(2)
        guide(BATCH)
        loss = objective.loss(model, guide, BATCH)
        results.append((loss.detach(), guide.paths["z"].around.clone()))
    start = sd.AmortizedGuide(model)
    start(BATCH)
    assert (start.paths["z"].around - results[0][1]).abs().max() > 0.01  # control: it does follow
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


class TestRefusals:
    def test_numbers(self):
        with pytest.raises(FitError, match="particles must be at least 1, got 0"):
            IWAE(0)

    def test_a_kl_weight(self):
        with pytest.raises(FitError, match=r"KL weight of 0\.5 has no meaning"):
            sd.fit(wide, wide_guide, Y, objective=IWAE(), kl_weight=0.5, progress=False)
        with pytest.raises(FitError, match="KL weight of 0 has no meaning"):
            sd.fit(wide, wide_guide, Y, objective=IWAE(), kl_weight=sd.Linear(0.0, 1.0, 5), progress=False)
        IWAE().check_weight(1.0), ELBO().check_weight(0.5)

    def test_latents_without_rsample_or_partner(self):
        def model(y):
            with pyro.plate("rows", len(y)):
                k = pyro.sample("k", dist.Bernoulli(0.3))
                pyro.sample("y", dist.Normal(k, 0.5), obs=y)

        def guide(y):
            with pyro.plate("rows", len(y)):
                pyro.sample("k", dist.Bernoulli(0.4))

        with pytest.raises(FitError, match="latent 'k' has no rsample"):
            IWAE(3).loss(model, guide, Y)
        with pytest.raises(FitError, match=r"the model has the latents \['k'\], the guide draws \[\]"):
            IWAE(3).loss(model, lambda y: None, Y)

    def test_a_global_site_that_reads_a_local_one(self):
        def model(y):
            with pyro.plate("rows", len(y)):
                z = pyro.sample("z", normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, R), obs=y)
            pyro.sample("late", dist.Normal(z.mean(-1, keepdim=True), 1.0))

        def guide(y):
            with pyro.plate("rows", len(y)):
                pyro.sample("z", normal(0.0, 1.0))
            pyro.sample("late", normal(torch.zeros(1), 1.0))

        with pytest.raises(
            FitError, match="site 'late' stands outside plate 'rows' and depends on latents inside"
        ):
            IWAE(3).loss(model, guide, Y)

    def test_dropout_in_the_guide(self):
        net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3).double())

        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, y):
                level = pyro.sample("level", normal(0.0, 1.0))
                with pyro.plate("rows", len(y)):
                    pyro.sample("z", dist.Normal(self.net(y) + level, 1.0))

        with pytest.raises(FitError, match="gives latent 'z' two densities"):
            IWAE(3).loss(wide, Guide(), Y)
        net.eval()
        IWAE(3).loss(wide, Guide(), Y).backward()
