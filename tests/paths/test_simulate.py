"""sdeint: the same trajectories as torchsde along the same noise; ragged times; clear refusals."""

import pytest
import torch
import torchsde

import stochdyn as sd
from tests.orders import F64, increments


def matrix(t, z):
    x, y = z[..., :1], z[..., 1:]
    one = torch.ones_like(x)
    return torch.stack([torch.cat([0.4 * one, 0.3 * x], -1), torch.cat([0.5 * y, 0.4 * one], -1)], -1)


PROBLEMS = {
    "geometric": (lambda t, z: 0.3 * z, lambda t, z: 0.5 * z, "diagonal"),
    "double well": (lambda t, z: z - z**3, lambda t, z: 0.3 + 0.1 * z.square(), "diagonal"),
    "two noises": (lambda t, z: -z * (1 + t), sd.MatrixDiffusion(matrix), "general"),
}


class Reference(torch.nn.Module):
    def __init__(self, drift, diffusion, noise_type, sde_type):
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type
        self.f = lambda t, y: drift(t.reshape(1, 1), y)
        self.g = lambda t, y: diffusion(t.reshape(1, 1), y)


@pytest.mark.parametrize("name", list(PROBLEMS))
@pytest.mark.parametrize(
    ("solver", "method"),
    [
        (sd.EulerMaruyama(), "euler"), (sd.Milstein(), "milstein"), (sd.SRK(), "srk"), (sd.StratonovichHeun(), "heun"),
        (sd.StratonovichMidpoint(), "midpoint"), (sd.ReversibleHeun(), "reversible_heun"),
    ],
    ids=lambda s: s if isinstance(s, str) else "",
)  # fmt: skip
def test_the_same_trajectories_as_torchsde(name, solver, method):
    drift, diffusion, noise_type = PROBLEMS[name]
    if noise_type == "general" and isinstance(solver, (sd.Milstein, sd.SRK)):
        pytest.skip("neither takes a matrix of noises")
    ts, z0 = (
        torch.linspace(0, 1, 9, dtype=F64),
        torch.tensor([[1.0, 0.5], [0.3, -0.7], [2.0, 0.1]], dtype=F64),
    )
    motion = sd.BrownianMotion(0.0, 1.0, (3, 2), seed=1, dtype=F64)
    ours = sd.sdeint(drift, diffusion, z0, ts, solver=solver, noise=motion)
    sde = Reference(drift, diffusion, noise_type, "stratonovich" if solver.stratonovich else "ito")
    theirs = torchsde.sdeint(sde, z0, ts, bm=motion.interval, method=method, dt=1 / 8).movedim(0, 1)
    assert (ours - theirs).abs().max() < 1e-11
    other = sd.BrownianMotion(0.0, 1.0, (3, 2), seed=2, dtype=F64)
    assert (sd.sdeint(drift, diffusion, z0, ts, solver=solver, noise=other) - theirs).abs().max() > 1e-2


def test_a_kernel_goes_where_its_path_goes():
    ts = torch.linspace(0, 1, 9, dtype=F64)
    for solver in (
        sd.EulerMaruyama(),
        sd.GaussianStep(),
        sd.ExponentialEuler(torch.tensor([-1.0], dtype=F64)),
    ):
        eps = torch.randn(9, 5, 2, dtype=F64)
        path = sd.SDEPath(lambda t, z: z - z**3, lambda t, z: 0.3 + 0.1 * z.square(), torch.ones(5, 2, dtype=F64), ts,
                          solver=solver)  # fmt: skip
        z = sd.sdeint(path.chain.drift, path.chain.diffusion, torch.ones(5, 2, dtype=F64), ts, solver=solver,
                      noise=eps[1:] / 8**0.5)  # fmt: skip
        assert (z - path.guided().transport(eps)).abs().max() < 1e-13


def test_series_of_their_own_times_padding_and_contexts():
    ts = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 2.5]], dtype=F64)
    context = torch.tensor([[1.0], [3.0]], dtype=F64)
    torch.manual_seed(0)
    z = sd.sdeint(
        lambda t, z, c: c, lambda t, z, c: 0.1 * c, torch.zeros(20_000, 2, 1, dtype=F64), ts, context=context
    )
    assert torch.equal(z[:, 0, 1], z[:, 0, 2])
    end = z[:, :, -1, 0]
    wanted = torch.tensor([1.0, 7.5], dtype=F64)
    spread = torch.tensor([0.1, 0.3 * 2.5**0.5], dtype=F64)
    assert ((end.mean(0) - wanted).abs() < 4 * spread / 20_000**0.5).all()
    assert ((end.std(0) / spread - 1).abs() < 4 / 40_000**0.5).all()


def test_gradients_pass_and_a_float32_run_stays_float32():
    sigma = torch.tensor([0.3], requires_grad=True)
    for solver in (sd.EulerMaruyama(), sd.SRK(), sd.ReversibleHeun()):
        z = sd.sdeint(lambda t, z: -z, sigma, torch.ones(4, 1), torch.linspace(0, 1, 5), solver=solver)
        assert z.dtype == torch.float32
        (found,) = torch.autograd.grad(z[:, -1].sum(), sigma)
        assert found.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"solver": sd.Heun()}, sd.FieldError, r"kernel as GaussianStep\(mean=\.\.\.\)"),
        ({"noise": torch.zeros(3, 1)}, sd.ShapeError, r"increments .* = \(4, 2, 1\), got \(3, 1\)"),
        ({"solver": sd.SRK(), "noise": torch.zeros(4, 2, 1)}, sd.ShapeError, r"Pass noise=sd\.BrownianMotion"),
        ({"noise": sd.BrownianMotion(0.0, 0.5, (2, 1))}, sd.TimeError, r"leave the BrownianMotion's \[0, 0\.5\]"),
        ({"noise": sd.BrownianMotion(0.0, 1.0, (2, 3))}, sd.ShapeError, r"BrownianMotion has shape \(2, 3\), the equation needs \(2, 1\)"),
        ({"solver": sd.SRK(), "noise": sd.BrownianMotion(0.0, 1.0, (3, 1))}, sd.ShapeError, r"has shape \(3, 1\)"),
        ({"solver": sd.SRK(), "ts": torch.rand(2, 5).cumsum(-1)}, sd.TimeError, r"all series must share the times"),
        ({"solver": sd.SRK(), "diffusion": sd.MatrixDiffusion(lambda t, z: z[..., None].expand(*z.shape, 2))},
         sd.DiffusionError, r"SRK: for additive or diagonal noise, or a single one"),
        ({"drift": lambda t, z: z**9, "z0": torch.full((2, 1), 50.0)}, sd.DivergedError, r"series 0, time 0\.\d+"),
        ({"z0": torch.full((2, 1), torch.nan)}, sd.DivergedError, r"`z0` is not finite"),
        ({"z0": 1.0}, sd.ShapeError, r"`z0` must be a floating tensor"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(change, error, message):
    given = {"drift": lambda t, z: -z, "diffusion": torch.tensor([0.3]), "z0": torch.ones(2, 1),
             "ts": torch.linspace(0, 1, 5)} | change  # fmt: skip
    parts = [given.pop(name) for name in ("drift", "diffusion", "z0", "ts")]
    with pytest.raises(error, match=message):
        sd.sdeint(*parts, **given)


def test_increments_of_the_same_motion_add_up():
    coarse, fine = increments(3, 7, 2), increments(6, 7, 2)
    assert (fine.reshape(8, 8, 7, 2).sum(1) - coarse).abs().max() < 1e-13


@pytest.mark.parametrize("solver", [sd.Milstein(), sd.SRK()], ids=["milstein", "srk"])
def test_noise_that_depends_on_another_state_is_refused_by_schemes_that_assume_it_does_not(solver):
    ts, z0 = torch.linspace(0, 1, 5), torch.ones(3, 2)
    with pytest.raises(
        sd.DiffusionError, match=f"{type(solver).__name__}: the diffusion of state 1 depends on state 0"
    ):
        sd.sdeint(lambda t, z: -z, lambda t, z: z.flip(-1), z0, ts, solver=solver)
    assert sd.sdeint(lambda t, z: -z, lambda t, z: z.square(), z0, ts, solver=solver).isfinite().all()
