"""The initial state as a step of its own, z0 = T(a + G e) with e ~ N(0, I): a message twists it like any."""

from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, biject_to
from torch.distributions.transforms import ComposeTransform, Transform

from stochdyn.errors import FieldError, ShapeError
from stochdyn.paths.noise import AbstractNoise, DiagonalNoise, MatrixNoise


class AbstractStart(ABC):
    """Where a path begins: (*batch, state)."""

    batch_shape: torch.Size
    state_dim: int

    @abstractmethod
    def expand(self, batch_shape: torch.Size) -> "AbstractStart":
        """The same start with a larger batch."""

    @abstractmethod
    def sample(self, sample_shape: torch.Size) -> Tensor:
        """Draw (*sample, *batch, state)."""

    @abstractmethod
    def log_prob(self, z0: Tensor) -> Tensor:
        """The log density, 0 where the start is known."""

    @abstractmethod
    def centre(self) -> Tensor:
        """A typical start, without randomness: (*batch, state)."""


class KnownStart(AbstractStart):
    """A tensor: no density."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.batch_shape, self.state_dim = value.shape[:-1], value.shape[-1]

    def expand(self, batch_shape: torch.Size) -> "KnownStart":
        return KnownStart(self.value.expand(*batch_shape, self.state_dim))

    def sample(self, sample_shape: torch.Size) -> Tensor:
        return self.value.expand(*sample_shape, *self.value.shape)

    def log_prob(self, z0: Tensor) -> Tensor:
        return z0.new_zeros(torch.broadcast_shapes(z0.shape[:-1], self.batch_shape))

    def centre(self) -> Tensor:
        return self.value


class RandomStart(AbstractStart):
    """A distribution over vectors, with the Gaussian base in which a message twists it.

    A Normal or MultivariateNormal, possibly under transforms (LogNormal), is its own base and the twist is
    exact there. Any other distribution is twisted in its unconstrained space with a standard normal as base;
    its density, and its draws where there is no message, stay its own.

    Attributes:
        gaussian: whether the prior is its own base.
    """

    def __init__(self, prior: dist.TorchDistribution) -> None:
        self.prior = prior
        self.batch_shape, self.state_dim = prior.batch_shape, prior.event_shape[-1]
        self.gaussian, self.loc, self.noise, self.transform = _gaussian_base(prior)

    def expand(self, batch_shape: torch.Size) -> "RandomStart":
        return RandomStart(self.prior.expand(batch_shape))

    def sample(self, sample_shape: torch.Size) -> Tensor:
        draw = self.prior.rsample if self.prior.has_rsample else self.prior.sample
        return draw(sample_shape)

    def log_prob(self, z0: Tensor) -> Tensor:
        return self.prior.log_prob(z0)

    def centre(self) -> Tensor:
        return self.from_base(self.loc).expand(*self.batch_shape, self.state_dim)

    def from_base(self, e: Tensor) -> Tensor:
        """Base coordinates to state."""
        return e if self.transform is None else self.transform(e)

    def to_base(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        """State to base coordinates, and the log of |dz0 / de| summed over the state."""
        if self.transform is None:
            return z0, z0.new_zeros(())
        e = self.transform.inv(z0)
        ladj = self.transform.log_abs_det_jacobian(e, z0)
        return e, ladj.sum(-1) if self.transform.domain.event_dim == 0 else ladj


def as_start(initial: "dist.TorchDistribution | Tensor") -> AbstractStart:
    """Read `initial` of a path.

    Raises:
        ShapeError: if it is not over vectors.
        FieldError: if it is neither a distribution over real vectors nor a tensor.
    """
    if isinstance(initial, Tensor):
        if initial.dim() < 1:
            raise ShapeError(
                "`initial` must have shape (*batch, state), got a number. Write torch.tensor([x0])."
            )
        if not initial.is_floating_point():
            raise FieldError(
                f"`initial` must be floating point, got {initial.dtype}. Write initial.double()."
            )
        return KnownStart(initial)
    if not isinstance(initial, torch.distributions.Distribution):
        raise FieldError(f"`initial` must be a distribution or a tensor, got {type(initial).__name__}.")
    if len(initial.event_shape) != 1:
        raise ShapeError(
            f"`initial` must have event_shape (state,), got batch_shape {tuple(initial.batch_shape)} and "
            f"event_shape {tuple(initial.event_shape)}. Add .to_event(1) to a Normal over the state."
        )
    if isinstance(initial, Independent) and isinstance(initial.base_dist, dist.Delta):
        return KnownStart(initial.base_dist.v)
    if isinstance(initial, dist.Delta):
        return KnownStart(initial.v)
    return RandomStart(initial)


def _gaussian_base(
    prior: torch.distributions.Distribution,
) -> tuple[bool, Tensor, AbstractNoise, Transform | None]:
    core, transforms = _unwrap(prior)
    shape = (*prior.batch_shape, *prior.event_shape)
    if (core.batch_shape + core.event_shape)[-1:] != shape[-1:]:
        return _reference_base(prior, torch.Size(shape))
    if isinstance(core, torch.distributions.Normal):
        loc, noise = core.loc.expand(shape), DiagonalNoise(core.scale.expand(shape))
    elif isinstance(core, torch.distributions.MultivariateNormal):
        loc, noise = core.loc.expand(shape), MatrixNoise(core.scale_tril.expand(*shape, shape[-1]))
    else:
        return _reference_base(prior, torch.Size(shape))
    return True, loc, noise, ComposeTransform(transforms) if transforms else None


def bijection(prior: torch.distributions.Distribution) -> Transform:
    """From unconstrained numbers on to the support of a start; a mixture has that of its components.

    Raises:
        NotImplementedError: if there is none, e.g. for integers.
    """
    try:
        return biject_to(prior.support)
    except NotImplementedError:
        if isinstance(prior, torch.distributions.MixtureSameFamily):
            return biject_to(prior.component_distribution.support)
        raise


def _reference_base(
    prior: torch.distributions.Distribution, shape: torch.Size
) -> tuple[bool, Tensor, AbstractNoise, Transform]:
    with torch.random.fork_rng(devices=[]):
        like = prior.sample()
    try:
        transform = bijection(prior)
        same = transform.inverse_shape(shape) == shape and like.is_floating_point()
    except NotImplementedError:
        same = False
    if not same:
        raise FieldError(
            f"`initial` is {type(prior).__name__} with support {prior.support}; a path needs a start with "
            "one free real number per state. Use a continuous distribution, or a tensor for a known start."
        )
    zeros = like.new_zeros(shape)
    return False, zeros, DiagonalNoise(torch.ones_like(zeros)), transform


def _unwrap(
    prior: torch.distributions.Distribution,
) -> tuple[torch.distributions.Distribution, list[Transform]]:
    """Strip Independent and Transformed wrappers; transforms are returned in the order they are applied."""
    transforms: list[Transform] = []
    while True:
        if isinstance(prior, Independent):
            prior = prior.base_dist
        elif isinstance(prior, torch.distributions.TransformedDistribution):
            transforms = list(prior.transforms) + transforms
            prior = prior.base_dist
        else:
            return prior, transforms
