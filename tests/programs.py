"""Small Pyro models on `Series`, with exact answers from `tests.problems`, shared by tests."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

import stochdyn as sd
from tests.problems import OU, euler_linear, kalman_log_evidence, ou_discretised

F64 = torch.float64
ROTATION = {"decay": 0.3, "speed": 2.0, "sigma": 0.6, "noise": 0.25}


def normal(loc, scale):
    return dist.Normal(torch.as_tensor(loc, dtype=F64), scale)


def ou_path(ts, theta, mu, sigma, start=None):
    """theta, mu, sigma: numbers, or tensors of batch shape."""
    theta, mu, sigma = (torch.as_tensor(x, dtype=F64)[..., None] for x in (theta, mu, sigma))
    start = dist.Normal(mu, sigma / (2 * theta).sqrt()).to_event(1) if start is None else start
    return sd.SDEPath(lambda t, z: theta * (mu - z), lambda t, z: sigma.expand(z.shape), start, ts)


def observe(grid, z, batch, noise):
    pyro.sample("y", dist.Normal(grid.observed(z), noise).mask(batch.mask).to_event(2), obs=batch.values)


def ou(batch, theta=OU["theta"], mu=OU["mu"], sigma=OU["sigma"], substeps=5):
    """Known parameters."""
    grid = sd.TimeGrid(batch.times, substeps=substeps)
    with batch.plate("series"):
        z = pyro.sample("z", ou_path(grid.ts, theta, mu, sigma))
        observe(grid, z, batch, OU["noise"])


def ou_evidence(batch, theta=OU["theta"], mu=OU["mu"], sigma=OU["sigma"], noise=OU["noise"], substeps=5):
    """The Kalman log evidence of every series of the discretised model, at its own times and holes."""
    out = []
    for i in range(len(batch)):
        times, values, seen = batch.times.expand(len(batch), -1)[i], batch.values[i], batch.mask[i, :, 0]
        dts = sd.TimeGrid(times, substeps=substeps).ts.diff()
        steps = torch.arange(len(times)) * substeps
        observed = {int(k): y for k, y, s in zip(steps, values, seen, strict=True) if s}
        out.append(kalman_log_evidence(ou_discretised(dts, theta, mu, sigma, noise), observed))
    return torch.tensor(out, dtype=F64)


def ou_series(number, times, seed=0, hold=()):
    """Simulated exactly; `hold` lists (series, time) to hide."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.as_tensor(times, dtype=F64)
    own = times.expand(number, -1)
    x = OU["mu"] + OU["sigma"] / math.sqrt(2 * OU["theta"]) * torch.randn(
        number, generator=generator, dtype=F64
    )
    xs = [x]
    for k in range(1, own.shape[-1]):
        keep = torch.exp(-OU["theta"] * (own[:, k] - own[:, k - 1]))
        sd_ = OU["sigma"] * ((1 - keep**2) / (2 * OU["theta"])).sqrt()
        x = OU["mu"] + (x - OU["mu"]) * keep + sd_ * torch.randn(number, generator=generator, dtype=F64)
        xs.append(x)
    x = torch.stack(xs, -1)[..., None]
    y = x + OU["noise"] * torch.randn(x.shape, generator=generator, dtype=F64)
    mask = torch.ones_like(y, dtype=torch.bool)
    for i, k in hold:
        mask[i, k] = False
    return sd.Series(times, y, mask=mask)


def own_times(number, points, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.1 + torch.rand(number, points, generator=generator, dtype=F64)).cumsum(-1) * 0.4


def rotating_path(ts, decay=ROTATION["decay"], speed=ROTATION["speed"], sigma=ROTATION["sigma"]):
    A = torch.tensor([[-decay, speed], [-speed, -decay]], dtype=F64)
    unit = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
    return sd.SDEPath(lambda t, z: z @ A.mT, torch.full((2,), sigma, dtype=F64), unit, ts)


def rotating(batch, substeps=5):
    """Two coordinates that turn, the first one observed."""
    grid = sd.TimeGrid(batch.times, substeps=substeps)
    with batch.plate("series"):
        z = pyro.sample("z", rotating_path(grid.ts))
        observe(grid, z[..., :1], batch, ROTATION["noise"])


def rotating_evidence(batch, substeps=5):
    p = ROTATION
    A = torch.tensor([[-p["decay"], p["speed"]], [-p["speed"], -p["decay"]]], dtype=F64)
    eye = torch.eye(2, dtype=F64)
    out = []
    for i in range(len(batch)):
        times = batch.times.expand(len(batch), -1)[i]
        dts = sd.TimeGrid(times, substeps=substeps).ts.diff()
        linear = euler_linear(
            A, torch.zeros(2, dtype=F64), p["sigma"] * eye, dts,
            m=torch.zeros(2, dtype=F64), P=eye, H=eye[:1], R=p["noise"] ** 2 * eye[:1, :1],
        )  # fmt: skip
        seen = batch.mask[i, :, 0]
        observed = {k * substeps: batch.values[i, k] for k in range(len(times)) if seen[k]}
        out.append(kalman_log_evidence(linear, observed))
    return torch.tensor(out, dtype=F64)


def rotating_series(number, times, seed=0):
    """Drawn from the model itself."""
    times = torch.as_tensor(times, dtype=F64)
    grid = sd.TimeGrid(times, substeps=20)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        z = grid.observed(rotating_path(grid.ts).sample((number,)))[..., :1]
        return sd.Series(times, z + ROTATION["noise"] * torch.randn_like(z))


def ou_priors():
    """theta, mu and sigma; theta's is narrow, since wide posteriors of mu given theta are far from normal."""
    theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.4, dtype=F64), 0.15))
    mu = pyro.sample("mu", normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-0.3, dtype=F64), 0.7))
    return theta, mu, sigma


def ou_latent(batch, substeps=2):
    """An Ornstein-Uhlenbeck process whose parameters have priors."""
    theta, mu, sigma = ou_priors()
    grid = sd.TimeGrid(batch.times, substeps=substeps)
    with batch.plate("series"):
        z = pyro.sample("z", ou_path(grid.ts, theta, mu, sigma))
        observe(grid, z, batch, OU["noise"])


def local_theta(batch, substeps=3):
    """A rate per series and a common level."""
    level = pyro.sample("level", normal(0.0, 1.0))
    grid = sd.TimeGrid(batch.times, substeps=substeps)
    with batch.plate("series"):
        theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.3, dtype=F64), 0.5))
        z = pyro.sample("z", ou_path(grid.ts, theta, level, OU["sigma"]))
        observe(grid, z, batch, OU["noise"])


def elbos(model, guide, *args, draws=100, plates=1):
    """Independent draws of the ELBO, all at once."""
    with torch.no_grad(), pyro.plate("particles", draws, dim=-plates - 1):
        q = poutine.trace(guide).get_trace(*args)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*args)
        p.compute_log_prob()
        q.compute_log_prob()

    def total(trace):
        sites = [s for s in trace.nodes.values() if s["type"] == "sample" and s["name"] != "particles"]
        parts = [
            s["log_prob"] for s in sites if isinstance(s["log_prob"], torch.Tensor) and s["log_prob"].dim()
        ]
        return sum(part.expand(draws, *part.shape[1:]).reshape(draws, -1).sum(-1) for part in parts)

    return total(p) - total(q)


def mean_and_error(draws):
    return draws.mean().item(), (draws.std() / math.sqrt(len(draws))).item()


def trained(model, guide, data, **options):
    return sd.fit(model, guide, data, progress=False, **options)
