"""Find traces: what a forward or backward pass left behind in a model, and one user's rows would hand to the next.

A *snapshot* maps *places* to values or digests. A place is a name in words, e.g. ``module 'layers.0' of type Layer
(cache[0])``. Two snapshots, before and after passes, are compared.

Looked at are the buffers of every module, its plain attributes and those of its class and its config (tensors, numbers,
texts, and containers and objects of them), the parameters, and the states of Python's and NumPy's random numbers.
Not seen is what a function keeps in its closure or a C extension keeps to itself; that shows only in its effect on the
gradients that :mod:`.probes` compares.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random  # noqa: TID251 - looked at, not drawn from
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import nn

from privtrain.backends.base import digest

#: Attributes that torch itself keeps for a module: parameters, buffers and submodules are looked at otherwise.
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
#: What DeepSpeed and FSDP2 count on the modules whose weights they gather; no forward pass reads it.
_FRAMEWORK_PREFIXES = (
    "__composable_api_state",
    "ds_",
    "_ds_",
    "applied_pre_backward",
    "pre_bwd_fn",
    "post_bwd_fn",
    "_external_params",
    "_original_p",
)
_FRAMEWORK_PACKAGES = ("torch.", "deepspeed.", "builtins", "typing", "abc")
#: Objects of these packages are not looked into: engines, process groups and buffers that come and go.
_SHARDING_PACKAGES = ("torch.distributed.", "torch._C", "deepspeed.", "accelerate.")
#: Containers within containers that are looked into.
_MAX_DEPTH = 6
#: Larger tensors are digested by the device that they are on.
_MAX_HASHED_BYTES = 1 << 20
#: The digest of a large tensor goes by blocks of this many words of 8 bytes; an odd factor tells the blocks apart.
_WORD_BYTES, _NUM_WORDS, _STEP = 8, 1 << 20, 6364136223846793005


def snapshot(model: nn.Module, parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, object]:
    """Return the state of a model: place → a value or a digest of it. Equal states have equal snapshots.

    Args:
        model: whose modules are looked at.
        parameters: name → parameter, or the part of it that this rank holds.
    """
    state: dict[str, object] = {}
    walker = _Walker({id(module) for module in model.modules()}, state)
    for name, module in model.named_modules():
        for key, value in module.named_buffers(recurse=False):
            state[_place(name, module, key)] = _tensor_digest(value)
        for key, value in _own_attributes(module):
            walker.walk(_place(name, module, key), value, 0)
    for name, value in parameters:
        state[f"parameter {name!r}"] = _tensor_digest(value.detach())
    state["random numbers of Python (random)"] = hash(random.getstate())
    kind, keys, *rest = np.random.get_state(legacy=True)
    state["random numbers of NumPy (numpy.random)"] = (kind, hashlib.sha256(np.asarray(keys).tobytes()).digest(), *rest)
    return state


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Return the places whose values differ between two snapshots, or that one of them lacks; in order of modules."""
    missing = object()  # equals nothing but itself, where None may be a value
    return [place for place in {**before, **after} if before.get(place, missing) != after.get(place, missing)]


def was_nothing(before: Mapping[str, object], place: str) -> bool:
    """Return whether nothing was there: no attribute, ``None``, ``False`` or an empty container."""
    return place not in before or before[place] in ("None", "False", 0, [])


def _place(name: str, module: nn.Module, key: str) -> str:
    return f"module {name!r} of type {type(module).__name__} ({key})"


def _own_attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield attributes of the module and of its classes, without those of torch and of sharding frameworks."""
    for cls in type(module).__mro__:
        if not cls.__module__.startswith(_FRAMEWORK_PACKAGES):
            for key, value in vars(cls).items():
                if not key.startswith("__") and _is_data(value):
                    yield f"{cls.__name__}.{key}", value
    for key, value in vars(module).items():
        if key not in _TORCH_ATTRIBUTES and not key.startswith(_FRAMEWORK_PREFIXES):
            yield key, value


def _is_data(value: object) -> bool:
    """Return whether a class's attribute may be state, in contrast to its methods and descriptors."""
    return isinstance(value, torch.Tensor | np.ndarray | int | float | complex | Mapping | list | Set | tuple)


class _Walker:
    """Writes a snapshot of values, and of all that they hold; an object that several places share is walked once.

    Args:
        modules: ``id`` of the model's modules, which are skipped: the caller walks them one by one.
        state: place → value or digest, which :meth:`walk` fills.
    """

    def __init__(self, modules: set[int], state: dict[str, object]) -> None:
        self._seen = modules
        self._state = state
        self._walked: list[object] = []  # objects walked, so that none is freed and its id given to another

    def walk(self, place: str, value: Any, depth: int) -> None:
        """Write a value under its place, and what it holds under places of their own, to a limited depth.

        Args:
            place: where the value is.
            value: anything.
            depth: how many containers it lies in.
        """
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
            self._state[place] = repr(value)  # as text, in which a NaN equals itself
            return
        if isinstance(value, torch.Tensor):
            self._state[place] = _tensor_digest(value.detach())
            return
        if isinstance(value, np.ndarray):
            self._state[place] = (str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).digest())
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._walked.append(value)
        if depth == _MAX_DEPTH:
            return
        for key, item in self._items(place, value):
            self.walk(f"{place}{key}", item, depth + 1)

    def _items(self, place: str, value: Any) -> Iterator[tuple[str, object]]:
        """Yield (place relative to ``value``, item) of what a container, module or object holds: e.g. ("[0]", 1)."""
        if isinstance(value, Mapping):
            self._state[place] = len(value)
            yield from ((f"[{key!r}]", item) for key, item in list(value.items()))
        elif isinstance(value, Set):
            self._state[place] = sorted(map(repr, value))
        elif isinstance(value, Sequence) or type(value).__name__ == "deque":
            self._state[place] = len(value)
            yield from ((f"[{i}]", item) for i, item in enumerate(value))
        elif isinstance(value, nn.Module):  # one that hides in a list
            own = itertools.chain(
                value.named_buffers(recurse=False),
                value.named_parameters(recurse=False),
                _own_attributes(value),
                value.named_children(),
            )
            yield from ((f".{key}", item) for key, item in own)
        elif _is_opaque(value):
            self._state[place] = type(value).__name__
        else:
            yield from ((f".{key}", item) for key, item in list(vars(value).items()))


def _is_opaque(value: object) -> bool:
    """Return whether an object is not looked into: a class, a function, without attributes or of a sharding library."""
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        return True
    return type(value).__module__.startswith(_SHARDING_PACKAGES)


def _tensor_digest(value: Any) -> object:
    """Return type, shape and digest of a tensor; of one without readable values layout and shape alone."""
    if hasattr(value, "to_local"):  # of a sharded tensor the part that this rank holds
        value = value.to_local()
    if value.is_meta or value.layout != torch.strided or _is_freed(value):
        return str(value.layout), tuple(value.shape)
    if value.numel() * value.element_size() <= _MAX_HASHED_BYTES:
        return str(value.dtype), tuple(value.shape), digest([value])
    return str(value.dtype), tuple(value.shape), _hashed(value)


def _hashed(value: torch.Tensor) -> int:
    """Return a digest of a large tensor, computed on its device: over every bit and its place, so that a shift shows.

    The tensor is read as int64 words. Each block of words is multiplied by a table of random odd numbers and summed,
    modulo 2**64. Chance differences show; it is no digest against an adversary.
    """
    flat = (torch.view_as_real(value) if value.is_complex() else value).contiguous().flatten().view(torch.uint8)
    if flat.storage_offset() % _WORD_BYTES or len(flat) % _WORD_BYTES:  # copy, since a view as words must be aligned
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % _WORD_BYTES)])
    table = _table(flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for words in flat.view(torch.int64).split(len(table)):
        total = total * _STEP + (words * table[: len(words)]).sum()
    return int(total)


@functools.lru_cache(maxsize=4)
def _table(device: torch.device) -> torch.Tensor:
    """Return [words] int64 multipliers: random, and odd so that no change of one word is lost modulo 2**64."""
    words = np.random.default_rng(0).integers(-(2**62), 2**62, _NUM_WORDS)
    return torch.from_numpy(2 * words + 1).to(device)


def _is_freed(value: torch.Tensor) -> bool:
    """Return whether a tensor's memory was freed, as FSDP2 does with gathered weights: to read it would crash."""
    return value.numel() > 0 and value.untyped_storage().nbytes() < value.element_size()
