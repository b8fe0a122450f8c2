"""Backends: the only package that talks to other processes. accelerate launches and places; we reduce and step."""

from __future__ import annotations

import datetime

from accelerate.utils import DistributedType, parse_flag_from_env

from privtrain.backends.base import Backend, Placement, ReplicatedBackend
from privtrain.backends.ddp import DdpBackend
from privtrain.backends.local import LocalBackend
from privtrain.backends.watch import Watch
from privtrain.errors import PrivtrainError
from privtrain.process.group import join_processes

#: accelerate's names of data parallelism in which every rank has the whole model.
_REPLICATED = {
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
}


def create_backend(timeout_seconds: int) -> Backend:
    """Return the backend that the accelerate config of this job asks for.

    Raises:
        PrivtrainError: if it asks for a mode whose guarantee we cannot establish.
    """
    state, device = join_processes(timeout_seconds)
    # What the launcher said, not accelerate's type: on a CPU it knows neither DeepSpeed nor FSDP.
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        from privtrain.backends.zero import ZeroBackend, ZeroSettings

        return ZeroBackend(device, ZeroSettings.from_launch())
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        from privtrain.backends.fsdp2 import Fsdp2Backend, replicas_from_launch

        return Fsdp2Backend(device, replicas_from_launch(), datetime.timedelta(seconds=timeout_seconds))
    if state.distributed_type in _REPLICATED:
        return DdpBackend(device)
    if state.distributed_type == DistributedType.NO:
        return LocalBackend(device)
    raise PrivtrainError(
        f"the launch config asks for {state.distributed_type.value}, which privtrain does not support; "
        "launch with one of the files in launch/accelerate"
    )


__all__ = ["Backend", "DdpBackend", "LocalBackend", "Placement", "ReplicatedBackend", "Watch", "create_backend"]
