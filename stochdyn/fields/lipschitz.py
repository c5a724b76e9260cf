"""Networks whose slope is bounded by construction."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stochdyn.errors import FieldError, ShapeError
from stochdyn.fields.neural import Linear


class GroupSort(nn.Module):
    """An activation that sorts its inputs in groups: 1-Lipschitz, and its Jacobian is a permutation.

    So it neither stretches a gradient nor loses any of its norm, as a ReLU does. With groups of two it is (max, min).

    Args:
        group: size of the groups of the last dimension.

    Shapes:
        (..., width) to (..., width); what is left over after the last whole group stays as it is.

    Raises:
        ShapeError: if `group` is below 2.

    References:
        Anil, Lucas & Grosse, "Sorting out Lipschitz function approximation", 2018, https://arxiv.org/abs/1811.05381

    Example:
        >>> import stochdyn as sd
        >>> sd.GroupSort()(torch.tensor([3.0, 1.0, -2.0, 5.0]))
        tensor([ 1.,  3., -2.,  5.])
    """

    def __init__(self, group: int = 2) -> None:
        super().__init__()
        if group < 2:
            raise ShapeError(f"GroupSort: groups must have at least 2 members, got {group}.")
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        whole = x.shape[-1] - x.shape[-1] % self.group
        if whole < x.shape[-1]:
            return torch.cat([self(x[..., :whole]), x[..., whole:]], -1)
        groups = x.unflatten(-1, (-1, self.group))
        if self.group == 2:
            a, b = groups.unbind(-1)
            return torch.stack([torch.minimum(a, b), torch.maximum(a, b)], -1).flatten(-2)
        return groups.sort(-1).values.flatten(-2)


class Bjorck(nn.Module):
    """A parametrisation that makes a matrix orthonormal, as near as some iterations of Björck and Bowie's get.

    W <- W (3 I - W'W) / 2 from W / sqrt(|W|_1 |W|_inf): that norm is at least the largest singular value, so all are at
    most 1, and each step takes s to s (3 - s^2) / 2, at most 1 and nearer to it. So the result never has a singular
    value above 1, whatever the number of iterations; more of them bring the small ones to 1. They grow by a half at
    each iteration while they are small.

    Args:
        iterations: how many.

    Shapes:
        (rows, columns) to the same: orthonormal columns, or rows where there are fewer of them.

    Raises:
        FieldError: if `iterations` is below 1.

    References:
        Björck & Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix", 1971,
        https://doi.org/10.1137/0708036

    Example:
        >>> import stochdyn as sd
        >>> W = sd.Bjorck()(torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
        >>> bool(torch.allclose(W.mT @ W, torch.eye(2), atol=1e-5))
        True
    """

    def __init__(self, iterations: int = 15) -> None:
        super().__init__()
        if iterations < 1:
            raise FieldError(f"Bjorck: needs at least 1 iteration, got {iterations}.")
        self.iterations = iterations

    def forward(self, W: Tensor) -> Tensor:
        wide = W.shape[-2] < W.shape[-1]
        W = W.mT if wide else W
        size = W.abs()
        norm = (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).clamp(min=torch.finfo(W.dtype).tiny).sqrt()
        W = W / norm[..., None, None]
        for _ in range(self.iterations):
            W = 1.5 * W - 0.5 * W @ (W.mT @ W)
        return W.mT if wide else W


class LipschitzMLP(nn.Module):
    """A multilayer perceptron with |f(x) - f(y)| <= lipschitz |x - y|, and which can reach it.

    Layers with Björck-orthonormal weights and `GroupSort` between them: no factor of its Jacobian stretches, so the
    bound holds for all weights, in the Euclidean norm, and none need shrink, so training can use all of it. A net of
    normalised layers with ReLU keeps the bound too, but loses slope: it cannot fit |x|. As a drift its bound rules out
    stiffness, and explosion: two trajectories part at most as fast as exp(lipschitz t).

    The weights are orthonormalised at every call. In a loop over time wrap it in
    `torch.nn.utils.parametrize.cached()`.

    Args:
        inputs, outputs: sizes of the last dimension.
        hidden: widths of the hidden layers.
        lipschitz: the bound, in units of output per input.
        group: of `GroupSort`.
        iterations: of `Bjorck`.

    Shapes:
        (*batch, inputs) to (*batch, outputs).

    Raises:
        ShapeError: if a size is below 1.
        FieldError: if `lipschitz` is not positive.

    References:
        Anil, Lucas & Grosse, "Sorting out Lipschitz function approximation", 2018, https://arxiv.org/abs/1811.05381

    Example:
        >>> import stochdyn as sd
        >>> net, x = sd.LipschitzMLP(3, 2, hidden=(16, 16), lipschitz=0.5), torch.randn(100, 3)
        >>> slopes = (net(x) - net(-x)).norm(dim=-1) / (2 * x).norm(dim=-1)
        >>> bool(slopes.max() <= 0.5 + 1e-6)
        True
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        *,
        lipschitz: float = 1.0,
        group: int = 2,
        iterations: int = 15,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        if min(widths) < 1:
            raise ShapeError(f"LipschitzMLP: sizes must be at least 1, got {widths}.")
        if not 0 < lipschitz < math.inf:
            raise FieldError(f"LipschitzMLP: `lipschitz` must be positive, got {lipschitz}.")
        self.lipschitz, self.sort = lipschitz, GroupSort(group)
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)
            parametrize.register_parametrization(layer, "weight", Bjorck(iterations))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            x = layer(self.sort(x))
        return self.lipschitz * x
