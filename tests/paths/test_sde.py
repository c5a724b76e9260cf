"""The path as a distribution: its law, its density, its messages and its KL, against exact answers."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import stochdyn as sd
from tests import problems
from tests.problems import within

F64 = torch.float64
THETA, MU, SIGMA, NOISE = (problems.OU[k] for k in ("theta", "mu", "sigma", "noise"))


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def seen(values):
    return torch.ones_like(values, dtype=torch.bool)


def ou_path(ts, solver=sd.EulerMaruyama(), start=None, sigma=SIGMA):  # noqa: B008
    if start is None:
        start = dist.Normal(tensor(MU), sigma / math.sqrt(2 * THETA)).to_event(1)
    return sd.SDEPath(lambda t, z: THETA * (MU - z), tensor(sigma), start, ts, solver=solver)


def log_weights(path, guided, log_likelihood, draws=200):
    z = guided.rsample((draws,))
    return path.log_prob(z) + log_likelihood(z) - guided.log_prob(z)


def gaussian_likelihood(grid, values, mask, noise, matrix=None):
    def log_likelihood(z):
        y = grid.observed(z) if matrix is None else grid.observed(z) @ matrix.mT
        log_prob = dist.Normal(y, noise).log_prob(values)
        return torch.where(mask, log_prob, 0.0).sum((-2, -1))

    return log_likelihood


def exact(path, grid, values, mask, noise, matrix=None):
    """Mean and variance of the log weight under the guided path of exact messages."""
    message = sd.information_filter(path, sd.Message.observed(grid, values, mask, noise, matrix))
    with torch.no_grad():
        log_w = log_weights(
            path, path.guided(message), gaussian_likelihood(grid, values, mask, noise, matrix)
        )
    return log_w.mean(0), log_w.var(0)


class TestEvidence:
    """ELBO == evidence of the discretised model, with zero variance, wherever the model is linear-Gaussian."""

    def test_ou(self):
        grid = sd.TimeGrid(problems.OU_TIMES, substeps=5)
        model = problems.ou_discretised(grid.ts.diff(), **problems.OU)
        answer = problems.kalman_log_evidence(
            model, dict(zip(range(0, 36, 5), problems.OU_VALUES, strict=True))
        )
        torch.manual_seed(0)
        elbo, variance = exact(ou_path(grid.ts), grid, problems.OU_VALUES, seen(problems.OU_VALUES), NOISE)
        assert abs(elbo - answer) < 1e-10
        assert variance < 1e-20
        wrong = sd.Message.observed(grid, problems.OU_VALUES, seen(problems.OU_VALUES), NOISE)
        path = ou_path(grid.ts)
        log_w = log_weights(
            path,
            path.guided(wrong),
            gaussian_likelihood(grid, problems.OU_VALUES, seen(problems.OU_VALUES), NOISE),
        )
        assert log_w.var() > 1e-2
        assert log_w.mean() < answer - 0.1

    @pytest.mark.parametrize(("known", "error"), [(True, 0.1153), (False, -0.0360)])
    def test_the_discretised_evidence_converges_to_the_exact_one(self, known, error):
        answer = problems.OU_KNOWN_START_LOG_EVIDENCE if known else problems.OU_LOG_EVIDENCE
        errors = []
        for dt in (0.05, 0.025, 0.0125):
            grid = sd.TimeGrid(problems.OU_TIMES, dt=dt, start=0.0 if known else None)
            path = ou_path(grid.ts, start=tensor(0.0) if known else None)
            elbo, _ = exact(path, grid, problems.OU_VALUES, seen(problems.OU_VALUES), NOISE)
            errors.append(float(elbo - answer))
        assert errors[0] == pytest.approx(error, abs=1e-4)
        assert 0.9 < math.log2(errors[0] / errors[1]) < 1.1
        assert 0.95 < math.log2(errors[1] / errors[2]) < 1.05

    def test_known_start_missing_and_masked(self):
        path = ou_path(sd.TimeGrid(problems.OU_TIMES, substeps=80, start=0.0).ts, start=tensor(0.0))
        grid = sd.TimeGrid(problems.OU_TIMES, substeps=80, start=0.0)
        elbo, variance = exact(path, grid, problems.OU_VALUES, seen(problems.OU_VALUES), NOISE)
        assert abs(elbo - problems.OU_KNOWN_START_LOG_EVIDENCE) < 0.02
        assert variance < 1e-18

        grid = sd.TimeGrid(problems.OU_TIMES, substeps=5)
        mask = seen(problems.OU_VALUES)
        mask[[2, 5]] = False
        values = torch.where(mask, problems.OU_VALUES, torch.nan)
        model = problems.ou_discretised(grid.ts.diff(), **problems.OU)
        answer = problems.kalman_log_evidence(
            model, {5 * i: problems.OU_VALUES[i] for i in range(8) if i not in (2, 5)}
        )
        elbo, variance = exact(ou_path(grid.ts), grid, values.nan_to_num(7.0), mask, NOISE)
        message = sd.Message.observed(grid, values, mask, NOISE)
        assert torch.isfinite(message.information).all()
        assert abs(elbo - answer) < 1e-10
        assert variance < 1e-20

        nothing = torch.zeros_like(mask)
        elbo, variance = exact(ou_path(grid.ts), grid, problems.OU_VALUES, nothing, NOISE)
        assert abs(elbo) < 1e-12
        assert variance < 1e-24

    def test_a_single_observation(self):
        grid = sd.TimeGrid(tensor(0.1), substeps=5)
        y = tensor(0.9)[:, None]
        elbo, variance = exact(ou_path(grid.ts), grid, y, seen(y), NOISE)
        spread = math.sqrt(SIGMA**2 / (2 * THETA) + NOISE**2)
        assert abs(elbo - dist.Normal(tensor(MU), spread).log_prob(tensor(0.9))) < 1e-10
        assert variance < 1e-20

    @pytest.mark.parametrize("noise", ["diagonal", "matrix", "wide", "scalar"])
    def test_rotating_ou_with_one_coordinate_observed(self, noise):
        A = problems.rotation(0.4, 3.0)
        factor = {
            "diagonal": torch.diag(tensor(0.5, 0.8)),
            "scalar": 0.6 * torch.eye(2, dtype=F64),
            "matrix": torch.tensor([[0.5, 0.0], [0.3, 0.7]], dtype=F64),
            "wide": torch.tensor([[0.5, 0.1, -0.2], [0.3, 0.7, 0.4]], dtype=F64),
        }[noise]
        given = {"diagonal": tensor(0.5, 0.8), "scalar": tensor(0.6)}.get(noise, sd.MatrixDiffusion(factor))
        P = torch.tensor([[0.8, 0.3], [0.3, 0.5]], dtype=F64)
        start = dist.MultivariateNormal(tensor(0.2, -0.1), covariance_matrix=P)
        times, y = tensor(0.0, 0.4, 1.0, 1.3), tensor(0.5, -0.7, 0.2, 0.6)[:, None]
        grid, H = sd.TimeGrid(times, dt=0.1), tensor(1.0, 0.0)[None]
        path = sd.SDEPath(lambda t, z: z @ A.mT + 0.3, given, start, grid.ts)
        model = problems.euler_linear(
            A, tensor(0.3, 0.3), factor, grid.ts.diff(), m=start.mean, P=P, H=H, R=tensor(0.01)[None]
        )
        answer = problems.kalman_log_evidence(model, dict(zip(grid.index.tolist(), y, strict=True)))
        torch.manual_seed(1)
        elbo, variance = exact(path, grid, y, seen(y), 0.1, H)
        assert abs(elbo - answer) < 1e-9
        assert variance < 1e-16

    def test_second_order_with_noise_on_the_velocity(self):
        A, sigma = problems.langevin_matrix(), problems.LANGEVIN["sigma"]
        H, g = tensor(1.0, 0.0)[None], tensor(0.0, sigma)[:, None]
        mask = torch.tensor([[False], [True], [True], [True], [True]])
        y = torch.cat([tensor(0.0)[None], problems.LANGEVIN_VALUES])
        start = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
        errors = []
        for solver in (sd.EulerMaruyama(), sd.GaussianStep(mean=sd.RungeKutta4())):
            grid = sd.TimeGrid(problems.LANGEVIN_TIMES, substeps=40)
            path = sd.SDEPath(lambda t, z: z @ A.mT, sd.MatrixDiffusion(g), start, grid.ts, solver=solver)
            torch.manual_seed(0)
            elbo, variance = exact(path, grid, y, mask, problems.LANGEVIN["noise"], H)
            assert variance < 1e-16
            errors.append(abs(float(elbo) - problems.LANGEVIN_LOG_EVIDENCE))
            if isinstance(solver, sd.EulerMaruyama):
                model = problems.euler_linear(
                    A, torch.zeros(2, dtype=F64), g, grid.ts.diff(), m=torch.zeros(2, dtype=F64),
                    P=torch.eye(2, dtype=F64), H=H, R=tensor(0.01)[None],
                )  # fmt: skip
                at = dict(zip(grid.index.tolist()[1:], problems.LANGEVIN_VALUES, strict=True))
                assert abs(elbo - problems.kalman_log_evidence(model, at)) < 1e-9
        assert errors[1] < 0.02 < errors[0] < 0.05

    @pytest.mark.parametrize("mean", [sd.Heun(), sd.RungeKutta4(), sd.RungeKutta4(substeps=2)])
    def test_better_means(self, mean):
        grid = sd.TimeGrid(problems.OU_TIMES, substeps=2)
        h = THETA * grid.ts.diff()
        a = 1 - h + h**2 / 2
        if isinstance(mean, sd.RungeKutta4):
            h = h / mean.substeps
            a = (1 - h + h**2 / 2 - h**3 / 6 + h**4 / 24) ** mean.substeps
        model = problems.ou_discretised(grid.ts.diff(), **problems.OU)
        model.F = [x.reshape(1, 1) for x in a]
        model.b = [(1 - x).reshape(1) * MU for x in a]
        answer = problems.kalman_log_evidence(
            model, dict(zip(range(0, 15, 2), problems.OU_VALUES, strict=True))
        )
        torch.manual_seed(0)
        path = ou_path(grid.ts, sd.GaussianStep(mean=mean))
        elbo, variance = exact(path, grid, problems.OU_VALUES, seen(problems.OU_VALUES), NOISE)
        assert abs(elbo - answer) < 1e-10
        assert variance < 1e-20

    def test_own_grids_in_a_batch(self):
        rows = [[0.1, 0.3, 1.0, 1.0], [0.0, 0.2, 0.9, 2.0], [0.5, 0.5, 0.5, 0.5]]
        lengths = [3, 4, 1]
        times, y = (
            torch.tensor(rows, dtype=F64),
            torch.randn(3, 4, 1, dtype=F64, generator=torch.manual_seed(0)),
        )
        mask = (torch.arange(4) < torch.tensor(lengths)[:, None])[..., None]
        grid = sd.TimeGrid(times, dt=0.1)
        elbo, variance = exact(ou_path(grid.ts), grid, y * mask, mask, NOISE)
        assert (variance < 1e-20).all()
        for i, n in enumerate(lengths):
            own = sd.TimeGrid(times[i, :n], dt=0.1)
            alone, _ = exact(ou_path(own.ts), own, y[i, :n], seen(y[i, :n]), NOISE)
            assert abs(elbo[i] - alone) < 1e-10

    def test_a_path_without_batch_takes_a_batch_of_observations(self):
        """As many series as steps: a batch dimension must not be taken for time."""
        grid = sd.TimeGrid(tensor(0.0, 0.5, 1.0), substeps=2)
        y = torch.randn(5, 3, 1, dtype=F64, generator=torch.manual_seed(0))
        path = ou_path(grid.ts)
        both, _ = exact(path, grid, y, seen(y), NOISE)
        for i in range(5):
            alone, _ = exact(path, grid, y[i], seen(y[i]), NOISE)
            assert abs(both[i] - alone) < 1e-10


class TestDensity:
    def test_ou_against_a_dense_normal(self):
        ts = tensor(0.0, 0.1, 0.35, 0.4, 1.0)
        path = ou_path(ts)
        mean, cov = chain_moments(ts)
        torch.manual_seed(0)
        z = path.rsample((7,))
        expected = dist.MultivariateNormal(mean, cov).log_prob(z[..., 0])
        assert (path.log_prob(z) - expected).abs().max() < 1e-10
        wrong = dist.MultivariateNormal(mean, cov * 1.01).log_prob(z[..., 0])
        assert (path.log_prob(z) - wrong).abs().max() > 1e-3

    @pytest.mark.parametrize("kind", ["diagonal", "one scale", "matrix", "wide", "state"])
    def test_nonlinear_fields_against_steps(self, kind):
        ts = tensor(0.0, 0.1, 0.35, 0.4)
        M = torch.tensor([[0.5, 0.1, 0.0], [0.2, 0.6, 0.3]], dtype=F64)

        def drift(t, z):
            return torch.sin(z) * (1 + t)

        given, factor = {
            "diagonal": (tensor(0.3, 0.6), lambda z: torch.diag(tensor(0.3, 0.6))),
            "one scale": (tensor(0.3), lambda z: 0.3 * torch.eye(2, dtype=F64)),
            "matrix": (sd.MatrixDiffusion(M[:, :2]), lambda z: M[:, :2]),
            "wide": (sd.MatrixDiffusion(M), lambda z: M),
            "state": (lambda t, z: 0.2 + z.square(), lambda z: torch.diag(0.2 + z.square())),
        }[kind]
        path = sd.SDEPath(drift, given, tensor(0.3, -0.2), ts)
        torch.manual_seed(0)
        z = path.rsample()
        total = 0.0
        for k, dt in enumerate(ts.diff()):
            g = factor(z[k])
            step = dist.MultivariateNormal(z[k] + drift(ts[k], z[k]) * dt, covariance_matrix=g @ g.mT * dt)
            total += step.log_prob(z[k + 1])
        assert abs(path.log_prob(z) - total) < 1e-10

    @pytest.mark.parametrize("kind", ["diagonal", "matrix", "tall"])
    def test_gradients(self, kind):
        ts = tensor(0.0, 0.1, 0.35)
        M = torch.tensor([[0.5, 0.1], [0.2, 0.6]], dtype=F64)
        start = torch.zeros(2, dtype=F64)

        def build(theta, log_sigma, log_start):
            sigma = log_sigma.exp()
            noise = {
                "diagonal": lambda t, z: sigma * (1 + z.square()),
                "matrix": sd.MatrixDiffusion(
                    lambda t, z: sigma * M * (1 + z.square().sum(-1)[..., None, None])
                ),
                "tall": sd.MatrixDiffusion(sigma * tensor(0.0, 1.0)[:, None]),
            }[kind]
            initial = dist.Normal(start, log_start.exp()).to_event(1)
            return sd.SDEPath(
                lambda t, z: torch.stack([z[..., 1], -theta * z[..., 0].sin()], -1), noise, initial, ts
            )

        parameters = [x.squeeze() for x in (tensor(1.2), tensor(-0.3), tensor(0.1))]
        torch.manual_seed(0)
        z = build(*parameters).rsample()

        def log_prob(z, *parameters):
            if kind == "tall":  # Positions follow from velocities: off their subspace there is no density.
                x = torch.stack([z[0, 0], *(z[0, 0] + (z[:-1, 1] * ts.diff()).cumsum(0))])
                z = torch.stack([x, z[:, 1]], -1)
            return build(*parameters).log_prob(z)

        inputs = [x.requires_grad_() for x in (z, *parameters)]
        assert torch.autograd.gradcheck(log_prob, inputs, rtol=1e-6, atol=1e-6)

    def test_a_value_without_batch_scores_against_a_batch_of_paths(self):
        """Two series, three times, so two steps: the batch must not be taken for time."""
        theta, ts = tensor(0.5, 2.0), tensor(0.0, 0.5, 1.0)
        path = sd.SDEPath(lambda t, z: -theta[..., None] * z, tensor(0.4), tensor(1.0), ts)
        z = tensor(1.0, 0.3, -0.4)[:, None]
        assert path.batch_shape == (2,)
        for i in range(2):
            one = sd.SDEPath(lambda t, z, i=i: -theta[i] * z, tensor(0.4), tensor(1.0), ts)
            assert abs(path.log_prob(z)[i] - one.log_prob(z)) < 1e-12
        z = torch.stack([z, 2 * z - 1])
        assert path.log_prob(z).shape == (2,)
        assert path.log_prob(z[:, None]).shape == (2, 2)

    def test_as_many_series_as_steps(self):
        theta = torch.linspace(0.2, 3.0, 4, dtype=F64)
        path = sd.SDEPath(
            lambda t, z: -theta[..., None] * z, tensor(0.4), tensor(1.0), tensor(0.0, 0.1, 0.3, 0.6, 1.0)
        )
        torch.manual_seed(0)
        z = path.rsample()
        for i in range(4):
            one = sd.SDEPath(lambda t, z, i=i: -theta[i] * z, tensor(0.4), tensor(1.0), path.ts)
            assert abs(path.log_prob(z)[i] - one.log_prob(z[i])) < 1e-12


def chain_moments(ts, sigma=SIGMA):
    """Mean and covariance of the Euler chain of the OU process, by recursion."""
    n, a = len(ts), 1 - THETA * ts.diff()
    cov = torch.zeros(n, n, dtype=F64)
    cov[0, 0] = sigma**2 / (2 * THETA)
    for k in range(n - 1):
        cov[k + 1, : k + 1] = cov[: k + 1, k + 1] = a[k] * cov[k, : k + 1]
        cov[k + 1, k + 1] = a[k] ** 2 * cov[k, k] + sigma**2 * ts.diff()[k]
    return torch.full((n,), MU, dtype=F64), cov


class TestLaw:
    """Monte Carlo against the exact law; four standard errors, 20,000 paths."""

    def test_variance_and_lag_correlation_at_irregular_times(self):
        ts = tensor(0.0, 0.013, 0.2, 0.21, 0.9, 1.3)
        mean, cov = chain_moments(ts)
        torch.manual_seed(0)
        with torch.no_grad():
            z = ou_path(ts).rsample((20000,))[..., 0] - mean
        products = z[:, :, None] * z[:, None, :]
        assert within(products, cov)
        assert within(z, 0.0)
        between = torch.linspace(0, 1.3, 6, dtype=F64)
        assert not within(products, chain_moments(between)[1])

    def test_geometric_brownian_motion(self):
        path = sd.SDEPath(
            lambda t, z: 0.1 * z, lambda t, z: 0.3 * z, tensor(1.0), torch.linspace(0, 1, 101, dtype=F64)
        )
        torch.manual_seed(0)
        with torch.no_grad():
            x = path.rsample((20000,))[:, -1, 0]
        assert within(x, 1.1051709180756477)
        assert within((x - 1.1051709180756477).square(), 0.11502472986530234)
        assert not within(x, 1.1051709180756477 * math.exp(0.045))  # Stratonovich

    def test_cox_ingersoll_ross(self):
        path = sd.SDEPath(
            lambda t, z: 2 * (0.5 - z), lambda t, z: 0.6 * z.clamp(min=1e-8).sqrt(), tensor(0.2),
            torch.linspace(0, 1, 301, dtype=F64),
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.no_grad():
            x = path.rsample((20000,))[:, -1, 0]
        assert within(x, 0.4593994150290162)
        assert within((x - 0.4593994150290162).square(), 0.03785673545522152)
        assert not within((x - 0.4593994150290162).square(), 0.03785673545522152 * 1.1)


class TestPadding:
    def build(self, order):
        times = torch.tensor([[0.0, 0.4, 1.0], [0.0, 0.7, 0.7], [0.2, 0.3, 0.35]], dtype=F64)[order]
        theta = tensor(0.5, 1.0, 2.0)[order]
        grid = sd.TimeGrid(times, dt=0.1)
        return grid, theta

    @pytest.mark.parametrize("kind", ["diagonal", "state", "matrix", "wide", "tall"])
    def test_padding_and_batch_order_change_nothing(self, kind):
        wide = torch.tensor([[0.5, 0.1, 0.2], [0.2, 0.6, -0.1]], dtype=F64)
        noise = {
            "diagonal": tensor(0.3, 0.5),
            "state": lambda t, z: 0.3 + 0.1 * z.square(),
            "matrix": sd.MatrixDiffusion(wide[:, :2]),
            "wide": sd.MatrixDiffusion(wide),
            "tall": sd.MatrixDiffusion(wide[:, :1]),
        }[kind]

        def make(ts, theta, message):
            path = sd.SDEPath(
                lambda t, z: -theta[..., None] * z.sin() + t,
                noise,
                tensor(0.3, -0.2).expand(*theta.shape, 2),
                ts,
            )
            return path, path.guided(message)

        generator = torch.manual_seed(0)
        grid, theta = self.build([0, 1, 2])
        n = grid.ts.shape[-1]
        h = torch.randn(3, n, 2, dtype=F64, generator=generator)
        L = torch.randn(3, n, 2, 2, dtype=F64, generator=generator)
        eps = torch.randn(n, 3, 2, dtype=F64, generator=generator)
        path, guided = make(grid.ts, theta, sd.Message(h, L @ L.mT))
        z = guided.transport(eps)
        scores = path.log_prob(z), guided.log_prob(z)

        order = [2, 0, 1]
        again = make(self.build(order)[0].ts, theta[order], sd.Message(h[order], (L @ L.mT)[order]))
        permuted = again[1].transport(eps[:, order])
        assert (permuted - z[order]).abs().max() < 1e-12
        for dist_, score in zip(again, scores, strict=True):
            assert (dist_.log_prob(permuted) - score[order]).abs().max() < 1e-12

        steps = (grid.ts.diff() > 0).sum(-1)
        for i, s in enumerate(steps.tolist()):
            own = make(grid.ts[i, : s + 1], theta[i], sd.Message(h[i, : s + 1], (L @ L.mT)[i, : s + 1]))
            alone = own[1].transport(eps[: s + 1, i])
            assert (alone - z[i, : s + 1]).abs().max() < 1e-12
            assert (z[i, s:] - z[i, s]).abs().max() == 0
            for dist_, score in zip(own, scores, strict=True):
                assert abs(dist_.log_prob(alone) - score[i]) < 1e-11
        assert (permuted - z).abs().max() > 1e-2  # the check sees a wrong order


class TestShapes:
    def test_expand_sample_shape_and_left_dimensions(self):
        theta = torch.rand(7, 1, 3, dtype=F64)
        ts = torch.linspace(0, 1, 4, dtype=F64)
        path = sd.SDEPath(lambda t, z: -theta[..., None] * z, tensor(0.4), tensor(1.0), ts)
        assert path.batch_shape == (7, 1, 3)
        assert path.rsample((2,)).shape == (2, 7, 1, 3, 4, 1)
        wide = path.expand([7, 5, 3])
        z = wide.rsample()
        assert isinstance(wide, sd.SDEPath)
        assert z.shape == (7, 5, 3, 4, 1)
        assert (z[:, 0] - z[:, 1])[..., 1:, :].abs().min() > 0
        assert (wide.log_prob(z) - path.log_prob(z)).abs().max() < 1e-12
        guided = path.guided(message=(torch.zeros(4, 1, dtype=F64), torch.ones(4, 1, dtype=F64))).expand(
            [7, 5, 3]
        )
        z = guided.rsample((2,))
        assert guided.log_prob(z).shape == (2, 7, 5, 3)

    def test_nested_plates(self):
        def model():
            with pyro.plate("group", 2, dim=-2):
                theta = pyro.sample("theta", dist.LogNormal(tensor(0.0).squeeze(), 1.0))
                with pyro.plate("member", 3, dim=-1):
                    return pyro.sample(
                        "path",
                        sd.SDEPath(
                            lambda t, z: -theta[..., None] * z, tensor(0.4), tensor(1.0),
                            torch.linspace(0, 1, 4, dtype=F64),
                        ),
                    )  # fmt: skip

        trace = poutine.trace(model).get_trace()
        assert trace.nodes["path"]["value"].shape == (2, 3, 4, 1)
        trace.compute_log_prob()
        assert trace.nodes["path"]["log_prob"].shape == (2, 3)

    def test_vectorised_particles(self):
        def model():
            theta = pyro.sample("theta", dist.LogNormal(tensor(0.0).squeeze(), 1.0))
            with pyro.plate("series", 3):
                path = sd.SDEPath(
                    lambda t, z: -theta[..., None] * z,
                    tensor(0.4),
                    tensor(1.0),
                    torch.linspace(0, 1, 5).double(),
                )
                return pyro.sample("path", path)

        with pyro.plate("particles", 4, dim=-2):
            assert model().shape == (4, 3, 5, 1)

    def test_context_static_by_time_and_in_a_network(self):
        ts = torch.linspace(0, 1, 4, dtype=F64)
        static, timed = torch.rand(3, 2, dtype=F64), torch.rand(3, 4, 2, dtype=F64)

        def drift(t, z, c):
            return torch.cat([z, c], -1).sum(-1, keepdim=True)

        for context in (static, timed):
            path = sd.SDEPath(drift, tensor(0.4), tensor(1.0), ts, context=context)
            assert path.batch_shape == (3,)
            z = path.expand([5, 3]).rsample((2,))
            assert z.shape == (2, 5, 3, 4, 1)
            score = path.log_prob(z)
            for i in range(3):
                own = sd.SDEPath(drift, tensor(0.4), tensor(1.0), ts, context=context[i])
                assert (own.log_prob(z[..., i, :, :]) - score[..., i]).abs().max() < 1e-12

    def test_context_rows_belong_to_the_start_of_their_step(self):
        c = tensor(1.0, 2.0, 4.0)[:, None]
        path = sd.SDEPath(lambda t, z, c: c, tensor(1e-9), tensor(0.0), tensor(0.0, 1.0, 2.0), context=c)
        assert path.rsample()[:, 0].tolist() == pytest.approx([0.0, 1.0, 3.0], abs=1e-6)
