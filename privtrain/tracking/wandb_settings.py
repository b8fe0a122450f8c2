"""The one way in which this project opens a W&B run: offline by default, and without what can carry text or paths."""

from __future__ import annotations

import os
from typing import Any


def careful_settings(machine: str | None = None, *, is_primary: bool = True) -> Any:
    """Return ``wandb.Settings`` without console, code, git and machine information; sets the mode if nobody did.

    Args:
        machine: label under which this machine's load is shown; without it no load is recorded.
        is_primary: whether this process is the one that writes the run; others add their machine's load to it.
    """
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    # "x_" settings are W&B's own, without a public name.
    load: dict[str, Any] = {"x_disable_machine_info": True, "x_disable_stats": True}
    if machine is not None:
        load = {"x_label": machine, "x_stats_disk_paths": ()}
        if is_online():
            load |= {"mode": "shared", "x_primary": is_primary, "x_update_finish_state": is_primary}
    return wandb.Settings(
        console="off",
        disable_git=True,
        save_code=False,
        disable_code=True,
        disable_job_creation=True,
        x_disable_meta=True,
        host="privtrain",
        init_timeout=120,
        **load,
    )


def is_online() -> bool:
    """Return whether W&B is asked to send anything."""
    return os.environ.get("WANDB_MODE", "offline") in ("online", "shared", "run")
