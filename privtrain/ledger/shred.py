"""Destroy what links a finished run's log to people; its counts and its chain still verify."""

from __future__ import annotations

import datetime
import os
import pathlib

from privtrain.errors import PrivtrainError
from privtrain.files.atomic import sync_directory, write_json
from privtrain.run.directory import RunDirectory

#: Files of ``secret/`` that remain → what they still say about people.
_REMAINS = {
    "root.key": "redraws the split: with the data set, who was held in or out",
    "manifest.json": "names every user, held in and held out; `attacks score` needs it",
    "prepared.json": "the same, as it was sealed before training, with the planted secrets",
    "used.json": "which users' records were left out, and how often canaries were drawn",
    "spans.json": "where sensitive text stands in the records",
    "identity.json": "a digest of the data set: whoever knows all records but one can test a guess of that one",
    "config.yaml": "paths of the data",
    "base_losses.json": "names users, with the base model's loss on their records",
    "data_counts.json": "how many rows were read and dropped",
    "private_metrics.jsonl": "losses, norms and batch sizes of the steps",
    "reservation.json": "this run's number in the registry, which has users' totals by other pseudonyms",
}


def shred(run_path: pathlib.Path, *, abandon: bool = False) -> tuple[list[str], dict[str, str]]:
    """Destroy what links the log to people, or would help to.

    That is the pseudonym key; the generation keys, which redraw the sample of every step; and all of
    ``secret/attack``: signals and references (tokens by user), results of each user, and shadow runs with the texts
    that they trained on and the keys of their own logs. The published report is not among them.

    Files are overwritten, synced and removed. On copy-on-write or network file systems and in backups older copies can
    survive; those are for the operator to destroy.

    Args:
        run_path: the run directory.
        abandon: also where the run has not finished, after which it cannot go on.

    Returns:
        The names of the files destroyed; and the files that remain in ``secret/`` → what they say about people.

    Raises:
        PrivtrainError: if there is no such run, or it has not finished.
    """
    run = RunDirectory(run_path)
    if not run.ledger.is_file():
        raise PrivtrainError(f"{run_path} has no ledger; give a run directory such as runs/demo")
    if not run.is_complete() and not abandon:
        raise PrivtrainError(f"{run_path} has not finished and could not go on without its keys; add --abandon if so")
    with run.locked():
        attack = run.secret / "attack"
        doomed = [run.secret / "pseudonym.key", *sorted(run.secret.glob("generation-*.key")), *sorted(attack.glob("*"))]
        destroyed = [str(path.relative_to(run.secret)) for path in doomed if _destroy(path)]
        if attack.is_dir() and not attack.is_symlink():
            attack.rmdir()
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if destroyed:
            write_json(run.secret / "shredded.json", {"time": when, "destroyed": destroyed}, mode=0o600)
    remaining = {name: what for name, what in _REMAINS.items() if (run.secret / name).exists()}
    linking = {path.name: _LINKING for path in sorted(run.secret.iterdir()) if _is_proof(path)}
    return destroyed, remaining | linking


_LINKING = "LINKING: a proof names a user beside the pseudonym; delete it, and its copies"


def _is_proof(path: pathlib.Path) -> bool:
    """Return whether a file begins like one that ``ledger prove`` writes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b"privtrain/ledger-proof/" in file.read(64)


def _destroy(path: pathlib.Path) -> bool:
    """Overwrite and remove a file, or a directory with all that is in it; what a link points to is left alone."""
    if not os.path.lexists(path):
        return False
    if path.is_dir() and not path.is_symlink():
        for item in list(path.iterdir()):
            _destroy(item)
        path.rmdir()
    else:
        if path.is_file() and not path.is_symlink():
            _overwrite(path)
        path.unlink()
    sync_directory(path.parent)
    return True


def _overwrite(path: pathlib.Path) -> None:
    """Write random bytes over the whole file, in place; they are on disk when this returns."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        for start in range(0, size, _CHUNK_BYTES):
            file.write(os.urandom(min(_CHUNK_BYTES, size - start)))
        file.flush()
        os.fsync(file.fileno())


_CHUNK_BYTES = 1 << 20
