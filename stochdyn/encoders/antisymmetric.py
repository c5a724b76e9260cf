"""Recurrent encoders whose memory neither fades nor explodes."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from stochdyn.encoders.base import AbstractBackwardEncoder, Rows, Transform
from stochdyn.errors import FieldError
from stochdyn.fields import AntisymmetricField, GroupSort


class AntisymmetricEncoder(AbstractBackwardEncoder):
    """An AntisymmetricRNN: each row is one Euler step of h' = tanh((W - W' - damping I) h + V x + b), backwards.

    The step is `step` (1 + gap): one unit for the row itself, and the gap to the next observed time, in time units. The
    Jacobian of the field has no eigenvalue with a positive real part, see `AntisymmetricField`, so that in small steps
    what was read long ago neither fades nor explodes; an encoding moves by at most
    `step` (1 + gap) times the learned speed per row.

    Args:
        obs_dim: number of channels.
        hidden: size of the encoding.
        step: of the Euler method; step (1 + gap) should be well below 1.
        damping: at least 0; Euler steps need some to be stable.
        covariates: number of covariates, static or time-varying; the latter are read at observed times.
        transform: applied to the values first, e.g. `torch.log1p`; they should end up near unit scale.
        time_unit: times are divided by it; a typical gap should end up near 1.

    Raises:
        ShapeError: if a size is below 1, or the batch has another number of channels or covariates.
        TimeError: if `time_unit` is not positive.
        FieldError: if `step` is not positive, or `damping` negative.

    References:
        Chang, Chen, Haber & Chi, "AntisymmetricRNN: a dynamical system view on recurrent neural networks", 2019,
        https://arxiv.org/abs/1902.09689

    Example:
        >>> import stochdyn as sd
        >>> batch = sd.Series([0.0, 0.1, 2.0], torch.randn(4, 3, 2))
        >>> sd.AntisymmetricEncoder(obs_dim=2, hidden=16)(batch).shape
        torch.Size([4, 3, 16])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int = 64,
        *,
        step: float = 0.2,
        damping: float = 0.1,
        covariates: int = 0,
        transform: Transform | None = None,
        time_unit: float = 1.0,
    ) -> None:
        super().__init__(obs_dim, hidden, covariates=covariates, transform=transform, time_unit=time_unit)
        if not 0 < step < math.inf:
            raise FieldError(f"AntisymmetricEncoder: `step` must be positive, got {step}.")
        self.step = step
        self.field = AntisymmetricField(hidden, context_dim=self.features + 1, damping=damping)

    def encode(self, rows: Rows) -> Tensor:
        h, out = rows.inputs.new_zeros(len(rows.inputs), self.hidden), []
        now = rows.inputs.new_zeros(1)
        steps = self.step * (1 + rows.gap)
        for x, step in zip(rows.stepped.unbind(1), steps[..., None].unbind(1), strict=True):
            h = h + step * self.field(now, h, x)
            out.append(h)
        return torch.stack(out, 1)


class OrthogonalEncoder(AbstractBackwardEncoder):
    """A recurrent encoder h <- GroupSort(U h + V x + b) with U orthogonal: gradients keep their norm over any length.

    The Jacobian of a step by the state is a permutation times U, orthogonal. So what came first is remembered as well
    as what came last; the encoding's size grows with what it reads. For long series in which early data count; where
    only near ones do, `GRUEncoder` forgets the rest.

    Args:
        obs_dim: number of channels.
        hidden: size of the encoding.
        covariates: number of covariates, static or time-varying; the latter are read at observed times.
        transform: applied to the values first, e.g. `torch.log1p`; they should end up near unit scale.
        time_unit: times are divided by it; a typical gap should end up near 1.

    Raises:
        ShapeError: if a size is below 1, or the batch has another number of channels or covariates.
        TimeError: if `time_unit` is not positive.

    References:
        Arjovsky, Shah & Bengio, "Unitary evolution recurrent neural networks", 2016, https://arxiv.org/abs/1511.06464;
        Anil, Lucas & Grosse, "Sorting out Lipschitz function approximation", 2018, https://arxiv.org/abs/1811.05381

    Example:
        >>> import stochdyn as sd
        >>> batch = sd.Series([0.0, 0.1, 2.0], torch.randn(4, 3, 2))
        >>> sd.OrthogonalEncoder(obs_dim=2, hidden=16)(batch).shape
        torch.Size([4, 3, 16])
    """

    def __init__(
        self,
        obs_dim: int,
        hidden: int = 64,
        *,
        covariates: int = 0,
        transform: Transform | None = None,
        time_unit: float = 1.0,
    ) -> None:
        super().__init__(obs_dim, hidden, covariates=covariates, transform=transform, time_unit=time_unit)
        self.sort = GroupSort()
        self.read = nn.Linear(self.features + 1, hidden)
        self.turn = orthogonal(nn.Linear(hidden, hidden, bias=False))

    def encode(self, rows: Rows) -> Tensor:
        read, turn = self.read(rows.stepped), self.turn.weight.mT  # computed once: it is a matrix exponential
        h, out = rows.inputs.new_zeros(len(rows.inputs), self.hidden), []
        for x in read.unbind(1):
            h = self.sort(h @ turn + x)
            out.append(h)
        return torch.stack(out, 1)
