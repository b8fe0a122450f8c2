"""Backends: the only package that talks to other processes. accelerate launches and places; we reduce and step."""

from __future__ import annotations

import datetime
import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from privtrain.backends.base import Backend, ReplicatedBackend
from privtrain.backends.ddp import DdpBackend
from privtrain.backends.local import LocalBackend
from privtrain.errors import PrivtrainError

_REPLICATED = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU, DistributedType.MULTI_NPU}


def create_backend(timeout_seconds: int) -> Backend:
    """Join the job that accelerate (or torchrun) launched, or be a job of one process.

    Args:
        timeout_seconds: a collective that waits longer for a lost rank ends the job.

    Raises:
        PrivtrainError: if the launch config asks for a mode whose guarantee we cannot establish.
    """
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Under torchrun accelerate looks for GPUs unless told; without one each rank would believe it is alone.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # A job of one process gets no process group, and PartialState refuses a timeout then.
    arguments = {"timeout": datetime.timedelta(seconds=timeout_seconds)} if num_launched > 1 else {}
    state = PartialState(cpu=cpu, **arguments)  # pyright: ignore[reportArgumentType]
    if state.num_processes != num_launched:
        raise PrivtrainError(
            f"the launcher started {num_launched} processes but accelerate sees {state.num_processes}: each would train "
            "and add noise alone; check distributed_type and use_cpu in the accelerate config"
        )
    if state.distributed_type in _REPLICATED:
        return DdpBackend(state.device)
    if state.distributed_type == DistributedType.NO:
        return LocalBackend(state.device)
    raise PrivtrainError(
        f"the launch config asks for {state.distributed_type.value}, which privtrain does not support yet; "
        "launch with launch/accelerate/cpu.yaml, or a config with distributed_type MULTI_GPU"
    )


__all__ = ["Backend", "DdpBackend", "LocalBackend", "ReplicatedBackend", "create_backend"]
