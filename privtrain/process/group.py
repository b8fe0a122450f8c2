"""Join the processes that accelerate or torchrun started, without believing what the launcher set."""

from __future__ import annotations

import datetime
import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from privtrain.errors import ConfigError, Fault, PrivtrainError


def join_processes(timeout_seconds: int) -> tuple[PartialState, torch.device]:
    """Join the job's processes, if a launcher started several; return accelerate's state and this rank's device.

    Args:
        timeout_seconds: a collective that waits longer for a lost rank ends the job.

    Raises:
        PrivtrainError: if accelerate sees another number of processes than the launcher started.
        ConfigError: if what the launcher set of ranks cannot be.
    """
    launched = num_launched()
    # Under torchrun accelerate looks for GPUs by default; without one each rank would believe it is alone.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # A job of one process gets no process group, and PartialState refuses a timeout then.
    arguments = {"timeout": datetime.timedelta(seconds=timeout_seconds)} if launched > 1 else {}
    state = PartialState(cpu=cpu, **arguments)  # pyright: ignore[reportArgumentType]
    if state.num_processes != launched:
        raise PrivtrainError(
            f"the launcher started {launched} processes but accelerate sees {state.num_processes}: "
            "each would train and add noise alone; check distributed_type and use_cpu in the accelerate config"
        )
    assert state.device is not None
    return state, state.device


def num_launched() -> int:
    """Return the number of processes, by the launcher's environment; a rank that nobody waits for would wait for ever.

    Raises:
        ConfigError: naming the variables that are no numbers, or too large.
    """
    numbers: dict[str, int] = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}  # without a launcher
    faults = []
    for name, default in list(numbers.items()):
        given = os.environ.get(name, "").strip() or str(default)
        if given.isdecimal():
            numbers[name] = int(given)
        elif (name, given) != ("LOCAL_RANK", "-1"):  # older launchers' word for one process
            faults.append(Fault(name, f"given {given!r}; must be a whole number, as accelerate or torchrun set it"))
    size = max(1, numbers["WORLD_SIZE"])
    for name in ("RANK", "LOCAL_RANK"):
        if not faults and numbers[name] >= size:
            faults.append(Fault(name, f"given {numbers[name]}; WORLD_SIZE={size} has ranks 0 to {size - 1}"))
    if faults:
        raise ConfigError(faults, "environment")
    return size
