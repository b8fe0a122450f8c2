"""Lock a run directory, and refuse one that belongs to another plan, data set or model.

What a directory belongs to is kept in ``secret/identity.json``: the fingerprint of plan and data, the digest of the
data, the run's id for trackers and the registry, and under ``fixed`` every other key that a run cannot change.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

from privtrain.backends import Backend
from privtrain.config import Config, load_config
from privtrain.errors import PlanMismatch, Preempted, PrivtrainError, RegistryUnreachable
from privtrain.files.atomic import write_json
from privtrain.inputs import Inputs
from privtrain.job.publish import complete_release
from privtrain.job.resume import is_bound
from privtrain.process.console import say
from privtrain.run.directory import RunDirectory

#: Sections that say what is trained, and on what.
_TRAINED_SECTIONS = ("model", "lora", "prompt", "data", "canaries")


def check_run_directory(inputs: Inputs) -> None:
    """Refuse a directory of another plan, data set or model before anything is written.

    Raises:
        PlanMismatch: saying which keys differ.
        UnsafePath: if other users could have read or planted its private files.
    """
    run = inputs.run
    run.check_private()
    if not run.exists():
        return
    tightened = run.check_permissions()
    if tightened:
        say(f"closed to other users: {', '.join(str(path) for path in tightened)}")
    identity = json.loads(run.identity.read_text(encoding="utf-8"))
    if identity["fingerprint"] != inputs.fingerprint:
        raise PlanMismatch(
            f"{run.root} belongs to another plan or data set (fingerprint {identity['fingerprint'][:12]}, this config "
            f"gives {inputs.fingerprint[:12]}); nothing was written. Restore its config, or set another run.name"
        )
    fixed = _fixed_keys(inputs.config)
    changed = [key for key, value in identity["fixed"].items() if fixed.get(key) != value]
    if changed:
        raise PlanMismatch(
            f"{run.root} was begun with another {', '.join(changed)}; nothing was written. "
            "Restore the value, or set another run.name"
        )
    if run.is_complete():
        _check_unchanged(inputs)


def _check_unchanged(inputs: Inputs) -> None:
    """Raise if a finished run was trained with other settings than these: it would not be trained again."""
    run = inputs.run
    if not run.resolved_config.exists():
        return
    before = _telling_keys(load_config(run.resolved_config))
    now = _telling_keys(inputs.config)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise PlanMismatch(
            f"{run.root} is finished and was trained with another {', '.join(changed)}; nothing was done. "
            "Restore the value, or set another run.name"
        )


def _dotted(config: Config, *sections: str) -> dict[str, Any]:
    """Return the keys of sections by dotted name, e.g. ``{"model.name": ...}``; ``data`` must be among the sections.

    Without where records are read from, since files may move: the training records' content is in the fingerprint, and
    ``data.evaluation`` is not trained on.
    """
    tree = config.model_dump(mode="json", include=set(sections))
    del tree["data"]["source"], tree["data"]["evaluation"]
    return {f"{section}.{key}": value for section in sections for key, value in tree[section].items()}


def _telling_keys(config: Config) -> dict[str, Any]:
    """Return what decides the trained weights, as dotted keys."""
    return _dotted(config, *_TRAINED_SECTIONS, "privacy", "training")


def _fixed_keys(config: Config) -> dict[str, Any]:
    """Return the keys besides the plan that a run cannot change: what is trained, on what, and what is published."""
    published = ("private_metrics", "release_held_out_metrics", "release_measurements")
    tracking = {f"tracking.{key}": getattr(config.tracking, key) for key in published}
    # Checkpoints hold the mean of the weights over the last steps: it cannot become the mean over fewer or more steps.
    training = {f"training.{key}": getattr(config.training, key) for key in ("method", "num_averaged_steps")}
    return _dotted(config, *_TRAINED_SECTIONS) | training | tracking


@contextlib.contextmanager
def claimed(inputs: Inputs, backend: Backend) -> Iterator[None]:
    """Create, check and lock the run directory while the block runs; on rank 0, since only that rank uses its files.

    A release that a crash interrupted is completed first. If the block fails before anything binds the directory to
    this plan (a ledger or a budget reservation), the identity is removed again, so that another plan may begin here.

    Raises:
        PlanMismatch: as :func:`check_run_directory`.
        RunBusy: if another process holds the directory.
    """
    if not backend.is_main:
        yield
        return
    run = inputs.run
    is_new = False  # whether this start gives the directory its identity
    if not run.exists():
        _create(run)
    with run.locked():
        check_run_directory(inputs)  # again: another job may have begun here since the first look
        if not run.exists():
            run.check_new()
            identity = {
                "fingerprint": inputs.fingerprint,
                "data_sha256": inputs.corpus.manifest_sha256,
                "tracker_id": f"{inputs.config.run.name}-{secrets.token_hex(4)}",
                "fixed": _fixed_keys(inputs.config),
                "started_in": str(pathlib.Path.cwd()),  # what relative paths of the configuration are relative to
            }
            write_json(run.identity, identity, mode=0o600)
            is_new = True
        if not run.is_complete():
            run.hide()  # what an earlier version, or somebody, left open
        if complete_release(run):
            say(f"completed the release of {run.root}, which a crash had interrupted after it was recorded")
        try:
            yield
        except (Preempted, RegistryUnreachable):
            raise  # the same command continues: a reservation stands, or may stand, under this identity
        except PrivtrainError:
            if is_new and not is_bound(run):
                run.identity.unlink(missing_ok=True)  # the next start may be of another plan
            raise


def _create(run: RunDirectory) -> None:
    """Make the run directory; tell which key to change if the file system refuses."""
    try:
        run.create()
    except OSError as error:
        problem = f"cannot make {run.root} ({error.strerror or type(error).__name__}); choose another run.output_dir"
        raise PrivtrainError(problem) from None


def is_complete(inputs: Inputs, backend: Backend) -> bool:
    """Return on every rank whether the run is complete. Rank 0 looks, since the others may not see the directory."""
    complete = backend.json_from_main(inputs.run.is_complete)
    if complete and backend.is_main:
        say(f"{inputs.run.root} is complete; nothing to do. For another run set run.name")
    return complete
