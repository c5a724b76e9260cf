"""Simulations in sections: the same states, and the same gradients however they are computed."""

import weakref

import pytest
import torch
import torchsde
from torch import nn

import stochdyn as sd
from stochdyn.errors import FieldError
from stochdyn.solvers.kernel import Problem
from stochdyn.solvers.walk import Increments, Walk
from tests.orders import F64

UNEVEN = torch.tensor([0.0, 0.1, 0.15, 0.4, 0.5, 0.5, 0.8, 0.85, 1.0], dtype=F64)
OWN = torch.stack([UNEVEN, 0.5 * UNEVEN, UNEVEN + 0.2])


class Kept:
    def __init__(self, x):
        self.x = x


class Both(nn.Module):
    """Drift and diffusion of one net of two states."""

    def __init__(self):
        super().__init__()
        self.net = sd.MLP(2, 4, (8,), activation=torch.tanh).double()

    def drift(self, t, z):
        return self.net(z)[..., :2] - z

    def own(self, t, z):
        return 0.3 * torch.sigmoid(z)

    def matrix(self, t, z):
        return 0.2 * torch.stack([self.net(z)[..., 2:], z], -1)


NOISES = {
    "diagonal": lambda b: b.own,
    "matrix": lambda b: sd.MatrixDiffusion(b.matrix),
    "additive": lambda b: None,
}


def gradients(gradient, solver, ts=UNEVEN, noise="diagonal"):
    """By the parameters, a latent that the drift captures, a constant diffusion and the start."""
    torch.manual_seed(0)
    both = Both()
    k, scale = (torch.tensor([v, 0.7], dtype=F64, requires_grad=True) for v in (0.4, 0.3))
    z0 = torch.randn(3, 2, dtype=F64, requires_grad=True)
    latent, g = k.exp(), NOISES[noise](both)
    noises = 2
    motion = None
    if ts.dim() == 1:
        motion = sd.BrownianMotion(0.0, 1.0, (3, noises), seed=1, dtype=F64)
    z = sd.sdeint(
        lambda t, z: both.drift(t, z) * latent,
        (scale * 1.0) if g is None else g,
        z0,
        ts,
        solver=solver,
        gradient=gradient,
        noise=motion,
    )
    weights = torch.randn(z.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    wanted = [z0, k, scale, *both.parameters()]
    found = torch.autograd.grad((weights * z).sum(), wanted, allow_unused=True)
    return z.detach(), [f for f in found if f is not None]


def agree(one, other, tolerance):
    (z, found), (same, again) = one, other
    assert (z - same).abs().max() < tolerance
    assert len(found) == len(again) >= 3
    for a, b in zip(found, again, strict=True):
        assert a.abs().max() > 1e-4
        assert (a - b).abs().max() < tolerance * (1 + a.abs().max())


@pytest.mark.parametrize("gradient", [sd.Checkpointed(), sd.Checkpointed(3)], ids=["root", "three"])
@pytest.mark.parametrize(
    "solver",
    [sd.EulerMaruyama(), sd.Milstein(), sd.GaussianStep(mean=sd.Heun(2)), sd.StratonovichHeun(), sd.SRK()],
    ids=lambda s: type(s).__name__,
)
def test_checkpointed_simulations_have_the_direct_gradient(solver, gradient):
    agree(gradients(sd.Direct(), solver), gradients(gradient, solver), 1e-12)


def test_times_of_their_own_and_noise_that_is_drawn():
    solver = sd.EulerMaruyama()
    agree(gradients(sd.Direct(), solver, OWN), gradients(sd.Checkpointed(), solver, OWN), 1e-12)


@pytest.mark.parametrize("noise", list(NOISES))
def test_the_adjoint_of_reversible_heun_is_exact(noise):
    solver = sd.ReversibleHeun()
    agree(gradients(sd.Direct(), solver, noise=noise), gradients(sd.Adjoint(), solver, noise=noise), 1e-9)


def test_a_captured_latent_is_lost_by_the_library_alone():
    """The control of the agreement above: torchsde's own default sees the parameters of the module only."""

    class Equation(nn.Module):
        sde_type, noise_type = "stratonovich", "diagonal"

        def f(self, t, y):
            return -k * y

        def g(self, t, y):
            return 0.3 * y

    k = torch.tensor(0.7, dtype=F64, requires_grad=True)
    y0, ts = torch.ones(2, 1, dtype=F64, requires_grad=True), torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    motion = sd.BrownianMotion(0.0, 1.0, (2, 1), seed=0, dtype=F64)

    def slope(z):
        return torch.autograd.grad(z.sum(), k)[0]

    def ours(gradient):
        f, g, solver = (lambda t, z: -k * z), (lambda t, z: 0.3 * z), sd.ReversibleHeun()
        return slope(sd.sdeint(f, g, y0, ts, solver=solver, gradient=gradient, noise=motion))

    theirs = torchsde.sdeint_adjoint(Equation(), y0, ts, bm=motion.interval, method="reversible_heun", dt=0.5)
    assert (ours(sd.Adjoint()) - ours(sd.Direct())).abs() < 1e-12
    assert (slope(theirs) - ours(sd.Direct())).abs() > 0.1


def test_what_cannot_be_done_is_said():
    with pytest.raises(
        FieldError, match=r"Milstein cannot be run backwards exactly. Use sd\.ReversibleHeun\(\)"
    ):
        gradients(sd.Adjoint(), sd.Milstein())
    with pytest.raises(
        FieldError, match=r"ReversibleHeun carries more than the state .* gradient=sd\.Adjoint\(\)"
    ):
        gradients(sd.Checkpointed(), sd.ReversibleHeun())
    with pytest.raises(FieldError, match=r"sdeint: `gradient` must be sd\.Direct\(\)"):
        gradients("adjoint", sd.ReversibleHeun())

    def nested(t, z):
        return (k + made) * z

    k = torch.ones(1, dtype=F64, requires_grad=True)
    made = k + 1
    with pytest.raises(FieldError, match="made from it"):
        sd.sdeint(nested, torch.ones(1, dtype=F64), torch.ones(1, dtype=F64), UNEVEN, solver=sd.ReversibleHeun(),
                  gradient=sd.Adjoint())  # fmt: skip


@pytest.mark.parametrize(
    ("gradient", "solver"), [(sd.Checkpointed(), sd.StratonovichHeun()), (sd.Adjoint(), sd.ReversibleHeun())]
)
def test_they_keep_few_tensors(gradient, solver):
    """Bytes that the graph keeps between forward and backward."""
    net, ts = sd.MLP(2, 2, (64,)), torch.linspace(0, 1, 257)

    def kept(gradient):
        alive, own = weakref.WeakSet(), {p.data_ptr() for p in net.parameters()}

        def pack(x):
            alive.add(held := Kept(x))
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.x):
            z = sd.sdeint(
                lambda t, z: net(z), torch.ones(2), torch.ones(32, 2), ts, solver=solver, gradient=gradient
            )
        assert z.requires_grad
        sizes = {held.x.data_ptr(): held.x.numel() * held.x.element_size() for held in alive}
        return sum(size for at, size in sizes.items() if at not in own)

    assert kept(gradient) < kept(sd.Direct()) / 3


def test_a_section_begins_where_it_is_told():
    z, times = torch.zeros(2, 1, dtype=F64), UNEVEN[:, None, None]
    problem = Problem(lambda t, z: -z, sd.fields.as_diffusion(torch.ones(1, dtype=F64)), z, times, 1)
    walk = Walk(problem, sd.EulerMaruyama(), Increments(None, z)).fixed()
    whole = walk.whole()
    assert walk.steps == 8 and torch.equal(walk.part(whole[3], 3, 8), whole[3:])
    assert not torch.equal(walk.part(whole[3], 2, 7), whole[3:])
