"""Guided paths: their density, the exact gap of a guide without a covariance of its own, and the gradient."""

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import stochdyn as sd
from tests import problems
from tests.problems import within

F64 = torch.float64
THETA, MU, SIGMA, NOISE = (problems.OU[k] for k in ("theta", "mu", "sigma", "noise"))


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def ou(dt=None, substeps=None, sigma=SIGMA, times=problems.OU_TIMES, start=None):
    grid = sd.TimeGrid(times, substeps, dt=dt, start=start)
    sigma = torch.as_tensor(sigma, dtype=F64)
    initial = dist.Normal(tensor(MU), SIGMA / math.sqrt(2 * THETA)).to_event(1)
    return grid, sd.SDEPath(lambda t, z: THETA * (MU - z), sigma[..., None], initial, grid.ts)


def observe(grid, values=problems.OU_VALUES, noise=NOISE):
    seen = torch.ones_like(values, dtype=torch.bool)
    return sd.Message.observed(
        grid, values, seen, noise
    ), lambda z: dist.Normal(grid.observed(z), noise).log_prob(values).sum((-2, -1))


class TestDensity:
    @pytest.mark.parametrize("noise", ["diagonal", "one scale", "matrix", "wide", "state"])
    @pytest.mark.parametrize("kind", ["diagonal", "full", "low rank", "control", "both"])
    def test_against_explicit_steps(self, noise, kind):
        ts = tensor(0.0, 0.1, 0.35, 0.4)
        M = torch.tensor([[0.5, 0.1, 0.0], [0.2, 0.6, 0.3]], dtype=F64)

        def drift(t, z):
            return torch.sin(z) * (1 + t)

        def control(t, z):
            return torch.cos(2 * z) + t

        given, factor = {
            "diagonal": (tensor(0.3, 0.6), lambda z: torch.diag(tensor(0.3, 0.6))),
            "one scale": (tensor(0.3), lambda z: 0.3 * torch.eye(2, dtype=F64)),
            "matrix": (sd.MatrixDiffusion(M[:, :2]), lambda z: M[:, :2]),
            "wide": (sd.MatrixDiffusion(M), lambda z: torch.linalg.cholesky(M @ M.mT)),
            "state": (lambda t, z: 0.2 + z.square(), lambda z: torch.diag(0.2 + z.square())),
        }[noise]
        generator = torch.manual_seed(0)
        h = torch.randn(4, 2, dtype=F64, generator=generator)
        d = torch.rand(4, 2, dtype=F64, generator=generator)
        L = torch.randn(4, 2, 1, dtype=F64, generator=generator)
        message = {
            "diagonal": sd.Message(h, d),
            "low rank": sd.Message.low_rank(h, d, L),
            "control": None,
        }.get(kind, sd.Message(h, torch.diag_embed(d) + L @ L.mT))
        J = torch.zeros(4, 2, 2, dtype=F64) if message is None else message.full()
        h = h if message else torch.zeros_like(h)
        path = sd.SDEPath(drift, given, tensor(0.3, -0.2), ts)
        q = path.guided(message, control if kind in ("control", "both") else None)
        z = q.rsample()
        total = 0.0
        for k, dt in enumerate(ts.diff()):
            G, a = factor(z[k]) * dt.sqrt(), z[k] + drift(ts[k], z[k]) * dt
            S = torch.linalg.inv(torch.eye(2, dtype=F64) + G.mT @ J[k + 1] @ G)
            m = S @ G.mT @ (h[k + 1] - J[k + 1] @ a)
            if kind in ("control", "both"):
                m = m + dt.sqrt() * control(ts[k], z[k])
            step = dist.MultivariateNormal(a + G @ m, covariance_matrix=G @ S @ G.mT)
            total += step.log_prob(z[k + 1])
        assert abs(q.log_prob(z) - total) < 1e-10
        assert abs(path.log_prob(z) - total) > 1e-2

    @pytest.mark.parametrize("kind", ["message", "control", "both", "state"])
    @pytest.mark.parametrize("start", ["normal", "lognormal", "gamma"])
    def test_weights_average_to_one(self, kind, start):
        ts = tensor(0.0, 0.1, 0.35)
        initial = {
            "normal": dist.Normal(tensor(0.3), 0.5),
            "lognormal": dist.LogNormal(tensor(0.1), 0.5),
            "gamma": dist.Gamma(tensor(3.0), tensor(2.5)),
        }[start].to_event(1)
        noise = (lambda t, z: 0.3 + 0.1 * z.sin()) if kind == "state" else tensor(0.4)
        message = (
            None
            if kind == "control"
            else sd.Message.at(tensor(0.7)[None].expand(3, 1), torch.ones(3, 1).double())
        )
        control = (lambda t, z: 0.3 * z.cos()) if kind in ("control", "both") else None
        path = sd.SDEPath(lambda t, z: -z.sin(), noise, initial, ts)
        q = path.guided(message, control)
        torch.manual_seed(0)
        with torch.no_grad():
            z = q.rsample((20000,))
            w = (path.log_prob(z) - q.log_prob(z)).exp()
            shifted = (path.log_prob(z) - path.guided(message, lambda t, z: 0.5 + 0 * z).log_prob(z)).exp()
        assert within(w, 1.0)
        assert not within(shifted, 1.0)

    def test_a_zero_message_changes_nothing(self):
        path = ou(substeps=3)[1]
        n = path.event_shape[0]
        q = path.guided((torch.zeros(n, 1, dtype=F64), torch.zeros(n, 1, dtype=F64)))
        torch.manual_seed(0)
        z = path.rsample()
        torch.manual_seed(0)
        assert torch.equal(q.rsample(), z)
        assert abs(q.log_prob(z) - path.log_prob(z)) < 1e-12

    def test_constant_and_state_dependent_steps_agree(self):
        """Constant noise takes a faster route; a callable of the same value must give the same path."""
        grid, path = ou(substeps=2)
        slow = sd.SDEPath(path.chain.drift, lambda t, z: SIGMA + 0 * z, path.chain.start.prior, grid.ts)
        message, _ = observe(grid)
        eps = torch.randn(grid.ts.shape[-1], 5, 1, dtype=F64, generator=torch.manual_seed(0))
        message = sd.Message(message.information.expand(5, -1, -1), message.precision)
        paths = [p.guided(message).transport(eps) for p in (path, slow)]
        assert (paths[0] - paths[1]).abs().max() < 1e-12


class TestWithoutItsOwnCovariance:
    """A guide that shares the prior's noise cannot reach the evidence; its best gap is known exactly."""

    @torch.no_grad()
    def gap(self, dt, noise=NOISE, eps=1.0):
        grid, path = ou(dt=dt, start=0.0)
        potential, log_likelihood = observe(grid, noise=noise)
        exact = sd.information_filter(path, potential)
        J, h = exact.precision[..., 0], exact.information
        steps = grid.ts.diff()

        def control(t, z):
            k = torch.searchsorted(grid.ts, t.flatten()).reshape(t.shape)
            a, dt = z + THETA * (MU - z) * steps[k], steps[k]
            G = SIGMA * dt.sqrt()
            return G * (h[:, 0][k + 1] - J[:, 0][k + 1] * a) / (1 + G**2 * J[:, 0][k + 1]) / dt.sqrt()

        first = sd.Message(h * (torch.arange(len(h)) == 0)[:, None], J * (torch.arange(len(h)) == 0)[:, None])
        guided = path.guided(first, control)
        rho = 1 + SIGMA**2 * steps * J[1:, 0]
        best = 0.5 * (rho - 1 - rho.log()).sum()
        model = problems.ou_discretised(steps, **{**problems.OU, "noise": noise})
        answer = problems.kalman_log_evidence(
            model, dict(zip(grid.index.tolist(), problems.OU_VALUES, strict=True))
        )
        # log q / posterior is linear in the squares of the noise, whose mean is 1: noise 1 gives the expectation.
        z = guided.transport(eps * torch.ones(len(h), 1, dtype=F64))
        return (
            float(answer - (path.log_prob(z) + log_likelihood(z) - guided.log_prob(z))),
            float(best),
            guided,
        )

    @pytest.mark.parametrize(
        ("dt", "noise", "nats"),
        [(0.05, 0.2, 1.3975), (0.0125, 0.2, 0.296), (0.003125, 0.2, 0.070), (0.05, 0.05, 42.3)],
    )
    def test_gap(self, dt, noise, nats):
        gap, best, _ = self.gap(dt, noise)
        assert gap == pytest.approx(best, abs=1e-9)
        assert gap == pytest.approx(nats, abs=1e-3 if noise == 0.2 else 0.1)
        assert gap == pytest.approx(self.gap(dt, noise, eps=-1.0)[0], abs=1e-9)

    def test_gap_by_monte_carlo(self):
        grid, path = ou(dt=0.05, start=0.0)
        _, log_likelihood = observe(grid)
        _, best, guided = self.gap(0.05)
        model = problems.ou_discretised(grid.ts.diff(), **problems.OU)
        answer = problems.kalman_log_evidence(
            model, dict(zip(grid.index.tolist(), problems.OU_VALUES, strict=True))
        )
        torch.manual_seed(0)
        with torch.no_grad():
            z = guided.rsample((4000,))
            log_w = path.log_prob(z) + log_likelihood(z) - guided.log_prob(z)
        assert within(log_w, answer - best)
        assert not within(log_w, answer)


class TestGradient:
    def test_message_gradient_vanishes_at_the_exact_guide(self):
        grid, path = ou(substeps=5)
        potential, log_likelihood = observe(grid)
        exact = sd.information_filter(path, potential)
        h, J = (x.detach().requires_grad_() for x in (exact.information, exact.precision))
        guided = path.guided(sd.Message(h, J))
        torch.manual_seed(0)
        z = guided.rsample((8,))
        target = path.log_prob(z) + log_likelihood(z)
        stick = torch.autograd.grad(
            (target - guided.score_parts(z).entropy_term).sum(), (h, J), retain_graph=True
        )
        assert max(g.abs().max() for g in stick) < 1e-10
        plain = torch.autograd.grad((target - guided.log_prob(z)).sum(), (h, J))
        assert max(g.abs().max() for g in plain) > 1e-2

    def test_control_module_is_detached_in_the_entropy_term(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(1, 1, dtype=F64)

            def forward(self, t, z):
                return self.layer(z)

        net = Net()
        path = ou(substeps=2)[1]
        z = path.rsample().detach()
        guided = path.guided(control=net)
        assert not guided.score_parts(z).entropy_term.requires_grad
        assert guided.log_prob(z).requires_grad
        attached = path.guided(control=lambda t, z: net(t, z))
        assert attached.score_parts(z).entropy_term.requires_grad

    def gradient_spread(self, substeps, detached):
        """Sd of d ELBO / d log sigma over single draws at the exact guide."""
        times = torch.linspace(0, 3, 13, dtype=F64)
        y = (0.5 + 0.4 * torch.sin(3 * times))[:, None]
        draws = 400
        log_sigma = torch.full((draws,), math.log(SIGMA), dtype=F64, requires_grad=True)
        grid, plain = ou(substeps=substeps, times=times)
        potential, log_likelihood = observe(grid, y)
        with torch.no_grad():
            message = sd.information_filter(plain, potential)
        _, path = ou(substeps=substeps, times=times, sigma=log_sigma.exp())
        torch.manual_seed(0)
        guided = path.guided(message)
        z = guided.rsample()
        if detached:
            _, fixed = ou(substeps=substeps, times=times, sigma=log_sigma.exp().detach())
            entropy = fixed.guided(message).log_prob(z)
        else:
            entropy = guided.score_parts(z).entropy_term
        (gradient,) = torch.autograd.grad((path.log_prob(z) + log_likelihood(z) - entropy).sum(), log_sigma)
        return float(gradient.std())

    def test_noise_of_a_diffusion_parameter_does_not_grow_with_the_number_of_steps(self):
        flat = [self.gradient_spread(n, detached=False) for n in (5, 20, 80)]
        assert flat[2] < 1.5 * flat[0]
        assert flat[2] < 5.0
        growing = [self.gradient_spread(n, detached=True) for n in (5, 20, 80)]
        for before, after in pairwise(growing):
            assert 1.6 < after / before < 2.4
        assert growing[2] > 8 * flat[2]

    @pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
    def test_pyro_uses_it(self, elbo):
        """At the exact guide Trace_ELBO's gradient is zero; the KL form's is not, but its value is right."""
        grid, path = ou(substeps=2)
        potential, _ = observe(grid)
        exact = sd.information_filter(path, potential)
        h, J = (x.detach().requires_grad_() for x in (exact.information, exact.precision))

        def model():
            z = pyro.sample("z", path)
            pyro.sample("y", dist.Normal(grid.observed(z), NOISE).to_event(2), obs=problems.OU_VALUES)

        def guide():
            pyro.sample("z", path.guided(sd.Message(h, J)))

        torch.manual_seed(0)
        loss = elbo().differentiable_loss(model, guide)
        gradient = torch.autograd.grad(loss, h)[0].abs().max()
        assert (gradient < 1e-10) == (elbo is Trace_ELBO)


def train(diagonal, steps=1200, particles=16, speed=6.0, noise=0.2):
    """Messages of a rotating OU process learned from nothing; the ELBO lost, with its standard error."""
    torch.manual_seed(0)
    A, H = problems.rotation(0.5, speed), tensor(1.0, 0.0)[None]
    times, y = tensor(0.0, 0.4, 0.8, 1.2), tensor(0.5, -0.7, 0.2, 0.6)[:, None]
    grid = sd.TimeGrid(times, dt=0.1)
    start = dist.Normal(torch.zeros(2, dtype=F64), 0.7).to_event(1)
    path = sd.SDEPath(lambda t, z: z @ A.mT, tensor(0.7), start, grid.ts)
    model = problems.euler_linear(
        A, torch.zeros(2, dtype=F64), 0.7 * torch.eye(2, dtype=F64), grid.ts.diff(), m=torch.zeros(2, dtype=F64),
        P=0.49 * torch.eye(2, dtype=F64), H=H, R=tensor(noise**2)[None],
    )  # fmt: skip
    answer = problems.kalman_log_evidence(model, dict(zip(grid.index.tolist(), y, strict=True)))
    n = grid.ts.shape[-1]
    loc = torch.zeros(n, 2, dtype=F64, requires_grad=True)
    log_d = torch.zeros(n, 2, dtype=F64, requires_grad=True)
    corner = torch.zeros(n, dtype=F64, requires_grad=True)

    def message():
        root = torch.diag_embed(log_d.exp()) + torch.nn.functional.pad(corner[:, None, None], (0, 1, 1, 0))
        return sd.Message.at(loc, log_d.exp().square() if diagonal else root @ root.mT)

    def log_weight(z, log_q):
        return (
            path.log_prob(z) + dist.Normal(grid.observed(z) @ H.mT, noise).log_prob(y).sum((-2, -1)) - log_q
        )

    optimiser = torch.optim.Adam([loc, log_d, corner], lr=0.05)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 0.01 ** max(0.0, 1.5 * k / steps - 0.5))
    for _ in range(steps):
        guided = path.guided(message())
        z = guided.rsample((particles,))
        loss = -log_weight(z, guided.score_parts(z).entropy_term).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    with torch.no_grad():
        guided = path.guided(message())
        z = guided.rsample((20000,))
        log_w = log_weight(z, guided.log_prob(z))
    return float(answer - log_w.mean()), float(log_w.std() / math.sqrt(20000))


@pytest.mark.slow
def test_diagonal_messages_lose_where_components_rotate_and_full_ones_do_not():
    lost, se = train(diagonal=True)
    assert lost > 0.3 + 4 * se
    lost, se = train(diagonal=False)
    assert abs(lost) < 0.01


class TestRefusals:
    def setup_method(self):
        self.path = sd.SDEPath(
            lambda t, z: -z, tensor(0.5, 0.5), tensor(0.0, 0.0), torch.linspace(0, 1, 4).double()
        )

    def test_messages(self):
        ones = torch.ones(3, 2, dtype=F64)
        with pytest.raises(sd.GuideError, match=r"ends in \(3, 2\), the path needs \(time=4, state=2\)"):
            self.path.guided((ones, ones))
        ones = torch.ones(4, 2)
        with pytest.raises(sd.GuideError, match=r"message is torch.float32, the path torch.float64"):
            self.path.guided((ones, ones))
        with pytest.raises(sd.ShapeError, match=r"precision must have shape"):
            self.path.guided((ones.double(), torch.ones(4, 3, 3, dtype=F64)))
        with pytest.raises(sd.GuideError, match=r"must be a Message or a tuple"):
            self.path.guided(ones.double())
        wide = self.path.expand([3])
        ones = torch.ones(2, 4, 2, dtype=F64)
        with pytest.raises(sd.ShapeError, match=r"path \(3,\), message \(2,\)"):
            wide.guided((ones, ones))
        with pytest.raises(sd.GuideError, match=r"stands in for `message`"):
            self.path.guided(score_message=sd.Message(ones, ones))

    def test_controls(self):
        with pytest.raises(sd.ShapeError, match=r"control returned \(3,\), expected \(..., noise=2\)"):
            self.path.guided(control=lambda t, z: z.new_zeros(3))
        with pytest.raises(sd.FieldError, match=r"control must be callable"):
            self.path.guided(control=torch.ones(2))
        with pytest.raises(sd.FieldError, match=r"control failed on t of shape"):
            self.path.guided(control=lambda t, z: z @ torch.ones(5, dtype=F64))
        with pytest.raises(sd.DtypeError, match=r"control returned torch.float32"):
            self.path.guided(control=lambda t, z: z.float())

        def unwritten(t, z):
            raise NotImplementedError("later")

        with pytest.raises(sd.FieldError, match=r"control raised NotImplementedError: later"):
            self.path.guided(control=unwritten)

    def test_a_precision_that_is_not_positive(self):
        J = -1e3 * torch.eye(2, dtype=F64).expand(4, 2, 2)
        with pytest.raises(sd.DivergedError, match=r"not positive definite"):
            self.path.guided(sd.Message(torch.zeros(4, 2, dtype=F64), J)).rsample()
        with pytest.raises(sd.DivergedError, match=r"series 0, time 0.333333"):
            self.path.guided(sd.Message(torch.zeros(4, 2, dtype=F64), J.diagonal(dim1=-2, dim2=-1))).rsample()
