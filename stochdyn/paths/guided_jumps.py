"""The guided path of a jump diffusion: every step a mixture of normals, twisted by a mixture of messages."""

from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

from stochdyn.errors import GuideError
from stochdyn.paths.checks import joint_batch
from stochdyn.paths.components import Products
from stochdyn.paths.mixture_message import FILTER_TAIL, MixtureMessage, counted
from stochdyn.paths.noise import matvec
from stochdyn.paths.start import RandomStart
from stochdyn.paths.support import path_support

if TYPE_CHECKING:
    from stochdyn.paths.jump_diffusion import JumpDiffusionPath

_BLOCK = 2**21  # numbers at once
_FLAT = (1,), (1, 1), (1, 1, 1)


class GuidedJumpPath(dist.TorchDistribution):
    """A jump diffusion twisted step by step by a mixture message; what its guide samples.

    The prior's step is a mixture of normals over how many jumps fall into it; times a mixture of Gaussian factors it
    stays one. Draws carry gradients by implicit reparametrisation of the mixture's conditional distribution functions,
    one coordinate after the other.

    Where the sizes are not normal, normals stand for them (`AbstractJumpSize.normals`): the density is that of what is
    drawn, so every bound and weight stays right.

        q(z' | z) ~ sum_n Poisson(n) N(z'; a + n mean, G^2 + n variance) * sum_c exp(w_c + h_c'z' - z'J_c z' / 2)

    Args:
        prior: the path.
        message: on its grid.
        score_message: the message as `score_parts` sees it, by default detached.

    Raises:
        GuideError: if the message is on another grid, or has other states.

    References:
        Figurnov, Mohamed & Mnih, "Implicit reparameterization gradients", 2018, https://arxiv.org/abs/1805.08498

    Example:
        >>> import torch, stochdyn as sd
        >>> jumps = sd.CompoundPoisson(1.0, sd.NormalJump(0.0, 4.0))
        >>> path = sd.JumpDiffusionPath(lambda t, z: 0 * z, torch.tensor([0.3]), jumps, torch.zeros(1),
        ...                             torch.linspace(0, 1, 6))
        >>> seen = sd.Message(torch.zeros(6, 1), torch.zeros(6, 1))
        >>> path.guided(path.filtered(seen)).rsample().shape
        torch.Size([6, 1])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        prior: "JumpDiffusionPath",
        message: MixtureMessage,
        score_message: MixtureMessage | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        chain = prior.chain
        if message.log_weight.shape[-2] != chain.steps + 1:
            raise GuideError(
                f"The message has {message.log_weight.shape[-2]} times, the path {chain.steps + 1}. Make it on the "
                "path's own grid."
            )
        if message.information.shape[-1] != chain.state_dim:
            raise GuideError(
                f"The message is about {message.information.shape[-1]} states, the path has {chain.state_dim}."
            )
        batch = joint_batch(path=chain.batch_shape, message=message.batch_shape)
        self.prior = prior if batch == prior.batch_shape else prior.expand(batch)
        self.message, self.score_message = message, score_message
        event_shape = torch.Size((chain.steps + 1, chain.state_dim))
        super().__init__(batch, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return path_support(self.prior.chain)

    @property
    def chain(self):
        """The prior's chain."""
        return self.prior.chain

    @property
    def ts(self) -> Tensor:
        """The grid (*batch, time), float64."""
        return self.prior.ts

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "GuidedJumpPath":
        new = object.__new__(GuidedJumpPath)
        new.__dict__.update(self.__dict__)
        new.prior = self.prior.expand(torch.Size(batch_shape))
        new._batch_shape = torch.Size(batch_shape)
        return new

    def _validate_sample(self, value: Tensor) -> None:
        self.prior.chain.check_value(value)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        chain = self.prior.chain
        shape = torch.Size((*sample_shape, *self.batch_shape))
        z = self.start_from(shape)
        t, dt, context = chain.layout(z.dim())
        after = self.message.time_major().lifted(z.dim())
        rows = [None] * chain.steps if context is None else context.unbind(0)
        most = None if callable(self.prior.jumps.intensity) else self._most(t, dt, z)
        states = [z]
        for k, (s, h, row) in enumerate(zip(t.unbind(0), dt.unbind(0), rows, strict=True)):
            mixture = self.mixture(s, h, z, row, after[k + 1], most)
            z = torch.where(h > 0, mixture.draw().to(z), z)
            states.append(z)
        value = torch.stack(states, -2)
        if self._validate_args:
            chain.check_finite(value)
        return value

    def _most(self, t: Tensor, dt: Tensor, z: Tensor) -> int:
        """Of a constant intensity, for all steps."""
        if not len(t):
            return 1
        rate = self.prior.intensity(t[0], z).detach() * dt.max()
        return max(self.prior.counts(rate, FILTER_TAIL), 1)

    def mixture(
        self,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        context: Tensor | None,
        message: MixtureMessage,
        most: int | None = None,
    ) -> Products:
        """What a step from z draws from: prior's step times message, summed over at most so many jumps."""
        a, noise = self.prior.chain.step(t, dt, context, z)
        scale = noise.safe((dt > 0)[..., 0]).scale.expand(a.shape)  # type: ignore
        rate = self.prior.intensity(t, z, context) * dt
        most = max(self.prior.counts(rate, FILTER_TAIL), 1) if most is None else most
        return self._mixture(a, scale, rate, message, most)

    def mismatch(
        self,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        new: Tensor,
        context: Tensor | None,
        most: int | None = None,
    ) -> Tensor:
        """The log density of a step less that of the normals which stand for it; zero where sizes are normal. `most` is
        what `mixture` was given when the step was drawn."""
        if self.prior.jumps.size.gaussian:
            return torch.zeros_like(z[..., 0])
        flat = MixtureMessage(*(torch.zeros(shape, dtype=torch.float64, device=z.device) for shape in _FLAT))
        stand_in = self.mixture(t, dt, z, context, flat, most)
        exact = self.prior.step_density(t, dt, z, new, context)
        found = exact - stand_in.log_density(new.to(stand_in.mean)) - stand_in.log_integral()
        return torch.where(dt[..., 0] > 0, found, torch.zeros_like(found))

    def start_from(self, shape: torch.Size) -> Tensor:
        """Initial states (*shape, state), drawn from the twisted start."""
        start = self.prior.chain.start
        if not isinstance(start, RandomStart):
            own = start.sample(torch.Size(shape[: len(shape) - len(self.batch_shape)]))
            return own.expand(*shape, start.state_dim)
        first = self._first(start, self.message).expanded(shape)
        return start.from_base(start.loc + start.noise.apply(first.draw().to(start.loc)))

    def _first(self, start: RandomStart, message: MixtureMessage) -> Products:
        """The noise of the start in its base coordinates, where the message acts."""
        m = message.time_major()[0]
        loc, G = (x.to(m.precision) for x in (start.loc[..., None, :], start.noise.factor()[..., None, :, :]))
        pull = matvec(m.precision, loc)
        own = MixtureMessage(
            m.log_weight + (loc * (m.information - 0.5 * pull)).sum(-1),
            matvec(G.mT, m.information - pull),
            G.mT @ m.precision @ G,
        )
        zero = torch.zeros_like(loc)
        return Products.of(zero[..., 0], zero, torch.ones_like(loc), own)

    def _mixture(
        self, a: Tensor, scale: Tensor, rate: Tensor, message: MixtureMessage, most: int
    ) -> Products:
        # Log weights are values at zero: far from it their differences need more digits than states have.
        a, scale, rate = (x.to(message.precision) for x in (a, scale, rate))
        m, d, log_prior, _ = counted(self.prior, a, scale.square(), rate, most)
        return Products.of(log_prior, m, d, message)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = self.prior.chain.aligned(value)
        self.prior.chain.check_start(value)
        return self._score(value, self.message)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Sticking-the-landing: the entropy term sees the sampled values, not the guide's own parameters."""
        message = self.message.detach() if self.score_message is None else self.score_message
        entropy_term = self._score(self.prior.chain.aligned(value), message)
        return ScoreParts(entropy_term, 0, entropy_term)

    def _score(self, value: Tensor, message: MixtureMessage) -> Tensor:
        steps = self.prior.steps(value)
        at = message.time_major().lifted(steps.a.dim() - 1)
        most = max(self.prior.counts(steps.rate, FILTER_TAIL), 1)
        rate = steps.rate.expand(*steps.a.shape[:-1], 1)
        size = steps.a[:1].numel() * (most + 1) * message.log_weight.shape[-1] * steps.a.shape[-1]
        rows = max(_BLOCK // max(size, 1), 1)
        parts = [slice(k, k + rows) for k in range(0, len(steps.a), rows)]
        density = torch.cat(
            [
                self._mixture(steps.a[p], steps.scale[p], rate[p], at[1:][p], most).log_density(
                    steps.after[p].to(message.precision)
                )
                for p in parts
            ]
        )
        density = torch.where(steps.real, density, torch.zeros_like(density))
        return self.score_start(value[..., 0, :], message) + density.sum(0).to(value)

    def score_start(self, z0: Tensor, message: MixtureMessage) -> Tensor:
        """The log density of an initial state under its prior times a message."""
        start = self.prior.chain.start
        if not isinstance(start, RandomStart):
            return start.log_prob(z0)
        e, ladj = start.to_base(z0)
        xi = start.noise.solve(e - start.loc)
        density = self._first(start, message).log_density(xi.to(message.precision)).to(xi)
        return density - start.noise.logdet() - ladj
