"""Release a run: a crash at any moment leaves nothing released, or a release that the next start completes.

1. Everything new is written to ``.release.tmp``, brought onto the disk and renamed to ``.release``: it is *staged*.
2. The ledger's release record, with the digests of all of it, is appended: from here on the release has happened.
3. Each part is moved to its place (*installed*), ``release.json`` last: it marks the run as complete.

A crash before 2 leaves a staged release that the next one replaces. A release that a crash interrupted after 2 is
completed by :func:`complete_release` when the run directory is locked again, before anything could write a released
file. The *manifest* lists what is released, by digest: see :mod:`privtrain.run.bundle`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from privtrain.errors import GuaranteeLost
from privtrain.files.atomic import sync_directory, sync_file, sync_tree, temporary_of, write_atomically, write_json
from privtrain.ledger.log import Ledger, verify_chain
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run import bundle
from privtrain.run.bundle import ReleaseManifest
from privtrain.run.directory import RunDirectory

#: Files of a run that were written during training and are released as they are.
_WRITTEN_BEFORE = ("config.yaml", "metrics.jsonl")


def publish(
    run: RunDirectory,
    ledger: Ledger,
    plan: PrivacyPlan,
    statement: dict[str, Any],
    write_weights: Callable[[pathlib.Path], None],
    *,
    name: str,
    base_model: dict[str, str],
) -> ReleaseManifest:
    """Stage, record and install a release: steps 1 to 3 of the module.

    Args:
        run: the run directory.
        ledger: the run's open ledger.
        plan: the run's.
        statement: content of ``privacy.json``.
        write_weights: writes the weights, tokenizer and model card into the directory that it is given.
        name: of the released directory, ``adapter`` or ``model``.
        base_model: file name → SHA-256 of the base model's files.
    """
    manifest = stage(run, plan, statement, write_weights, name=name, base_model=base_model)
    ledger.release(statement["epsilon"], plan.delta, manifest)
    install(run, manifest)
    return manifest


def stage(
    run: RunDirectory,
    plan: PrivacyPlan,
    statement: dict[str, Any],
    write_weights: Callable[[pathlib.Path], None],
    *,
    name: str,
    base_model: dict[str, str],
) -> ReleaseManifest:
    """Write everything that is released to ``.release``, durably; return its manifest. Arguments: :func:`publish`."""
    temporary = temporary_of(run.staged)
    for directory in (temporary, run.staged):
        shutil.rmtree(directory, ignore_errors=True)
    weights = temporary / name
    weights.mkdir(parents=True)
    write_weights(weights)
    for place in (temporary, weights):  # the released directory is shared on its own, so each has all that it needs
        write_json(place / run.privacy.name, statement)

    # Path from the run directory → SHA-256, of what is staged here and of what training wrote.
    digests = {}
    for name_written in _WRITTEN_BEFORE:
        sync_file(run.root / name_written)
        digests[name_written] = bundle.sha256_of(run.root / name_written)
    digests |= {path: bundle.sha256_of(temporary / path) for path in bundle.files_under(temporary)}
    manifest = ReleaseManifest(
        statement=bundle.digest_of(statement),
        plan=plan.fingerprint(),
        ledger_head=statement["ledger"]["head"],
        base_model=base_model,
        tokenizer=bundle.tokenizer_digest(digests),
        files=dict(sorted(digests.items())),
    )
    write_atomically(weights / bundle.NAME, bundle.render(manifest, name))
    write_atomically(temporary / bundle.NAME, bundle.render(manifest, "run"))

    # Staged at once and whole: the renaming is the step.
    sync_tree(temporary)
    os.replace(temporary, run.staged)
    sync_directory(run.root)
    return manifest


def install(run: RunDirectory, manifest: ReleaseManifest) -> None:
    """Move what was staged to its place; parts that an interrupted call has moved already stay there.

    Raises:
        GuaranteeLost: if, after the move, a file is not in its place as it was recorded.
    """
    top_level_names = {path.partition("/")[0] for path in manifest.files}
    for name in sorted(top_level_names - set(_WRITTEN_BEFORE)):
        _move(run.staged / name, run.root / name)
    for path, digest in manifest.files.items():
        try:
            is_right = bundle.sha256_of(run.root / path) == digest
        except OSError:
            is_right = False
        if not is_right:
            raise GuaranteeLost(
                f"{run.root / path} is not what the release record of {run.ledger} holds; restore it from a backup"
            )
    run.show()  # from here on other users may read what is released
    _move(run.staged / bundle.NAME, run.release)
    set_file_times(run, manifest)
    with contextlib.suppress(FileNotFoundError):
        run.staged.rmdir()


def set_file_times(run: RunDirectory, manifest: ReleaseManifest) -> None:
    """Set the times of all released files to the present full hour: their own tell how long training took."""
    hour = time.time() // 3600 * 3600
    released = [run.root / path for path in (*manifest.files, bundle.NAME)]
    # Also the directories: other users see their times, even those of the private ones.
    directories = {run.secret, run.checkpoints, *(path.parent for path in released)}
    for path in {*released, *directories, run.released / bundle.NAME}:
        with contextlib.suppress(OSError):  # a file system that keeps no times
            os.utime(path, (hour, hour))


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Move a staged file or directory over what is there; do nothing if it was moved already."""
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        os.replace(source, target)
        sync_directory(target.parent)


def complete_release(run: RunDirectory) -> bool:
    """Complete a release that a crash interrupted after it was recorded; return whether there was one.

    Raises:
        LedgerCorrupt: if the ledger does not verify.
        GuaranteeLost: if a part of the release is gone.
    """
    if run.is_complete():
        with contextlib.suppress(OSError):  # not there, or not empty and then not ours
            run.staged.rmdir()
        return False
    if not run.ledger.exists():
        return False
    release = verify_chain(run.ledger, allow_torn=True).release
    if release is None:
        return False
    install(run, release.manifest)
    if not run.is_complete():
        write_atomically(run.release, bundle.render(release.manifest, "run"))
    return True
