"""A device that is not the CPU, on a machine that has none.

It computes on the CPU, refuses to mix devices as an accelerator does, and counts what an accelerator would make the
host wait for. Autograd runs through it; fake CUDA tensors abort there in a CPU build of torch.
"""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_iter, tree_map

DEVICE_TYPE = "sim"

#: Operations whose result the host needs before it can go on.
_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive"}
_WAITS |= {"masked_select", "equal", "repeat_interleave"}
_COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}


class MixedDevices(RuntimeError):  # noqa: N818 - what happened, as torch would say it
    """An operation took a tensor of the CPU and one of the device."""


class Simulated(torch.Tensor):
    """A tensor of the device; ``raw`` holds its values on the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Simulated:
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{DEVICE_TYPE}:0",
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    def __repr__(self, **_: Any) -> str:
        return f"Simulated({self.raw!r})"

    def tolist(self) -> Any:
        if Device.active is not None:
            Device.active.waits[_caller()] += 1
        return self.raw.tolist()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def numpy(self, **_: Any) -> Any:
        raise MixedDevices("numpy cannot read the device; copy to the host first")

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index(index), value)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _compute(function, args, kwargs or {})


def _index(index: Any) -> Any:
    """Copy lists to the device, as torch does where no mode sees it."""
    if isinstance(index, tuple):
        return tuple(_index(part) for part in index)
    return torch.tensor(index, device=f"{DEVICE_TYPE}:0") if isinstance(index, list) else index


def _compute(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = function._schema.name.split("::")[1]
    if name not in _COPIES:
        for leaf in tree_iter((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Simulated) and leaf.dim() > 0:
                raise MixedDevices(f"{function} takes a tensor of the CPU beside one of the device")
    options = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
    found = function(*tree_map(_unwrap, args), **tree_map(_unwrap, options))
    target = kwargs.get("device")
    if name in ("_to_copy",) and target is not None and torch.device(target).type == "cpu":
        return found
    if name in ("copy_", "_copy_from") and not isinstance(args[0], Simulated):
        return args[0]
    written = _written(function, args)
    return written if written is not None else tree_map(_wrap, found)


def _written(function: Any, args: tuple) -> Any:
    """Return the argument that an operation in place returns: the same tensor, not another with its values."""
    name = function._schema.name
    is_in_place = name.endswith("_") and not name.endswith("__")
    if is_in_place and args and isinstance(args[0], Simulated):
        return args[0]
    return None


def _unwrap(value: Any) -> Any:
    return value.raw if isinstance(value, Simulated) else value


def _wrap(value: Any) -> Any:
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, Simulated)
    return Simulated(value) if is_plain else value


class Device(TorchDispatchMode):
    """Sees every operation while it is active: makes tensors of the device, and counts.

    Attributes:
        num_kernels: operations on the device.
        waits: where → how often the host waits for the device.
        copies: ``"to host"`` or ``"to device"``, and where → how often a tensor was copied.
    """

    active: Device | None = None

    def __init__(self) -> None:
        super().__init__()
        self.restart()

    def restart(self) -> None:
        """Count from here on."""
        self.num_kernels = 0
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # of each thread: torch.tensor(…) copies where we see it
        kwargs = kwargs or {}
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == DEVICE_TYPE
        on_device = tree_any(lambda leaf: isinstance(leaf, Simulated), (args, kwargs))
        if not to_device and not on_device:
            return function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        self.num_kernels += 1
        self._count(name, args, target)
        return _compute(function, args, kwargs)

    def _count(self, name: str, args: tuple, target: Any) -> None:
        by_truth = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1] or ()
        )
        if name in _WAITS or by_truth:
            self.waits[_caller()] += 1
        elif name == "_to_copy" and target is not None:
            was, will = isinstance(args[0], Simulated), torch.device(target).type == DEVICE_TYPE
            if was != will:
                self.copies[("to host " if was else "to device ") + _caller()] += 1
        elif name in ("copy_", "_copy_from"):
            into, source = (args[0], args[1]) if name == "copy_" else (args[1], args[0])
            if isinstance(into, Simulated) != isinstance(source, Simulated):
                self.copies[("to device " if isinstance(into, Simulated) else "to host ") + _caller()] += 1


def _caller() -> str:
    """Return file and line of the project's innermost frame."""
    frames = [frame for frame in traceback.extract_stack() if "/privtrain/" in frame.filename]
    own = [frame for frame in frames if "/tests/" not in frame.filename] or frames
    return f"{own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno}" if own else "elsewhere"


def register() -> None:
    """Make ``torch.device("sim")``: once in a process, before its first backward pass starts autograd's threads."""
    torch.utils.rename_privateuse1_backend(DEVICE_TYPE)
    backend_registration._setup_privateuseone_for_python_backend(DEVICE_TYPE)
    getattr(torch, DEVICE_TYPE).get_amp_supported_dtype = lambda: [torch.bfloat16]


@contextlib.contextmanager
def simulated() -> Iterator[Device]:
    """Activate the device and count from here on."""
    torch._C._set_only_lift_cpu_tensors(True)
    with Device() as device:
        Device.active = device
        try:
            yield device
        finally:
            Device.active = None
            torch._C._set_only_lift_cpu_tensors(False)


def move(model: torch.nn.Module) -> None:
    """Put the parameters and buffers of a model on the device, in place; what was tied stays tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in moved:
                    there = Simulated(parameter.data.clone())
                    moved[id(parameter)] = torch.nn.Parameter(there, parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = Simulated(buffer.clone())
