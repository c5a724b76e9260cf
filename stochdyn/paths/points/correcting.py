"""The self-correcting process: the longer nothing happens, the likelier a jump."""

from typing import Any

import torch
from torch import Tensor

from stochdyn.paths.points.base import AbstractPointProcess, Rows, State, joint, parameter
from stochdyn.paths.points.marks import Law
from stochdyn.paths.points.occurrences import Occurrences
from stochdyn.paths.points.poisson import growth
from stochdyn.paths.points.simulate import AbstractSampler


class SelfCorrecting(AbstractPointProcess):
    """lambda(t) = exp(mu (t - t0) - alpha N(t)), N the number of jumps before t; closed form.

    In the long run mu / alpha jumps per unit of time, more regular than Poisson's.

    Args:
        mu: growth of the log intensity per unit of time, a number or (*batch,), positive.
        alpha: what a jump takes from it, not negative.
        t0, t1: the window, numbers or (*batch,).
        marks, max_jumps, sampler: as for `PoissonProcess`.

    Shapes:
        batch_shape: broadcast of mu, alpha, window, marks; event_shape (max_jumps, 1 + mark).

    Raises:
        FieldError: for parameters out of range.
        TimeError, DataError, ShapeError: for a value outside the support, naming the series and the jump.
        PaddingError: from `sample`.

    References:
        Isham & Westcott, "A self-correcting point process", 1979, https://doi.org/10.1016/0304-4149(79)90008-5

    Example:
        >>> import stochdyn as sd
        >>> sd.SelfCorrecting(1.0, 0.4, 0.0, 1.0).log_prob(torch.tensor([[0.5]]).double())
        tensor(-0.8657, dtype=torch.float64)
    """

    def __init__(
        self,
        mu: float | Tensor,
        alpha: float | Tensor,
        t0: Any,
        t1: Any,
        *,
        marks: Law | None = None,
        max_jumps: int | None = None,
        sampler: AbstractSampler | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check = bool(self._validate_args if validate_args is None else validate_args)
        self.mu = parameter("mu", mu, positive=True, owner="SelfCorrecting", validate=check)
        self.alpha = parameter("alpha", alpha, positive=False, owner="SelfCorrecting", validate=check)
        batch = joint("SelfCorrecting", self.mu.shape, self.alpha.shape)
        super().__init__(
            batch,
            t0,
            t1,
            marks=marks,
            max_jumps=max_jumps,
            sampler=sampler,
            device=self.mu.device,
            validate_args=validate_args,
        )

    def _states(self, jumps: Occurrences) -> State:
        seen = torch.cat([torch.zeros_like(jumps.start)[None], jumps.real.to(jumps.start).cumsum(0)])
        return Rows((seen,), jumps.start.dim())

    def _begin(self, now: Tensor) -> State:
        return Rows((torch.zeros_like(now),), now.dim() - 1)

    def _next(self, state: State, t: Tensor, mark: Tensor, happened: Tensor) -> State:
        (seen,) = state.parts
        return Rows((seen + happened.to(seen),), t.dim() - 1)

    def _rate(self, state: State, t: Tensor) -> Tensor:
        return self._log_line(state, t).exp()

    def _log_rate(self, state: State, jumps: Occurrences) -> Tensor:
        return self._log_line(state, jumps.times)

    def _log_line(self, state: State, t: Tensor) -> Tensor:
        (seen,) = state.parts
        return self.mu * (t - self.t0.to(t)) - self.alpha * seen

    def _integral(self, state: State, a: Tensor, b: Tensor) -> Tensor:
        return growth(self._log_line(state, a), self.mu, b - a)

    def _bound(self, state: State, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor] | None:
        # It grows: the bound is its value a while ahead, at which it has at most doubled or about one jump is due.
        rate = self._rate(state, now)
        ahead = torch.minimum(1 / rate.clamp_min(torch.finfo(now.dtype).tiny), 0.7 / self.mu.to(now))
        until = torch.minimum(now + ahead, end)
        return self._rate(state, until), until
