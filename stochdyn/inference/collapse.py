"""Whether a guide uses its latents: mutual information, active units, KL per site."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to

from stochdyn.errors import FitError, SupportError
from stochdyn.inference.batches import arguments
from stochdyn.inference.draws import Draws, Site, draw, evaluating, pair
from stochdyn.inference.local import Layout, find_layout

_AT_ONCE = 16
_AUXILIARY = "_unconstrained"


@dataclass(frozen=True)
class SiteUse:
    """How far one latent is used.

    Attributes:
        name: of the site.
        local: whether it belongs to the series.
        units: its numbers per series, in unconstrained coordinates.
        active: how many of these have posterior means that differ between series; None for a global site.
        kl: the mean of log q - log p, per series for a local site, in all for a global one.
    """

    name: str
    local: bool
    units: int
    active: int | None
    kl: float


@dataclass(frozen=True)
class PosteriorCollapse:
    """What `posterior_collapse` found; prints as a table.

    Attributes:
        mutual_information: between series and local latents under the guide, in nats: 0 is collapse.
        limit: its largest possible value, the log of the number of series.
        sites: one `SiteUse` per latent.

    Example:
        >>> import stochdyn as sd
        >>> site = sd.PosteriorCollapse.Site("z", local=True, units=2, active=0, kl=0.004)
        >>> print(sd.PosteriorCollapse(0.003, 4.159, (site,)))
        mutual information 0.00 nats, at most 4.16
        site  units  active        KL
        z         2       0     0.004  per series
    """

    Site = SiteUse

    mutual_information: float
    limit: float
    sites: tuple[SiteUse, ...]

    @property
    def active_units(self) -> dict[str, int]:
        """Active units by local site."""
        return {site.name: site.active for site in self.sites if site.active is not None}

    @property
    def kl(self) -> dict[str, float]:
        """KL by site."""
        return {site.name: site.kl for site in self.sites}

    def __str__(self) -> str:
        wide = max([4, *(len(site.name) for site in self.sites)])
        lines = [
            f"mutual information {self.mutual_information:.2f} nats, at most {self.limit:.2f}",
            f"{'site':<{wide}}  units  active        KL",
        ]
        for site in self.sites:
            active = "-" if site.active is None else site.active
            per = "per series" if site.local else "in all"
            lines.append(f"{site.name:<{wide}}  {site.units:>5}  {active:>6}  {site.kl:>8.3f}  {per}")
        return "\n".join(lines)


def posterior_collapse(
    fit: Any,
    data: Any,
    *,
    draws: int = 100,
    shifts: int = 200,
    plate: str | None = None,
    threshold: float = 0.01,
    seed: int | None = 0,
) -> PosteriorCollapse:
    """Measure whether the guide's posteriors differ between series, or have fallen back on the prior.

    I_q(x; z) = 1/N sum_i E_{q(z|x_i)} [ log q(z | x_i) - log 1/N sum_j q(z | x_j) ]

    over all latents inside the series' plate, given the others. The densities under other series come from
    replaying the guide with the draws moved on by some number of series. A unit is active where the variance over
    series of its posterior mean is above `threshold`, and surely above what the finite number of draws adds.

    Args:
        fit: What `sd.fit` returned, or (model, guide).
        data: What the model takes; at least two series.
        draws: For posterior means and KL; up to ten of them for the mutual information.
        shifts: Up to how many other series each draw is compared with, drawn at random. With all N - 1 the mean
            over j is exact; with fewer the mutual information is a little too large on average.
        plate: The plate over the series; None finds it.
        threshold: Of an active unit, in unconstrained coordinates.
        seed: Of the draws; None uses the current random state.

    Raises:
        FitError: if there is only one series or no plate, or local paths stand on different grids, where the path of
            one series has no density under another.

    References:
        Hoffman & Johnson, "ELBO surgery", 2016, http://approximateinference.org/2016/accepted/HoffmanJohnson2016.pdf;
        Burda, Grosse & Salakhutdinov, "Importance weighted autoencoders", 2016, https://arxiv.org/abs/1509.00519;
        Dieng et al., "Avoiding latent variable collapse with generative skip models", 2019,
        https://arxiv.org/abs/1807.04863

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import stochdyn as sd
        >>> def model(y):
        ...     with pyro.plate("rows", len(y)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def collapsed(y):
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> found = sd.posterior_collapse((model, collapsed), torch.linspace(-1, 1, 8))
        >>> abs(found.mutual_information) < 1e-5, found.active_units
        (True, {'z': 0})
    """
    model, guide = pair(fit)
    args = arguments(data)
    with evaluating(model, guide, seed=seed):
        layout = find_layout(model, guide, args, plate)
        if layout.plate is None:
            raise FitError(
                "posterior_collapse: the model has no plate over series, so there is none to compare."
            )
        information, series = mutual_information(guide, args, layout, draws=min(draws, 10), shifts=shifts)
        found = draw((model, guide), data, draws)
        sites = site_uses(found, lambda site: layout.plate in site.plates, series, threshold)
    return PosteriorCollapse(information, math.log(series), sites)


def mutual_information(
    guide: Callable[..., Any], args: tuple, layout: Layout, *, draws: int, shifts: int
) -> tuple[float, int]:
    """I_q(x; local latents) in nats, and the number of series. Call it inside `evaluating`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def guide(y):
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("z", dist.Normal(y, 1e-3))
        >>> with torch.no_grad():
        ...     found = mutual_information(guide, (torch.arange(4.0),), Layout("rows", 1), draws=1, shifts=10)
        >>> round(found[0], 3), found[1]  # log 4
        (1.386, 4)
    """
    total = 0.0
    for _ in range(draws):
        trace: Any = poutine.trace(guide).get_trace(*args)
        names = {name for name, _ in layout.locals(trace)}
        trace.compute_log_prob(lambda name, site, names=names: name in names)
        units = layout.units(trace)
        own = units.total(layout.locals(trace))
        (frame,) = (f for f in units.frames if f.name == layout.plate)
        _check(trace, layout, frame.dim, frame.size)
        other = _Others(guide, args, layout, units, frame.dim)(trace, _shifts(frame.size, shifts))
        share = math.log1p(-1 / frame.size)
        mixture = torch.logaddexp(own - math.log(frame.size), other + share)
        total += (own - mixture).mean().item()
    return total / draws, frame.size


@dataclass(frozen=True)
class _Others:
    """The log of the mean density of every series' draw under other series."""

    guide: Callable[..., Any]
    args: tuple
    layout: Layout
    units: Any
    dim: int

    def __call__(self, trace: Any, shifts: list[int]) -> Tensor:
        parts = []
        for k in range(0, len(shifts), _AT_ONCE):
            parts += self._densities(trace, shifts[k : k + _AT_ONCE])
        return torch.stack(parts).logsumexp(0) - math.log(len(parts))

    def _densities(self, trace: Any, shifts: list[int]) -> list[Tensor]:
        given = trace.copy()
        for name, site in self.layout.locals(trace):
            given.nodes[name] = {**site, "value": self._moved(site, shifts)}
        try:
            crossed = self.layout.trace(self.guide, self.args, len(shifts), given)
            names = {name for name, _ in self.layout.locals(crossed)}
            crossed.compute_log_prob(lambda name, site: name in names)
        except ValueError as error:  # Pyro wraps what a distribution raises
            if not isinstance(error.__cause__ or error, SupportError):
                raise
            raise FitError(
                "Mutual information compares the latents of different series, and those of one cannot come from "
                f"another's guide: {error.__cause__ or error}"
            ) from error
        found = self.units.total(self.layout.locals(crossed))
        return [row.roll(-shift, self.dim) for row, shift in zip(found, shifts, strict=True)]

    def _moved(self, site: dict[str, Any], shifts: list[int]) -> Tensor:
        value, event = site["value"], len(site["fn"].event_shape)
        batch = value.shape[: value.dim() - event]
        rows = torch.stack([value.roll(shift, self.dim - event) for shift in shifts])
        return rows.reshape(len(shifts), *[1] * (self.layout.nesting - len(batch)), *value.shape)


def _shifts(series: int, most: int) -> list[int]:
    every = torch.arange(1, series)
    return every.tolist() if len(every) <= most else every[torch.randperm(len(every))[:most]].tolist()


def _check(trace: Any, layout: Layout, dim: int, series: int) -> None:
    if series < 2:
        raise FitError(
            f"plate '{layout.plate}' has {series} member: mutual information needs two series or more."
        )
    for name, site in layout.locals(trace):
        ts = getattr(site["fn"], "ts", None)
        if ts is None or ts.dim() <= -dim or torch.equal(ts, ts.roll(1, dim - 1)):
            continue
        raise FitError(
            f"path '{name}': the series have times of their own, so the path of one has no density under another's "
            "guide. Mutual information needs shared times: take the series on one grid (missing values masked)."
        )


def site_uses(
    found: Draws, is_local: Callable[[Site], bool], series: int, threshold: float = 0.01
) -> tuple[SiteUse, ...]:
    """Active units and KL of every latent of the model; of one series no unit can be called active.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def program():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> with torch.no_grad():
        ...     found = draw((program, program), (), 4)
        >>> site_uses(found, lambda site: False, 1)
        (SiteUse(name='z', local=False, units=1, active=None, kl=0.0),)
    """
    out = []
    for name, prior in found.prior.items():
        q = found.latents[name].log_prob
        inner = found.latents.get(name + _AUXILIARY)  # of Pyro's own automatic guides
        if inner is not None:
            q = q + inner.log_prob
        kl = sum_rightmost(q - prior.log_prob, len(prior.plates)).mean().item()
        local = is_local(prior)
        free = unconstrained(prior)
        active = int(_active(free, threshold).sum()) if local and series > 1 else None
        out.append(SiteUse(name, local, free.shape[-1], active, kl / series if local else kl))
    return tuple(out)


def unconstrained(site: Site) -> Tensor:
    """(draws, members, units) the values of a site in unconstrained coordinates; of a discrete one, themselves.

    Example:
        >>> import pyro.distributions as dist
        >>> site = Site("theta", dist.LogNormal(torch.zeros(4), 1.0), torch.ones(4), torch.zeros(4), (), False)
        >>> unconstrained(site).shape
        torch.Size([4, 1, 1])
    """
    plates = 1 + len(site.plates)
    draws, *batch = site.value.shape[:plates]
    # What left of the plates was squeezed out of the value is still in the distribution.
    ones = [1] * (len(site.fn.batch_shape) - plates)
    value = site.value.reshape(draws, *ones, *batch, *site.value.shape[plates:])
    discrete = site.fn.support.is_discrete
    u = value.to(site.log_prob.dtype) if discrete else biject_to(site.fn.support).inv(value)
    return u.reshape(draws, math.prod(batch), -1)


def _active(draws: Tensor, threshold: float) -> Tensor:
    """Units whose means over draws have a variance over members above the threshold, and above what the finite number
    of draws adds, by five of its standard errors: of a wide posterior that is more than the threshold."""
    spread = draws.mean(0).var(0)
    if len(draws) < 2:
        return spread > threshold
    added = draws.var(0).mean(0) / len(draws)
    error = added * math.sqrt(2 / (draws.shape[1] - 1))
    return spread - added > (5 * error).clamp(min=threshold)
