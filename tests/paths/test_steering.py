"""A drift in place of the prior's, and a control: densities, KL, evidence and gradients of both."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

import stochdyn as sd
from stochdyn.paths.steering import frozen
from tests.problems import within

F64 = torch.float64
SIGMA = (0.4, 0.7)


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def prior_drift(t, z):
    return torch.stack([z[..., 1], -z[..., 0].sin() - 0.3 * z[..., 1]], -1)


def other_drift(t, z):
    return prior_drift(t, z) + torch.stack([0.5 * z[..., 0].cos(), 1.0 + 0 * z[..., 0]], -1) * (1 + t)


def start():
    return dist.Normal(tensor(0.2, -0.1), 0.5).to_event(1)


def prior(initial=None, noise=None, drift=prior_drift, points=6):
    ts = torch.linspace(0, 1, points, dtype=F64) ** 1.5
    noise = tensor(*SIGMA) if noise is None else noise
    return sd.SDEPath(drift, noise, start() if initial is None else initial, ts)


NOISES = {
    "constant": lambda: (tensor(*SIGMA), lambda t, z: tensor(*SIGMA)),
    "state": lambda: ((lambda t, z: 0.3 + 0.1 * z.square()), lambda t, z: 0.3 + 0.1 * z.square()),
    "matrix": lambda: (sd.MatrixDiffusion(tensor(0.5, 0.1, 0.2, 0.6).reshape(2, 2)), None),
}


def as_control(noise, g, f_q=other_drift):
    """The control that does what the drift does: (f_q - f_p) / g."""

    def control(t, z):
        gap = f_q(t, z) - prior_drift(t, z)
        if g is not None:
            return gap / g(t, z)
        return torch.linalg.solve(noise.field, gap[..., None])[..., 0]

    return control


class TestAnotherDrift:
    def test_the_priors_own_drift_changes_nothing(self):
        p = prior()
        q = p.guided(drift=prior_drift)
        torch.manual_seed(0)
        z = p.rsample((7,))
        torch.manual_seed(0)
        assert torch.equal(q.rsample((7,)), z)
        assert torch.equal(q.log_prob(z), p.log_prob(z))
        assert (p.guided(drift=other_drift).log_prob(z) - p.log_prob(z)).abs().min() > 1e-3

    @pytest.mark.parametrize("noise", NOISES)
    def test_is_the_path_with_that_drift(self, noise):
        given, _ = NOISES[noise]()
        q, same = prior(noise=given).guided(drift=other_drift), prior(noise=given, drift=other_drift)
        torch.manual_seed(0)
        z = same.rsample((7,))
        torch.manual_seed(0)
        torch.testing.assert_close(q.rsample((7,)), z, rtol=0, atol=1e-12)
        torch.testing.assert_close(q.log_prob(z), same.log_prob(z), rtol=0, atol=1e-10)
        assert (prior(noise=given).log_prob(z) - same.log_prob(z)).abs().min() > 1e-3

    @pytest.mark.parametrize("noise", NOISES)
    def test_is_the_control_of_the_same_drift(self, noise):
        given, g = NOISES[noise]()
        p = prior(noise=given)
        steered, controlled = p.guided(drift=other_drift), p.guided(control=as_control(given, g))
        eps = torch.randn(6, 7, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
        z = steered.transport(eps, torch.Size([7]))
        torch.testing.assert_close(controlled.transport(eps, torch.Size([7])), z, rtol=0, atol=1e-10)
        torch.testing.assert_close(controlled.log_prob(z), steered.log_prob(z), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("noise", NOISES)
    def test_kl_and_evidence_are_those_of_the_control(self, noise):
        given, g = NOISES[noise]()
        p = prior(noise=given)
        guides = p.guided(drift=other_drift), p.guided(control=as_control(given, g))

        def log_likelihood(z, k):
            return dist.Normal(z[..., 0], 0.3).log_prob(tensor(0.4)[0]) if k in (2, 5) else None

        kls, evidences = [], []
        for q in guides:
            torch.manual_seed(0)
            q.rsample()
            kls.append(kl_divergence(q, p))
            torch.manual_seed(1)
            evidences.append(sd.particle_evidence(q, log_likelihood, particles=50))
        torch.testing.assert_close(kls[0], kls[1], rtol=0, atol=1e-10)
        torch.testing.assert_close(evidences[0], evidences[1], rtol=0, atol=1e-10)
        torch.manual_seed(1)
        bootstrap = sd.particle_evidence(p, log_likelihood, particles=50)
        assert (evidences[0] - bootstrap).abs() > 1e-3

    def test_kl_has_the_expectation_of_the_log_ratio(self):
        p = prior()
        q = p.guided(drift=other_drift).expand([20000])
        torch.manual_seed(0)
        with torch.no_grad():
            z = q.rsample()
            kl, ratio = kl_divergence(q, p), q.log_prob(z) - p.log_prob(z)
        assert within(kl - ratio, 0.0)
        assert kl.std() < ratio.std()
        assert not within(kl - ratio, 0.05 * float(ratio.mean()))

    def test_evidence_is_unbiased(self):
        """Of a linear-Gaussian model, whose evidence is exact."""
        p, c = prior(drift=lambda t, z: -z, points=4), tensor(0.9)[0]

        def log_likelihood(z, k):
            return dist.Normal(z[..., 0], 0.3).log_prob(c) if k == 3 else None

        mean, var = tensor(0.2)[0], tensor(0.25)[0]
        for dt in p.ts.diff():
            mean, var = (1 - dt) * mean, (1 - dt) ** 2 * var + SIGMA[0] ** 2 * dt
        exact = dist.Normal(mean, (var + 0.09).sqrt()).log_prob(c)
        q = p.guided(drift=lambda t, z: 1.0 - z).expand([20000])
        torch.manual_seed(0)
        ratios = (sd.particle_evidence(q, log_likelihood, particles=3) - exact).exp()
        assert within(ratios, 1.0)
        assert not within(ratios, 1.1)

    @pytest.mark.parametrize("message", [False, True])
    @pytest.mark.parametrize("initial", ["normal", "gamma", "known"])
    def test_weights_average_to_one(self, initial, message):
        begin = {
            "normal": start(),
            "gamma": dist.Gamma(tensor(3.0, 2.0), tensor(2.5, 2.5)).to_event(1),
            "known": tensor(0.3, 0.1),
        }[initial]
        p = prior(begin, points=4, drift=lambda t, z: -z.sin())
        first = sd.Message.at(torch.full((1, 2), 0.5, dtype=F64), torch.ones(1, 2, dtype=F64))
        q = p.guided(first if message else None, drift=lambda t, z: 0.3 - z.sin())
        wrong = p.guided(first if message else None, drift=lambda t, z: 0.5 - z.sin())
        torch.manual_seed(0)
        with torch.no_grad():
            z = q.rsample((20000,))
            w, shifted = ((p.log_prob(z) - x.log_prob(z)).exp() for x in (q, wrong))
        assert within(w, 1.0)
        assert not within(shifted, 1.0)

    def test_a_message_of_one_time_acts_on_the_start_alone(self):
        p = prior()
        first = sd.Message.at(torch.ones(1, 2, dtype=F64), 1e6 * torch.ones(1, 2, dtype=F64))
        q = p.guided(first, drift=other_drift)
        z = q.rsample((50,))
        assert (z[:, 0] - 1).abs().max() < 0.01
        base = dist.Normal(tensor(0.2, -0.1), 0.5)
        precision = 4 + 1e6
        twisted = dist.Normal((4 * base.loc + 1e6) / precision, precision**-0.5)
        steps = prior(drift=other_drift).log_prob(z) - base.log_prob(z[:, 0]).sum(-1)
        expected = steps + twisted.log_prob(z[:, 0]).sum(-1)
        torch.testing.assert_close(q.log_prob(z), expected, rtol=0, atol=1e-8)

    def test_expand(self):
        p = prior()
        q = p.guided(drift=other_drift)
        z = q.expand([3]).rsample()
        assert z.shape == (3, 6, 2)
        torch.testing.assert_close(q.expand([3]).log_prob(z), q.log_prob(z), rtol=0, atol=1e-12)

    def test_its_batch_widens_the_path(self):
        shift = torch.randn(4, 1, dtype=F64)
        q = prior().guided(drift=lambda t, z: shift - z)
        assert q.batch_shape == (4,)
        z = q.rsample()
        single = [prior(drift=lambda t, z, s=s: s - z).log_prob(x) for s, x in zip(shift, z, strict=True)]
        torch.testing.assert_close(q.log_prob(z), torch.stack(single), rtol=0, atol=1e-10)


class Net(nn.Module):
    def __init__(self, context=0):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2 + context, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t, z, context=None):
        return self.inner(z if context is None else torch.cat([z, context], -1))


class TestContext:
    @pytest.mark.parametrize("shape", [(3,), (5, 3), (5, 6, 3)])
    @pytest.mark.parametrize("kind", ["drift", "control"])
    @pytest.mark.parametrize("net", ["plain", "prepared"])
    def test_each_step_sees_its_row(self, shape, kind, net):
        torch.manual_seed(0)
        f = Net(3) if net == "plain" else sd.NeuralField(2, hidden=(8,), context_dim=3).double()
        context, p = torch.randn(shape, dtype=F64), prior().expand([5])
        q = p.guided(**{kind: f}, context=context)
        z = q.rsample((2,))
        rows = context if len(shape) == 3 else context[..., None, :].expand(*shape[:-1], 6, 3)
        total = start().log_prob(z[..., 0, :])
        for k, dt in enumerate(p.ts.diff()):
            c = rows[..., k, :].expand(2, 5, 3)
            x, t = z[..., k, :], p.ts[k]
            f_k = f(t[None], x, c)
            f_k = f_k if kind == "drift" else prior_drift(t, x) + tensor(*SIGMA) * f_k
            step = dist.Normal(x + f_k * dt, tensor(*SIGMA) * dt.sqrt()).to_event(1)
            total = total + step.log_prob(z[..., k + 1, :])
        torch.testing.assert_close(q.log_prob(z), total, rtol=0, atol=1e-10)
        other = p.guided(**{kind: f}, context=context + 1).log_prob(z)
        assert (other - total).abs().min() > 1e-4

    def test_the_priors_context_stays_the_priors(self):
        """The prior has a context of one size, the guide's drift one of another."""
        c = torch.randn(5, 1, dtype=F64)
        ts = torch.linspace(0, 1, 6, dtype=F64)
        p = sd.SDEPath(lambda t, z, c: c - z, lambda t, z, c: 0.3 + c.square(), start(), ts, context=c)
        own = torch.randn(5, 6, 3, dtype=F64)
        q = p.guided(drift=Net(3), context=own)
        z = q.rsample()
        x, dt = z[:, :-1], ts.diff()[:, None]
        mean = x + q.steered.drift(None, x, own[:, :-1]) * dt
        g = (0.3 + c.square())[:, None] * dt.sqrt()
        steps = dist.Normal(mean, g.expand(mean.shape)).log_prob(z[:, 1:]).sum((-1, -2))
        torch.testing.assert_close(q.log_prob(z), start().log_prob(z[:, 0]) + steps, rtol=0, atol=1e-10)

    def test_a_control_without_context_of_its_own_gets_the_paths(self):
        c = torch.randn(5, 2, dtype=F64)
        ts = torch.linspace(0, 1, 6, dtype=F64)
        p = sd.SDEPath(lambda t, z, c: c - z, tensor(0.3, 0.4), start(), ts, context=c)
        z = p.rsample()
        implicit = p.guided(control=lambda t, z, c: c * z).log_prob(z)
        torch.testing.assert_close(implicit, p.guided(control=lambda t, z, c: c * z, context=c).log_prob(z))


class TestGradient:
    """Sticking the landing: what the guide owns is detached in the entropy term, what the prior owns is not."""

    def setup_method(self):
        torch.manual_seed(0)
        self.f, self.g, self.own = Net(), sd.ElementwiseField(2, 4).double(), Net(3)
        ts = torch.linspace(0, 1, 6, dtype=F64)
        self.prior = sd.SDEPath(self.f, self.g, start(), ts)
        self.context = torch.randn(6, 3, dtype=F64, requires_grad=True)

    def gradients(self, value, inputs):
        return torch.autograd.grad(value, inputs, allow_unused=True)

    @pytest.mark.parametrize("kind", ["drift", "control"])
    def test_the_guides_parameters_get_no_direct_gradient_and_the_priors_do(self, kind):
        q = self.prior.guided(**{kind: self.own}, context=self.context)
        z = q.rsample().detach()
        owned, priors = [*self.own.parameters(), self.context], list(self.g.parameters())
        entropy = q.score_parts(z).entropy_term
        torch.testing.assert_close(entropy, q.log_prob(z))
        assert all(x is None for x in self.gradients(entropy, owned))
        found = self.gradients(q.score_parts(z).entropy_term, priors)
        expected = self.gradients(q.log_prob(z), priors)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
            assert a.abs().max() > 0
        attached = self.gradients(q.log_prob(z), owned)
        assert all(x is not None for x in attached)
        if kind == "control":
            drift = self.gradients(q.score_parts(z).entropy_term, list(self.f.parameters()))
            assert all(x is not None for x in drift)

    @pytest.mark.parametrize("kind", ["drift", "control"])
    def test_the_drawn_value_still_carries_them(self, kind):
        q = self.prior.guided(**{kind: self.own}, context=self.context)
        entropy = q.score_parts(q.rsample()).entropy_term
        found = self.gradients(entropy, [*self.own.parameters(), self.context])
        assert all(x is not None for x in found)

    @pytest.mark.parametrize("kind", ["drift", "control"])
    def test_a_score_context_that_hangs_on_a_latent_drawn_before(self, kind):
        latent = torch.ones(3, dtype=F64, requires_grad=True)
        q = self.prior.guided(
            **{kind: self.own}, context=self.context + latent, score_context=self.context.detach() + latent
        )
        z = q.rsample().detach()
        through, own = self.gradients(q.score_parts(z).entropy_term, [latent, self.context])
        assert own is None
        torch.testing.assert_close(through, self.gradients(q.log_prob(z), [latent])[0])

    def test_what_is_dropped_is_zero_on_average(self):
        shift = torch.zeros(4000, 2, dtype=F64, requires_grad=True)
        q = self.prior.guided(drift=lambda t, z, c: self.own(t, z, c) + shift, context=self.context)
        torch.manual_seed(0)
        z = q.rsample().detach()
        (dropped,) = self.gradients(q.log_prob(z).sum(), [shift])
        assert within(dropped, 0.0)
        assert not within(dropped + 0.2 * dropped.std(0), 0.0)


class TestFrozen:
    def test_values_stay_and_gradients_go(self):
        net, z = Net(), torch.randn(4, 2, dtype=F64, requires_grad=True)
        cold = frozen(net)
        torch.testing.assert_close(cold(None, z), net(None, z))
        assert torch.autograd.grad(cold(None, z).sum(), z)[0].abs().max() > 0
        assert not cold(None, z.detach()).requires_grad
        assert all(p.requires_grad for p in net.parameters())

    def test_prepared_is_detached_too(self):
        net = sd.NeuralField(2, hidden=(4,), context_dim=3).double()
        rows, value = frozen(net).prepared(torch.randn(5, 3, dtype=F64))
        z = torch.randn(5, 2, dtype=F64)
        assert not rows.requires_grad
        assert not value(torch.zeros(1), z, rows).requires_grad
        assert not hasattr(frozen(Net()), "prepared")

    def test_a_closure_stays_as_it_is(self):
        def f(t, z):
            return z

        assert frozen(f) is f


class TestRefusals:
    def test_combinations(self):
        p = prior()
        with pytest.raises(sd.GuideError, match=r"`drift` takes the place .* Give one: control="):
            p.guided(drift=other_drift, control=other_drift)
        with pytest.raises(
            sd.GuideError, match="`context` is for `drift` or `control`, and neither is given"
        ):
            p.guided(context=torch.zeros(3, dtype=F64))
        velocity = sd.MatrixDiffusion(tensor(0.0, 0.5)[:, None])
        with pytest.raises(sd.GuideError, match=r"With 1 noises for 2 states .* Use `control`"):
            prior(noise=velocity).guided(drift=other_drift)

    def test_a_message_on_the_steps_beside_a_drift(self):
        ones = torch.ones(6, 2, dtype=F64)
        with pytest.raises(sd.GuideError, match=r"ends in \(6, 2\), the path needs \(time=1, state=2\)"):
            prior().guided((ones, ones), drift=other_drift)

    def test_drifts_that_do_not_fit(self):
        p = prior()
        with pytest.raises(sd.FieldError, match=r"guide's drift returned \(3,\), expected \(..., state=2\)"):
            p.guided(drift=lambda t, z: z.new_zeros(3))
        with pytest.raises(sd.FieldError, match="guide's drift failed on t of shape"):
            p.guided(drift=lambda t, z, c: z)
        with pytest.raises(sd.DtypeError, match="guide's drift returned torch.float32"):
            p.guided(drift=lambda t, z: z.float())
        with pytest.raises(sd.FieldError, match="context of size 3, got 2"):
            p.guided(drift=sd.NeuralField(2, context_dim=3).double(), context=torch.zeros(2, dtype=F64))


@pytest.mark.parametrize(("states", "noises"), [(2, 1), (4, 2), (2, 2)])
def test_a_control_of_fewer_noises_than_states_in_blocks(states, noises, monkeypatch):
    """The density does not depend on how many times the fields are called for at once."""
    torch.manual_seed(0)
    net = sd.MLP(states, noises, hidden=(4,)).double()
    noise = sd.MatrixDiffusion(0.5 * torch.eye(states, dtype=F64)[:, :noises])
    prior = sd.SDEPath(
        lambda t, z: -z, noise, torch.zeros(6, states, dtype=F64), torch.linspace(0, 1, 11).double()
    )
    q = prior.guided(control=lambda t, z: net(z))
    value, found = q.rsample(), []
    for rows in (10**6, 12):
        monkeypatch.setattr("stochdyn.paths.drifts._ROWS", rows)
        found.append((q.log_prob(value), torch.distributions.kl_divergence(q, prior)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
