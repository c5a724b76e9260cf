"""A recurrent encoder whose state flows between observations."""

import torch
from torch import Tensor, nn

from stochdyn.encoders.base import AbstractBackwardEncoder, Rows, Transform
from stochdyn.errors import TimeError
from stochdyn.fields import MLP
from stochdyn.solvers import AbstractMean, RungeKutta4


class ODERNNEncoder(AbstractBackwardEncoder):
    """A hidden state that flows by a learned ODE through each gap and jumps by a GRU cell at observed times.

    dh/ds = tanh(MLP(h)) over a gap of s time units, backwards from the last observed time. `substeps` of the solver
    make a gap, however long. It costs about four times as much as `GRUEncoder`: for series with very uneven gaps.

    Args:
        obs_dim: number of channels.
        hidden: size of the encoding.
        width: of the hidden layer of the field, by default `hidden`.
        substeps: steps of the solver per gap.
        solver: `Heun()` or `RungeKutta4()`.
        covariates: number of covariates, static or time-varying; the latter are read at observed times.
        transform: applied to the values first, e.g. `torch.log1p`; they should end up near unit scale.
        time_unit: times are divided by it; a typical gap should end up near 1.

    Raises:
        ShapeError: if a size is below 1, or the batch has another number of channels or covariates.
        TimeError: if `time_unit` is not positive, or `substeps` below 1.

    References:
        Rubanova, Chen & Duvenaud, "Latent ODEs for irregularly-sampled time series", 2019,
        https://arxiv.org/abs/1907.03907

    Example:
        >>> import stochdyn as sd
        >>> batch = sd.Series([0.0, 0.1, 2.0], torch.randn(4, 3, 2))
        >>> sd.ODERNNEncoder(obs_dim=2, hidden=16, substeps=2)(batch).shape
        torch.Size([4, 3, 16])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int = 64,
        *,
        width: int | None = None,
        substeps: int = 1,
        solver: AbstractMean = RungeKutta4(),  # noqa: B008
        covariates: int = 0,
        transform: Transform | None = None,
        time_unit: float = 1.0,
    ) -> None:
        super().__init__(obs_dim, hidden, covariates=covariates, transform=transform, time_unit=time_unit)
        if substeps < 1:
            raise TimeError(f"ODERNNEncoder: `substeps` must be at least 1, got {substeps}.")
        self.substeps, self.solver = substeps, solver
        self.field = MLP(hidden, hidden, (width or hidden,), activation=torch.tanh, final=torch.tanh)
        self.cell = nn.GRUCell(self.features, hidden)

    def encode(self, rows: Rows) -> Tensor:
        h = rows.inputs.new_zeros(len(rows.inputs), self.hidden)
        out = []
        for x, gap in zip(rows.inputs.unbind(1), rows.gap[..., None].unbind(1), strict=True):
            h = self.cell(x, self.flow(h, gap) if out else h)
            out.append(h)
        return torch.stack(out, 1)

    def flow(self, h: Tensor, gap: Tensor) -> Tensor:
        """The state (series, hidden) after a gap (series, 1), in time units."""
        step, now = gap / self.substeps, torch.zeros_like(gap)
        for _ in range(self.substeps):
            h = self.solver.mean(lambda t, z: self.field(z), now, step, h)
        return h
