"""The stationary law against scipy's Lyapunov solvers, and against the chain that starts there."""

import math

import pyro.distributions as dist
import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov

import stochdyn as sd
from stochdyn.paths.stationary import lyapunov
from tests import problems

F64 = torch.float64
LANGEVIN = problems.langevin_matrix()
SYSTEMS = {
    "coupled": (
        torch.tensor([[-1.0, 0.4, 0.0], [0.3, -0.8, 0.2], [0.0, -0.5, -2.0]], dtype=F64),
        torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.7, 0.0], [0.1, -0.3, 0.4]], dtype=F64),
    ),
    "rotation": (problems.rotation(0.3, 5.0), torch.tensor([[0.6, 0.0], [0.0, 0.2]], dtype=F64)),
    "velocity": (LANGEVIN, torch.tensor([[0.0], [problems.LANGEVIN["sigma"]]], dtype=F64)),
}
SOLVERS = {"euler": sd.EulerMaruyama(), "heun": sd.GaussianStep(mean=sd.Heun())}


def linear(A, m):
    return lambda t, z: (z - m) @ A.mT


def start(name, **options):
    A, g = SYSTEMS[name]
    m = torch.arange(1.0, len(A) + 1, dtype=F64)
    return sd.Stationary(linear(A, m), sd.MatrixDiffusion(g), torch.zeros(len(A), dtype=F64), **options), m


def step_matrices(name, dt, solver):
    A, g = SYSTEMS[name]
    M = torch.eye(len(A), dtype=F64) + A * dt
    return M + (A @ A * dt**2 / 2 if solver == "heun" else 0 * A), g * math.sqrt(dt)


@pytest.mark.parametrize("name", SYSTEMS)
def test_continuous_law(name):
    (A, g), (got, m) = SYSTEMS[name], start(name)
    expected = solve_continuous_lyapunov(A.numpy(), -(g @ g.mT).numpy())
    assert (got.covariance_matrix - torch.as_tensor(expected)).abs().max() < 1e-12
    assert (got.mean - m).abs().max() < 1e-12
    assert got.event_shape == (len(A),)


def test_langevin_is_equipartition():
    got, _ = start("velocity")
    omega, gamma, sigma = (problems.LANGEVIN[k] for k in ("omega", "gamma", "sigma"))
    v = sigma**2 / (2 * gamma)
    expected = torch.diag(torch.tensor([v / omega**2, v], dtype=F64))
    assert (got.covariance_matrix - expected).abs().max() < 1e-13


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_law_of_the_chain(name, solver):
    M, G = step_matrices(name, 0.02, solver)
    got, _ = start(name, dt=0.02, solver=SOLVERS[solver])
    expected = solve_discrete_lyapunov(M.numpy(), (G @ G.mT).numpy())
    assert (got.covariance_matrix - torch.as_tensor(expected)).abs().max() < 1e-12


def drifting(start_covariance, M, G, steps):
    """How far the covariance of a chain gets from where it starts."""
    S, worst = start_covariance, 0.0
    for _ in range(steps):
        S = M @ S @ M.mT + G @ G.mT
        worst = max(worst, float((S - start_covariance).abs().max()))
    return worst


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_chain_started_there_stays(name, solver):
    dt = 0.02
    M, G = step_matrices(name, dt, solver)
    assert drifting(start(name, dt=dt, solver=SOLVERS[solver])[0].covariance_matrix, M, G, 500) < 1e-10
    # The control: the continuous law is not the chain's.
    assert drifting(start(name)[0].covariance_matrix, M, G, 500) > 1e-6


def marginal_variances(initial, ts, theta, sigma):
    """Exact, from the path's own density: the inverse of its Hessian."""
    path = sd.SDEPath(lambda t, z: -theta * z, torch.tensor([sigma], dtype=F64), initial, ts)
    zero = torch.zeros(len(ts), 1, dtype=F64)
    hessian = torch.autograd.functional.hessian(lambda z: path.log_prob(z), zero)
    return torch.linalg.inv(-hessian.reshape(len(ts), len(ts))).diagonal()


def test_the_density_of_a_path_has_the_same_variance_at_all_times():
    theta, sigma, dt = 1.5, 0.8, 0.25
    ts = dt * torch.arange(12, dtype=F64)

    def initial(dt=None):
        g = torch.tensor([sigma], dtype=F64)
        return sd.Stationary(lambda t, z: -theta * z, g, torch.ones(1, dtype=F64), dt=dt)

    exact = sigma**2 * dt / (1 - (1 - theta * dt) ** 2)
    assert (marginal_variances(initial(dt), ts, theta, sigma) - exact).abs().max() < 1e-12
    coarse = marginal_variances(initial(), ts, theta, sigma)
    assert abs(coarse[0] - sigma**2 / (2 * theta)) < 1e-12
    assert coarse[-1] - coarse[0] > 0.03


def test_evidence_of_a_stationary_start():
    """The frozen evidence of the Ornstein-Uhlenbeck problem, reached as steps get short."""
    theta, mu, sigma, noise = (problems.OU[k] for k in ("theta", "mu", "sigma", "noise"))
    grid = sd.TimeGrid(problems.OU_TIMES, substeps=200)

    def drift(t, z):
        return theta * (mu - z)

    g = torch.tensor([sigma], dtype=F64)
    path = sd.SDEPath(
        drift,
        g,
        sd.Stationary(drift, g, torch.zeros(1, dtype=F64)),
        grid.ts,
        solver=sd.GaussianStep(mean=sd.Heun()),
    )
    seen = torch.ones(8, 1, dtype=torch.bool)
    guided = path.guided(
        sd.information_filter(path, sd.Message.observed(grid, problems.OU_VALUES, seen, noise))
    )
    z = guided.rsample()
    seen_at = dist.Normal(grid.observed(z), noise).log_prob(problems.OU_VALUES).sum()
    got = (path.log_prob(z) + seen_at - guided.log_prob(z)).item()
    assert abs(got - problems.OU_LOG_EVIDENCE) < 0.01


def test_batch_of_parameters():
    theta, sigma = torch.tensor([[0.5], [2.0]], dtype=F64), torch.tensor([0.3, 0.6, 0.9], dtype=F64)
    got = sd.Stationary(
        lambda t, z: theta[..., None] * (4 - z),
        lambda t, z: sigma[..., None] + 0 * z,
        torch.zeros(1, dtype=F64),
    )
    assert got.batch_shape == (2, 3)
    assert (got.variance[..., 0] - sigma**2 / (2 * theta)).abs().max() < 1e-14
    assert got.expand((5, 2, 3)).rsample().shape == (5, 2, 3, 1)
    path = sd.SDEPath(lambda t, z: theta[..., None] * (4 - z), torch.tensor([0.3], dtype=F64), got,
                      torch.linspace(0, 1, 5, dtype=F64))  # fmt: skip
    assert path.expand(torch.Size((7, 2, 3))).rsample().shape == (7, 2, 3, 5, 1)


@pytest.mark.parametrize("dt", [None, 0.05])
def test_gradients(dt):
    A, g = SYSTEMS["coupled"]
    m = torch.tensor([1.0, -1.0, 0.5], dtype=F64)

    def law(A, g, m):
        got = sd.Stationary(linear(A, m), sd.MatrixDiffusion(g), torch.zeros(3, dtype=F64), dt=dt)
        return got.mean, got.covariance_matrix

    inputs = [x.clone().requires_grad_() for x in (A, g, m)]
    assert torch.autograd.gradcheck(law, inputs)


def test_gradients_of_a_nonlinear_drift_move_the_fixed_point():
    """dx = r (1 - x^2) dt + s dW at x = 1: A = -2 r m, variance s^2 / (4 r m); with the point at sqrt(c)."""

    def law(r, c):
        got = sd.Stationary(
            lambda t, z: r * (c - z**2), torch.tensor([0.4], dtype=F64), torch.ones(1, dtype=F64)
        )
        return got.mean, got.covariance_matrix

    r, c = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.7, 2.0))
    mean, covariance = law(r, c)
    assert abs(mean.item() - math.sqrt(2)) < 1e-12
    assert abs(covariance.item() - 0.16 / (4 * 0.7 * math.sqrt(2))) < 1e-12
    assert torch.autograd.gradcheck(law, (r, c))


def test_single_precision_and_many_states():
    torch.manual_seed(0)
    A = torch.randn(30, 30, dtype=F64) / 8 - 2 * torch.eye(30, dtype=F64)
    g = torch.rand(30, dtype=F64) + 0.5
    expected = torch.as_tensor(solve_continuous_lyapunov(A.numpy(), -torch.diag(g**2).numpy()))
    got = sd.Stationary(lambda t, z: z @ A.mT, g, torch.ones(30, dtype=F64)).covariance_matrix
    assert (got - expected).abs().max() < 1e-12
    single = sd.Stationary(lambda t, z: z @ A.float().mT, g.float(), torch.ones(30))
    assert single.covariance_matrix.dtype == torch.float32
    assert (single.covariance_matrix - expected).abs().max() < 1e-5


def test_context():
    u = torch.tensor([[1.0], [3.0]], dtype=F64)
    got = sd.Stationary(
        lambda t, z, c: c - z, torch.tensor([1.0], dtype=F64), torch.zeros(1, dtype=F64), context=u
    )
    assert torch.allclose(got.mean, u, atol=1e-12)
    with pytest.raises(sd.ShapeError, match="do not broadcast"):
        sd.Stationary(lambda t, z, c: c - z, torch.ones(1), torch.zeros(3, 1), context=torch.ones(2, 1))


class TestRefuses:
    def test_an_unstable_member(self):
        theta = torch.tensor([1.0, -0.25, 2.0], dtype=F64)
        with pytest.raises(sd.StabilityError, match=r"batch member 1: .*eigenvalue 0\.25 .*not negative"):
            sd.Stationary(
                lambda t, z: -theta[..., None] * z, torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
            )

    def test_a_rotation_without_decay(self):
        A = problems.rotation(0.0, 2.0)
        with pytest.raises(sd.StabilityError, match=r"one member: .*2i"):
            sd.Stationary(lambda t, z: z @ A.mT, torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64))

    def test_a_step_that_is_too_long(self):
        with pytest.raises(sd.StabilityError, match=r"eigenvalue -2, not inside the unit circle.*shorter dt"):
            sd.Stationary(lambda t, z: -3 * z, torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64), dt=1.0)

    def test_no_fixed_point(self):
        with pytest.raises(sd.FieldError, match=r"no fixed point found, the drift is still 1 "):
            sd.Stationary(lambda t, z: z**2 + 1, torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64))

    def test_a_state_that_no_noise_reaches(self):
        g = sd.MatrixDiffusion(torch.tensor([[1.0], [0.0]], dtype=F64))
        with pytest.raises(sd.DiffusionError, match="singular"):
            sd.Stationary(lambda t, z: -z, g, torch.zeros(2, dtype=F64))

    def test_weights_that_would_not_be_those_of_the_path(self):
        net = sd.bayesian(sd.NeuralField(1, hidden=(4,)), "net")
        with pytest.raises(
            sd.FieldError, match=r"weights of drift or diffusion are random.*sd\.draw_weights"
        ):
            sd.Stationary(net, torch.ones(1), torch.zeros(1))

    def test_wrong_arguments(self):
        with pytest.raises(sd.TimeError, match="`dt` must be positive"):
            sd.Stationary(lambda t, z: -z, torch.ones(1), torch.zeros(1), dt=0.0)
        with pytest.raises(sd.ShapeError, match="`around` must be"):
            sd.Stationary(lambda t, z: -z, torch.ones(1), 2)


def test_lyapunov_of_a_batch_is_that_of_its_members():
    A = torch.stack([SYSTEMS["rotation"][0], SYSTEMS["velocity"][0]])
    Q = torch.eye(2, dtype=F64).expand(2, 2, 2)
    for discrete in (False, True):
        M = A / 20 if discrete else A
        together = lyapunov(M, Q, discrete=discrete)
        alone = torch.stack([lyapunov(m, q, discrete=discrete) for m, q in zip(M, Q, strict=True)])
        assert (together - alone).abs().max() < 1e-13
        residual = M @ together @ M.mT + Q - together if discrete else A @ together + together @ A.mT + Q
        assert residual.abs().max() < 1e-12
