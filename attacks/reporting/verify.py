"""Check a report that somebody hands over: with the run's key everything, without it what outsiders can check."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from attacks.analysis import analyse
from attacks.errors import AttackInputError
from attacks.reporting import record, report
from attacks.scoring import target as targets
from attacks.signals import SIGNALS_PATH
from privtrain.errors import DamagedFile
from privtrain.files import reading
from privtrain.files.reading import file_sha256
from privtrain.run import bundle
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import read_sealed_file


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a verification found, as sentences for the terminal.

    Attributes:
        holds: what was checked and is right.
        not_checked: what could not be checked, and why.
    """

    holds: list[str]
    not_checked: list[str]


def verify_report(root: pathlib.Path) -> Checked:
    """Check ``report/`` against itself, the released files beside it and, where ``secret/`` is there, its seals.

    Args:
        root: a run directory, or a copy of what was published of one.

    Raises:
        DamagedFile: if a file is missing, damaged or not as it was sealed.
        AttackInputError: if two files contradict each other, naming them.
    """
    run = RunDirectory(root)
    has_key = (run.secret / "root.key").exists()
    results = _read(run, root / analyse.ATTACKS_PATH, analyse.SCHEMA_NAME, has_key=has_key)
    facts = _read(run, root / report.REPORT_PATH, report.SCHEMA_NAME, has_key=has_key)
    target = _mapping(results, "target", root / analyse.ATTACKS_PATH)
    scoring = _mapping(results, "scoring", root / analyse.ATTACKS_PATH)
    _mapping(target, "released", root / analyse.ATTACKS_PATH)
    files = _mapping(facts, "files", root / report.REPORT_PATH)
    if facts.get("attacks") != results:
        raise AttackInputError(
            f"{root / report.REPORT_PATH} quotes other results than {root / analyse.ATTACKS_PATH} holds; one of them "
            "was altered, or the report was not written again after the analysis"
        )
    _check_nothing_else(root / "report")
    for path in (report.INDEX_PATH, report.MARKDOWN_PATH):
        if file_sha256(root / path) != files.get(path.name):
            raise AttackInputError(f"{root / path} is not the file that {root / report.REPORT_PATH} was written with")
    holds = ["results, report.json, report.md and index.html belong together"]
    not_checked = ["that statement and ledger agree: privtrain ledger verify"]
    _check_target(run, target, holds, not_checked)
    if not has_key:
        not_checked += [
            "that the run's owner computed these results: the seals need secret/root.key",
            "that all users were scored, on their sealed sides: the signals are in secret/",
        ]
        return Checked(holds, not_checked)
    holds.append("the seals of results and report")
    if (root / SIGNALS_PATH).exists():
        scored = record.read_scoring(run)
        scored.check()
        if scored.seal != scoring.get("seal"):
            raise AttackInputError(f"{root / SIGNALS_PATH} was scored after {root / analyse.ATTACKS_PATH} was computed")
        holds.append("the seal of the signals, which the results were computed from")
    else:
        not_checked.append(f"the signals: {root / SIGNALS_PATH} is not there")
    return Checked(holds, not_checked)


def _mapping(facts: dict[str, Any], name: str, path: pathlib.Path) -> dict[str, Any]:
    """Return a field that must be a mapping; without the run's key nothing vouches for the form of the file."""
    value = facts.get(name)
    if not isinstance(value, dict):
        raise DamagedFile(path, f"lacks what a report holds ({name})")
    return value


def _check_nothing_else(directory: pathlib.Path) -> None:
    """Raise if ``report/`` holds any file beside the four of a report: a reader would take it for a part of that."""
    if directory.is_symlink():
        raise AttackInputError(f"{directory} is a link; check the directory that it leads to")
    known = {path.name for path in (analyse.ATTACKS_PATH, report.REPORT_PATH, report.INDEX_PATH, report.MARKDOWN_PATH)}
    others = sorted(name for name in os.listdir(directory) if name not in known)
    if others:
        shown = ", ".join(bundle.printable(name) for name in others[:5])
        raise AttackInputError(f"{directory} holds what is no part of the report: {shown}; remove it")


def _read(run: RunDirectory, path: pathlib.Path, schema: str, *, has_key: bool) -> dict[str, Any]:
    """Return the content of a JSON file with this schema; its seal is checked where the run's key is at hand."""
    return read_sealed_file(run, path, schema=schema) if has_key else reading.read_json(path, schema=schema)


def _check_target(run: RunDirectory, target: dict[str, Any], holds: list[str], not_checked: list[str]) -> None:
    """Compare statement and released files, as far as they are there, with the digests in the results.

    Args:
        run: where the files are.
        target: digests that the results hold, under ``statement`` and ``released``.
        holds: gets a sentence for each thing that holds.
        not_checked: gets a sentence for each thing that is not there.

    Raises:
        AttackInputError: if one differs.
    """
    if run.privacy.exists():
        if file_sha256(run.privacy) != target.get("statement"):
            raise AttackInputError(f"{run.privacy} is not the statement that the report is about")
        holds.append("privacy.json is the statement that was attacked")
    else:
        not_checked.append("the privacy statement: privacy.json is not here")
    if run.released.exists():
        differing = targets.differing({"released": target["released"]}, {"released": targets.released_digests(run)})
        if differing:
            raise AttackInputError(f"{run.released} is not what was attacked: {', '.join(differing)}")
        holds.append(f"{run.released.name}/ is what was attacked")
    else:
        not_checked.append("the model that was attacked: neither adapter/ nor model/ is here")
