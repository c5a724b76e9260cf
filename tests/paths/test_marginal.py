"""Paths by their marginals: the identities that make them one, their divergence, and what is refused."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.paths.marginal import Knots, MarginalPath
from tests.problems import ou_path_kl, within

F64 = torch.float64
T = torch.tensor([0.0, 0.4, 1.0], dtype=F64)


def knots(batch=(), n=2, seed=0, times=T):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*batch, *shape, generator=generator, dtype=F64)

    k = times.shape[-1]
    L = 0.2 * draw(k, n, n).tril(-1) + torch.diag_embed(0.3 + draw(k, n).abs())
    M = draw(k - 1, n, n)
    K = torch.linalg.solve_triangular(
        torch.linalg.cholesky(M @ M.mT + torch.eye(n, dtype=F64)), M, upper=False
    )
    return Knots(times, draw(k, n), L, draw(k - 1, 2, n), K)


def prior(drift=lambda t, z: -z, diffusion=None, n=2, ts=T):
    diffusion = torch.full((n,), 0.5, dtype=F64) if diffusion is None else diffusion
    start = dist.Normal(torch.zeros(n, dtype=F64), 1.0).to_event(1)
    return sd.SDEPath(drift, diffusion, start, ts)


def marginal(path=None, parameters=None):
    parameters = parameters or knots()
    return MarginalPath(path or prior(), parameters, torch.arange(parameters.times.shape[-1]))


def fraction(bridge, w):
    return torch.full_like(bridge.length, w)


class TestMoments:
    def test_they_meet_the_knots(self):
        q = marginal()
        bridge = q.bridge()
        for w, k in ((0.0, slice(0, -1)), (1.0, slice(1, None))):
            m, S = bridge.mean(fraction(bridge, w))[0], bridge.covariance(fraction(bridge, w))
            L = q.knots.scale_tril
            torch.testing.assert_close(m, q.knots.loc[k])
            torch.testing.assert_close(S, (L @ L.mT)[k])

    def test_slopes_are_those_at_the_ends_of_every_gap(self):
        q = marginal()
        bridge = q.bridge()
        for end, w in enumerate((0.0, 1.0)):
            torch.testing.assert_close(bridge.mean(fraction(bridge, w))[1], q.knots.slopes[:, end])

    @pytest.mark.parametrize("w", [0.2, 0.5, 0.9])
    def test_the_drift_makes_the_covariance(self, w):
        """S' = A S + S A' + gg' along the flow, by differences."""
        bridge = marginal().bridge()
        step = 1e-6
        ahead, behind = (bridge.covariance(fraction(bridge, w + s)) for s in (step, -step))
        slope = (ahead - behind) / (2 * step * bridge.length[..., None])
        pull = bridge.pull(fraction(bridge, w))
        torch.testing.assert_close(slope, pull + pull.mT + bridge.reference, rtol=1e-6, atol=1e-6)

    def test_the_mean_moves_with_its_velocity(self):
        bridge, step = marginal().bridge(), 1e-6
        ahead, behind = (bridge.mean(fraction(bridge, 0.3 + s))[0] for s in (step, -step))
        slope = (ahead - behind) / (2 * step * bridge.length)
        torch.testing.assert_close(slope, bridge.mean(fraction(bridge, 0.3))[1], rtol=1e-6, atol=1e-6)

    def test_covariances_are_positive_definite(self):
        bridge = marginal(parameters=knots((50,), seed=3)).bridge()
        for w in (0.001, 0.3, 0.999):
            assert (torch.linalg.eigvalsh(bridge.covariance(fraction(bridge, w))) > 0).all()


def simulated(q, steps=2000, draws=4000, divergence=True):
    """dz = h dt + g dW over the first gap by small Euler steps; states at its middle."""
    q = q.expand((1,))
    bridge = q.bridge().at(torch.zeros(1, 1, dtype=torch.long))
    start = q.knots.loc[0] + (torch.randn(draws, q.chain.state_dim, dtype=F64) @ q.knots.scale_tril[0].mT)
    z, D = start[None], float(bridge.length.flatten()[0])
    h = D / 2 / steps
    for k in range(steps):
        w = torch.full((1, 1), (k + 0.5) / (2 * steps), dtype=F64)
        drift = q.drift_at(bridge, w, z)
        if not divergence:
            with torch.no_grad():
                drift = drift - 0.5 * q._noise_and_divergence(bridge.time(w), z)[1]
        noise = q._noise(bridge.time(w), z)
        z = (z + drift * h + noise.apply(torch.randn_like(z)) * math.sqrt(h)).detach()
    return z[0], bridge


def moments_agree(z, bridge):
    w = torch.full((1, 1), 0.5, dtype=F64)
    m, S = bridge.mean(w)[0][0, 0], bridge.covariance(w)[0, 0]
    r = z - m
    products = (r[:, :, None] * r[:, None, :]).flatten(1)
    return within(z, m) and within(products, S.flatten())


class TestLaw:
    """The SDE with the drift h has the marginals, whatever the diffusion."""

    def test_constant_noise(self):
        torch.manual_seed(0)
        with torch.no_grad():
            assert moments_agree(*simulated(marginal(), steps=150))

    def test_noise_that_depends_on_the_state(self):
        torch.manual_seed(0)
        path = prior(diffusion=lambda t, z: 0.6 + 0.3 * torch.sin(2 * z))
        assert moments_agree(*simulated(marginal(path), steps=150))
        assert not moments_agree(*simulated(marginal(path), steps=150, divergence=False))

    def test_matrix_noise(self):
        torch.manual_seed(0)

        def g(t, z):
            a = 1.0 + 0.6 * torch.tanh(z[..., 0] + z[..., 1] + 1.3)
            return torch.stack([torch.stack([a, 0.1 * z[..., 1].cos()], -1), torch.stack([0 * a, a], -1)], -2)

        path = prior(diffusion=sd.MatrixDiffusion(g))
        assert moments_agree(*simulated(marginal(path), steps=100, draws=5000))
        assert not moments_agree(*simulated(marginal(path), steps=100, draws=5000, divergence=False))


class TestDivergence:
    def test_against_girsanov(self):
        """A posterior that is an OU process of another rate: its marginals, as well as cubics and bridges can hold them."""
        a, c, s, x0, end = 1.0, 2.0, 0.5, 1.0, 2.0
        times = torch.linspace(0, end, 41, dtype=F64)
        decay = torch.exp(-a * times)
        variance = s**2 / (2 * a) * (1 - decay.square())
        h = float(times[1])
        K = torch.sqrt(variance[:-1] / variance[1:].clamp(min=1e-300)) * math.exp(-a * h)
        slopes = (-a * x0 * decay)[:, None]
        parameters = Knots(
            times, (x0 * decay)[:, None], variance.sqrt()[:, None, None],
            torch.stack([slopes[:-1], slopes[1:]], -2), K[:, None, None],
        )  # fmt: skip
        path = sd.SDEPath(
            lambda t, z: -c * z, torch.tensor([s], dtype=F64), torch.tensor([x0], dtype=F64), times
        )
        q = MarginalPath(path.expand((4000,)), parameters, torch.arange(41))
        torch.manual_seed(0)
        kl = q.path_kl()
        exact = ou_path_kl(a, c, s, end, x0)
        assert within(kl, exact, errors=4.5)
        assert not within(kl, 1.05 * exact)
        assert abs(kl.mean() - exact) < 0.01 * exact

    def test_more_times_have_less_noise(self):
        torch.manual_seed(0)
        q = marginal(prior().expand((2000,)))
        one, four = q.path_kl(1), q.path_kl(4)
        assert four.std() < 0.7 * one.std()
        assert within((one - one.mean()) + one.mean() - four.mean(), 0.0)

    def test_gaps_of_no_length_count_nothing(self):
        p = knots(times=torch.tensor([0.0, 0.4, 1.0, 1.0, 1.0], dtype=F64))
        short = Knots(p.times[:3], p.loc[:3], p.scale_tril[:3], p.slopes[:2], p.coupling[:2])
        torch.manual_seed(0)
        long, whole = (
            MarginalPath(prior().expand((4000,)), x, torch.arange(3)).path_kl() for x in (p, short)
        )
        assert within(long - whole.mean(), 0.0, errors=5)
        loc = p.loc.clone().requires_grad_()
        parameters = Knots(p.times, loc, p.scale_tril, p.slopes, p.coupling)
        MarginalPath(prior(), parameters, torch.arange(3)).path_kl().backward()
        assert torch.isfinite(loc.grad).all()
        assert not loc.grad[3:].any()

    def test_a_known_start_has_no_divergence(self):
        path = sd.SDEPath(lambda t, z: -z, torch.full((2,), 0.5, dtype=F64), torch.ones(2, dtype=F64), T)
        q = marginal(path)
        torch.testing.assert_close(q.bridge().mean(fraction(q.bridge(), 0.0))[0][0], torch.ones(2, dtype=F64))
        assert torch.isfinite(q.path_kl(50))
        assert (q.rsample()[0] == 1).all()

    def test_a_context_by_time(self):
        seen = []

        def drift(t, z, context):
            seen.append((t.detach().clone(), context.detach().clone()))
            return -z + context

        grid = torch.linspace(0, 1, 6, dtype=F64)
        context = torch.arange(6, dtype=F64)[:, None].expand(3, 6, 1)
        start = dist.Normal(torch.zeros(3, 2, dtype=F64), 1.0).to_event(1)
        path = sd.SDEPath(drift, torch.full((2,), 0.5, dtype=F64), start, grid, context=context)
        seen.clear()
        marginal(path, knots((3,))).path_kl()
        t, c = seen[-1]
        assert torch.equal(c, torch.floor(t * 5 + 1e-9).clamp(max=5).expand(c.shape))


class TestOnTheGrid:
    def test_messages_make_these_marginals(self):
        """A fine grid: the guided path has the mean and the covariance of the marginals at the knots."""
        ts = torch.linspace(0, 1, 401, dtype=F64)
        times = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
        L = torch.tensor([0.5, 0.2, 0.3], dtype=F64)[:, None, None]
        loc = torch.tensor([0.3, 1.0, -0.5], dtype=F64)[:, None]
        parameters = Knots(
            times, loc, L, torch.zeros(2, 2, 1, dtype=F64), torch.full((2, 1, 1), 0.2, dtype=F64)
        )
        q = MarginalPath(prior(n=1, ts=ts), parameters, torch.arange(3))
        torch.manual_seed(0)
        z = q.guided().sample((4000,))[:, [0, 200, 400]]
        assert ((z.mean(0) - loc).abs() < 0.05).all()
        assert ((z.std(0) - L[:, 0]).abs() < 0.04).all()

    def test_nothing_after_the_last_knot(self):
        ts = torch.linspace(0, 2, 21, dtype=F64)
        message = marginal(prior(ts=ts)).guided().message
        assert not message.precision[11:].any()
        assert not message.information[11:].any()
        assert message.information[10].any()


class TestRefused:
    def test_density(self):
        q = marginal()
        with pytest.raises(sd.GuideError, match=r"objective=sd.PathELBO\(\)"):
            q.log_prob(q.rsample())

    def test_noise_on_the_velocity_only(self):
        noise = sd.MatrixDiffusion(torch.tensor([[0.0], [0.5]], dtype=F64))
        with pytest.raises(sd.DiffusionError, match="1 noises for 2 states"):
            marginal(prior(diffusion=noise))

    def test_a_start_that_is_not_normal(self):
        start = dist.LogNormal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
        with pytest.raises(sd.GuideError, match="the start is Independent"):
            marginal(sd.SDEPath(lambda t, z: -z, torch.full((2,), 0.5, dtype=F64), start, T))


def test_float32_and_expand():
    p = knots()
    half = Knots(T, *(x.float() for x in (p.loc, p.scale_tril, p.slopes, p.coupling)))
    start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    q = MarginalPath(
        sd.SDEPath(lambda t, z: -z, torch.full((2,), 0.5), start, T), half, torch.arange(3)
    ).expand((4,))
    assert q.rsample().shape == (4, 3, 2)
    assert q.path_kl(3).dtype == torch.float32
    assert q.rsample((5,)).shape == (5, 4, 3, 2)


def rate_by_quadrature(q, A, shift=0.0, nodes=48):
    """The divergence from dz = (A z + shift) dt + g dW, its integral over time by Gauss-Legendre, no draws."""
    x, weights = (torch.as_tensor(v, dtype=F64) for v in np.polynomial.legendre.leggauss(nodes))
    bridge, total = q.bridge(), q._kl_start()
    for w, weight in zip((x + 1) / 2, weights / 2, strict=True):
        w = torch.full_like(bridge.length, float(w))
        (m, velocity), S = bridge.mean(w), bridge.covariance(w)
        g = q._noise(bridge.time(w), m).factor()
        slope = torch.linalg.solve(g, A - torch.linalg.solve(S, bridge.pull(w).mT).mT)
        gap = torch.linalg.solve(g, (m @ A.mT + shift - velocity)[..., None])[..., 0]
        rate = 0.5 * (gap.square().sum(-1) + (slope @ S @ slope.mT).diagonal(dim1=-2, dim2=-1).sum(-1))
        total = total + weight * (bridge.length[..., 0] * rate).sum(0)
    return total


class TestEstimate:
    """Of the divergence, against quadrature, for every way in which noise can be written."""

    A = torch.tensor([[-0.5, 1.0], [-1.0, -0.5]], dtype=F64)
    G = torch.tensor([[0.6, 0.2], [0.0, 0.5]], dtype=F64)

    def path(self, diffusion):
        return prior(lambda t, z: z @ self.A.mT, diffusion)

    @pytest.mark.parametrize("times", [1, 4])
    def test_noise_that_does_not_depend_on_the_state(self, times):
        scale = torch.tensor([0.6, 0.5], dtype=F64)
        for diffusion in (scale, lambda t, z: scale.expand(z.shape), sd.MatrixDiffusion(self.G)):
            torch.manual_seed(0)
            path = self.path(diffusion)
            exact = rate_by_quadrature(marginal(path), self.A)
            kl = marginal(path.expand((4000,))).path_kl(times)
            assert within(kl, exact)
            assert not within(kl, 1.1 * exact)

    def test_noise_that_seems_to_depend_on_the_state(self):
        """The general branch has the same mean."""
        scale = torch.tensor([0.6, 0.5], dtype=F64)
        exact = rate_by_quadrature(marginal(self.path(scale)), self.A)
        torch.manual_seed(0)
        kl = marginal(self.path(lambda t, z: scale + 0 * z).expand((4000,))).path_kl(4)
        assert within(kl, exact)

    def test_pairs_and_the_closed_form_have_less_noise_than_single_states(self):
        scale = torch.tensor([0.6, 0.5], dtype=F64)
        torch.manual_seed(0)
        pairs = marginal(self.path(scale).expand((2000,))).path_kl(4)
        single = marginal(self.path(lambda t, z: scale + 0 * z).expand((2000,))).path_kl(8)
        assert pairs.std() < 0.6 * single.std()
