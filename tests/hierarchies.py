"""Linear-Gaussian hierarchies of ragged series, with exact evidence and exact messages."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import stochdyn as sd
from tests.programs import F64, normal

TOP, MIDDLE, LOWER, NOISE = 2.0, 1.1, 0.7, 0.5
Y = [[1.2, 0.8, 1.0], [-0.3], [0.4, 0.9]]
Y_EVIDENCE = -6.2625019068779775


def ragged(ys, **options):
    rows = [(torch.arange(len(y)).double(), torch.as_tensor(y, dtype=F64)[:, None]) for y in ys]
    return sd.Series.from_list(rows, **options)


def simulated(groups, seed, members=3, most=4, middle=TOP):
    """`members` series in every group, of 1 to `most` observations."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    ys, labels = [], []
    for group in range(groups):
        level = middle * draw()
        for _ in range(members):
            theta = level + LOWER * draw()
            count = int(torch.randint(1, most + 1, (), generator=generator))
            ys.append(theta + NOISE * draw(count))
            labels.append(group)
    return ragged(ys, groups={"site": labels})


def observe_levels(batch, theta):
    seen = dist.Normal(theta[..., None, None], NOISE).mask(batch.mask).to_event(2)
    pyro.sample("y", seen, obs=batch.values)


def two_levels(batch):
    """A common level, one for every series."""
    mu = pyro.sample("mu", normal(0.0, TOP))
    with batch.plate("subject"):
        observe_levels(batch, pyro.sample("theta", dist.Normal(mu, LOWER)))


def by_site(batch):
    """A level for every group, one for every series."""
    with batch.group_plate("site"):
        mu = pyro.sample("mu", normal(0.0, TOP))
    with batch.plate("subject"):
        observe_levels(batch, pyro.sample("theta", dist.Normal(mu[..., batch.groups["site"]], LOWER)))


def three_levels(batch):
    """A common level, one for every group, one for every series."""
    top = pyro.sample("top", normal(0.0, TOP))
    with batch.group_plate("site"):
        mu = pyro.sample("mu", dist.Normal(top, MIDDLE))
    with batch.plate("subject"):
        observe_levels(batch, pyro.sample("theta", dist.Normal(mu[..., batch.groups["site"]], LOWER)))


def evidence(batch, top=None):
    """Of `by_site`, summed over its groups; with `top` (a standard deviation) of `three_levels`."""
    site = batch.groups["site"]
    own = torch.arange(len(batch)).repeat_interleave(batch.mask.sum((1, 2)))
    y = batch.values[batch.mask]
    same_series, same_site = (
        (k[:, None] == k).to(F64) for k in (own, site.repeat_interleave(batch.mask.sum((1, 2))))
    )
    covariance = LOWER**2 * same_series + NOISE**2 * torch.eye(len(y), dtype=F64)
    covariance = covariance + (TOP**2 if top is None else MIDDLE**2) * same_site + (top or 0.0) ** 2
    return dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).item()


class Moments(sd.AbstractEncoder):
    """Number and mean of what was observed."""

    hidden = 2

    def forward(self, batch):
        number = batch.mask.sum((1, 2)).double()
        mean = (batch.values * batch.mask).sum((1, 2)) / number
        return torch.stack([number, mean], -1)[:, None].expand(-1, batch.values.shape[1], -1)


class ExactHead(nn.Module):
    """The message of a series about a level that its own scatters around by `spread`."""

    def __init__(self, site, spread):
        super().__init__()
        self.scale, self.spread = (site.centre, site.unit), spread
        self.shift = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x):
        number, mean = x[..., 0], x[..., 1]
        centre, unit = self.scale
        precision = 1 / (self.spread**2 + NOISE**2 / number)
        numbers = torch.stack([0.5 * precision.log() + unit.log(), (mean - centre) / unit], -1)
        return numbers + self.shift


def member_messages(batch, spread):
    """(h, J) of every series about a level above its own."""
    number, mean = Moments()(batch)[:, 0].unbind(-1)
    J = 1 / (spread**2 + NOISE**2 / number)
    return J * mean, J


def exact_guide(model, batch):
    """A guide that is the posterior, set by hand."""
    plates = {"theta": "subject", "mu": "site"} if model is not two_levels else {"theta": "subject"}
    guide = sd.AmortizedGuide(model, Moments(), amortize=plates)
    guide(batch)
    sites = guide.amortized.sites
    for name, spread in (("theta", 0.0), ("mu", LOWER)):
        if name in sites:
            sites[name].head = ExactHead(sites[name], spread)
    if guide.joint is not None:
        h, J = member_messages(batch, LOWER)
        if model is three_levels:
            site = batch.groups["site"]
            h, J = (torch.zeros(int(site.max()) + 1, dtype=F64).index_add(0, site, x) for x in (h, J))
            h, J = h / (1 + MIDDLE**2 * J), J / (1 + MIDDLE**2 * J)
        precision = 1 / TOP**2 + J.sum()
        with torch.no_grad():
            guide.joint.loc.fill_(h.sum() / precision)
            guide.joint.log_scale.fill_(-precision.log() / 2)
    return guide


def moved(guide, by=0.3):
    """The same guide with other parameters, so that every head reads everything that it sees."""
    with torch.no_grad():
        for parameter in guide.amortized.parameters():
            parameter += by * torch.randn_like(parameter)
    return guide
