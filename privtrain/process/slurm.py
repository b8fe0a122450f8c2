"""Ranks that srun started itself: one task is one rank, without torchrun or accelerate between."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

_FIRST_PORT, _NUM_PORTS = 15000, 20000


def adopt_slurm_tasks(environment: MutableMapping[str, str]) -> None:
    """Translate srun's variables into the ones that every launcher sets, in place.

    Nothing is changed where a launcher has set ``RANK`` already, where there is one task, or outside of an ``srun``:
    the batch script itself has SLURM variables too but is not a rank.
    """
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or "SLURM_PROCID" not in environment or num_tasks == 1:
        return
    local_rank = int(environment.get("SLURM_LOCALID", "0"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible:
        local_rank %= len(visible.split(","))  # --gpus-per-task shows each task its own device alone
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    # The same on every task, and another one for another job on the same machines.
    port = _FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % _NUM_PORTS
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(num_tasks)
    environment["LOCAL_RANK"] = str(local_rank)
    # A list such as "4(x2),3", tasks by node: the first node's count stands for all.
    first_count, *_ = re.split(r"[(,]", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    environment["LOCAL_WORLD_SIZE"] = first_count
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(port))


def first_host(node_list: str) -> str:
    """Return the first name of a SLURM node list: ``gpu[007-012,20],cpu3`` → ``gpu007``."""
    # A name up to a comma or bracket; then perhaps [numbers] and what follows them in the name.
    match = re.match(r"([^,\[]+)(?:\[([^\]]*)\]([^,\[]*))?", node_list.strip())
    if match is None:
        return "localhost"
    prefix, numbers, suffix = match.groups()
    if numbers is None:
        return prefix
    first_number, *_ = re.split(r"[-,]", numbers)
    return prefix + first_number + suffix
