"""Posteriors of the latents that are not paths, as values that a guide is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from stochdyn.errors import GuideError
from stochdyn.guides.latent import LatentNormal
from stochdyn.guides.plates import Place
from stochdyn.guides.signature import Trained


@dataclass(frozen=True)
class MeanField:
    """Independent normals in unconstrained space.

    Args:
        init_scale: initial standard deviations, as a share of the prior's.

    Example:
        >>> import stochdyn as sd
        >>> sd.MeanField().init_scale
        0.1
    """

    init_scale: float = 0.1


@dataclass(frozen=True)
class FullRank:
    """One normal with full covariance over all latents outside plates; full within a member inside plates.

    Args:
        init_scale: initial standard deviations, as a share of the prior's.

    Example:
        >>> import stochdyn as sd
        >>> sd.FullRank(init_scale=0.05)
        FullRank(init_scale=0.05)
    """

    init_scale: float = 0.1


@dataclass(frozen=True)
class Start:
    """What the prior says of a latent: where to begin. All in flattened unconstrained space."""

    loc: Tensor
    scale: Tensor
    place: Place
    table_shape: torch.Size


def free_shape(prior: dist.TorchDistribution) -> torch.Size:
    """The event shape of a latent in unconstrained space."""
    transform = biject_to(prior.support)
    return torch.Size(
        transform.inverse_shape(prior.batch_shape + prior.event_shape)[len(prior.batch_shape) :]
    )


def prior_start(name: str, prior: dist.TorchDistribution, place: Place, draws: int = 200) -> Start:
    """Median and spread of the prior in unconstrained space.

    Raises:
        GuideError: if the latent is discrete and not enumerated.
    """
    if prior.support is None or getattr(prior.support, "is_discrete", False):
        raise GuideError(
            f"site '{name}' is discrete. Mark it infer={{'enumerate': 'parallel'}} and use TraceEnum_ELBO, or sum it "
            "out of the likelihood."
        )
    u = biject_to(prior.support).inv(prior.sample(torch.Size((draws,))))
    u = u.reshape(draws, *prior.batch_shape, -1).detach()
    loc, scale = centre_and_spread(u)
    full = place.table_shape(prior.batch_shape)
    if full != prior.batch_shape:
        lead = tuple(range(len(prior.batch_shape)))
        loc = loc.mean(lead).expand(*full, -1) if lead else loc
        scale = scale.mean(lead).expand(*full, -1) if lead else scale
    return Start(loc.contiguous(), scale.contiguous(), place, full)


def centre_and_spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Median and interquartile range / 1.35 over the first dimension; 1 where there is no spread."""
    n = len(rows)
    if n == 0:
        return torch.zeros_like(rows.sum(0)), torch.ones_like(rows.sum(0))
    ordered = rows.sort(0).values
    spread = (ordered[(3 * n) // 4 - (n == 1)] - ordered[n // 4]) / 1.35
    return ordered[n // 2], torch.where(
        (spread > 0) & torch.isfinite(spread), spread, torch.ones_like(spread)
    )


def lower_factor(scale: Tensor, lower: Tensor) -> Tensor:
    """scale (I + lower), row by row: the numbers below the diagonal are of order one, however narrow the posterior."""
    return torch.diag_embed(scale) + scale[..., None] * lower.tril(-1)


class LocalNormal(nn.Module):
    """A normal per member of the plates around a site; `factor` has off-diagonal entries where full."""

    def __init__(self, loc: Tensor, log_scale: Tensor, lower: Tensor | None) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(loc), nn.Parameter(log_scale)
        self.lower = None if lower is None else nn.Parameter(lower)
        self.trained = Trained(loc.shape[:-1], loc.device)

    @classmethod
    def begin(cls, start: Start, family: Any) -> "LocalNormal":
        """From the prior; diagonal with `MeanField`, else full."""
        log_scale = (start.scale * family.init_scale).log()
        size = start.loc.shape[-1]
        full = not isinstance(family, MeanField) and size > 1
        return cls(
            start.loc.clone(), log_scale, start.loc.new_zeros(*start.loc.shape, size) if full else None
        )

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "LocalNormal":
        """An empty one with the shapes of a state_dict."""
        like = {name: torch.zeros_like(value) for name, value in state.items()}
        return cls(like["loc"], like["log_scale"], like.get("lower"))

    def posterior(self, prior: dist.TorchDistribution, place: Place) -> LatentNormal:
        """The posterior for the members of this run.

        Raises:
            GuideError: if the plates have other members than those that it holds.
        """
        if not place.fits(self.loc, 1):
            raise GuideError(
                f"site '{place.name}': the guide holds posteriors for {tuple(self.loc.shape[:-1])} members of the "
                f"plates, this run has plates {place.sizes()}. Use amortize={{'{place.name}': plate}} with an "
                "encoder, or fit a new guide."
            )
        loc, log_scale = place.take(self.loc, 1), place.take(self.log_scale, 1)
        factor = log_scale.exp()
        if self.lower is not None:
            factor = lower_factor(factor, place.take(self.lower, 2))
        q = LatentNormal(
            loc,
            factor,
            biject_to(prior.support),
            (prior.event_shape, free_shape(prior)),
            (loc.detach(), factor.detach()),
        )
        batch = torch.broadcast_shapes(prior.batch_shape, q.batch_shape)
        return q if batch == q.batch_shape else q.expand(batch)

    def median(self, prior: dist.TorchDistribution, place: Place) -> Tensor:
        """The posterior median, without history."""
        u = place.take(self.loc, 1).detach()
        return biject_to(prior.support)(u.reshape(u.shape[:-1] + free_shape(prior)))


class Arrangement:
    """Where the latents outside plates stand in one vector, in the order of the model."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slices: dict[str, slice] = {}

    def arrange(self, sizes: Mapping[str, int]) -> None:
        """Lay the sites out.

        Raises:
            GuideError: if the sizes do not add up to what the parameters hold.
        """
        if sum(sizes.values()) != self.size:
            raise GuideError(
                f"The guide holds {self.size} numbers for latents outside plates, the model has "
                f"{sum(sizes.values())} ({', '.join(sizes)}). Load the state of the same model."
            )
        self.slices, at = {}, 0
        for name, size in sizes.items():
            self.slices[name] = slice(at, at + size)
            at += size

    def part(self, name: str, before: int) -> slice:
        """Where a site stands, after so many numbers.

        Raises:
            GuideError: if that is not where it stood when the guide first ran.
        """
        part = self.slices[name]
        if before != part.start:
            raise GuideError(
                f"site '{name}' comes after {before} numbers of latents outside plates, it came after "
                f"{part.start} when the guide first ran ({', '.join(self.slices)}). A model must have the same latents "
                "in the same order in every run."
            )
        return part


class JointNormal(nn.Module):
    """One normal over all latents outside plates, sampled site by site: each conditional on those before it."""

    def __init__(self, loc: Tensor, log_scale: Tensor, lower: Tensor) -> None:
        super().__init__()
        self.loc, self.log_scale, self.lower = nn.Parameter(loc), nn.Parameter(log_scale), nn.Parameter(lower)
        self.arrangement = Arrangement(len(loc))

    @classmethod
    def begin(cls, starts: Mapping[str, Start], family: FullRank) -> "JointNormal":
        """From the priors."""
        loc = torch.cat([s.loc for s in starts.values()])
        scale = torch.cat([s.scale for s in starts.values()])
        return cls(loc, (scale * family.init_scale).log(), loc.new_zeros(len(loc), len(loc)))

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "JointNormal":
        """An empty one with the shapes of a state_dict."""
        return cls(*(torch.zeros_like(state[name]) for name in ("loc", "log_scale", "lower")))

    def arrange(self, sizes: Mapping[str, int]) -> None:
        """Lay the sites out, in the order of the model."""
        self.arrangement.arrange(sizes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where every site stands."""
        return self.arrangement.slices

    def at(self) -> Tensor:
        """Where it stands, in unconstrained space: (size,)."""
        return self.loc.detach().clone()

    @torch.no_grad()
    def move_to(self, u: Tensor) -> None:
        """Stand elsewhere, as wide as before."""
        self.loc.copy_(u)

    def history(self) -> "Residuals":
        """What one run of a guide records."""
        return Residuals()

    def conditional(self, name: str, before: "Residuals") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """loc and factor given the residuals of the sites before, attached and as the score sees them."""
        part = self.arrangement.part(name, before.count)
        L = lower_factor(self.log_scale.exp(), self.lower)
        rows, known = L[part, : part.start], part.start
        block, loc = L[part, part], self.loc[part]
        score_loc, score_block = loc.detach(), block.detach()
        if known:
            loc = loc + before.attached @ rows.mT
            score_loc = score_loc + before.scored @ rows.detach().mT
        return loc, block, score_loc, score_block

    def posterior(self, name: str, prior: dist.TorchDistribution, before: "Residuals") -> LatentNormal:
        """The conditional posterior of one site."""
        loc, block, score_loc, score_block = self.conditional(name, before)
        grow = (*loc.shape[:-1], *block.shape)
        return LatentNormal(
            loc,
            block.expand(grow),
            biject_to(prior.support),
            (prior.event_shape, free_shape(prior)),
            (score_loc, score_block.expand(grow)),
        )

    def median(self, name: str, prior: dist.TorchDistribution) -> Tensor:
        """The posterior median, without history."""
        u = self.loc[self.slices[name]].detach()
        return biject_to(prior.support)(u.reshape(free_shape(prior)))


class Residuals:
    """The whitened values of the joint sites sampled so far in one run of a guide."""

    def __init__(self) -> None:
        self.attached, self.scored = torch.empty(0), torch.empty(0)

    @property
    def count(self) -> int:
        """How many numbers are recorded."""
        return self.attached.shape[-1]

    def add(self, q: LatentNormal, value: Tensor) -> None:
        """Record a sampled (or replayed) value."""
        u = q.free(value)
        attached = _whiten(u - q.loc, q.factor)
        scored = _whiten(u - q.score[0], q.score[1])
        self.attached, self.scored = _join(self.attached, attached), _join(self.scored, scored)


def _whiten(r: Tensor, factor: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, r[..., None], upper=False)[..., 0]


def _join(before: Tensor, new: Tensor) -> Tensor:
    if before.numel() == 0:
        return new
    batch = torch.broadcast_shapes(before.shape[:-1], new.shape[:-1])
    return torch.cat([before.expand(*batch, -1), new.expand(*batch, -1)], -1)
