"""Decoders: from the states at the observation times to the distribution of what is observed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from stochdyn.errors import FieldError, ShapeError
from stochdyn.fields import MLP, Memory

Link = Callable[[Tensor], Tensor]
Numbers = float | Sequence[float] | Tensor


class AbstractDecoder(nn.Module, ABC):
    """The contract: `decoder(z)` for states (..., time, state) is a distribution over scalars (..., time, channel).

    Example:
        >>> from stochdyn.decoders import AbstractDecoder
        >>> class Counts(AbstractDecoder):
        ...     def forward(self, z):
        ...         return dist.Poisson(z.exp())
        >>> Counts()(torch.zeros(5, 3, 2)).batch_shape
        torch.Size([5, 3, 2])
    """

    @abstractmethod
    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """The distribution of every channel at every time."""


def _keep_log(
    module: nn.Module, name: str, start: Numbers, obs_dim: int, learned: bool, least: float = 0.0
) -> None:
    """Store log(start - least), one per channel, as `log_<name>`: a parameter or a buffer."""
    where = f"{type(module).__name__}: `{name}`"
    start = torch.as_tensor(start, dtype=torch.get_default_dtype())
    if start.numel() not in (1, obs_dim):
        raise ShapeError(
            f"{where} must be a number or ({obs_dim},), one per channel, got {tuple(start.shape)}."
        )
    if not bool((start > least).all() & start.isfinite().all()):
        rule = "be positive" if least == 0 else f"be above {least:g}"
        raise ShapeError(f"{where} must {rule}, got {start.tolist()}.")
    log = (start - least).expand(obs_dim).clone().log()
    if learned:
        module.register_parameter(f"log_{name}", nn.Parameter(log))
    else:
        module.register_buffer(f"log_{name}", log)


def _decoded(net: nn.Module, z: Tensor, obs_dim: int) -> Tensor:
    out = net(z)
    if out.shape[-1] != obs_dim:
        raise ShapeError(
            f"The decoder's net returned {out.shape[-1]} channels for obs_dim={obs_dim}. Change its last "
            "layer or obs_dim."
        )
    return out


class NormalDecoder(AbstractDecoder):
    """Normal observations: y = net(z) + scale * noise, one scale per channel.

    Args:
        net: (..., state) to (..., channel): a linear map, an `MLP`, or `torch.nn.Identity()`.
        obs_dim: number of channels.
        scale: of the noise: its initial value where it is learned, one or one per channel. In the units of the data.
            Or a module (..., state) to (..., channel), the logarithm of a scale that depends on the state.
        learned: whether the scale is learned; a module's parameters say that themselves.

    Raises:
        ShapeError: if the scale is not positive, or a net returns another number of channels.
        FieldError: for `learned=False` beside a module.

    Example:
        >>> import stochdyn as sd
        >>> decoder = sd.NormalDecoder(torch.nn.Linear(4, 3), obs_dim=3, scale=0.1)
        >>> decoder(torch.randn(8, 20, 4)).batch_shape
        torch.Size([8, 20, 3])
    """

    log_scale: Tensor | nn.Module

    def __init__(
        self, net: nn.Module, obs_dim: int, *, scale: Numbers | nn.Module = 0.1, learned: bool = True
    ) -> None:
        super().__init__()
        self.net, self.obs_dim = net, obs_dim
        if isinstance(scale, nn.Module):
            if not learned:
                raise FieldError(
                    "NormalDecoder: learned=False does not reach into the module that gives the scale. Freeze it with "
                    "scale.requires_grad_(False)."
                )
            self.log_scale = scale
        else:
            _keep_log(self, "scale", scale, obs_dim, learned)

    def forward(self, z: Tensor) -> dist.Normal:
        loc, log_scale = _decoded(self.net, z, self.obs_dim), self.log_scale
        if isinstance(log_scale, nn.Module):
            log_scale = _decoded(log_scale, z, self.obs_dim)
        return dist.Normal(loc, log_scale.exp())


class AnchoredDecoder(nn.Module):
    """Normal, from the last observed value on: y = last + elapsed * rate(h) + sqrt(elapsed) * scale(h) * noise.

    For processes that are observed without noise: just after an observation the prediction is that value, and it moves
    away and widens with the time since. A channel never observed so far has a mean and a scale of its own, read off h.
    `ObservationJumpODE` calls it as `decoder(h, memory)`.

    Args:
        state_dim: size of h.
        obs_dim: number of channels.
        widths: of the hidden layers of the net that reads rate and logarithm of the scale off h.

    Shapes:
        h (*batch, state), a `Memory` of (*batch, channel); the batch shape is (*batch, channel).

    Raises:
        ShapeError: if the memory has another number of channels.

    Example:
        >>> import stochdyn as sd
        >>> memory = sd.Memory(torch.full((5, 2), 3.0), torch.zeros(5, 2), torch.ones(5, 2))
        >>> sd.AnchoredDecoder(8, obs_dim=2)(torch.randn(5, 8), memory).mean[0]
        tensor([3., 3.], grad_fn=<SelectBackward0>)
    """

    def __init__(self, state_dim: int, obs_dim: int, widths: Sequence[int] = (50,)) -> None:
        super().__init__()
        self.net = MLP(state_dim, 4 * obs_dim, widths, activation=torch.tanh)

    def forward(self, h: Tensor, memory: Memory) -> dist.Normal:
        rate, log_scale, loc, log_width = self.net(h).chunk(4, -1)
        own, channels = rate.shape[-1], memory.values.shape[-1]
        if own != channels:
            raise ShapeError(
                f"AnchoredDecoder was made for {own} channels, the memory has {channels}. Set obs_dim={channels}."
            )
        # Never quite zero, so that a density exists at the time of an observation too.
        elapsed = memory.elapsed.clamp_min(torch.finfo(h.dtype).eps ** 2)
        known = memory.seen > 0
        loc = torch.where(known, memory.values + memory.elapsed * rate, loc)
        return dist.Normal(loc, torch.where(known, elapsed.sqrt() * log_scale.exp(), log_width.exp()))


class StudentTDecoder(AbstractDecoder):
    """Observations with outliers: y = net(z) + scale * t noise with df degrees of freedom, both per channel.

    df > 2, so that the noise has a variance, scale^2 df / (df - 2). The log density is not concave: far from net(z) a
    value pulls less, and an outlier is let go.

    Args:
        net: (..., state) to (..., channel).
        obs_dim: number of channels.
        scale: initial value, in the units of the data.
        df: degrees of freedom, initial value; 4 has heavy tails, 30 is nearly normal.
        learned: whether the scale is learned.
        learned_df: whether the degrees of freedom are learned; that needs thousands of observations.

    Raises:
        ShapeError: if the scale is not positive, df not above 2, or the net returns another number of channels.

    References:
        Lange, Little & Taylor, "Robust statistical modeling using the t distribution", Journal of the American
        Statistical Association 1989, https://doi.org/10.1080/01621459.1989.10478852

    Example:
        >>> import stochdyn as sd
        >>> sd.StudentTDecoder(torch.nn.Linear(4, 3), obs_dim=3)(torch.randn(8, 20, 4)).df[0, 0, 0].item()
        4.0
    """

    log_scale: Tensor
    log_df: Tensor  # of its excess over 2

    def __init__(
        self,
        net: nn.Module,
        obs_dim: int,
        *,
        scale: Numbers = 0.1,
        df: Numbers = 4.0,
        learned: bool = True,
        learned_df: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.obs_dim = net, obs_dim
        _keep_log(self, "scale", scale, obs_dim, learned)
        _keep_log(self, "df", df, obs_dim, learned_df, least=2.0)

    @property
    def df(self) -> Tensor:
        """(channel,) the degrees of freedom."""
        return 2.0 + self.log_df.exp()

    def forward(self, z: Tensor) -> dist.StudentT:
        return dist.StudentT(self.df, _decoded(self.net, z, self.obs_dim), self.log_scale.exp())


class _CountDecoder(AbstractDecoder):
    """What counts share: mean = exposure * link(net(z))."""

    log_exposure: Tensor

    def __init__(self, net: nn.Module, obs_dim: int, link: Link, exposure: Numbers) -> None:
        super().__init__()
        self.net, self.obs_dim, self.link = net, obs_dim, link
        _keep_log(self, "exposure", exposure, obs_dim, learned=False)

    def mean(self, z: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The expected counts (..., time, channel)."""
        rate = self.link(_decoded(self.net, z, self.obs_dim)) * self.log_exposure.exp()
        rate = rate if exposure is None else rate * exposure
        # A link may underflow to 0, where log_prob has no gradient.
        return rate + torch.finfo(rate.dtype).tiny ** 0.5


class PoissonDecoder(_CountDecoder):
    """Counts: y ~ Poisson(exposure * link(net(z))), variance = mean.

    Args:
        net: (..., state) to (..., channel).
        obs_dim: number of channels.
        link: from the net's output to a positive rate: `torch.exp` (effects multiply), or
            `torch.nn.functional.softplus` (nearly linear for large rates, cannot explode).
        exposure: what a rate is per: counting time, area, volume; a number, or one per channel. One that varies
            with series and time is an argument of the call, `decoder(z, exposure)`, (series, time, channel).

    Raises:
        ShapeError: if an exposure is not positive, or the net returns another number of channels.

    Example:
        >>> import stochdyn as sd
        >>> decoder = sd.PoissonDecoder(torch.nn.Identity(), obs_dim=2, exposure=10.0)
        >>> decoder(torch.zeros(5, 2)).mean[0].round()
        tensor([10., 10.])
    """

    def __init__(
        self, net: nn.Module, obs_dim: int, *, link: Link = torch.exp, exposure: Numbers = 1.0
    ) -> None:
        super().__init__(net, obs_dim, link, exposure)

    def forward(self, z: Tensor, exposure: Tensor | None = None) -> dist.Poisson:
        return dist.Poisson(self.mean(z, exposure))


class NegativeBinomialDecoder(_CountDecoder):
    """Overdispersed counts: mean = exposure * link(net(z)), variance = mean + mean^2 / concentration.

    A Poisson count whose rate has a Gamma(concentration, concentration / mean) distribution. A large concentration is
    the Poisson limit.

    Args:
        net: (..., state) to (..., channel).
        obs_dim: number of channels.
        concentration: initial value, one or one per channel.
        learned: whether the concentration is learned.
        link: as for `PoissonDecoder`.
        exposure: as for `PoissonDecoder`.

    Raises:
        ShapeError: if concentration or exposure is not positive, or the net returns another number of channels.

    References:
        Hilbe, "Negative Binomial Regression", Cambridge University Press 2011 (the NB2 form),
        https://doi.org/10.1017/CBO9780511973420

    Example:
        >>> import stochdyn as sd
        >>> decoder = sd.NegativeBinomialDecoder(torch.nn.Identity(), obs_dim=1, concentration=2.0)
        >>> seen = decoder(torch.tensor([4.0]).log())
        >>> round(seen.mean.item(), 3), round(seen.variance.item(), 3)  # 4 + 16 / 2
        (4.0, 12.0)
    """

    log_concentration: Tensor

    def __init__(
        self,
        net: nn.Module,
        obs_dim: int,
        *,
        concentration: Numbers = 10.0,
        learned: bool = True,
        link: Link = torch.exp,
        exposure: Numbers = 1.0,
    ) -> None:
        super().__init__(net, obs_dim, link, exposure)
        _keep_log(self, "concentration", concentration, obs_dim, learned)

    def forward(self, z: Tensor, exposure: Tensor | None = None) -> dist.NegativeBinomial:
        log_mean = self.mean(z, exposure).log()
        return dist.NegativeBinomial(self.log_concentration.exp(), logits=log_mean - self.log_concentration)


class BernoulliDecoder(AbstractDecoder):
    """Zeros and ones: P(y = 1) = sigmoid(net(z)).

    Args:
        net: (..., state) to (..., channel), the log odds.
        obs_dim: number of channels.

    Raises:
        ShapeError: if the net returns another number of channels.

    Example:
        >>> import stochdyn as sd
        >>> sd.BernoulliDecoder(torch.nn.Identity(), obs_dim=3)(torch.zeros(5, 3)).mean[0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, net: nn.Module, obs_dim: int) -> None:
        super().__init__()
        self.net, self.obs_dim = net, obs_dim

    def forward(self, z: Tensor) -> dist.Bernoulli:
        return dist.Bernoulli(logits=_decoded(self.net, z, self.obs_dim))


class CategoricalDecoder(AbstractDecoder):
    """Classes 0, ..., K - 1 in every channel: P(y = k) proportional to exp(net(z)_k).

    The net returns channel * K numbers, the logits of the first channel first.

    Args:
        net: (..., state) to (..., channel * K).
        obs_dim: number of channels.
        classes: K, the number of classes, the same in all channels.

    Raises:
        ShapeError: if there are fewer than 2 classes, or the net returns another number of logits.

    Example:
        >>> import stochdyn as sd
        >>> seen = sd.CategoricalDecoder(torch.nn.Linear(2, 12), obs_dim=3, classes=4)(torch.randn(8, 20, 2))
        >>> seen.batch_shape, seen.logits.shape
        (torch.Size([8, 20, 3]), torch.Size([8, 20, 3, 4]))
    """

    def __init__(self, net: nn.Module, obs_dim: int, *, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ShapeError(f"CategoricalDecoder: `classes` must be at least 2, got {classes}.")
        self.net, self.obs_dim, self.classes = net, obs_dim, classes

    def forward(self, z: Tensor) -> dist.Categorical:
        logits = self.net(z)
        if logits.shape[-1] != self.obs_dim * self.classes:
            raise ShapeError(
                f"The decoder's net returned {logits.shape[-1]} logits for obs_dim={self.obs_dim} channels of "
                f"{self.classes} classes, {self.obs_dim * self.classes} together. Change its last layer or obs_dim."
            )
        return dist.Categorical(logits=logits.unflatten(-1, (self.obs_dim, self.classes)))
