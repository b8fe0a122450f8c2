"""Run a function on several gloo ranks of this machine and collect what each returns."""

from __future__ import annotations

import faulthandler
import pathlib
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

#: After this long a rank prints where it is, and again and again: which ranks wait for which.
_STUCK_SECONDS = 120


def _worker(
    rank: int, world_size: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(_STUCK_SECONDS, repeat=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    try:
        result = function(*arguments)
        pathlib.Path(directory, f"{rank}.pkl").write_bytes(pickle.dumps(result))
    finally:
        dist.destroy_process_group()


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results by rank. The function and its arguments are pickled, so it must be at module level."""
    with tempfile.TemporaryDirectory() as directory:
        # Forked ranks need not import everything again; on the CPU, with one thread each, that is safe.
        torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
            _worker, args=(world_size, directory, function, arguments), nprocs=world_size, start_method="fork"
        )
        return [pickle.loads(pathlib.Path(directory, f"{rank}.pkl").read_bytes()) for rank in range(world_size)]
