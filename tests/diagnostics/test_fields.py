"""Reading a fit: the fields that come out are those of the model, draw by draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def series(number=3, **options):
    return sd.Series(torch.linspace(0, 2, 5), torch.randn(number, 5, 1, dtype=F64), **options)


def relaxation(batch):
    """A rate per series, one noise for all."""
    grid = sd.TimeGrid(batch.times, substeps=2)
    sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-1.0, dtype=F64), 0.3))
    with batch.plate("series"):
        theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.0, dtype=F64), 0.5))
        start = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
        path = sd.SDEPath(
            lambda t, z: theta[..., None] * (1 - z),
            lambda t, z: sigma[..., None] * (1 + z**2),
            start,
            grid.ts,
        )
        z = pyro.sample("z", path)
        pyro.sample("y", dist.Normal(grid.observed(z), 0.2).mask(batch.mask).to_event(2), obs=batch.values)


def read(fit, data, **options):
    fields = sd.posterior_fields(fit, data, draws=7, **options)
    return fields, sd.read_field(fields, data)


def test_every_draw_is_its_own_parameters():
    guide, data = sd.AmortizedGuide(relaxation), series()
    for i in range(3):
        fields, reading = read((relaxation, guide), data, series=i)
        assert reading.drift.shape == reading.diffusion.shape == (7, 121, 1)
        x = reading.points
        slope = reading.drift[:, :1] / (1 - x[:1])
        assert torch.allclose(reading.drift, slope * (1 - x), atol=1e-12)
        sigma = reading.diffusion[:, :1] / (1 + x[:1] ** 2)
        assert torch.allclose(reading.diffusion, sigma * (1 + x**2), atol=1e-12)
        assert slope.std() > 0 and sigma.std() > 0
        assert fields.states.shape == (7, 5, 1)
        low, high = fields.states.min(), fields.states.max()
        assert x[0].item() == pytest.approx((low - 0.25 * (high - low)).item())
        # As the drift of a solver is called: any number of dimensions before the draws.
        wide = torch.randn(4, 2, 7, 1, dtype=F64)
        assert torch.allclose(fields.drift(wide, wide), slope[:, 0] * (1 - wide), atol=1e-12)


def test_draws_are_those_of_the_seed():
    guide, data = sd.AmortizedGuide(relaxation), series()
    one, same, other = (read((relaxation, guide), data, seed=s)[1].drift for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_fixed_points_of_a_fit():
    guide, data = sd.AmortizedGuide(relaxation), series()
    fields, _ = read((relaxation, guide), data)
    found = sd.fixed_points(fields.drift, torch.linspace(-1, 3, 5, dtype=F64)[:, None])
    (point,) = found.points
    assert abs(point.location - 1).max() < 1e-12
    slope = fields.drift(torch.zeros(1), torch.zeros(1, 1, 1, dtype=F64))[0, :, 0]
    assert torch.allclose(torch.as_tensor(point.eigenvalues[:, 0].real), -slope, atol=1e-12)
    assert point.presence == 1.0


@pytest.mark.parametrize("dims", [None, [1], [2, 0]])
def test_a_neural_sde(dims):
    model, data = sd.LatentSDE(1, 3, hidden=8), series().to(torch.float32)
    reading = sd.read_field((model, model.guide), data, dims=dims, draws=4)
    chosen = (0, 1) if dims is None else tuple(dims)
    assert reading.dims == chosen
    points = reading.points.shape[0]
    assert reading.shape == ((121,) if len(chosen) == 1 else (31, 31))
    assert reading.drift.shape == (4, points, 3)
    others = [d for d in range(3) if d not in chosen]
    mean = reading.states.flatten(0, 1).mean(0)
    assert torch.equal(reading.points[:, others], mean[others].expand(points, -1))
    with torch.no_grad():
        expected = model.process.drift(torch.zeros(1), reading.points)
        noise = model.process.diffusion(torch.zeros(1), reading.points)
    assert torch.allclose(reading.drift, expected.expand(4, -1, -1), atol=1e-6)
    assert torch.allclose(reading.diffusion, noise.expand(4, -1, -1), atol=1e-6)
    assert model.training


def test_points_of_ones_own_and_a_matrix():
    root = torch.tensor([[0.3, 0.4], [0.0, 2.0]])
    process = sd.NeuralSDE(2, 8, diffusion=sd.MatrixDiffusion(root))
    model, data = sd.LatentSDE(1, 2, hidden=8, process=process), series().to(torch.float32)
    points = torch.randn(6, 2)
    reading = sd.read_field((model, model.guide), data, points, draws=2)
    assert reading.shape is None
    assert torch.allclose(reading.diffusion, torch.tensor([0.5, 2.0]).expand(2, 6, 2))


class TestCovariates:
    def model(self):
        data = series(covariates=torch.tensor([0.0, 0.0, 5.0, 5.0, 9.0]).expand(3, 5)[..., None]).to(
            torch.float32
        )
        return sd.LatentSDE(1, 1, hidden=8, covariates=1), data

    @pytest.mark.parametrize(
        ("t", "u"), [(None, 0.0), (0.9, 0.0), (1.0, 5.0), (1.7, 5.0), (2.0, 9.0), (7.0, 9.0)]
    )
    def test_are_those_at_the_time(self, t, u):
        model, data = self.model()
        reading = sd.read_field((model, model.guide), data, t=t, draws=2)
        with torch.no_grad():
            expected = model.process.drift(torch.zeros(1), reading.points, torch.full((121, 1), u))
        assert torch.allclose(reading.drift, expected.expand(2, -1, -1), atol=1e-6)

    def test_or_frozen(self):
        model, data = self.model()
        reading = sd.read_field((model, model.guide), data, context=torch.tensor([-3.0]), draws=2)
        with torch.no_grad():
            expected = model.process.drift(torch.zeros(1), reading.points, torch.full((121, 1), -3.0))
        assert torch.allclose(reading.drift, expected.expand(2, -1, -1), atol=1e-6)


def test_refuses():
    guide, data = sd.AmortizedGuide(relaxation), series()
    with pytest.raises(sd.FieldError, match=r"no path 'x' in the model; its paths are \['z'\]"):
        sd.posterior_fields((relaxation, guide), data, site="x")
    fields, _ = read((relaxation, guide), data)
    with pytest.raises(sd.ShapeError, match="one or two of the 1 states"):
        sd.read_field(fields, data, dims=[1])
    with pytest.raises(sd.ShapeError, match=r"`points` must have shape \(point, state=1\), got \(3,\)"):
        sd.read_field(fields, data, torch.zeros(3))
