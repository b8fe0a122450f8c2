"""Destroy what links a finished run's log to people; its counts and its chain still verify."""

from __future__ import annotations

import datetime
import os
import pathlib

from privtrain.errors import PrivtrainError
from privtrain.rundir import RunDirectory, sync_directory, write_json

#: What else in ``secret/`` still says something about people, and what.
_REMAINS = {
    "root.key": "redraws the split: with the data set, who was held in or out",
    "manifest.json": "names every user, held in and held out; `attacks score` needs it",
    "identity.json": "a digest of the data set: whoever knows all records but one can test a guess of that one",
    "config.yaml": "paths of the data",
    "data_counts.json": "how many rows were read and dropped",
    "private_metrics.jsonl": "losses, norms and batch sizes of the steps",
    "attack": "scores of documents by pseudonym, and what was concluded from them",
}


def shred(run_path: pathlib.Path, *, abandon: bool = False) -> tuple[list[str], dict[str, str]]:
    """Destroy the pseudonym key, and the generation keys, which redraw the sample of every step.

    Files are overwritten, synced and removed. On copy-on-write or network file systems and in backups older copies can
    survive; those are for the operator to destroy.

    Args:
        run_path: the run directory.
        abandon: also where the run has not finished, after which it cannot go on.

    Returns:
        The names of the files destroyed, and what remains in ``secret/`` that says something about people: name → what.

    Raises:
        PrivtrainError: if there is no such run, or it has not finished.
    """
    run = RunDirectory(run_path)
    if not run.ledger.is_file():
        raise PrivtrainError(f"{run_path} has no ledger; give a run directory such as runs/demo")
    if not run.is_complete() and not abandon:
        raise PrivtrainError(f"{run_path} has not finished and could not go on without its keys; add --abandon if so")
    with run.locked():
        keys = [run.secret / "pseudonym.key", *sorted(run.secret.glob("generation-*.key"))]
        destroyed = [key.name for key in keys if _destroy(key)]
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if destroyed:
            write_json(run.secret / "shredded.json", {"time": when, "destroyed": destroyed}, mode=0o600)
    remaining = {name: what for name, what in _REMAINS.items() if (run.secret / name).exists()}
    return destroyed, remaining


def _destroy(path: pathlib.Path) -> bool:
    if not path.exists():
        return False
    with open(path, "r+b") as file:
        file.write(os.urandom(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    sync_directory(path.parent)
    return True
