"""A pretended accelerator, on which every wait of the host for the device is counted; no GPU is needed.

Tensors of the device `FAR` hold a CPU tensor that computes, and call themselves tensors of torch's meta device, for
which autograd needs no hardware. What would stop the host on CUDA is recorded with the line that asked for it; what CUDA
refuses (operands on two devices) is refused.
"""

import sys
from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from stochdyn.inference import parameters

FAR = "meta"
CPU = torch.device("cpu")
aten = torch.ops.aten
_ALWAYS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "equal", "allclose", "is_nonzero", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig",
    "linalg_eigvals", "linalg_lstsq", "linalg_matrix_exp", "randperm", "multinomial", "histc", "argwhere",
}  # fmt: skip
_BUILD = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}


class Far(torch.Tensor):
    """A tensor of the pretended device; `near` computes."""

    near: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(cls, near.shape, **layout, device=FAR)
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {}, [])

    def __repr__(self):
        return f"Far({self.near})"


def _near(x):
    if isinstance(x, Far):
        return x.near
    return CPU if isinstance(x, torch.device) and x.type == FAR else x


def _name(func):
    return func.overloadpacket.__name__


def _masks(func, args):
    """Indices that are masks: their size is found on the device, except where one number is filled in."""
    index = [i for i in args[1] if i is not None]
    filled = _name(func).startswith("index_put") and args[2].numel() == 1
    return not filled and any(i.dtype in (torch.bool, torch.uint8) for i in index)


def _waits(func, args, kwargs, inside, outside):
    """Why the host waits for the device here, or None."""
    name = _name(func)
    if inside != outside and name in ("_to_copy", "copy_", "to") and not _asynchronous(args, kwargs, inside):
        return "copy to the device" if outside else "copy to the host"
    if not inside:
        return None
    if name in _ALWAYS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return name
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index") and _masks(
        func, args
    ):
        return "a mask as index"
    return None


def _asynchronous(args, kwargs, inside):
    """To the device a copy may be queued; the host needs what it copies from it."""
    return not inside and (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))


def _map(change, x):
    """Apply to everything in nested lists, tuples and dicts."""
    if isinstance(x, (list, tuple)):
        return type(x)([_map(change, part) for part in x])
    if isinstance(x, dict):
        return {name: _map(change, part) for name, part in x.items()}
    return change(x)


def _compute(func, args, kwargs, log):
    tensors = []
    collect = lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None  # noqa: E731
    _map(collect, (args, kwargs))
    if any(x.device.type == FAR and not isinstance(x, Far) for x in tensors):
        raise RuntimeError(
            f"{func}: a list as an index is copied to the device. Index with a slice or a tensor."
        )
    inside = any(isinstance(x, Far) for x in tensors)
    device = kwargs.get("device")
    outside = inside if device is None else torch.device(device).type == FAR
    if _name(func) == "copy_":
        inside, outside = isinstance(args[1], Far), isinstance(args[0], Far)
    elif inside and any(not isinstance(x, Far) and x.dim() for x in tensors):
        _refuse_or_copy(func, tensors, log)
    if outside and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: the generator is on the host, the values are on the device")
    if (inside or outside) and (why := _waits(func, args, kwargs, inside, outside)):
        _record(log, why)
    out = func(*_map(_near, args), **_map(_near, kwargs))
    if torch.Tag.inplace_view in func.tags and inside:
        with no_dispatch():
            func(*args, **kwargs)
    if not outside:
        return out
    known = {id(x.near): x for x in tensors if isinstance(x, Far)}

    def back(o):
        if not isinstance(o, torch.Tensor):
            return o
        return known[id(o)] if id(o) in known else Far(o)

    return _map(back, out)


def _refuse_or_copy(func, tensors, log):
    strange = [tuple(x.shape) for x in tensors if not isinstance(x, Far) and x.dim()]
    if _name(func) not in ("index", "index_put", "index_put_"):
        raise RuntimeError(f"{func}: tensors on two devices; of shapes {strange} on the host")
    _record(log, "an index on the host")


def _record(log, why):
    frame = sys._getframe(1)
    while frame is not None and not any(
        part in frame.f_code.co_filename for part in ("/stochdyn/", "/test_")
    ):
        frame = frame.f_back
    where = (
        "elsewhere"
        if frame is None
        else f"{frame.f_code.co_filename.split('/stochdyn/')[-1]}:{frame.f_lineno}"
    )
    log.append(f"{why} at {where}")


class _Dispatch(TorchDispatchMode):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {}, self.log)


class _Functions(TorchFunctionMode):
    """What never reaches the dispatcher: tensors built from Python numbers, lists made of tensors, `x.data = y`."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _BUILD:
            return self._build(func, args, kwargs)
        if args and isinstance(args[0], Far):
            if func in (torch.Tensor.tolist, torch.Tensor.numpy):
                _record(self.log, func.__name__)
                return func(args[0].near)
            if func is torch.Tensor.data.__set__:
                args[0].near = args[1].near
                return None
        return func(*args, **kwargs)

    def _build(self, func, args, kwargs):
        like = func is torch.Tensor.new_tensor and isinstance(args[0], Far)
        device = kwargs.get("device")
        given = args[-1] if not kwargs.get("data") else kwargs["data"]
        if isinstance(given, torch.Tensor) or not (
            like or (device is not None and torch.device(device).type == FAR)
        ):
            return func(*args, **kwargs)
        _record(self.log, "numbers copied to the device")
        rest = {k: v for k, v in kwargs.items() if k not in ("device", "requires_grad")}
        near = args[0].near.new_tensor(*args[1:], **rest) if like else func(*args, **rest)
        return Far(near).requires_grad_(kwargs.get("requires_grad", False))


@contextmanager
def pretended():
    """Inside, device `FAR` computes; yields the list of waits."""
    log = []
    fused = [*_get_fused_kernels_supported_devices(), FAR]
    with (
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", return_value=fused),
        mock.patch.object(parameters, "FUSED", {*parameters.FUSED, FAR}),
        _Functions(log),
        _Dispatch(log),
    ):
        yield log
