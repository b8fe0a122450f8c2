"""What the ``privtrain ledger`` commands print: tables for people, JSON for machines. Nothing here changes a log.

A user is shown by *pseudonym*, an HMAC of the id under a key of the run. The *head* of a log is the hash of its last
record; a released run's ledger ends in a *release record*, which holds the digests of all that was released.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from privtrain.errors import ConfigError, LedgerCorrupt, PrivtrainError, VerificationFailed
from privtrain.files import strict_json
from privtrain.files.atomic import write_atomically
from privtrain.ledger.chain import LedgerState, read_records
from privtrain.ledger.log import blinded_plan, verify
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.secret import SecretKey, pseudonym, which_pseudonym
from privtrain.run import bundle
from privtrain.run.base_model import base_digests
from privtrain.run.consistency import statement_faults
from privtrain.run.directory import RunDirectory
from privtrain.run.places import own_config


def run_with_ledger(run_path: pathlib.Path) -> RunDirectory:
    """Return the run, which must have a ledger."""
    run = RunDirectory(run_path)
    if not run.ledger.is_file():
        raise PrivtrainError(f"{run_path} has no ledger; give a run directory such as runs/demo")
    return run


def verify_run(run_path: pathlib.Path, head: str | None = None) -> str:
    """Check a run's ledger, and that all that was released agrees with it; return a line for people.

    Args:
        run_path: the run directory.
        head: hash of a record that was noted earlier, elsewhere: the log must still contain that record.

    Raises:
        LedgerCorrupt: with file and offset of the first thing that does not hold, or what the statement says otherwise.
    """
    run = run_with_ledger(run_path)
    state = verify(run.ledger)
    also_checked = ""
    if state.release is not None or run.privacy.is_file():
        also_checked = _check_release(run, state)
    if head is not None:
        if all(record["hash"] != head for record in read_records(run.ledger)):
            raise LedgerCorrupt(f"{run.ledger} never had head {head}: it was rewritten, or truncated and then extended")
        also_checked += ", contains the head given"
    num_open = state.num_charged - len(state.commits)
    never_committed = f", {num_open} begun but never committed" if num_open else ""
    return (
        f"ledger verified: {state.num_records} records, {state.num_charged} steps charged, "
        f"{len(state.commits)} committed{never_committed}, {state.num_contributions} contributions, "
        f"generation {state.generation}{also_checked}"
    )


def _check_release(run: RunDirectory, state: LedgerState) -> str:
    """Compare statement, released files, base model and plan with the release record; return words for the report.

    Raises:
        LedgerCorrupt: with everything that does not agree.
    """
    if state.release is None:
        raise LedgerCorrupt(f"{run.ledger}: has no release, but there is {run.privacy}")
    manifest = state.release.manifest
    problems = _release_faults(run, state)
    if problems:
        raise LedgerCorrupt("\n".join([f"{run.ledger} contradicts what is released", *problems]))
    base, note = base_faults(run, manifest)
    if base:
        raise LedgerCorrupt(f"{run.ledger}: {'; '.join(base)}")
    _check_plan(run, state)
    return f", matches privacy.json and {len(manifest.files)} released files{note}"


def _release_faults(run: RunDirectory, state: LedgerState) -> list[str]:
    """Return, in words, where ``release.json``, released files and statement contradict the ledger's release record."""
    assert state.release is not None
    manifest, problems = state.release.manifest, []
    try:
        written, place = bundle.read_manifest(run.root)
        if written != manifest or place != "run":
            problems.append(f"{bundle.NAME} is not what the release record holds")
    except VerificationFailed as error:
        problems += error.problems
    file_faults, _ = bundle.run_faults(run, manifest)
    problems += [str(fault) for fault in file_faults]
    for path in (run.privacy, run.released / run.privacy.name):  # the run's statement, and its copy beside the weights
        name = path.relative_to(run.root).as_posix()
        try:
            statement = _read(path)
        except LedgerCorrupt as error:
            problems.append(str(error))
            continue
        if bundle.digest_of(statement) != manifest.statement:
            problems.append(f"{name}: its content is not what the release record holds")
        try:
            problems += [f"{name}: {claim}" for claim in _false_claims(statement, state)]
        except (KeyError, TypeError) as error:
            problems.append(f"{name}: lacks what a privacy statement holds ({error!r})")
        problems += [f"{name}: {fault}" for fault in statement_faults(statement)]
    return problems


def base_faults(run: RunDirectory, manifest: bundle.ReleaseManifest) -> tuple[list[str], str]:
    """Compare the base model's files with the recorded digests.

    Returns:
        Where they differ, in words; and a note for people: whether the base model was compared, or why not.
    """
    if not manifest.base_model:
        return [], "; the base model was not on disk and is not recorded"
    try:
        digests = base_digests(own_config(run).model)
    except (ConfigError, OSError):
        digests = {}
    if not digests:
        return [], "; the base model is not at hand and was not compared"
    names = sorted({*digests, *manifest.base_model})
    wrong = [name for name in names if digests.get(name) != manifest.base_model.get(name)]
    return [f"the base model's {name} is not the file that was recorded" for name in wrong], ", base model included"


def _false_claims(statement: dict[str, Any], state: LedgerState) -> list[str]:
    """Return, in words, where the privacy statement contradicts the ledger."""
    compared = _claims(statement, state)
    wrong = [f"{name} is {stated}, the ledger shows {logged}" for name, stated, logged in compared if stated != logged]
    if state.num_charged > statement["num_steps"]:
        wrong.append(f"num_steps is {statement['num_steps']}, the ledger charges {state.num_charged} steps")
    return wrong


def _claims(statement: dict[str, Any], state: LedgerState) -> list[tuple[str, Any, Any]]:
    """Return (name, value in the privacy statement, value in the log) for each compared value."""
    release = state.release
    assert release is not None
    claims = [
        ("steps_released", statement["steps_released"], state.num_charged),
        ("ledger.num_commits", statement["ledger"]["num_commits"], len(state.commits)),
        (
            "contribution_bound.records_per_unit_per_step",
            statement["contribution_bound"]["records_per_unit_per_step"],
            state.records_per_unit,
        ),
        ("epsilon", statement["epsilon"], release.epsilon),
        ("delta", statement["delta"], release.delta),
        *(("accountants: upper", item["upper"], release.epsilon) for item in statement["accountants"]),
    ]
    if state.split or "split_commitment" in statement:
        claims.append(("split_commitment", statement["split_commitment"], state.split))
    claims.append(("ledger.head", statement["ledger"]["head"], release.manifest.ledger_head))
    claims.append(("plan_fingerprint", statement["plan_fingerprint"], release.manifest.plan))
    try:
        plan = PrivacyPlan.from_body(statement["plan"])
    except ValueError:
        return [*claims, ("fingerprint of the plan", "that of no plan", release.manifest.plan)]
    # Steps draw from as many groups of units as the plan's correlated noise has bands; independent noise needs none.
    num_groups = 1 if plan.strategy is None else plan.strategy.num_bands
    claims += [
        ("fingerprint of the plan", plan.fingerprint(), release.manifest.plan),
        ("steps_accounted", statement["steps_accounted"], plan.accounted_steps(state.intents)),
        ("number of groups by the plan", num_groups, state.num_groups),
    ]
    return claims


def _check_plan(run: RunDirectory, state: LedgerState) -> None:
    """Raise if the log belongs to another plan or data set than the run's ``secret/identity.json``.

    The log holds an HMAC of the fingerprint of plan and data; once the key is shredded nothing can be compared.
    """
    if not (run.secret / "pseudonym.key").is_file() or not run.identity.is_file():
        return
    identity = _read(run.identity)
    if state.plan != blinded_plan(run.load_key("pseudonym"), str(identity.get("fingerprint"))):
        raise LedgerCorrupt(f"{run.ledger} belongs to another plan or data set than {run.identity}")
    data = identity.get("data_sha256")
    if state.release is not None and data is not None:  # the fingerprint of the published plan, with the data's digest
        plan = PrivacyPlan.from_body(_read(run.privacy).get("plan"))
        if plan.fingerprint(data) != identity["fingerprint"]:
            raise LedgerCorrupt(f"{run.privacy}: its plan is not the one that {run.identity} was begun with")


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise :class:`LedgerCorrupt` if there is none."""
    try:
        value = strict_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LedgerCorrupt(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise LedgerCorrupt(f"{path} holds no JSON object")
    return value


def pseudonym_of(run: RunDirectory, user: str) -> str:
    """Return a user's pseudonym in this run.

    Raises:
        PrivtrainError: if the key was shredded.
    """
    if (run.secret / "shredded.json").exists():
        raise PrivtrainError(f"{run.root}: the key that links users to pseudonyms was shredded; give --pseudonym")
    return pseudonym(run.load_key("pseudonym"), user)


def print_ledger(run_path: pathlib.Path, last: int = 40, as_json: bool = False) -> None:
    """Print one row per ledger record, with each step's counts of users and records; no user id appears."""
    from privtrain.ledger.query import opened_contributions

    run = run_with_ledger(run_path)
    with opened_contributions(run.ledger) as contributions:
        steps, state = contributions.steps(), contributions.state
    rows = []
    for record in read_records(run.ledger):
        row = {key: record.get(key) for key in ("seq", "kind", "generation", "step")}
        if record["kind"] == "intent":
            nobody = {"num_units": 0, "num_records": 0, "max_records": 0, "num_zeroed": 0}
            row |= steps.get((record["generation"], record["step"]), nobody)
        elif record["kind"] == "session":
            row["step"] = record["from_step"]
        rows.append(row)
    if as_json:
        print_json({"head": state.head, "num_charged": state.num_charged, "records": rows})
        return
    table = _table("record", "kind", "generation", "step", "units", "records", "most of one unit", "zeroed")
    names = ("seq", "kind", "generation", "step", "num_units", "num_records", "max_records", "num_zeroed")
    for row in rows[-last:]:
        table.add_row(*(_text(row.get(name)) for name in names))
    console = _console()
    if len(rows) > last:
        console.print(f"the last {last} of {len(rows)} records; --last N shows more, --json all")
    console.print(table)
    console.print(f"{state.num_charged} steps charged, {len(state.commits)} committed; head {state.head}")


def print_top(run_path: pathlib.Path, count: int, as_json: bool) -> None:
    """Print the users with the most records, by pseudonym."""
    from privtrain.ledger.query import opened_contributions

    with opened_contributions(run_with_ledger(run_path).ledger) as contributions:
        rows = contributions.top(count)
    _print_rows(rows, as_json, {"num_shown": len(rows)}, "pseudonym", "records", "steps", "zeroed")


def print_user(run_path: pathlib.Path, user: str | None, unit_pseudonym: str | None, as_json: bool) -> None:
    """Print one user's contributions to a run, step by step; the user is given by id or by pseudonym."""
    from privtrain.ledger.query import opened_contributions

    run = run_with_ledger(run_path)
    name = which_pseudonym(user, unit_pseudonym, lambda user: pseudonym_of(run, user))
    with opened_contributions(run.ledger) as contributions:
        rows, state = contributions.user(name), contributions.state
    summary = {
        "pseudonym": name,
        "num_steps": len(rows),
        "num_steps_charged": state.num_charged,
        "num_records": sum(row["records"] for row in rows),
        "num_zeroed": sum(row["zeroed"] for row in rows),
        "num_steps_in_model": sum(row["in_model"] for row in rows),
    }
    _print_rows(rows, as_json, summary, "generation", "step", "records", "zeroed", "committed", "in_model")


def print_statistics(run_path: pathlib.Path, cap: int | None, as_json: bool) -> None:
    """Print how the contributions are distributed over users."""
    from privtrain.ledger.query import opened_contributions

    with opened_contributions(run_with_ledger(run_path).ledger) as contributions:
        statistics = contributions.statistics(cap)
    if as_json:
        print_json(dataclasses.asdict(statistics))
        return
    k = statistics.records_per_unit
    shares = [
        (f"contributions with k = {k} records", statistics.share_at_k),
        (f"contributions above k = {k}", statistics.share_above_k),
        (f"users with more than {cap} records", statistics.share_of_users_above_cap),
        (f"records beyond a user's first {cap}", statistics.share_of_records_above_cap),
    ]
    table = _table("", "")
    for name in ("num_steps", "num_users", "num_contributions", "num_records", "num_zeroed"):
        table.add_row(name.removeprefix("num_"), f"{getattr(statistics, name):,}")
    for name in ("records_per_user", "steps_per_user"):
        spread = ", ".join(f"{key} {value:,}" for key, value in getattr(statistics, name).items())
        table.add_row(name.replace("_", " "), spread)
    table.add_row("Gini of records over contributing users", f"{statistics.gini:.3f}")
    for name, share in shares:
        if share is not None:
            table.add_row(name, f"{100 * share:.2f} %")
    _console().print(table)


def _check_target(target: pathlib.Path) -> None:
    """Raise if a file to be written is there already, or lies where a run's public files are.

    Any directory above the file may be a run.
    """
    place = target.resolve()
    for root in place.parents:
        run = RunDirectory(root)
        if run.ledger.is_file() and not place.is_relative_to(run.secret):
            raise PrivtrainError(
                f"{target} is in the part of a run that may be published; choose {run.secret} or outside"
            )
    if not target.parent.is_dir():
        raise PrivtrainError(f"{target.parent} is not a directory")
    if os.path.lexists(target):
        raise PrivtrainError(f"{target} is there already; remove it, or give another name")


def export_run(run_path: pathlib.Path, target: pathlib.Path, file_format: str) -> str:
    """Write all contributions, by pseudonym, to a file outside the run's public part; return a line for people."""
    from privtrain.ledger.query import opened_contributions

    run = run_with_ledger(run_path)
    _check_target(target)
    with opened_contributions(run.ledger) as contributions:
        count = contributions.export(target, file_format)
    return f"{count} contributions in {target}, readable by you alone; it is as private as the ledger"


def prove_run(run_path: pathlib.Path, user: str | None, unit_pseudonym: str | None, target: pathlib.Path) -> str:
    """Write the proof of one user's part to a file outside the runs' public parts; return a line for people."""
    from privtrain.ledger.proof import check_proof, prove

    run = run_with_ledger(run_path)
    _check_target(target)
    name = which_pseudonym(user, unit_pseudonym, lambda user: pseudonym_of(run, user))
    proof = prove(run.ledger, name, user)
    checked = check_proof(proof, proof["head"])
    write_atomically(target, json.dumps(proof, separators=(",", ":")) + "\n", mode=0o600)
    return f"{target}: part in {len(checked.parts)} of {checked.num_steps} steps; head {checked.head}"


def print_checked_proof(
    path: pathlib.Path, head: str, key_path: pathlib.Path | None, user: str | None, as_json: bool
) -> None:
    """Check the proof in a file and print what it shows.

    Args:
        path: the file.
        head: hash that the proof's records must end in, from a source that the caller trusts.
        key_path: the run's pseudonym key, to check that the pseudonym is the user's; ``None`` if it was not shown.
        user: whose proof it must be; ``None`` for whomever it names.
        as_json: JSON in place of a table.
    """
    from privtrain.ledger.proof import check_proof, read_proof

    key = _shown_key(key_path) if key_path is not None else None
    checked = check_proof(read_proof(path), head, key=key, user=user)
    rows = [dataclasses.asdict(part) for part in checked.parts]
    linked = "recomputed from the key" if checked.is_key_checked else "as stated; --key checks it"
    summary = {
        "user": checked.user,
        "pseudonym": checked.pseudonym,
        "link": linked,
        "head": checked.head,
        "num_steps_charged": checked.num_steps,
        "num_steps": len(rows),
        "num_records": sum(part.records for part in checked.parts),
    }
    _print_rows(rows, as_json, summary, "generation", "step", "records", "is_zeroed", "is_committed", "is_in_model")


def _shown_key(path: pathlib.Path) -> SecretKey:
    """Return a key that somebody was shown, from wherever they keep it."""
    try:
        return SecretKey(bytes.fromhex(path.read_text(encoding="ascii").strip()))
    except (OSError, ValueError):
        raise PrivtrainError(f"--key: {path} is missing or is no key of a run") from None


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    print(json.dumps(value, indent=2))


def _print_rows(rows: list[dict[str, Any]], as_json: bool, summary: dict[str, Any], *names: str) -> None:
    """Print rows as a table with the columns ``names``, and the summary below it; or both as one JSON object."""
    if as_json:
        print_json({**summary, "rows": rows})
        return
    console = _console()
    if rows:
        table = _table(*names)
        for row in rows:
            table.add_row(*(_text(row[name]) for name in names))
        console.print(table)
    console.print(
        "\n".join(f"{name.removeprefix('num_').replace('_', ' ')}: {value}" for name, value in summary.items())
    )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else str(value)


def _table(*columns: str) -> Table:
    return Table(*(column.removeprefix("is_").replace("_", " ") for column in columns))


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
