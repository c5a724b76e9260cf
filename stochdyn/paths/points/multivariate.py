"""The multivariate Hawkes process: jumps of several kinds that bring each other about."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.errors import ShapeError
from stochdyn.paths.points.base import AbstractPointProcess, Rows, State, joint, parameter
from stochdyn.paths.points.hawkes import check_branching
from stochdyn.paths.points.occurrences import Occurrences
from stochdyn.paths.points.scan import linear_scan
from stochdyn.paths.points.simulate import AbstractSampler, Thinning


class MultivariateHawkes(AbstractPointProcess):
    """lambda_i(t) = mu_i + sum over jumps before t, of kind j, of alpha_ij exp(-beta_ij (t - t_k)); closed form.

    The mark of a jump is its kind, 0, 1, ... The matrix alpha / beta says how many jumps of kind i a jump of kind j
    brings.

    Args:
        mu: (*batch, kind) base intensities, not negative.
        alpha: (*batch, kind, kind), alpha[i, j] the rise of kind i at a jump of kind j, not negative.
        beta: decay rates, positive: a number, or what broadcasts against alpha (of batch shape: beta[..., None, None]).
        t0, t1: the window, numbers or (*batch,).
        explosive, max_jumps, sampler: as for `Hawkes`.

    Shapes:
        batch_shape: broadcast of the batches of mu, alpha, beta and of the window; event_shape (max_jumps, 2).

    Raises:
        StabilityError: if the spectral radius of alpha / beta is 1 or more, while validation is on.
        ShapeError: if mu and alpha do not agree on the number of kinds.
        FieldError, TimeError, DataError, PaddingError: as for `Hawkes`; kinds out of range are named.

    References:
        Hawkes, "Spectra of some self-exciting and mutually exciting point processes", 1971,
        https://doi.org/10.1093/biomet/58.1.83

    Example:
        >>> import stochdyn as sd
        >>> alpha = torch.tensor([[0.2, 0.5], [0.0, 0.3]])
        >>> process = sd.MultivariateHawkes(torch.tensor([0.5, 0.1]), alpha, 1.0, 0.0, 4.0)
        >>> process.log_prob(torch.tensor([[0.5, 1.0], [0.8, 0.0]]).double())
        tensor(-5.8091, dtype=torch.float64)
    """

    def __init__(
        self,
        mu: Tensor,
        alpha: Tensor,
        beta: float | Tensor,
        t0: Any,
        t1: Any,
        *,
        explosive: bool = False,
        max_jumps: int | None = None,
        sampler: AbstractSampler | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check, name = (
            bool(self._validate_args if validate_args is None else validate_args),
            type(self).__name__,
        )
        self.mu = parameter("mu", mu, positive=False, owner=name, validate=check)
        self.alpha = parameter("alpha", alpha, positive=False, owner=name, validate=check)
        beta = parameter("beta", beta, positive=True, owner=name, validate=check)
        self.kinds = self.mu.shape[-1] if self.mu.dim() else 0
        if self.alpha.shape[-2:] != (self.kinds, self.kinds) or self.kinds == 0:
            raise ShapeError(
                f"{name}: mu must be (*batch, kind) and alpha (*batch, kind, kind), got {tuple(self.mu.shape)} and "
                f"{tuple(self.alpha.shape)}. alpha[i, j] is the rise of kind i at a jump of kind j."
            )
        self.beta = beta.reshape(*[1] * max(0, 2 - beta.dim()), *beta.shape)
        matrix = joint(f"{name}: alpha and beta", self.alpha.shape, self.beta.shape)
        if check and not explosive:
            ratio = torch.linalg.eigvals((self.alpha / self.beta).detach()).abs().amax(-1)
            check_branching(name, ratio, "(spectral radius of alpha / beta)")
        super().__init__(
            joint(name, self.mu.shape[:-1], matrix[:-2]),
            t0,
            t1,
            max_jumps=max_jumps,
            sampler=sampler or Thinning(),
            device=self.beta.device,
            validate_args=validate_args,
        )

    def _mark_dim(self) -> int:
        return 1

    def _mark_support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.kinds - 1)

    def intensities(self, ts: Any, jumps: Any) -> Tensor:
        """The intensity of every kind at any times given the jumps before them.

        Shapes:
            ts (time,) or (*batch, time); jumps (*batch, jump, 2) -> (*batch, time, kind)

        Example:
            >>> import stochdyn as sd
            >>> process = sd.MultivariateHawkes(torch.tensor([0.5, 0.1]), 0.3 * torch.eye(2), 1.0, 0.0, 4.0)
            >>> process.intensities([0.5, 1.0], torch.tensor([[0.6, 1.0]]).double())
            tensor([[0.5000, 0.1000],
                    [0.5000, 0.3011]], dtype=torch.float64)
        """
        found = self._read(jumps)
        at, count = self._times(ts, found)
        return self._rates(self._states(found).take(count), at).movedim(0, -2)

    def _one_hot(self, marks: Tensor) -> Tensor:
        """(row, *batch, 1, kind)"""
        return (marks == torch.arange(self.kinds, device=marks.device)).to(marks)[..., None, :]

    def _states(self, jumps: Occurrences) -> State:
        edges = jumps.edges[:-1]
        decay = torch.exp(-self.beta * edges.diff(dim=0)[..., None, None])
        rise = self._one_hot(jumps.marks) * jumps.real[..., None, None]
        shape = torch.broadcast_shapes(decay.shape, rise.shape)
        level = (
            linear_scan(decay.expand(shape), rise.to(decay).expand(shape))
            if len(rise)
            else decay.expand(shape)
        )
        return Rows((edges, torch.cat([level.new_zeros(1, *shape[1:]), level])), edges.dim() - 1)

    def _begin(self, now: Tensor) -> State:
        rows = self.beta.shape[-2]
        return Rows((now, now.new_zeros(*now.shape, rows, self.kinds)), now.dim() - 1)

    def _next(self, state: State, t: Tensor, mark: Tensor, happened: Tensor) -> State:
        since, level = state.parts
        decayed = level * torch.exp(-self.beta * (t - since)[..., None, None])
        renewed = torch.where(happened[..., None, None], decayed + self._one_hot(mark), level)
        return Rows((torch.where(happened, t, since), renewed.to(level)), t.dim() - 1)

    def _excitation(self, state: State, t: Tensor) -> Tensor:
        """(row, *batch, kind, kind) what jumps of kind j add to the intensity of kind i."""
        since, level = state.parts
        return self.alpha * (level * torch.exp(-self.beta * (t - since)[..., None, None]))

    def _rates(self, state: State, t: Tensor) -> Tensor:
        return self.mu + self._excitation(state, t).sum(-1)

    def _rate(self, state: State, t: Tensor) -> Tensor:
        return self._rates(state, t).sum(-1)

    def _integral(self, state: State, a: Tensor, b: Tensor) -> Tensor:
        length = b - a
        part = torch.expm1(-self.beta * length[..., None, None]) / self.beta
        return self.mu.sum(-1) * length - (self._excitation(state, a) * part).sum((-2, -1))

    def _log_density(self, state: State, jumps: Occurrences) -> Tensor:
        rates = self._rates(state, jumps.times)
        kind = jumps.marks.long().expand(*rates.shape[:-1], 1)
        rate = rates.gather(-1, kind)[..., 0]
        if self._validate_args:
            self._check_rate(rate, jumps)
        return torch.where(jumps.real, rate, torch.ones_like(rate)).log()

    def _draw_mark(self, state: State, t: Tensor) -> Tensor:
        rates = self._rates(state, t)
        flat = rates.expand(*t.shape, self.kinds).reshape(-1, self.kinds).clamp_min(1e-300)
        return torch.multinomial(flat, 1).reshape(*t.shape, 1).to(t)

    def _bound(self, state: State, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor] | None:
        return self._rate(state, now), end
