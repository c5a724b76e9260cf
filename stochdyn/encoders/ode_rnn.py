"""A recurrent encoder whose state flows between observations."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from stochdyn.encoders.base import AbstractBackwardEncoder, Rows, Transform
from stochdyn.errors import TimeError
from stochdyn.fields import GRUJump, Memory, NeuralField
from stochdyn.paths.observation_jumps import ObservationJumps, Readings
from stochdyn.solvers import AbstractMean, RungeKutta4


class ODERNNEncoder(AbstractBackwardEncoder):
    """A hidden state that flows by a learned ODE through each gap and jumps by a GRU cell at observed times.

    dh/ds = tanh(MLP(h[, covariates])) over a gap of s time units, backwards from the last observed time. `substeps` of
    the solver make a gap, however long. It costs about four times as much as `GRUEncoder`: for series with very uneven
    gaps. Flow and jump can be those of an `ObservationJumpODE`; there is no prediction for the jump to read.

    Args:
        obs_dim: number of channels.
        hidden: size of the encoding.
        flow: dh/ds, a module `(s, h[, context])` or an `AbstractMemoryFlow`, s being the time since the last observed
            time, e.g. `GRUFlow(hidden)`; by default a network.
        jump: a module `(s, h, y, mask, seen[, context])` to the new h, `seen` being None; by default a `GRUJump`.
        width: of the hidden layer of the default flow, by default `hidden`.
        substeps: steps of the solver per gap.
        solver: `Heun()` or `RungeKutta4()`.
        covariates: number of covariates, static or time-varying, the context of flow and jump; read at observed times.
        transform: applied to the values first, e.g. `torch.log1p`; they should end up near unit scale.
        time_unit: times are divided by it; a typical gap should end up near 1.

    Raises:
        ShapeError: if a size is below 1, or the batch has another number of channels or covariates.
        TimeError: if `time_unit` is not positive, or `substeps` below 1.
        FieldError: if a jump reads a prediction, or returns another shape.

    References:
        Rubanova, Chen & Duvenaud, "Latent ODEs for irregularly-sampled time series", 2019,
        https://arxiv.org/abs/1907.03907

    Example:
        >>> import stochdyn as sd
        >>> batch = sd.Series([0.0, 0.1, 2.0], torch.randn(4, 3, 2))
        >>> sd.ODERNNEncoder(obs_dim=2, hidden=16, substeps=2)(batch).shape
        torch.Size([4, 3, 16])
        >>> sd.ODERNNEncoder(obs_dim=2, hidden=16, flow=sd.GRUFlow(16))(batch).shape
        torch.Size([4, 3, 16])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int = 64,
        *,
        flow: nn.Module | None = None,
        jump: nn.Module | None = None,
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
        self.solver = replace(solver, substeps=substeps * solver.substeps)
        options = {"context_dim": covariates, "activation": torch.tanh, "final": torch.tanh}
        self.flow = flow or NeuralField(hidden, hidden=(width or hidden,), **options)
        self.jump = jump or GRUJump(obs_dim, hidden, prediction=False, context_dim=covariates)

    def encode(self, rows: Rows) -> Tensor:
        y, mask, context = rows.inputs.split([self.obs_dim, self.obs_dim, self.covariates], -1)
        # Its differences are the gaps, which the time elapsed has rounded.
        times = rows.gap.double().cumsum(1)
        readings = Readings(times, y, mask, context if self.covariates else None)
        start = rows.inputs.new_zeros(len(rows.inputs), self.hidden)
        return self._jumps.run(start, readings).after

    def flowed(self, h: Tensor, gap: Tensor) -> Tensor:
        """The state (series, hidden) after a gap (series, 1), in time units, from the last observed time."""
        memory = Memory.empty(h, self.obs_dim)
        return self._jumps.between(torch.zeros_like(gap), gap, h, memory)[0]

    @property
    def _jumps(self) -> ObservationJumps:
        return ObservationJumps(self.flow, self.jump, self.solver)
