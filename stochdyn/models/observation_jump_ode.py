"""A state that flows between observations and jumps at them: an autoregressive model in continuous time."""

from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.data import Series
from stochdyn.data.checks import as_real
from stochdyn.decoders import AbstractDecoder, AnchoredDecoder, NormalDecoder
from stochdyn.device import readable
from stochdyn.errors import ShapeError, TimeError
from stochdyn.fields import MLP, GRUFlow, GRUJump, Memory, MemoryFlow
from stochdyn.guides.empty import EmptyGuide
from stochdyn.models.ahead import OneStepAhead
from stochdyn.models.past import Past
from stochdyn.paths.observation_jumps import ObservationJumps
from stochdyn.solvers import AbstractODESolver, RungeKutta4


class ObservationJumpODE(nn.Module):
    """A state that flows by an ODE between observations and jumps at them: ODE-RNN, GRU-ODE-Bayes, NJ-ODE.

    h(t) sums up what was observed until t. Just before an observation the decoder reads its distribution off h; then h
    jumps. So log p(y) = log p(y_1) + log p(y_2 | y_1) + ... is exact, there are no latents, and `sd.fit(model,
    model.guide, batch)` maximises it. Missing channels are masked and do not enter the jump; a time at which nothing
    is observed changes nothing. Censored values count as tails, and come to the jump as their limits.

    Every series goes through its own times: a batch takes as many jumps one after the other as its longest series, each
    after a flow as long as the longest gap there. Given the past, the channels observed at one time are independent.

    Args:
        obs_dim: number of channels.
        hidden: size of h.
        flow: dh/dt, a module `(t, h[, context])`, an `AbstractMemoryFlow`, or an `AbstractLinearFlow`; by default a
            `GRUFlow`, a `MemoryFlow` where `anchored`.
        jump: a module `(t, h, y, mask, seen[, context])` to the new h, see `GRUJump`, which is the default.
        decoder: from h to the distribution of the observations; by default normal, mean and scale read off h.
        covariates: number of covariates; they are the context of flow and jump, and act from their time on.
        anchored: for processes observed without noise: the decoder is an `AnchoredDecoder`.
        given_first: whether what is observed at the first time of a series is given: it enters the jump, and has no
            density. For series that start at a known value.
        start: h at the first time of a series: a tensor (hidden,), or a parameter; by default learned from zero.
        solver: of the flow over one gap: fixed steps, `RungeKutta4(substeps)`, `Heun(substeps)`, or `Dopri5()`.
        dt: the longest piece of a gap that the solver takes at once, in units of time in which a typical gap should be
            near 1; None for whole gaps, however long.

    Shapes:
        flow: t (*batch, 1), h (*batch, hidden), context (*batch, covariate). jump: as these, y and mask
        (*batch, channel): y is 0 and the mask 0 where missing, the mask is -1 where y is a limit; `seen` the predicted
        distribution of batch shape (*batch, channel).

    Raises:
        ShapeError: if a batch has another number of channels or covariates, the decoder one of channels, or `start`
            another size.
        FieldError: if a flow or a jump returns another shape.
        DivergedError: if the state leaves the finite numbers in a gap or a jump, naming the series and the time.
        TimeError: if `dt` is not positive, or a gap would need more than 10,000 pieces of it.

    References:
        Rubanova, Chen & Duvenaud, "Latent ODEs for irregularly-sampled time series", 2019,
        https://arxiv.org/abs/1907.03907; De Brouwer, Simm, Arany & Moreau, "GRU-ODE-Bayes", 2019,
        https://arxiv.org/abs/1905.12374; Herrera, Krach & Teichmann, "Neural jump ordinary differential equations",
        2021, https://arxiv.org/abs/2006.04727

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series(torch.linspace(0, 1, 6), torch.randn(8, 6, 3), mask=torch.rand(8, 6, 3) < 0.7)
        >>> model = sd.ObservationJumpODE(obs_dim=3, hidden=16)
        >>> fit = sd.fit(model, model.guide, batch, steps=5, progress=False)
        >>> model.predictive(batch, [0.25, 1.5]).mean.shape
        torch.Size([8, 2, 3])
        >>> sd.predict(fit, batch, ts=[1.5, 2.0], draws=10).observations.shape
        torch.Size([10, 8, 8, 3])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int = 32,
        *,
        flow: nn.Module | None = None,
        jump: nn.Module | None = None,
        decoder: AbstractDecoder | AnchoredDecoder | None = None,
        covariates: int = 0,
        anchored: bool = False,
        given_first: bool = False,
        start: Tensor | None = None,
        solver: AbstractODESolver = RungeKutta4(2),  # noqa: B008
        dt: float | None = 1.0,
    ) -> None:
        super().__init__()
        if min(obs_dim, hidden) < 1 or covariates < 0:
            got = f"obs_dim={obs_dim}, hidden={hidden}, covariates={covariates}"
            raise ShapeError(
                f"ObservationJumpODE: channels and hidden must be at least 1, covariates 0. Got {got}."
            )
        if dt is not None and not 0 < dt < float("inf"):
            raise TimeError(
                f"ObservationJumpODE: `dt` must be positive and finite, got {dt}. It is the longest step."
            )
        if anchored and decoder is not None:
            raise ShapeError(
                "ObservationJumpODE takes anchored=True or a decoder. An AnchoredDecoder is one: drop the other."
            )
        self.obs_dim, self.hidden, self.covariates, self.solver = obs_dim, hidden, covariates, solver
        self.given_first, self.dt, self._longest = given_first, dt, 0.0
        self.decoder = decoder or (AnchoredDecoder if anchored else _normal)(hidden, obs_dim)
        if flow is None and isinstance(self.decoder, AnchoredDecoder):
            flow = MemoryFlow(hidden, obs_dim, context_dim=covariates)
        self.flow = flow or GRUFlow(hidden, context_dim=covariates)
        self.jump = jump or GRUJump(obs_dim, hidden, context_dim=covariates)
        if start is None or isinstance(start, nn.Parameter):
            self.start = nn.Parameter(torch.zeros(hidden)) if start is None else start
        else:
            self.register_buffer("start", start)
        if self.start.shape != (hidden,):
            raise ShapeError(
                f"ObservationJumpODE: `start` must have shape (hidden,) = ({hidden},), got {tuple(self.start.shape)}."
            )
        self._guide = (EmptyGuide(self),)

    @property
    def guide(self) -> EmptyGuide:
        """The guide, which samples nothing: there are no latents."""
        return self._guide[0]

    def forward(self, batch: Series) -> Tensor:
        ahead = self.one_step_ahead(batch)
        if self.given_first:
            later = torch.ones_like(batch.mask)
            later[:, 0] = False
            batch = batch._with(mask=batch.mask & later)
        with batch.plate("series"):
            return batch.observe("y", ahead)

    def one_step_ahead(self, batch: Series) -> OneStepAhead:
        """The distribution of every value (series, time, channel) given what was observed before its time.

        Draws are made one after the other: a time at which nothing is observed is drawn and fed back as if observed,
        until the next observation, so that the draws past the last one are joint. A channel missing where others are
        observed is drawn given those.

        Example:
            >>> import torch, stochdyn as sd
            >>> batch = sd.Series([0.0, 1.0], torch.randn(4, 2, 3))
            >>> sd.ObservationJumpODE(obs_dim=3).one_step_ahead(batch).mean.shape
            torch.Size([4, 2, 3])
        """
        past = self._past(batch)
        h, memory = past.before()
        return OneStepAhead(self._decode(h, memory), past.draw)

    def predictive(self, batch: Series, ts: Any = None) -> Any:
        """The distribution of an observation at any time, given all that was observed until then, then included.

        Args:
            batch: the series.
            ts: the times (k,), or (series, k), none before the first of a series; None for those of the batch.

        Returns:
            What the decoder returns, of batch shape (series, k, channel); the times are not joint.

        Raises:
            TimeError: if a time is before the first of its series, or not finite, or there is none.
            ShapeError: if there are times of another number of series.

        Example:
            >>> import torch, stochdyn as sd
            >>> batch = sd.Series([0.0, 1.0], torch.randn(4, 2, 3))
            >>> model = sd.ObservationJumpODE(obs_dim=3, anchored=True)
            >>> bool((model.predictive(batch, [1.0]).mean == batch.values[:, 1:]).all())
            True
        """
        past = self._past(batch)
        times = batch.times if ts is None else as_real("ts", ts)
        times = times.to(batch.values.device, torch.float64)
        if times.dim() > 2 or times.dim() < 1 or (times.dim() == 2 and len(times) != len(batch)):
            raise ShapeError(
                f"`ts` must have shape (k,) or (series, k) = ({len(batch)}, k), got {tuple(times.shape)}. Give times "
                "for all series, or some for each."
            )
        if times.numel() == 0:
            raise TimeError(f"`ts` of shape {tuple(times.shape)} holds no time. Pass at least one.")
        return self._decode(*past.until(times.expand(len(batch), -1)))

    def _decode(self, h: Tensor, memory: Memory) -> Any:
        seen = self.decoder(h, memory) if isinstance(self.decoder, AnchoredDecoder) else self.decoder(h)
        if seen.batch_shape != memory.values.shape:
            raise ShapeError(
                f"The decoder returned the batch shape {tuple(seen.batch_shape)} for h of shape {tuple(h.shape)} and "
                f"{self.obs_dim} channels, expected {tuple(memory.values.shape)}. Make it for obs_dim={self.obs_dim}."
            )
        return seen

    def _past(self, batch: Series) -> Past:
        self._check(batch)
        ids = lambda: batch.ids  # noqa: E731 - read where it fails: an accelerator would be waited for
        jumps = ObservationJumps(self.flow, self.jump, self.solver, self.dt, self._longest, ids)
        start = self.start.expand(len(batch), -1)
        past = Past.of(batch, jumps, self._decode, start, with_covariates=self.covariates > 0)
        if self.dt is not None and readable(past.rows.times) and past.rows.times.shape[1] > 1:
            self._longest = max(self._longest, float(past.rows.times.diff(dim=1).max()))
        return past

    def _check(self, batch: Series) -> None:
        if batch.obs_dim != self.obs_dim:
            raise ShapeError(
                f"ObservationJumpODE was made for {self.obs_dim} channels, the batch has {batch.obs_dim} "
                f"{tuple(batch.channels)}. Set obs_dim={batch.obs_dim}."
            )
        given = 0 if batch.covariates is None else batch.covariates.shape[-1]
        if self.covariates and given != self.covariates:
            raise ShapeError(
                f"ObservationJumpODE was made for {self.covariates} covariates, the batch has {given or 'none'}. "
                f"Set covariates={given}."
            )


def _normal(hidden: int, obs_dim: int) -> NormalDecoder:
    """Mean and scale read off h; the scale can neither vanish nor explode."""
    log_scale = MLP(hidden, obs_dim, (hidden,), final=_bounded)
    return NormalDecoder(MLP(hidden, obs_dim, (hidden,)), obs_dim, scale=log_scale)


def _bounded(x: Tensor) -> Tensor:
    return 10 * torch.tanh(x / 10)
