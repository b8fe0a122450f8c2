"""``privtrain ledger show | verify``: read a finished or running ledger without changing it."""

from __future__ import annotations

import json
import pathlib

from rich.console import Console
from rich.table import Table

from privtrain.errors import LedgerCorrupt, PrivtrainError
from privtrain.ledger.log import read_records, verify
from privtrain.rundir import RunDirectory


def _log_of(run_path: pathlib.Path) -> RunDirectory:
    run = RunDirectory(run_path)
    if not run.ledger.is_file():
        raise PrivtrainError(f"{run_path} has no ledger; give a run directory such as runs/demo")
    return run


def verify_run(run_path: pathlib.Path) -> str:
    """Check a run's ledger and the head that its privacy statement quotes.

    Returns:
        One line for people.

    Raises:
        LedgerCorrupt: with the offset of the first record that does not hold, or if the statement quotes another head.
    """
    run = _log_of(run_path)
    state = verify(run.ledger)
    quoted = ""
    if run.privacy.is_file():
        statement = json.loads(run.privacy.read_text(encoding="utf-8"))
        if statement["ledger"]["head"] != state.head:
            head = statement["ledger"]["head"]
            raise LedgerCorrupt(
                f"{run.privacy} quotes ledger head {head[:12]}, the log ends in {state.head[:12]}: "
                "records were removed or added after the release"
            )
        if statement["steps_released"] != state.num_charged:
            raise LedgerCorrupt(
                f"{run.privacy} accounts for {statement['steps_released']} steps, "
                f"the ledger charged {state.num_charged}"
            )
        quoted = ", matches privacy.json"
    num_open = state.num_charged - len(state.commits)
    return (
        f"ledger verified: {state.num_records} records, {state.num_charged} steps charged, "
        f"{len(state.commits)} committed"
        f"{f', {num_open} begun but never committed' if num_open else ''}, generation {state.generation}{quoted}"
    )


def print_ledger(run_path: pathlib.Path) -> None:
    """One row a step: units, records and the most records of one unit."""
    run = _log_of(run_path)
    state = verify(run.ledger) if run.privacy.is_file() else None
    table = Table("record", "kind", "generation", "step", "units", "records", "most of one unit")
    for record in read_records(run.ledger):
        units = record.get("units")
        table.add_row(
            str(record["seq"]),
            record["kind"],
            str(record.get("generation", "")),
            str(record.get("step", record.get("from_step", ""))),
            "" if units is None else str(len(units)),
            "" if units is None else str(sum(count for _, count in units)),
            "" if units is None else str(max((count for _, count in units), default=0)),
        )
    console = Console()
    console.print(table)
    if state is not None:
        console.print(f"head {state.head}")
