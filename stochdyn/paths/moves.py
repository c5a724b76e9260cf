"""One step of many particles: how a particle filter moves along a path and what its weights gain."""

import abc

import torch
from torch import Tensor

from stochdyn.errors import FieldError
from stochdyn.paths.components import Products
from stochdyn.paths.guided import GuidedPath
from stochdyn.paths.guided_jumps import GuidedJumpPath
from stochdyn.paths.jump_diffusion import JumpDiffusionPath
from stochdyn.paths.message import Message
from stochdyn.paths.noise import AbstractNoise, AbstractTwist
from stochdyn.paths.sde import SDEPath
from stochdyn.paths.steering import shift

# What a step needs of each particle: resampled with it.
Carried = tuple[Tensor, ...]
Path = SDEPath | GuidedPath | JumpDiffusionPath | GuidedJumpPath


class AbstractMoves(abc.ABC):
    """The moves of particles (particles, *batch, state) along the grid of a path."""

    path: GuidedPath | JumpDiffusionPath | GuidedJumpPath

    def __init__(self, ndim: int) -> None:
        self.t, self.dt, context = self.path.chain.layout(ndim)
        self.rows = [None] * len(self.t) if context is None else context.unbind(0)

    @abc.abstractmethod
    def start(self, particles: int) -> tuple[Tensor, Tensor]:
        """Initial states, and the logarithms of their weights (particles, *batch)."""

    @abc.abstractmethod
    def ahead(self, k: int, z: Tensor) -> tuple[Tensor, Carried]:
        """What weighs a state before step k: the log integral of step times message; and what the step needs."""

    @abc.abstractmethod
    def move(self, k: int, z: Tensor, carried: Carried, resampled: bool) -> tuple[Tensor, Tensor]:
        """New states, and what the logarithms of the weights gain beside `-ahead`."""


class PriorMoves(AbstractMoves):
    """Of a jump diffusion without messages: the bootstrap filter.

    Example:
        >>> import stochdyn as sd
        >>> jumps = sd.CompoundPoisson(1.0, sd.DoubleExponentialJump(0.4, 10.0, 5.0))
        >>> path = sd.JumpDiffusionPath(lambda t, z: 0 * z, torch.tensor([0.2]), jumps, torch.zeros(1),
        ...                             torch.linspace(0, 1, 6))
        >>> PriorMoves(path).start(10)[0].shape
        torch.Size([10, 1])
    """

    def __init__(self, path: JumpDiffusionPath) -> None:
        self.path = path
        super().__init__(len(path.batch_shape) + 2)

    def start(self, particles: int) -> tuple[Tensor, Tensor]:
        path = self.path
        z = path.chain.start.sample(torch.Size((particles,)))
        z = z.expand(particles, *path.batch_shape, path.chain.state_dim)
        return z, torch.zeros_like(z[..., 0])

    def ahead(self, k: int, z: Tensor) -> tuple[Tensor, Carried]:
        return torch.zeros_like(z[..., 0]), ()

    def move(self, k: int, z: Tensor, carried: Carried, resampled: bool) -> tuple[Tensor, Tensor]:
        return self.path.move(self.t[k], self.dt[k], z, self.rows[k]), torch.zeros_like(z[..., 0])


class JumpMoves(AbstractMoves):
    """Of a guided jump diffusion: a step is a draw of a mixture of normals.

    Example:
        >>> import stochdyn as sd
        >>> jumps = sd.CompoundPoisson(1.0, sd.NormalJump(0.0, 4.0))
        >>> path = sd.JumpDiffusionPath(lambda t, z: 0 * z, torch.tensor([0.2]), jumps, torch.zeros(1),
        ...                             torch.linspace(0, 1, 6))
        >>> guided = path.guided(path.filtered(sd.Message(torch.zeros(6, 1), torch.zeros(6, 1))))
        >>> JumpMoves(guided).ahead(0, torch.zeros(10, 1))[0].abs().max() < 1e-6
        tensor(True)
    """

    def __init__(self, path: GuidedJumpPath) -> None:
        self.path = path
        super().__init__(len(path.batch_shape) + 2)
        self._most: int | None = None
        self.messages = path.message.time_major().lifted(len(path.batch_shape) + 2)

    def start(self, particles: int) -> tuple[Tensor, Tensor]:
        path = self.path
        z = path.start_from(torch.Size((particles, *path.batch_shape)))
        log_w = path.chain.start.log_prob(z) - path.score_start(z, path.message)
        return z, log_w.expand(z.shape[:-1])

    def ahead(self, k: int, z: Tensor) -> tuple[Tensor, Carried]:
        after = self.messages[k + 1]
        if self.path.prior.max_jumps is None:
            rate = self.path.prior.intensity(self.t[k], z, self.rows[k]) * self.dt[k]
            self._most = max(self.path.prior.counts(rate), 1)
        mixture = self.path.mixture(self.t[k], self.dt[k], z, self.rows[k], after, self._most)
        mixture = mixture.expanded(z.shape[:-1])
        ahead = torch.where(self.dt[k][..., 0] > 0, mixture.log_integral(), after.log_value(z))
        return ahead, (*mixture.parts, ahead)

    def move(self, k: int, z: Tensor, carried: Carried, resampled: bool) -> tuple[Tensor, Tensor]:
        *parts, ahead = carried
        new = torch.where(self.dt[k] > 0, Products(*parts).draw().to(z), z)
        off = self.path.mismatch(self.t[k], self.dt[k], z, new, self.rows[k], self._most)
        return new, ahead - self.messages[k + 1].log_value(new) + off


class GaussianMoves(AbstractMoves):
    """Of a path whose steps are Gaussian, twisted, controlled or steered.

    Example:
        >>> import stochdyn as sd
        >>> path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.5]), torch.zeros(1), torch.linspace(0, 1, 11))
        >>> GaussianMoves(path.guided()).start(10)[1].shape
        torch.Size([10])
    """

    def __init__(self, path: GuidedPath) -> None:
        self.path = path
        ndim = len(path.batch_shape) + 2
        super().__init__(ndim)
        self.message = None if path.message is None else path.message.time_major()
        self.controls = None if path.control is None else path.control.drifts(ndim).one_by_one()
        self.steered = None if path.steered is None else path.steered.drifts(ndim).one_by_one()

    def start(self, particles: int) -> tuple[Tensor, Tensor]:
        path, shape = self.path, torch.Size((particles,))
        z = path.start_from(self._noise(particles, path.chain.state_dim), shape, random=True)
        log_w = path.chain.start.log_prob(z) - path.score_start(z, path.message)
        return z, log_w.expand(particles, *path.batch_shape)

    def ahead(self, k: int, z: Tensor) -> tuple[Tensor, Carried]:
        a, self._step = self.path.chain.step(self.t[k], self.dt[k], self.rows[k], z)
        after = self._after(k)
        self._twist, mean, ahead = _look_ahead(self._step, a, after)
        return ahead, (a, mean, ahead)

    def move(self, k: int, z: Tensor, carried: Carried, resampled: bool) -> tuple[Tensor, Tensor]:
        path, (a, mean, _) = self.path, carried
        noise, twist = self._step, self._twist
        if resampled and not path.chain.shares_noise:
            noise, after = path.chain.step(self.t[k], self.dt[k], self.rows[k], z)[1], self._after(k)
            twist = None if after is None else noise.twist(after.precision, after.diagonal)
        if self.controls is not None:
            mean = mean + shift(self.controls[k], self.t[k], self.dt[k], z)
        if self.steered is not None:
            own = path.chain.solver.advance(self.steered[k], self.t[k], self.dt[k], z)
            mean = mean + noise.safe((self.dt[k] > 0)[..., 0]).solve(own - a)
        eps = self._noise(len(z), path.chain.noise_dim)
        xi = mean + (eps if twist is None else twist.colour(eps))
        gained = 0.5 * (eps.square() - xi.square()).sum(-1)
        return a + noise.apply(xi), gained + (0.0 if twist is None else twist.half_logdet())

    def _after(self, k: int) -> Message | None:
        return None if self.message is None or self.steered is not None else self.message[k + 1]

    def _noise(self, particles: int, size: int) -> Tensor:
        chain = self.path.chain
        return torch.randn(particles, *self.path.batch_shape, size, dtype=chain.dtype, device=chain.device)


def moves_of(path: Path) -> AbstractMoves:
    """How particles move along a path.

    Raises:
        FieldError: for anything else.

    Example:
        >>> import stochdyn as sd
        >>> path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.5]), torch.zeros(1), torch.linspace(0, 1, 11))
        >>> type(moves_of(path)).__name__
        'GaussianMoves'
    """
    if isinstance(path, JumpDiffusionPath):
        return PriorMoves(path)
    if isinstance(path, GuidedJumpPath):
        return JumpMoves(path)
    if not isinstance(path, SDEPath | GuidedPath):
        raise FieldError(
            f"Particles move along an SDEPath, a JumpDiffusionPath, or a guided one, got {type(path).__name__}."
        )
    return GaussianMoves(path if isinstance(path, GuidedPath) else path.guided())


def _look_ahead(
    noise: AbstractNoise, a: Tensor, after: Message | None
) -> tuple[AbstractTwist | None, Tensor, Tensor]:
    """The twist of a step, the mean of its noise, and the log integral of step times message."""
    if after is None:
        none = torch.zeros(a.shape[:-1], dtype=a.dtype, device=a.device)
        return None, torch.zeros_like(noise.pull(a)), none
    twist = noise.twist(after.precision, after.diagonal)
    v = noise.pull(after.gradient(a))
    mean = twist.smooth(v)
    return twist, mean, after.log_value(a) + 0.5 * (v * mean).sum(-1) + twist.half_logdet()
