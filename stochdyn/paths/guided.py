"""The guided path: a path whose every step is twisted by a message and shifted by a control."""

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

from stochdyn.errors import GuideError
from stochdyn.fields import Field
from stochdyn.paths.chain import LOG_2PI, Chain, Known
from stochdyn.paths.checks import joint_batch
from stochdyn.paths.compiled import Compiled, StepInputs
from stochdyn.paths.drifts import BoundDrift
from stochdyn.paths.message import Message
from stochdyn.paths.noise import AbstractNoise, AbstractTwist, apply_precision, stacked
from stochdyn.paths.start import RandomStart
from stochdyn.paths.steering import Control, Steering, check_combination, frozen, shift
from stochdyn.paths.support import path_support


class GuidedPath(dist.TorchDistribution):
    """A path twisted step by step; made by `SDEPath.guided`, sampled by guides.

    With J the precision and h the information of the message on the new state, a = a(z) and S = (I +
    G'JG)^-1, the noise of a step is xi ~ N(S G'(h - J a) + sqrt(dt) u(t, z), S). Exact for linear-Gaussian
    models when the messages are those of the backward information filter.

    Args:
        chain: the prior's chain.
        message: on every grid time, see `Message`; None for none.
        control: `(t, z[, context]) -> (..., noise)`, drift in noise units; None for none.
        drift: `(t, z[, context]) -> (..., state)`, in place of the prior's drift; None for none. Beside it the
            message has one time only, the first, and acts on the start.
        context: what `drift` and `control` get instead of the path's own context.
        score_context: the context as `score_parts` sees it, by default detached; see `score_message`.
        loop: `Compiled(...)` runs the loop over time compiled; None runs it step by step.
        score_message: the message as `score_parts` sees it. By default the message detached; a guide whose
            message depends on latents sampled before the path passes one in which only its own parameters are
            detached.

    Raises:
        GuideError: if the message is on another grid.
        ShapeError: if the control does not return noise units.

    Example:
        >>> import stochdyn as sd
        >>> path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.5]), torch.zeros(1), torch.linspace(0, 1, 11))
        >>> guided = path.guided(message=(torch.ones(11, 1), torch.ones(11, 1)))
        >>> guided.rsample().shape
        torch.Size([11, 1])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        chain: Chain,
        message: Message | None,
        control: Control | None,
        score_message: Message | None = None,
        *,
        drift: Field | None = None,
        context: Tensor | None = None,
        score_context: Tensor | None = None,
        loop: Compiled | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_combination(control, drift, context, chain)
        points = chain.steps + 1 if drift is None else 1
        if message is not None:
            chain = _widened(chain, message=fitting(message, chain, points).batch_shape)
        if score_message is not None:
            fitting(score_message, chain, points)
        if score_message is not None and message is None:
            raise GuideError("`score_message` stands in for `message`, which is None. Pass both or none.")
        self.control, self.steered = None, None
        if control is not None:
            self.control = Steering(control, context, score_context, chain)
            chain = _widened(chain, control=self.control.batch_shape)
        elif drift is not None:
            self.steered = chain.steered(drift, context)
            chain = _widened(chain, drift=self.steered.batch_shape)
        self.message, self.score_message, self._score_context = message, score_message, score_context
        self.chain, self.loop = chain, loop
        self.has_rsample = message is not None or start_has_rsample(chain)
        self._drawn: Tensor | None = None
        self._steps: tuple[list[Tensor], list[AbstractNoise] | AbstractNoise] | None = None
        self._recalls = False
        event_shape = torch.Size((chain.steps + 1, chain.state_dim))
        super().__init__(self.chain.batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return path_support(self.chain)

    @property
    def ts(self) -> Tensor:
        """The grid (*batch, time), float64."""
        return self.chain.ts

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "GuidedPath":
        new = object.__new__(GuidedPath)
        new.__dict__.update(self.__dict__)
        shape = torch.Size(batch_shape)
        new.chain, new._drawn, new._steps, new._recalls = self.chain.expand(shape), None, None, False
        new.steered = None if self.steered is None else self.steered.expand(shape)
        new._batch_shape = shape
        return new

    def _validate_sample(self, value: Tensor) -> None:
        self.chain.check_value(value)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        sample_shape, chain = torch.Size(sample_shape), self.chain
        shape = (chain.steps + 1, *sample_shape, *self.batch_shape, chain.state_dim)
        noise = torch.randn(shape, dtype=chain.dtype, device=chain.device)
        value = self._transport(noise, self.start_from(noise[0], sample_shape, random=True))
        if self._validate_args:
            chain.check_finite(value)
        self._drawn = value
        return value

    def transport(self, eps: Tensor, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Turn standard normal noise (time, *sample, *batch, noise) into a path; zeros give the path's mode.

        Row 0 moves the initial state; with fewer noises than states the surplus columns are ignored.
        """
        return self._transport(eps, self.start_from(eps[0], sample_shape))

    @property
    def _own(self) -> Chain:
        return self.chain if self.steered is None else self.steered

    def _on_steps(self, message: Message | None) -> Message | None:
        """The message if it acts on the steps: beside another drift it acts on the start alone."""
        return None if self.steered is not None else message

    def _transport(self, eps: Tensor, z: Tensor) -> Tensor:
        chain, ndim = self._own, z.dim()
        t, dt, context = chain.layout(ndim)
        message = None if self._on_steps(self.message) is None else self.message.time_major().lifted(ndim)
        eps = eps[1:, ..., : chain.noise_dim]
        compiled = self._compiled(z, message, eps)
        if compiled is not None:
            return compiled
        affine = self._affine(message, eps, ndim) if self.control is None else None
        # Unbound once: a slice per step would cost a full-size gradient each.
        at = list(zip(t.unbind(0), dt.unbind(0), chain.drifts(ndim).one_by_one(), strict=True))
        if affine is not None:
            return self._affine_steps(z, at, affine)
        after = [None] * chain.steps if message is None else message[1:].unbind()
        controls = [None] * chain.steps if self.control is None else self.control.drifts(ndim).one_by_one()
        given = zip(at, _unbound(context, chain.steps), after, controls, eps.unbind(0), strict=True)
        states, means, noises = [z], [], []
        for (s, h, f), c, m, u, e in given:
            a, noise = chain.step(s, h, c, z, f)
            xi = e
            if m is not None:
                twist, mean = _twisted(noise, a, m)
                xi = mean + twist.colour(e)
            if u is not None:
                xi = xi + shift(u, s, h, z)
            z = a + noise.apply(xi)
            states.append(z)
            means.append(a)
            noises.append(noise)
        self._steps = means, noises
        return torch.stack(states, -2)

    def _compiled(self, z: Tensor, message: Message | None, eps: Tensor) -> Tensor | None:
        """The path by the compiled loop, where there is one and it can."""
        if self.loop is None or self.control is not None or (message is not None and not message.diagonal):
            return None
        chain, ndim = self._own, z.dim()
        t, dt, context = chain.layout(ndim)
        drifts, after = chain.drifts(ndim), None if message is None else message[1:]
        h, J = (None, None) if after is None else (after.information, after.precision)
        inputs = StepInputs(t, dt, drifts.shares(), context, h, J, eps)
        found = self.loop.run(chain.drift, chain.diffusion, chain.solver, z, inputs)
        if found is None:
            return None
        states, means, scales = found
        self._steps = means, [chain.noise_of(G) for G in scales]
        return torch.stack([z.expand(states[0].shape), *states], -2)

    def _affine_steps(
        self,
        z: Tensor,
        at: list[tuple[Tensor, Tensor, BoundDrift]],
        affine: tuple[AbstractNoise, Tensor | None, Tensor, bool],
    ) -> Tensor:
        noise, gains, offset, diagonal = affine
        states, means = [z], []
        for (s, h, f), M, b in zip(at, _unbound(gains, len(at)), offset.unbind(0), strict=True):
            a = self._own.solver.advance(f, s, h, z)
            z = b + (a if M is None else apply_precision(M, a, diagonal))
            states.append(z)
            means.append(a)
        self._steps = means, noise
        return torch.stack(states, -2)

    def start_from(self, eps: Tensor, sample_shape: torch.Size, *, random: bool = False) -> Tensor:
        """The initial state made of standard normal noise.

        A start that is not its own Gaussian base and has no message is not a function of noise: it is drawn
        from its distribution where `random`, else its centre in base coordinates is moved.
        """
        start = self.chain.start
        if not isinstance(start, RandomStart) or (random and not start.gaussian and self.message is None):
            return start.sample(sample_shape)
        e = start.loc.expand(*sample_shape, *self.batch_shape, start.state_dim)
        if self.message is None:
            return start.from_base(e + start.noise.apply(eps))
        twist, mean = _twisted(start.noise, e, self.message.time_major()[0])
        return start.from_base(e + start.noise.apply(mean + twist.colour(eps)))

    def _affine(
        self, message: Message | None, eps: Tensor, ndim: int
    ) -> tuple[AbstractNoise, Tensor | None, Tensor, bool] | None:
        """With constant noise every step is z' = M a(z) + c: the noise, M and c of all steps at once."""
        noise = self.chain.constant_noise(ndim)
        if noise is None:
            return None
        if message is None:
            return noise, None, noise.apply(eps), True
        after = message[1:]
        twist = noise.twist(after.precision, after.diagonal)
        c = noise.apply(twist.smooth(noise.pull(after.information)) + twist.colour(eps))
        if after.diagonal and self.chain.diffusion.diagonal:
            gain = noise.apply(twist.smooth(noise.pull(after.precision)))
            return noise, 1 - gain, c, True
        J, columns = after.full(), []
        for d in range(self.chain.state_dim):
            columns.append(noise.apply(twist.smooth(noise.pull(J[..., d]))))
        gain = torch.stack(columns, -1)
        eye = torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device)
        return noise, eye - gain, c, False

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = self.chain.aligned(value)
        self.chain.check_start(value)
        return self._score(value, self.message, self.control, self._own)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Sticking-the-landing: the entropy term sees the sampled values, not the guide's own parameters.

        References:
            Roeder, Wu & Duvenaud, "Sticking the landing", 2017, https://arxiv.org/abs/1703.09194
        """
        message = self.score_message
        if message is None and self.message is not None:
            message = self.message.detach()
        chain, control = self._own, self.control
        if message is None and control is None and self.steered is None:
            log_prob = self._score(value, None, None, chain)
            return ScoreParts(log_prob, 0, log_prob)
        if self.steered is not None:
            own = self.steered.own_context
            context = own.detach() if self._score_context is None and own is not None else self._score_context
            chain = self.chain.steered(frozen(self.steered.drift), context)
        control = None if control is None else control.frozen()
        entropy_term = self._score(value, message, control, chain)
        return ScoreParts(entropy_term, 0, entropy_term)

    def recall(self) -> None:
        """Let the densities of the path drawn last reuse what drawing it computed.

        For an objective that asks for gradients with respect to parameters: the reused numbers hang on the draw, so a
        derivative with respect to the path itself would miss them.
        """
        self._recalls = True

    def known(self, value: Tensor) -> tuple[Tensor, AbstractNoise] | None:
        """Means and noise of the steps of a path, if it is the one drawn last and they may be reused."""
        if not self._recalls or self._steps is None or value is not self._drawn:
            return None
        means, noises = self._steps
        if isinstance(means, list):
            noise = noises if isinstance(noises, AbstractNoise) else stacked(noises)
            self._steps = torch.stack(means), noise
        return self._steps

    def _score(
        self, value: Tensor, message: Message | None, control: Steering | None, chain: Chain
    ) -> Tensor:
        known = self.known(value)
        if known is not None and chain is not self._own:
            known = None, known[1]
        value = self.chain.aligned(value)
        noise, xi, mean, twist, real = self._twisted_steps(value, message, control, chain, known)[1:]
        first = self.score_start(value[..., 0, :], message)
        w = xi - mean
        half_logdet = 0.0 if twist is None else twist.half_logdet()
        w = w if twist is None else twist.whiten(w)
        density = -0.5 * (w.square().sum(-1) + w.shape[-1] * LOG_2PI) - half_logdet - noise.logdet()
        return first + torch.where(real, density, torch.zeros_like(density)).sum(0)

    def score_start(self, z0: Tensor, message: Message | None) -> Tensor:
        """The log density of an initial state under its prior times a message."""
        start = self.chain.start
        if message is None or not isinstance(start, RandomStart):
            return start.log_prob(z0)
        e, ladj = start.to_base(z0)
        twist, mean = _twisted(start.noise, start.loc, message.time_major()[0])
        w = twist.whiten(start.noise.solve(e - start.loc) - mean)
        gaussian = -0.5 * (w.square().sum(-1) + w.shape[-1] * LOG_2PI)
        return gaussian - twist.half_logdet() - start.noise.logdet() - ladj

    def moments(self, value: Tensor) -> tuple[Tensor, AbstractNoise, Tensor, "AbstractTwist | None", Tensor]:
        """Per step of a path: mean a, noise, the twisted mean of xi, the twist, and which steps are real."""
        a, noise, _, mean, twist, real = self._twisted_steps(
            value, self.message, self.control, self._own, self.known(value)
        )
        return a, noise, mean, twist, real

    def _twisted_steps(
        self,
        value: Tensor,
        message: Message | None,
        control: Steering | None,
        chain: Chain,
        known: Known | None = None,
    ) -> tuple[Tensor, AbstractNoise, Tensor, Tensor, "AbstractTwist | None", Tensor]:
        a, noise, xi, real = chain.steps_of(value, known)
        mean, twist = torch.zeros_like(xi), None
        if self._on_steps(message) is not None:
            twist, mean = _twisted(noise, a, message.time_major().lifted(a.dim() - 1)[1:])
        if control is not None:
            before = chain.split(chain.aligned(value))[0]
            t, dt, _ = chain.layout(before.dim() - 1)
            mean = mean + shift(control.drifts(before.dim() - 1).at_once(), t, dt, before)
        return a, noise, xi, mean, twist, real


def _twisted(noise: AbstractNoise, a: Tensor, after: Message) -> tuple[AbstractTwist, Tensor]:
    twist = noise.twist(after.precision, after.diagonal)
    return twist, twist.smooth(noise.pull(after.gradient(a)))


def _unbound(x: Tensor | None, steps: int) -> "tuple[Tensor, ...] | list[None]":
    return [None] * steps if x is None else x.unbind(0)


def fitting(message: Message, chain: Chain, points: int | None = None) -> Message:
    """Refuse a message that does not belong on a chain.

    Raises:
        GuideError: naming both shapes or both dtypes.
    """
    if not isinstance(message, Message):
        raise GuideError(
            f"`message` must be a Message or a tuple (loc, precision), got {type(message).__name__}."
        )
    expected = (points or chain.steps + 1, chain.state_dim)
    if tuple(message.information.shape[-2:]) != expected:
        raise GuideError(
            f"The message ends in {tuple(message.information.shape[-2:])}, the path needs "
            f"(time={expected[0]}, state={expected[1]}). Make it on the path's own grid."
        )
    for tensor in (message.information, message.precision):
        if tensor.dtype != chain.dtype:
            raise GuideError(
                f"The message is {tensor.dtype}, the path {chain.dtype}. Convert it with .to({chain.dtype})."
            )
    return message


def _widened(chain: Chain, **batch: torch.Size) -> Chain:
    shape = joint_batch(path=chain.batch_shape, **batch)
    return chain if shape == chain.batch_shape else chain.expand(shape)


def start_has_rsample(chain: Chain) -> bool:
    """Whether the start of a path without message carries gradients."""
    return not isinstance(chain.start, RandomStart) or chain.start.prior.has_rsample
