"""``privtrain track sync``: replay a run's ``metrics.jsonl`` into one W&B run.

Offline runs that were resumed leave several W&B directories with one id, which do not merge well on upload. The metrics
file is whole, so it is replayed instead.
"""

from __future__ import annotations

import json
import os
import pathlib

from privtrain.config import load_config
from privtrain.errors import ConfigError, Fault
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.directory import RunDirectory
from privtrain.tracking.mirrors import rows_of
from privtrain.tracking.wandb_settings import is_online
from privtrain.tracking.wandb_tracker import WandbTracker


def sync_run(path: pathlib.Path) -> str:
    """Send the rows of ``metrics.jsonl`` to W&B, and the release if the run is finished; return a summary in words.

    Raises:
        ConfigError: if there is no run, or no key to send it with.
        RunBusy: if a job is running there.
    """
    run = RunDirectory(path)
    if not run.exists() or not run.metrics.exists():
        raise ConfigError([Fault("RUN", f"{path} holds no run with metrics")])
    os.environ.setdefault("WANDB_MODE", "online")
    if is_online() and not _has_key():
        raise ConfigError([Fault("WANDB_API_KEY", "no key of W&B on this machine; set it, or run: wandb login")])
    run.check_private()
    config = load_config(run.resolved_config)
    identity = json.loads(run.identity.read_text(encoding="utf-8"))
    with run.locked():
        rows = rows_of(run)
        tracker = WandbTracker(config, PrivacyPlan.build(config.privacy, config.training), run, identity["tracker_id"])
        try:
            tracker.log_rows(rows)
            if run.is_complete():
                tracker.publish(run)
        finally:
            tracker.close()
    if is_online():
        return f"sent {len(rows)} rows of {config.run.name} to W&B"
    mode = os.environ["WANDB_MODE"]
    kept = f"{len(rows)} rows are in {run.root / 'wandb'}" if mode == "offline" else "nothing was written"
    return f"sent nothing (WANDB_MODE={mode}): {kept}; unset WANDB_MODE to send"


def _has_key() -> bool:
    """Return whether W&B finds a key: in the environment, in its settings, or in ~/.netrc."""
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or wandb.api.api_key)
