"""The guided path: a path whose every step is twisted by a message and shifted by a control."""

from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor, nn
from torch.distributions import constraints

from stochdyn.errors import GuideError, ShapeError
from stochdyn.fields import call_field, evaluate
from stochdyn.paths.chain import LOG_2PI, Chain
from stochdyn.paths.checks import joint_batch
from stochdyn.paths.message import Message
from stochdyn.paths.noise import AbstractNoise, AbstractTwist, apply_precision
from stochdyn.paths.start import RandomStart
from stochdyn.paths.support import path_support

Control = Callable[..., Tensor]


class GuidedPath(dist.TorchDistribution):
    """A path twisted step by step; made by `SDEPath.guided`, sampled by guides.

    With J the precision and h the information of the message on the new state, a = a(z) and S = (I +
    G'JG)^-1, the noise of a step is xi ~ N(S G'(h - J a) + sqrt(dt) u(t, z), S). Exact for linear-Gaussian
    models when the messages are those of the backward information filter.

    Args:
        chain: the prior's chain.
        message: on every grid time, see `Message`; None for none.
        control: `(t, z[, context]) -> (..., noise)`, drift in noise units; None for none.
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
        validate_args: bool | None = None,
    ) -> None:
        if message is not None:
            chain = _widened(chain, message=fitting(message, chain).batch_shape)
        if score_message is not None:
            fitting(score_message, chain)
        if score_message is not None and message is None:
            raise GuideError("`score_message` stands in for `message`, which is None. Pass both or none.")
        if control is not None:
            chain = _widened(chain, control=_probe_control(control, chain))
        self.message, self.control, self.score_message = message, control, score_message
        self.chain = chain
        self.has_rsample = message is not None or start_has_rsample(chain)
        self._drawn: Tensor | None = None
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
        new.chain, new._drawn = self.chain.expand(torch.Size(batch_shape)), None
        new._batch_shape = torch.Size(batch_shape)
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

    def _transport(self, eps: Tensor, z: Tensor) -> Tensor:
        t, dt, context = self.chain.layout(z.dim())
        message = None if self.message is None else self.message.time_major().lifted(z.dim())
        eps = eps[1:, ..., : self.chain.noise_dim]
        affine = self._affine(message, eps, z.dim()) if self.control is None else None
        states = [z]
        # Unbound once: a slice per step would cost a full-size gradient each.
        at = zip(t.unbind(0), dt.unbind(0), _unbound(context, self.chain.steps), strict=True)
        if affine is None:
            after = [None] * self.chain.steps if message is None else message[1:].unbind()
            for (s, h, c), m, e in zip(at, after, eps.unbind(0), strict=True):
                z = self._general_step(s, h, c, z, m, e)
                states.append(z)
        else:
            gains, offset, diagonal = affine
            for (s, h, c), M, b in zip(at, _unbound(gains, self.chain.steps), offset.unbind(0), strict=True):
                a = self.chain.solver.advance(self._drift(c), s, h, z)
                z = b + (a if M is None else apply_precision(M, a, diagonal))
                states.append(z)
        return torch.stack(states, -2)

    def _drift(self, context: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda s, x: evaluate("drift", self.chain.drift, s, x, context)

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
    ) -> tuple[Tensor | None, Tensor, bool] | None:
        """With constant noise every step is z' = M a(z) + c: M and c of all steps at once."""
        noise = self.chain.constant_noise(ndim)
        if noise is None:
            return None
        if message is None:
            return None, noise.apply(eps), True
        after = message[1:]
        twist = noise.twist(after.precision, after.diagonal)
        c = noise.apply(twist.smooth(noise.pull(after.information)) + twist.colour(eps))
        if after.diagonal and self.chain.diffusion.diagonal:
            gain = noise.apply(twist.smooth(noise.pull(after.precision)))
            return 1 - gain, c, True
        J, columns = after.full(), []
        for d in range(self.chain.state_dim):
            columns.append(noise.apply(twist.smooth(noise.pull(J[..., d]))))
        gain = torch.stack(columns, -1)
        return torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device) - gain, c, False

    def _general_step(
        self, t: Tensor, dt: Tensor, context: Tensor | None, z: Tensor, after: Message | None, eps: Tensor
    ) -> Tensor:
        a, noise = self.chain.step(t, dt, context, z)
        if after is None:
            xi = eps
        else:
            twist, mean = _twisted(noise, a, after)
            xi = mean + twist.colour(eps)
        if self.control is not None:
            xi = xi + self.control_shift(t, dt, context, z)
        return a + noise.apply(xi)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = self.chain.aligned(value)
        self.chain.check_start(value)
        return self._score(value, self.message, self.control)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Sticking-the-landing: the entropy term sees the sampled values, not the guide's own parameters.

        References:
            Roeder, Wu & Duvenaud, "Sticking the landing", 2017, https://arxiv.org/abs/1703.09194
        """
        message = self.score_message
        if message is None and self.message is not None:
            message = self.message.detach()
        if message is None and self.control is None:
            log_prob = self._score(value, None, None)
            return ScoreParts(log_prob, 0, log_prob)
        entropy_term = self._score(value, message, _frozen(self.control))
        return ScoreParts(entropy_term, 0, entropy_term)

    def _score(self, value: Tensor, message: Message | None, control: Control | None) -> Tensor:
        value = self.chain.aligned(value)
        noise, xi, mean, twist, real = self._twisted_steps(value, message, control)[1:]
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

    def control_shift(self, t: Tensor, dt: Tensor, context: Tensor | None, z: Tensor) -> Tensor:
        """What the control adds to the noise of a step."""
        return dt.sqrt() * evaluate("control", self.control, t, z, context)

    def _control_shift(self, control: Control, value: Tensor) -> Tensor:
        before = self.chain.split(value)[0]
        t, dt, context = self.chain.layout(before.dim() - 1)
        return dt.sqrt() * evaluate("control", control, t, before, context)

    def moments(self, value: Tensor) -> tuple[Tensor, AbstractNoise, Tensor, "AbstractTwist | None", Tensor]:
        """Per step of a path: mean a, noise, the twisted mean of xi, the twist, and which steps are real."""
        a, noise, _, mean, twist, real = self._twisted_steps(value, self.message, self.control)
        return a, noise, mean, twist, real

    def _twisted_steps(
        self, value: Tensor, message: Message | None, control: Control | None
    ) -> tuple[Tensor, AbstractNoise, Tensor, Tensor, "AbstractTwist | None", Tensor]:
        a, noise, xi, real = self.chain.steps_of(value)
        mean, twist = torch.zeros_like(xi), None
        if message is not None:
            twist, mean = _twisted(noise, a, message.time_major().lifted(a.dim() - 1)[1:])
        if control is not None:
            mean = mean + self._control_shift(control, value)
        return a, noise, xi, mean, twist, real


def _twisted(noise: AbstractNoise, a: Tensor, after: Message) -> tuple[AbstractTwist, Tensor]:
    twist = noise.twist(after.precision, after.diagonal)
    return twist, twist.smooth(noise.pull(after.gradient(a)))


def _unbound(x: Tensor | None, steps: int) -> "tuple[Tensor, ...] | list[None]":
    return [None] * steps if x is None else x.unbind(0)


def fitting(message: Message, chain: Chain) -> Message:
    """Refuse a message that does not belong on a chain.

    Raises:
        GuideError: naming both shapes or both dtypes.
    """
    if not isinstance(message, Message):
        raise GuideError(
            f"`message` must be a Message or a tuple (loc, precision), got {type(message).__name__}."
        )
    expected = (chain.steps + 1, chain.state_dim)
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


def _probe_control(control: Control, chain: Chain) -> torch.Size:
    z = chain.start.centre().detach().expand(*chain.batch_shape, chain.state_dim)
    t, _, context = chain.layout(z.dim())
    if chain.steps < 1:
        return torch.Size()
    with torch.no_grad():
        u = call_field("control", control, t[0], z, None if context is None else context[0])
    if u.shape[-1] not in (chain.noise_dim, 1):
        raise ShapeError(f"The control returned {tuple(u.shape)}, expected (..., noise={chain.noise_dim}).")
    return u.shape[:-1]


def _frozen(control: Control | None) -> Control | None:
    """The control with its own parameters detached; a closure cannot be looked into and stays attached."""
    if not isinstance(control, nn.Module):
        return control
    parameters = {name: p.detach() for name, p in control.named_parameters()}
    return lambda *args: torch.func.functional_call(control, parameters, args)
