"""The one way in which this project opens a W&B run: offline unless told, and without what can carry text or paths."""

from __future__ import annotations

import os
from typing import Any


def careful_settings() -> Any:
    """``wandb.Settings`` with console capture, code, git and machine information off; sets the mode if nobody did."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb.Settings(
        console="off",
        disable_git=True,
        save_code=False,
        disable_code=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        host="privtrain",
        init_timeout=120,
    )
