"""Bayesian fields: random weights with width-scaled priors, and the copy in which they are drawn once."""

import math
from abc import ABC
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro.distributions as dist
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.poutine.messenger import block_messengers
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stochdyn.errors import FieldError
from stochdyn.fields.diffusion import AbstractDiffusion

WeightPrior = Callable[[Tensor, int | None], dist.TorchDistribution]
Given = TypeVar("Given")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class WidthScaled:
    """The prior of weights: N(0, weight^2 / fan-in), and N(0, bias^2) for biases.

    A sum over the inputs of a layer then has a variance that does not grow with their number, so that the prior of a
    net's output is that of its limit of infinite width, a Gaussian process, up to terms that vanish.

    Args:
        weight: standard deviation of what a layer makes of inputs of unit mean square.
        bias: standard deviation of a bias.

    Raises:
        FieldError: if one is not positive.

    References:
        Neal, "Bayesian learning for neural networks", 1996, https://doi.org/10.1007/978-1-4612-0745-0

    Example:
        >>> import torch, stochdyn as sd
        >>> sd.WidthScaled(weight=2.0)(torch.zeros(8, 16), 16).scale
        tensor(0.5000)
    """

    weight: float = 1.0
    bias: float = 1.0

    def __post_init__(self) -> None:
        if not (self.weight > 0 and self.bias > 0):
            raise FieldError(f"WidthScaled: scales must be positive, got {self.weight} and {self.bias}.")

    def __call__(self, like: Tensor, fan_in: int | None) -> dist.Normal:
        scale = self.bias if fan_in is None else self.weight / math.sqrt(fan_in)
        return dist.Normal(like.new_zeros(()), like.new_tensor(scale))


_PRIOR = WidthScaled()


def bayesian(module: Module, name: str = "net", *, prior: WeightPrior = _PRIOR) -> Module:
    """Make the weights of a net random, in place: each becomes a sample site `<name>.<path of the weight>`.

    A path draws them when it is built, once, outside the plates of the model: one net for all. Elsewhere (a decoder, a
    closure over the net) call `draw_weights` and use the copy that it returns. Weights are matrices, and vectors whose
    name has "bias" in it; other vectors and numbers (a learned period, a rate) stay parameters.

    Args:
        module: an `nn.Module` whose layers take batched weights, such as `NeuralField`, `MLP`, `ElementwiseField`.
        name: goes in front of the sites' names; two nets of a model need two names.
        prior: `(like, fan_in) -> distribution` over numbers: `like` has the weight's shape and dtype, `fan_in` is the
            number of inputs that are summed, None for a bias.

    Returns:
        the module.

    Raises:
        FieldError: if the module has no weights, or weights that are computed from others (parametrisations).

    References:
        MacKay, "A practical Bayesian framework for backpropagation networks", 1992,
        https://doi.org/10.1162/neco.1992.4.3.448

    Example:
        >>> import pyro, torch, stochdyn as sd
        >>> drift = sd.bayesian(sd.NeuralField(2, hidden=(16,)), "drift")
        >>> def model():
        ...     path = sd.SDEPath(drift, torch.tensor([0.1]), torch.zeros(2), torch.linspace(0, 1, 5))
        ...     return pyro.sample("z", path)
        >>> pyro.poutine.trace(model).get_trace().stochastic_nodes[:2]
        ['drift.net.layers.0.weight', 'drift.net.layers.0.bias']
    """
    if any(parametrize.is_parametrized(part) for part in module.modules()):
        raise FieldError(
            f"bayesian: {type(module).__name__} computes weights from others (a parametrisation), so a prior on what "
            "it holds is not one on the weights. Use sd.MLP or sd.NeuralField."
        )
    kind, count = type(module).__name__, 0
    _prepare(module, name)
    for part in module.modules():
        for key, fan_in in (_weights(part) if isinstance(part, PyroModule) else {}).items():
            like = part._parameters[key].detach().clone()  # type: ignore
            setattr(part, key, PyroSample(_Prior(key, fan_in, prior)))
            part.register_buffer(_like(key), like, persistent=False)
            count += 1
    if not count:
        raise FieldError(f"bayesian: {kind} has no weights. Give a net, e.g. sd.MLP(2, 1).")
    return module


def _prepare(module: nn.Module, name: str) -> None:
    """Let Pyro handle the attributes of every part, by its full name."""
    context = PyroModule()._pyro_context
    for path, part in module.named_modules():
        # Pyro's mixin does not go with abstract classes; what they hold of weights is in their parts.
        if not isinstance(part, ABC):
            to_pyro_module_(part, recurse=False)
            part.__dict__.update(_pyro_name=f"{name}.{path}" if path else name, _pyro_context=context)


@dataclass(frozen=True)
class _Prior:
    """The prior of one weight, in the dtype and on the device that its module has by now."""

    key: str
    fan_in: int | None
    prior: WeightPrior

    def __call__(self, module: nn.Module) -> dist.TorchDistribution:
        like = module._buffers[_like(self.key)]
        if like is None:
            raise FieldError(f"bayesian: the buffer of '{self.key}' is gone. Build the net anew.")
        return self.prior(like, self.fan_in).expand(like.shape).to_event(like.dim())


def _like(key: str) -> str:
    return f"{key}_like"


def _weights(part: nn.Module) -> dict[str, int | None]:
    """The fan-in of every weight of one module, None for biases; a module may say so itself by `fan_in`."""
    own = {key: p for key, p in part._parameters.items() if p is not None}
    said = getattr(part, "fan_in", None)
    if isinstance(said, dict):
        return {key: said[key] for key in own if key in said}
    found: dict[str, int | None] = {}
    for key, p in own.items():
        if "bias" in key:
            found[key] = None
        elif p.dim() >= 2:
            found[key] = p[0].numel()
    return found


def draw_weights(
    field: Given, *, plates: Sequence[str] = (), memo: dict[int, nn.Module] | None = None
) -> Given:
    """A copy of a module in which every random weight of it and of its parts is drawn, once; else the module itself.

    Paths do this with their fields, since they call them after the model has returned, when every access would draw
    anew. Call it yourself for a net in a closure or in a decoder, or to give two paths the same weights.

    Args:
        field: a module, with `PyroSample` weights of your own or made by `bayesian`; anything else is returned as it
            is.
        plates: names of the plates around the call whose members have weights each of their own. The others of the
            model's plates are left out: one net for all. Plates of particles and of draws stay.
        memo: one dictionary for several fields that share modules: these are then drawn once.

    Example:
        >>> import torch, stochdyn as sd
        >>> net = sd.draw_weights(sd.bayesian(sd.MLP(1, 1), "net"))
        >>> x = torch.ones(1)
        >>> bool(net(x) == net(x))
        True
    """
    if isinstance(field, AbstractDiffusion):
        drawn = draw_weights(field.field, plates=plates, memo=memo)
        return field if drawn is field.field else type(field)(drawn)  # type: ignore
    if not has_random_weights(field):
        return field
    with _outside_plates(plates):
        copy = _drawn(field, {} if memo is None else memo)
    copy.weights_drawn = True  # type: ignore
    return copy  # type: ignore


def has_random_weights(field: object) -> bool:
    """Whether a field has weights that are drawn anew whenever they are read.

    Example:
        >>> import stochdyn as sd
        >>> has_random_weights(sd.bayesian(sd.MLP(1, 1), "net")), has_random_weights(sd.MLP(1, 1))
        (True, False)
    """
    field = field.field if isinstance(field, AbstractDiffusion) else field
    return isinstance(field, nn.Module) and any(_random(part) for part in field.modules())


def has_drawn_weights(field: object) -> bool:
    """Whether a field is a copy made by `draw_weights`, a new one in every run.

    Example:
        >>> has_drawn_weights(nn.Linear(1, 1))
        False
    """
    return getattr(field, "weights_drawn", False) is True


def _outside_plates(kept: Sequence[str]) -> AbstractContextManager[Any]:
    """Without the plates that the model itself entered."""
    traced = max((i for i, m in enumerate(_PYRO_STACK) if isinstance(m, TraceMessenger)), default=-1)
    outer = {id(m) for m in _PYRO_STACK[: traced + 1]}  # whoever traces the model entered these

    def inside(messenger: Any) -> bool:
        if not isinstance(messenger, PlateMessenger) or id(messenger) in outer or messenger.name in kept:
            return False
        return not (messenger.name.startswith("_") or messenger.name == "num_particles_vectorized")

    return block_messengers(inside)


def _random(part: nn.Module) -> list[str]:
    """The names of the random attributes of one module."""
    if not isinstance(part, PyroModule):
        return []
    declared = [
        key for kind in type(part).__mro__ for key, v in vars(kind).items() if isinstance(v, PyroSample)
    ]
    return list(dict.fromkeys([*declared, *part._pyro_samples]))


def _drawn(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """A copy with its weights drawn; a module that is registered twice is drawn once."""
    if id(module) in memo:
        return memo[id(module)]
    kind, plain = type(module), type(module).__bases__[0]
    made = isinstance(module, PyroModule) and not issubclass(plain, PyroModule) and PyroModule[plain] is kind
    new = object.__new__(plain if made else kind)
    new.__dict__.update(module.__dict__)
    for group in ("_parameters", "_buffers"):
        new.__dict__[group] = dict(module.__dict__[group])
    new.__dict__["_modules"] = {k: part and _drawn(part, memo) for k, part in module._modules.items()}
    memo[id(module)] = new
    if not isinstance(module, PyroModule):
        return new
    with module._pyro_context:
        values = {key: getattr(module, key) for key in [*_random(module), *module._pyro_params]}
    for key in ("_pyro_name", "_pyro_context", "_pyro_params", "_pyro_samples"):
        new.__dict__.pop(key)
    if not made:
        new.__dict__.update(_pyro_name="", _pyro_context=type(module._pyro_context)())
        new.__dict__.update(_pyro_params=OrderedDict(), _pyro_samples=OrderedDict())
    new.__dict__.update(values)
    return new
