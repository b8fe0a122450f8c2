"""What the attack job reads of a finished run, each only after a check that the run still stands by it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from attacks.errors import AttackInputError
from attacks.rundir import read_statement
from attacks.scoring import target as targets
from privtrain.config import Config, load_config, public_tree, to_yaml
from privtrain.data.corpus import Corpus, load_corpus
from privtrain.errors import ConfigError, VerificationFailed
from privtrain.files import reading
from privtrain.files.reading import file_sha256
from privtrain.run import bundle, consistency
from privtrain.run.directory import RunDirectory
from privtrain.run.places import located
from privtrain.run.statement import PrivacyStatement


def verified_statement(run: pathlib.Path) -> PrivacyStatement:
    """Return the privacy statement of a finished run, after checking it against everything that the run released.

    What the report allows an attack to show (the cap) follows from this statement.

    Raises:
        AttackInputError: if the run is not finished.
        PrivtrainError: if what the run released is not what its statement and its ledger say.
    """
    statement = read_statement(run)
    check_release(RunDirectory(run))
    return statement


def check_release(run: RunDirectory) -> None:
    """Check that every released file is what the release record says, and that the statement follows from its plan.

    The release record is ``release.json`` with the ledger's last record. ``privtrain verify`` checks the rest of the
    ledger; this does not.

    Raises:
        AttackInputError: naming every file and field that does not hold, in one line.
    """
    try:
        bundle.check_released(run.root)
        problems = consistency.statement_faults(reading.read_json(run.privacy, remedy="restore it"))
    except VerificationFailed as error:
        problems = list(error.problems)
    except OSError as error:
        problems = [f"{error.filename or 'a file'} cannot be read: {error.strerror}"]
    if problems:
        raise AttackInputError(
            f"{run.root} is not what was released: {'; '.join(' '.join(item.split()) for item in problems)}; restore "
            f"it, or see: privtrain verify {run.root}"
        )


def check_base(run: RunDirectory, digests: Mapping[str, str]) -> None:
    """Check that a base model is the one that the run was trained from.

    Args:
        run: a finished run.
        digests: file name to SHA-256 of the base model that is here now.

    Raises:
        AttackInputError: naming the files that differ.
    """
    manifest, _ = bundle.read_manifest(run.root)
    if not manifest.base_model:  # it was not on disk when the run was released
        return
    differing = targets.differing({"base": manifest.base_model}, {"base": digests})
    if differing:
        raise AttackInputError(
            f"{run.root} was trained from another base model or tokenizer than is there now ({', '.join(differing)}); "
            "restore it, or give model.revision"
        )


def check_target(run: RunDirectory, scored: Mapping[str, Any], path: pathlib.Path, remedy: str) -> None:
    """Check that a file was computed on the statement and the released model that the run has now.

    Args:
        run: the attacked run.
        scored: digests that the file's record holds, under ``statement`` and ``released``.
        path: of the file, for the error message.
        remedy: what the error tells the user to do.

    Raises:
        AttackInputError: naming what differs.
    """
    now = {"statement": file_sha256(run.privacy), "released": targets.released_digests(run)}
    differing = targets.differing({name: scored.get(name) for name in now}, now)
    if differing:
        raise AttackInputError(f"{path} is of another target than {run.root} ({', '.join(differing)}); {remedy}")


def read_config(run: RunDirectory) -> Config:
    """Return the resolved configuration of a run, which must be the one that it published.

    The published one differs only in paths, of which it keeps the file names.

    Raises:
        AttackInputError: if the two disagree, or the resolved one is no valid configuration.
    """
    reading.read_bytes(run.resolved_config)  # refuses a link or a pipe, which load_config would follow
    try:
        config = load_config(run.resolved_config)
    except ConfigError as error:
        raise AttackInputError(f"{' '.join(str(error).split())}; restore it") from None
    if reading.read_bytes(run.config) != to_yaml(public_tree(config)).encode("utf-8"):
        raise AttackInputError(
            f"{run.resolved_config} is not the configuration that {run.config} publishes: one of them was altered; "
            "restore it (paths may change, file names and everything else may not)"
        )
    return located(config, run)


def read_corpus(config: Config) -> Corpus:
    """Return the records of a run, as the trainer read them.

    Raises:
        AttackInputError: in one line, if the files are not there, damaged or of other columns.
    """
    try:
        return load_corpus(config.data, config.performance.index_dir)
    except ConfigError as error:
        raise AttackInputError(f"{' '.join(str(error).split())}; restore the files that were trained on") from None
