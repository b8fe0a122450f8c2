"""Backends: the only package that talks to other processes. accelerate launches and places; we reduce and step."""

from __future__ import annotations

from accelerate.utils import DistributedType

from privtrain.backends.base import Backend, ReplicatedBackend
from privtrain.backends.ddp import DdpBackend
from privtrain.backends.local import LocalBackend
from privtrain.backends.watch import Watch
from privtrain.errors import PrivtrainError
from privtrain.processes import join_processes

_REPLICATED = {
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
}


def create_backend(timeout_seconds: int) -> Backend:
    """The backend that the accelerate config of this job asks for.

    Raises:
        PrivtrainError: if it asks for a mode whose guarantee we cannot establish.
    """
    state, device = join_processes(timeout_seconds)
    if state.distributed_type in _REPLICATED:
        return DdpBackend(device)
    if state.distributed_type == DistributedType.NO:
        return LocalBackend(device)
    raise PrivtrainError(
        f"the launch config asks for {state.distributed_type.value}, which privtrain does not support yet; "
        "launch with launch/accelerate/cpu.yaml, or a config with distributed_type MULTI_GPU"
    )


__all__ = ["Backend", "DdpBackend", "LocalBackend", "ReplicatedBackend", "Watch", "create_backend"]
