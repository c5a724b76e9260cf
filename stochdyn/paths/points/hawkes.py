"""The Hawkes process with an exponential kernel."""

from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import StabilityError
from stochdyn.paths.points.base import AbstractPointProcess, Rows, State, joint, parameter
from stochdyn.paths.points.marks import Law
from stochdyn.paths.points.occurrences import Occurrences
from stochdyn.paths.points.scan import linear_scan
from stochdyn.paths.points.simulate import AbstractSampler, Thinning


class Hawkes(AbstractPointProcess):
    """lambda(t) = mu + alpha sum over jumps before t of exp(-beta (t - t_i)); closed form, linear time.

    Each jump brings alpha / beta further ones on average, its branching ratio. Nothing is known of jumps before t0.

    Args:
        mu: base intensity, jumps per unit of time; a number or (*batch,), not negative.
        alpha: rise of the intensity at a jump, not negative.
        beta: decay rate of a rise, per unit of time, positive.
        t0, t1: the window, numbers or (*batch,).
        explosive: accept a branching ratio of 1 or more, where the numbers of jumps grow without end. Its likelihood in
            a window is a proper one.
        marks: the law of the marks, which here play no part in the excitation; for those that do see
            `MultivariateHawkes` and `PointProcess`.
        max_jumps: rows of samples; None pads to the longest of a draw.
        sampler: by default `Thinning()`.

    Shapes:
        batch_shape: broadcast of mu, alpha, beta, window, marks; event_shape (max_jumps, 1 + mark).

    Raises:
        StabilityError: if the branching ratio is 1 or more, while validation is on.
        FieldError: for parameters out of range.
        TimeError, DataError, ShapeError: for a value outside the support, naming the series and the jump.
        PaddingError: from `sample`.

    References:
        Hawkes, "Spectra of some self-exciting and mutually exciting point processes", 1971,
        https://doi.org/10.1093/biomet/58.1.83;
        Ozaki, "Maximum likelihood estimation of Hawkes' self-exciting point processes", 1979,
        https://doi.org/10.1007/BF02480272

    Example:
        >>> import stochdyn as sd
        >>> times = torch.tensor([0.2, 0.5, 0.9, 1.0, 1.7, 2.4, 2.45, 3.1]).double()
        >>> sd.Hawkes(0.5, 0.8, 1.6, 0.0, 4.0).log_prob(times[:, None])
        tensor(-4.8973, dtype=torch.float64)
    """

    def __init__(
        self,
        mu: float | Tensor,
        alpha: float | Tensor,
        beta: float | Tensor,
        t0: Any,
        t1: Any,
        *,
        explosive: bool = False,
        marks: Law | None = None,
        max_jumps: int | None = None,
        sampler: AbstractSampler | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check = bool(self._validate_args if validate_args is None else validate_args)
        self.mu = parameter("mu", mu, positive=False, owner="Hawkes", validate=check)
        self.alpha = parameter("alpha", alpha, positive=False, owner="Hawkes", validate=check)
        self.beta = parameter("beta", beta, positive=True, owner="Hawkes", validate=check)
        batch = joint("Hawkes", self.mu.shape, self.alpha.shape, self.beta.shape)
        if check and not explosive:
            check_branching("Hawkes", (self.alpha / self.beta).detach(), "alpha / beta")
        super().__init__(
            batch,
            t0,
            t1,
            marks=marks,
            max_jumps=max_jumps,
            sampler=sampler or Thinning(),
            device=self.beta.device,
            validate_args=validate_args,
        )

    @property
    def branching(self) -> Tensor:
        """(*batch,) how many jumps one jump brings on average.

        Example:
            >>> import stochdyn as sd
            >>> sd.Hawkes(0.5, 0.8, 1.6, 0.0, 4.0).branching
            tensor(0.5000, dtype=torch.float64)
        """
        return (self.alpha / self.beta).expand(self.batch_shape)

    def _states(self, jumps: Occurrences) -> State:
        edges = jumps.edges[:-1]
        batch = torch.broadcast_shapes(edges.shape[1:], self.beta.shape)
        decay = torch.exp(-self.beta * edges.diff(dim=0)).expand(-1, *batch)
        rise = jumps.real.to(decay).expand(decay.shape)
        rises = torch.cat([torch.zeros_like(decay[:1]), linear_scan(decay, rise)]) if len(rise) else None
        return Rows((edges, decay.new_zeros(1, *batch) if rises is None else rises), edges.dim() - 1)

    def _begin(self, now: Tensor) -> State:
        return Rows((now, torch.zeros_like(now)), now.dim() - 1)

    def _next(self, state: State, t: Tensor, mark: Tensor, happened: Tensor) -> State:
        since, level = state.parts
        renewed = 1 + level * torch.exp(-self.beta * (t - since))
        return Rows(
            (torch.where(happened, t, since), torch.where(happened, renewed, level).to(level)), t.dim() - 1
        )

    def _rate(self, state: State, t: Tensor) -> Tensor:
        since, level = state.parts
        return self.mu + self.alpha * level * torch.exp(-self.beta * (t - since))

    def _integral(self, state: State, a: Tensor, b: Tensor) -> Tensor:
        since, level = state.parts
        left = self.alpha * level * torch.exp(-self.beta * (a - since))
        return self.mu * (b - a) - left * torch.expm1(-self.beta * (b - a)) / self.beta

    def _bound(self, state: State, now: Tensor, end: Tensor) -> tuple[Tensor, Tensor] | None:
        return self._rate(state, now), end


def check_branching(name: str, ratio: Tensor, what: str) -> None:
    """Refuse a self-exciting process that explodes.

    Args:
        name: of the process.
        ratio: (*batch,) branching ratio or spectral radius.
        what: how it comes about.

    Raises:
        StabilityError: naming the batch member and the ratio.

    Example:
        >>> check_branching("Hawkes", torch.tensor(0.5), "alpha / beta")
    """
    bad = ~(ratio < 1)
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        where = f", batch member {first[0] if len(first) == 1 else tuple(first)}" if first else ""
        raise StabilityError(
            f"{name}{where}: the branching ratio {what} is {float(ratio[tuple(first)]):.6g}, and with 1 or more the "
            "numbers of jumps grow without end. Make the ratio a parameter in (0, 1) of its own, alpha = ratio * beta, "
            "or pass explosive=True."
        )
