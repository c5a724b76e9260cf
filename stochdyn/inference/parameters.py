"""The parameters that a fit trains: found in modules and in Pyro's param messages."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import clip_grad_norm_, get_total_norm

from stochdyn.errors import FitError

FUSED = {"cuda", "xpu"}  # where torch's Adam is one kernel, which can be told on the device to change nothing
Part = frozenset[int]  # parameters by identity
Buffers = list[tuple[nn.Module, str, torch.Tensor | None, torch.Tensor | None]]


def modules_of(program: Any) -> list[nn.Module]:
    """The modules behind a program: itself, its bound instance, or what a Pyro handler wraps.

    Example:
        >>> import pyro, torch
        >>> net = torch.nn.Linear(1, 1)
        >>> modules_of(net) == modules_of(net.forward) == modules_of(pyro.poutine.condition(net, {})) == [net]
        True
    """
    if isinstance(program, nn.Module):
        return [program]
    parts = [getattr(program, name, None) for name in ("__self__", "func", "fn", "__wrapped__")]
    parts += getattr(program, "args", None) or ()
    found = [module for part in parts if callable(part) for module in modules_of(part)]
    return list(dict.fromkeys(found))


def save_buffers(modules: list[nn.Module]) -> Buffers:
    """Copies of all module buffers, for `restore_buffers`.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> saved = save_buffers([norm])
        >>> _ = norm(torch.randn(4, 2))
        >>> restore_buffers(saved)
        >>> norm.running_mean
        tensor([0., 0.])
    """
    return [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for root in modules
        for module in root.modules()
        for name, buffer in module._buffers.items()
    ]


def restore_buffers(saved: Buffers) -> None:
    """Puts saved buffers back: the same tensors, with the values that they had.

    Example:
        >>> restore_buffers([])
    """
    with torch.no_grad():
        for module, name, buffer, value in saved:
            if buffer is not None and value is not None:
                buffer.copy_(value)
            module._buffers[name] = buffer


def restore_buffers_where(skipped: torch.Tensor, saved: Buffers) -> None:
    """The same where `skipped` is True, which only the device knows.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> saved = save_buffers([norm])
        >>> _ = norm(torch.randn(4, 2))
        >>> restore_buffers_where(torch.tensor(True), saved)
        >>> norm.running_mean
        tensor([0., 0.])
    """
    with torch.no_grad():
        for module, name, _, value in saved:
            now = module._buffers.get(name)
            if now is None or value is None or now.shape != value.shape or now.device != skipped.device:
                continue  # what a forward pass writes is where the parameters are
            now.copy_(torch.where(skipped, value, now))


def parameters_of(program: Any, trace: Any = None) -> dict[int, torch.Tensor]:
    """The trained tensors of a program by identity: of its modules, and of the param sites of a trace.

    Example:
        >>> len(parameters_of(torch.nn.Linear(1, 1)))
        2
    """
    found = [tensor for root in modules_of(program) for tensor in root.parameters()]
    found += [tensor for _, tensor in _param_sites(trace)]
    return {id(t): t for t in found if t.requires_grad and t.is_leaf and not is_lazy(t)}


def guide_parameters(model: Any, guide: Any, model_trace: Any, guide_trace: Any) -> list[torch.Tensor]:
    """What the guide has alone. A guide that runs the model has the model's parameters too: by identity.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> len(guide_parameters(net, torch.nn.Sequential(net, torch.nn.Linear(1, 1)), None, None))
        2
    """
    shared = parameters_of(model, model_trace)
    return [t for key, t in parameters_of(guide, guide_trace).items() if key not in shared]


def _param_sites(trace: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, site in trace.nodes.items() if trace is not None else ():
        if site["type"] == "param" and isinstance(site["value"], torch.Tensor):
            value = site["value"]
            yield name, value.unconstrained() if hasattr(value, "unconstrained") else value


class Parameters:
    """Every tensor that is trained, once each, with a name and an Adam optimiser.

    The union of the parameters of the modules and of the param messages of a run, by identity. New ones
    (made lazily by a guide's first call, or by a new branch) may join at any step.

    Args:
        programs: The programs to search, by the name that goes in front of their parameters' names.

    Example:
        >>> import torch
        >>> parameters = Parameters({"model": torch.nn.Linear(1, 1), "guide": lambda: None})
        >>> parameters.collect()
        >>> list(parameters.named())
        ['model.weight', 'model.bias']
    """

    def __init__(self, programs: dict[str, Any]) -> None:
        self._roots = [(role, root) for role, program in programs.items() for root in modules_of(program)]
        self.modules = list(dict.fromkeys(root for _, root in self._roots))
        self._names: dict[int, str] = {}
        self._tensors: list[torch.Tensor] = []
        self.optimizer: torch.optim.Adam | None = None

    def __len__(self) -> int:
        return len(self._tensors)

    def named(self) -> dict[str, torch.Tensor]:
        return {self._names[id(tensor)]: tensor for tensor in self._tensors}

    def collect(self, trace: Any = None) -> None:
        """Adds the parameters that are not known yet.

        Args:
            trace: A Pyro trace with param sites, or None to look at the modules only.

        Raises:
            FitError: A new parameter is not finite.
        """
        new = []
        for name, tensor in self._candidates(trace):
            if id(tensor) in self._names or not tensor.requires_grad or not tensor.is_leaf or is_lazy(tensor):
                continue
            self._names[id(tensor)] = name
            new.append(tensor)
        if new:
            _densify(new)
            self._tensors += new
            self._check_finite(new)
            self._optimise(new)

    def clear_gradients(self) -> None:
        for tensor in self._tensors:
            tensor.grad = None

    def keep(self, part: Part) -> None:
        """Drops the gradients of all parameters outside a part, so that a step leaves them."""
        for tensor in self._tensors:
            if id(tensor) not in part:
                tensor.grad = None

    @property
    def accelerated(self) -> bool:
        """Whether all are on one accelerator whose Adam can leave a step out by itself."""
        devices = {tensor.device for tensor in self._tensors}
        return len(devices) == 1 and _fused(self._tensors[0])

    def clip(self, limit: "float | torch.Tensor") -> torch.Tensor:
        """Clips the gradients to a total norm, and returns the norm that they had (no host sync)."""
        if not isinstance(limit, torch.Tensor):
            return clip_grad_norm_(self._tensors, limit)
        gradients = [tensor.grad for tensor in self._tensors if tensor.grad is not None]
        norm = get_total_norm(gradients)
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def update(self, lr: float, skip: torch.Tensor | None = None) -> None:
        """One step of Adam, which the device leaves out where `skip` is True (if they are `accelerated`)."""
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = None if skip is None else skip.float()
        self.optimizer.step()

    def check_complete(self, loss: torch.Tensor) -> None:
        """Looks once at what the loss depends on.

        Raises:
            FitError: There is nothing to train.

        Warns:
            UserWarning: The loss depends on an `nn.Parameter` that is not trained.
        """
        if not self._tensors:
            raise FitError(
                "nothing to train: neither model nor guide has parameters. Use an nn.Module, an automatic "
                "guide such as pyro.infer.autoguide.AutoNormal(model), or pyro.param inside the program."
            )
        if not loss.requires_grad:
            raise FitError(
                f"nothing to train: the loss depends on none of the {len(self)} parameters. "
                "Check for detach(), no_grad or .item() in model and guide."
            )
        # Only nn.Parameters: other leaves may be a distribution's own, made anew in every run.
        owned = [leaf for leaf in leaves(loss) if isinstance(leaf, nn.Parameter)]
        missed = [tuple(leaf.shape) for leaf in owned if id(leaf) not in self._names]
        if missed:
            warnings.warn(
                f"{len(missed)} parameters, of shapes {missed}, enter the loss and are not trained: neither "
                "model nor guide owns them. Pass the nn.Module itself as model or guide, or call "
                "pyro.module(name, net) inside the program.",
                stacklevel=2,
            )

    def _candidates(self, trace: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for role, root in self._roots:
            yield from root.named_parameters(prefix=role)
        yield from _param_sites(trace)

    def _check_finite(self, tensors: list[torch.Tensor]) -> None:
        bad = [self._names[id(tensor)] for tensor in tensors if not torch.isfinite(tensor).all()]
        if bad:
            raise FitError(
                f"parameter {', '.join(bad)}: is not finite before training. Check its initial value; after "
                "a failed fit elsewhere, build the model and the guide anew."
            )

    def _optimise(self, new: list[torch.Tensor]) -> None:
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(new, fused=all(map(_fused, new)) or None)
        else:
            self.optimizer.add_param_group({"params": new})


def _fused(tensor: torch.Tensor) -> bool:
    return tensor.device.type in FUSED


def _densify(tensors: list[torch.Tensor]) -> None:
    # Lazily made parameters may be expanded views, which no optimiser can write to.
    for tensor in tensors:
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def leaves(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """The leaf tensors that a loss depends on.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> [leaf is x for leaf in leaves(x.exp().sum())]
        [True]
    """
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        pending += [parent for parent, _ in node.next_functions]
