"""A guide's own drift, or a control with a context: law, density, gradients, and what is refused."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import stochdyn as sd
from stochdyn.paths.steering import frozen
from tests.problems import within

F64 = torch.float64
TS = torch.linspace(0, 1, 9, dtype=F64)
START = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)


def f(t, z):
    return -z


def own(t, z):
    return (0.5 - z).sin()


def g(t, z):
    return 0.3 + 0.1 * z.cos()


def prior(batch=(), diffusion=g, drift=f):
    return sd.SDEPath(drift, diffusion, START.expand(batch), TS)


class TestAnotherDrift:
    def test_the_priors_own_drift_changes_nothing(self):
        p = prior()
        torch.manual_seed(0)
        z = p.rsample((5,))
        torch.manual_seed(0)
        q = p.guided(drift=f)
        assert torch.equal(q.rsample((5,)), z)
        torch.testing.assert_close(q.log_prob(z), p.log_prob(z))

    def test_it_is_the_path_of_that_drift(self):
        q, other = prior().guided(drift=own), prior(drift=own)
        torch.manual_seed(0)
        z = other.rsample((5,))
        torch.manual_seed(0)
        torch.testing.assert_close(q.rsample((5,)), z)
        torch.testing.assert_close(q.log_prob(z), other.log_prob(z))

    def test_it_is_a_control_in_noise_units(self):
        p = prior()
        q, c = p.guided(drift=own), p.guided(control=lambda t, z: (own(t, z) - f(t, z)) / g(t, z))
        torch.manual_seed(0)
        z = q.rsample((5,))
        torch.manual_seed(0)
        torch.testing.assert_close(c.rsample((5,)), z)
        torch.testing.assert_close(q.log_prob(z), c.log_prob(z))

    @pytest.mark.parametrize("diffusion", [g, torch.tensor([0.3, 0.4], dtype=F64)])
    def test_its_divergence(self, diffusion):
        """Along the path it is the mean of the log ratio, with less noise; a wrong drift has another."""
        p = prior((4000,), diffusion)
        q = p.guided(drift=own)
        torch.manual_seed(0)
        z = q.rsample()
        ratio, kl = q.log_prob(z) - p.log_prob(z), kl_divergence(q, p)
        assert within(ratio - kl, 0.0)
        assert kl.std() < ratio.std()
        wrong = p.guided(drift=lambda t, z: 2 * own(t, z))
        wrong._drawn = z
        assert not within(ratio - kl_divergence(wrong, p), 0.0)

    def test_evidence_is_unbiased(self):
        """No observations: every estimate of the evidence 1 has mean 1, with another drift too."""
        torch.manual_seed(0)
        q = prior((300,)).guided(drift=own)
        estimates = sd.particle_evidence(q, lambda z, k: torch.zeros(z.shape[:-1], dtype=F64), particles=10).exp()
        assert within(estimates, 1.0)

    def test_a_message_on_the_start(self):
        """One time: it twists the start and nothing else."""
        first = sd.Message(torch.tensor([[2.0, 0.0]], dtype=F64), torch.ones(1, 2, dtype=F64))
        torch.manual_seed(0)
        q = prior((4000,)).guided(first, drift=own)
        z = q.rsample()
        assert within(z[:, 0], torch.tensor([1.0, 0.0], dtype=F64))
        assert abs(z[:, 0].std(0) - 0.5**0.5).max() < 0.04
        moved = dist.Normal(torch.tensor([1.0, 0.0], dtype=F64), 0.5**0.5).to_event(1)
        other = sd.SDEPath(own, g, moved, TS)
        torch.testing.assert_close(q.log_prob(z), other.log_prob(z))

    def test_contexts_of_its_own(self):
        context = torch.randn(3, 9, 2, dtype=F64)

        def pushed(t, z, c):
            return -z + c

        q = prior((3,)).guided(drift=pushed, context=context)
        noise = lambda t, z, c: g(t, z)  # noqa: E731
        other = sd.SDEPath(pushed, noise, START.expand((3,)), TS, context=context)
        z = q.rsample()
        torch.testing.assert_close(q.log_prob(z), other.log_prob(z))


class TestGradient:
    def net(self, context=0):
        torch.manual_seed(0)
        return sd.NeuralField(2, hidden=(4,), context_dim=context).double()

    def test_the_entropy_term_leaves_out_the_guides_drift(self):
        net, theta = self.net(), torch.tensor(1.0, dtype=F64, requires_grad=True)
        q = prior(diffusion=lambda t, z: theta * g(t, z)).guided(drift=net)
        z = q.rsample().detach()
        entropy = q.score_parts(z)[2]
        torch.testing.assert_close(entropy, q.log_prob(z))
        entropy.backward()
        assert all(p.grad is None for p in net.parameters())
        assert theta.grad != 0

    def test_and_its_context_but_not_a_scored_one(self):
        context = torch.randn(9, 3, dtype=F64, requires_grad=True)
        for options, attached in (({}, False), ({"score_context": context}, True)):
            for kind in ("drift", "control"):
                q = prior().guided(**{kind: self.net(3)}, context=context, **options)
                z = q.rsample().detach()
                parts = q.score_parts(z)[2]
                if attached and kind == "control":
                    assert torch.autograd.grad(parts, context)[0].any()
                if not attached:
                    assert not parts.requires_grad

    def test_frozen_keeps_the_value(self):
        net = self.net(3)
        z, c = torch.randn(5, 2, dtype=F64), torch.randn(5, 3, dtype=F64)
        cold = frozen(net)
        torch.testing.assert_close(cold(torch.zeros(1), z, c), net(torch.zeros(1), z, c))
        assert not cold(torch.zeros(1), z, c).requires_grad
        assert not cold.prepared(c)[0].requires_grad
        assert net(torch.zeros(1), z, c).requires_grad
        assert frozen(own) is own


class TestRecall:
    """What drawing a path computed serves its density: the same number, the same gradient by parameters."""

    @pytest.mark.parametrize("kind", ["diagonal", "full", "drift", "none"])
    @pytest.mark.parametrize("noise", ["module", "constant"])
    def test_values_and_gradients(self, kind, noise):
        torch.manual_seed(0)
        drift, other = (sd.NeuralField(2, hidden=(4,)).double() for _ in range(2))
        diffusion = sd.ElementwiseField(2, 4).double() if noise == "module" else torch.full((2,), 0.3, dtype=F64)
        h = torch.randn(3, 9, 2, dtype=F64, requires_grad=True)
        J = 0.5 + torch.rand(3, 9, 2, dtype=F64)
        J = torch.diag_embed(J) + 0.1 if kind == "full" else J
        parameters = [*drift.parameters(), h, *(other.parameters() if kind == "drift" else [])]
        parameters += list(diffusion.parameters()) if noise == "module" else []

        def ratio(recall):
            p = sd.SDEPath(drift, diffusion, START.expand((3,)), TS)
            options = {"drift": {"drift": other}, "none": {}}.get(kind, {"message": sd.Message(h, J)})
            q = p.guided(**options)
            torch.manual_seed(1)
            z = q.rsample()
            if recall:
                q.recall()
                p.recall(q)
            value = (p.log_prob(z) - q.score_parts(z)[2]).sum()
            return value, torch.autograd.grad(value, parameters, allow_unused=True)

        (a, ga), (b, gb) = ratio(False), ratio(True)
        torch.testing.assert_close(a, b)
        for x, y in zip(ga, gb, strict=True):
            if x is None or y is None:
                assert (x is None or not x.any()) and (y is None or not y.any())
            else:
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)

    def test_fields_are_not_called_again(self):
        calls = []

        class Counting(sd.NeuralField):
            def forward(self, t, z, context=None):
                calls.append(z.dim())
                return super().forward(t, z, context)

        p = prior(drift=Counting(2, hidden=(4,)).double(), diffusion=torch.full((2,), 0.3, dtype=F64))
        q = p.guided(sd.Message(torch.zeros(9, 2, dtype=F64), torch.ones(9, 2, dtype=F64)))
        z = q.rsample()
        q.recall()
        calls.clear()
        q.score_parts(z)
        assert not calls
        q.score_parts(z + 0)
        assert calls

    def test_another_draw_or_another_field_is_computed(self):
        p = prior()
        q = p.guided(sd.Message(torch.ones(9, 2, dtype=F64), torch.ones(9, 2, dtype=F64)))
        z = q.rsample()
        expected = q.log_prob(2 * z), prior(drift=own).log_prob(z)
        q.recall()
        torch.testing.assert_close(q.log_prob(2 * z), expected[0])
        elsewhere = prior(drift=own)
        elsewhere.recall(q)
        torch.testing.assert_close(elsewhere.log_prob(z), expected[1])


class TestRefused:
    def test_drift_beside_a_control(self):
        with pytest.raises(sd.GuideError, match="Give one"):
            prior().guided(control=own, drift=own)

    def test_drift_where_no_noise_reaches(self):
        noise = sd.MatrixDiffusion(torch.tensor([[0.0], [0.5]], dtype=F64))
        with pytest.raises(sd.GuideError, match="1 noises for 2 states"):
            prior(diffusion=noise).guided(drift=own)

    def test_a_context_for_nothing(self):
        with pytest.raises(sd.GuideError, match="neither is given"):
            prior().guided(context=torch.zeros(2, dtype=F64))

    def test_a_drift_of_another_size(self):
        with pytest.raises(sd.FieldError, match=r"guide's drift returned \(3,\), expected \(..., state=2\)"):
            prior().guided(drift=lambda t, z: z.new_zeros(3))
