import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import stochdyn as sd
from stochdyn.paths.support import PathSupport, PathTransform
from stochdyn.testing import ConformanceError, check_encoder, check_kernel, check_path

F64 = torch.float64
TS = torch.linspace(0, 1, 6, dtype=F64)
PADDED = torch.tensor([[0.0, 0.2, 0.5, 0.6, 1.0], [0.1, 0.4, 0.9, 0.9, 0.9]], dtype=F64)
LOWER = torch.tensor([[0.5, 0.0], [0.3, 0.4]], dtype=F64)
TALL = torch.tensor([[0.0], [0.6]], dtype=F64)


def real(*x):
    return torch.tensor(x, dtype=F64)


def drift(t, z):
    return torch.sin(z) - 0.5 * t


def swing(t, z):
    return torch.stack([z[..., 1], -z[..., 0] - 0.3 * z[..., 1]], -1)


UNIT = dist.Normal(real(0.2, -0.1), 0.7).to_event(1)
POSITIVE = dist.LogNormal(real(0.2, -0.1), 0.5).to_event(1)
SMOOTH = sd.GaussianStep(mean=sd.Heun())
PATHS = {
    "diagonal": (drift, real(0.5, 0.8), UNIT, TS),
    "known start": (drift, real(0.5, 0.8), real(1.0, 0.0), TS),
    "matrix": (drift, sd.MatrixDiffusion(lambda t, z: LOWER), UNIT, TS),
    "tall": (swing, sd.MatrixDiffusion(lambda t, z: TALL), UNIT, TS),
    "tall, known start": (swing, sd.MatrixDiffusion(lambda t, z: TALL), real(1.0, 0.0), TS),
    "state-dependent": (drift, lambda t, z: 0.3 + 0.2 * torch.sigmoid(z), UNIT, TS),
    "padded": (drift, real(0.5, 0.8), UNIT, PADDED),
    "padded, known start": (drift, real(0.5, 0.8), real(1.0, 0.0), PADDED),
    "padded, tall": (swing, sd.MatrixDiffusion(lambda t, z: TALL), UNIT, PADDED),
    "positive start": (drift, real(0.5, 0.8), POSITIVE, TS),
    "Heun": (drift, real(0.5, 0.8), UNIT, TS, SMOOTH),
}


def build(name, kind=sd.SDEPath):
    *parts, solver = PATHS[name] if len(PATHS[name]) == 5 else (*PATHS[name], sd.EulerMaruyama())
    return lambda: kind(*parts, solver=solver)


@pytest.mark.parametrize("name", PATHS)
def test_our_paths_pass(name):
    check_path(build(name))


@pytest.mark.parametrize("name", ["diagonal", "padded", "tall"])
def test_guided_paths_pass(name):
    def make():
        path = build(name)()
        loc = 0.5 * torch.ones(path.event_shape, dtype=F64)
        return path.guided(message=(loc, 2 * torch.ones_like(loc)))

    check_path(make)


class ForgetsItsType(sd.SDEPath):
    pass


class Own(sd.SDEPath):
    """Keeps its type; the broken ones below differ in one thing each."""

    def expand(self, batch_shape, _instance=None):
        new = super().expand(batch_shape)
        new.__class__ = type(self)
        return new


class OffByAConstant(Own):
    def log_prob(self, value):
        return super().log_prob(value) - math.log(0.9)


class DensityOfAnotherNoise(Own):
    """Each step's density has a sigma 3 % too large."""

    def log_prob(self, value):
        wide = sd.SDEPath(PATHS["diagonal"][0], 1.03 * PATHS["diagonal"][1], *PATHS["diagonal"][2:])
        return wide.log_prob(value)


class SamplesTooWide(Own):
    def rsample(self, sample_shape=()):
        wide = sd.SDEPath(PATHS["diagonal"][0], 1.05 * PATHS["diagonal"][1], *PATHS["diagonal"][2:])
        return wide.expand(self.batch_shape).rsample(torch.Size(sample_shape))


class CopiesOnePath(Own):
    def rsample(self, sample_shape=()):
        one = super().rsample(sample_shape)
        return one[..., :1, :, :].expand_as(one) if len(self.batch_shape) else one


class ForgetsSamples(Own):
    def rsample(self, sample_shape=()):
        return super().rsample(()) if len(sample_shape) == 1 else super().rsample(sample_shape)


class NotDifferentiable(Own):
    def log_prob(self, value):
        return super().log_prob(value) + (value - value.detach()).abs().sqrt().sum((-2, -1))


class OtherDensityWhenExpanded(Own):
    def log_prob(self, value):
        return super().log_prob(value) * (1 + 1e-6 * len(self.batch_shape))


class HasItsOwnNoise(Own):
    generator = torch.Generator().manual_seed(0)

    def rsample(self, sample_shape=()):
        z = super().rsample(sample_shape)
        return z + 1e-3 * torch.randn(z.shape, generator=self.generator, dtype=F64)


class Narrow(PathSupport):
    def check(self, value):
        return super().check(value) & (value.abs() < 0.01).all(-1).all(-1)


class RefusesItsSamples(Own):
    @property
    def support(self):
        return Narrow(self.chain)


class Lossy(constraints.Constraint):
    event_dim = 2

    def __init__(self, chain):
        self.chain = chain

    def check(self, value):
        return torch.ones(value.shape[:-2], dtype=torch.bool)


class LossyTransform(PathTransform):
    def _inverse(self, y):
        return super()._inverse(y).round(decimals=3)


class WrongJacobian(PathTransform):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) + 0.2 * x.square().sum(-1)


def with_transform(transform):
    class Kind(Lossy):
        pass

    torch.distributions.biject_to.register(Kind, lambda support: transform(support.chain))

    class Path(Own):
        @property
        def support(self):
            return Kind(self.chain)

    return Path


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (Own, None),
        (ForgetsItsType, "must keep the type"),
        (OffByAConstant, "guided density / density"),
        (DensityOfAnotherNoise, "not of one law"),
        (SamplesTooWide, "not of one law"),
        (CopiesOnePath, "same path for every copy"),
        (ForgetsSamples, "rsample"),
        (NotDifferentiable, "gradient of log_prob"),
        (OtherDensityWhenExpanded, "expand changes log_prob"),
        (HasItsOwnNoise, "same seed"),
        (RefusesItsSamples, "its own support|own sample"),
        (with_transform(LossyTransform), "not a round trip"),
        (with_transform(WrongJacobian), "not of one law"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_broken_path_is_found(kind, complaint):
    if complaint is None:
        check_path(build("diagonal", kind))
        return
    with pytest.raises(ConformanceError, match=complaint):
        check_path(build("diagonal", kind))


def test_a_value_over_one_dimension_is_no_path():
    with pytest.raises(ConformanceError, match="event_shape must be"):
        check_path(lambda: UNIT)


def test_the_random_state_outside_is_kept():
    net, before = sd.GRUEncoder(2, 4), torch.get_rng_state()
    check_path(build("diagonal"), draws=100)
    check_kernel(sd.EulerMaruyama(), draws=100)
    check_encoder(net)
    assert torch.equal(before, torch.get_rng_state())


KERNELS = [
    sd.EulerMaruyama(),
    SMOOTH,
    sd.GaussianStep(mean=sd.RungeKutta4()),
    sd.GaussianStep(mean=sd.RungeKutta4(3)),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_our_kernels_pass(kernel):
    check_kernel(kernel)


class WrongScale(sd.EulerMaruyama):
    def step(self, drift, diffusion, t, dt, z, context):
        a, G = super().step(drift, diffusion, t, dt, z, context)
        return a, 1.02 * G


class ScaleOfTime(sd.EulerMaruyama):
    def step(self, drift, diffusion, t, dt, z, context):
        return self.advance(drift, t, dt, z), diffusion.scale(diffusion(t, z, context), dt)


class OtherAdvance(sd.EulerMaruyama):
    def advance(self, drift, t, dt, z):
        return z + drift(t + dt, z) * dt

    def step(self, drift, diffusion, t, dt, z, context):
        return sd.EulerMaruyama().step(drift, diffusion, t, dt, z, context)


class Drifts(sd.EulerMaruyama):
    def advance(self, drift, t, dt, z):
        return super().advance(drift, t, dt, z) + 1e-3


class HalfSpeed(sd.EulerMaruyama):
    def advance(self, drift, t, dt, z):
        return z + 0.5 * drift(t, z) * dt


class OtherTransition(sd.EulerMaruyama):
    def transition(self, drift, diffusion, t, dt, z):
        step = super().transition(drift, diffusion, t, dt, z)
        return dist.Normal(step.mean, 1.02 * step.variance.sqrt()).to_event(1)


class DropsCorrelation(sd.EulerMaruyama):
    def transition(self, drift, diffusion, t, dt, z):
        step = super().transition(drift, diffusion, t, dt, z)
        return dist.Normal(step.mean, step.variance.sqrt()).to_event(1)


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (WrongScale(), "against g g'"),
        (ScaleOfTime(), "against g g'"),
        (OtherAdvance(), "`advance`"),
        (Drifts(), "zero length"),
        (HalfSpeed(), "against the drift"),
        (OtherTransition(), "transition variance"),
        (DropsCorrelation(), "covariance of transition samples"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, sd.EulerMaruyama) else None,
)
def test_a_broken_kernel_is_found(kernel, complaint):
    with pytest.raises(ConformanceError, match=complaint):
        check_kernel(kernel)


class Reader(sd.GRUEncoder):
    """The broken ones below differ from it in one thing each."""

    def __init__(self):
        super().__init__(2, 6, covariates=3)


class OtherShape(Reader):
    def forward(self, batch):
        return super().forward(batch)[..., :5]


class SinglePrecision(Reader):
    def forward(self, batch):
        return super().forward(batch).float()


class NotFinite(Reader):
    def forward(self, batch):
        return super().forward(batch) / batch.mask.any(-1, keepdim=True)


class Random(Reader):
    def forward(self, batch):
        out = super().forward(batch)
        return out + torch.rand_like(out)


class SeesMissing(Reader):
    def forward(self, batch):
        return super().forward(batch) + batch.values.sum(-1, keepdim=True)


class SeesPadding(Reader):
    def forward(self, batch):
        return super().forward(batch) * batch.values.shape[1]


class SeesNeighbours(Reader):
    def forward(self, batch):
        return super().forward(batch) + torch.arange(len(batch))[:, None, None]


class CountsQuestions(Reader):
    """Times without observations count."""

    def forward(self, batch):
        return super().forward(batch) + batch.lengths[:, None, None]


class Centred(Reader):
    """Each entry sees the whole series, the past as well."""

    def forward(self, batch):
        out = super().forward(batch)
        return (
            out
            + torch.where(batch.mask, batch.values, torch.zeros_like(batch.values)).sum((1, 2))[:, None, None]
        )


class Forwards(Reader):
    def encode(self, rows):
        real = (rows.inputs[..., 2:4].sum(-1) > 0)[..., None]
        out = self.gru((rows.stepped * real).flip(1))[0].flip(1)
        return torch.where(real, out, torch.zeros_like(out))


class Forgetful(Reader):
    """Each entry sees its own time only."""

    def encode(self, rows):
        x = rows.stepped
        return self.gru(x.reshape(-1, 1, x.shape[-1]))[0].reshape(*x.shape[:2], -1)


class NoTimes(Reader):
    def encode(self, rows):
        return self.gru(torch.cat([rows.inputs, torch.zeros_like(rows.gap[..., None])], -1))[0]


class NoMask(Reader):
    def encode(self, rows):
        hide = torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 1]).double()
        return self.gru(rows.stepped * hide)[0]


class NoCovariates(Reader):
    def encode(self, rows):
        hide = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 1]).double()
        return self.gru(rows.stepped * hide)[0]


class Unused(Reader):
    def __init__(self):
        super().__init__()
        self.idle = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (Reader, None),
        (OtherShape, "encoding: .*expected"),
        (SinglePrecision, "encoding: .*float32"),
        (NotFinite, "not finite"),
        (Random, "two different encodings"),
        (SeesMissing, "missing values"),
        (SeesPadding, "padding"),
        (SeesNeighbours, "padding|order of the batch"),
        (CountsQuestions, "times without observations"),
        (Centred, "causality: values at time 4"),
        (Forwards, "padding|causality"),
        (Forgetful, "reach: values at time 4"),
        (NoTimes, "times: not read"),
        (NoMask, "mask: not read"),
        (NoCovariates, "covariates: not read|reach: covariates"),
        (Unused, "parameter 'idle.weight' gets none"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_broken_encoder_is_found(kind, complaint):
    torch.manual_seed(0)
    if complaint is None:
        check_encoder(kind(), covariates=3)
        return
    with pytest.raises(ConformanceError, match=complaint):
        check_encoder(kind(), covariates=3)


def test_checking_an_encoder_leaves_it_as_it_is():
    net = sd.SetEncoder(2, 4)
    check_encoder(net)
    assert all(p.dtype == torch.float32 and p.grad is None for p in net.parameters())
