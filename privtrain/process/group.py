"""Join the processes that accelerate or torchrun started, without believing what the launcher set."""

from __future__ import annotations

import datetime
import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from privtrain.errors import PrivtrainError


def join_processes(timeout_seconds: int) -> tuple[PartialState, torch.device]:
    """Join the job's processes, if a launcher started several; return accelerate's state and this rank's device.

    Args:
        timeout_seconds: a collective that waits longer for a lost rank ends the job.

    Raises:
        PrivtrainError: if accelerate sees another number of processes than the launcher started.
    """
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Under torchrun accelerate looks for GPUs by default; without one each rank would believe it is alone.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # A job of one process gets no process group, and PartialState refuses a timeout then.
    arguments = {"timeout": datetime.timedelta(seconds=timeout_seconds)} if num_launched > 1 else {}
    state = PartialState(cpu=cpu, **arguments)  # pyright: ignore[reportArgumentType]
    if state.num_processes != num_launched:
        raise PrivtrainError(
            f"the launcher started {num_launched} processes but accelerate sees {state.num_processes}: "
            "each would train and add noise alone; check distributed_type and use_cpu in the accelerate config"
        )
    assert state.device is not None
    return state, state.device
