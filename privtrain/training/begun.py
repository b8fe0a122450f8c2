"""How many steps a run directory proves to have begun: what the ledger shows, unless other files show more.

A ledger that is gone, or an older one put in its place, must not look like a run that never began: its steps may have
been computed and their checkpoints copied.
"""

from __future__ import annotations

import pathlib

from privtrain.errors import LedgerCorrupt
from privtrain.job import checkpoint
from privtrain.ledger import LedgerState, verify_chain
from privtrain.ledger.bodies import directory_of
from privtrain.ledger.head import head_path
from privtrain.run.directory import RunDirectory


def num_begun(run: RunDirectory) -> int:
    """Steps that a run began, by its verified ledger; what a crash left half written was never begun.

    Raises:
        LedgerCorrupt: if the ledger does not verify, or other files show steps that it does not.
    """
    state = verified_state(run)
    return 0 if state is None else state.num_charged


def verified_state(run: RunDirectory) -> LedgerState | None:
    """What a run's verified ledger says; ``None`` of a run that never had one. Not while a job is writing.

    Raises:
        LedgerCorrupt: if the ledger does not verify, or other files show steps that it does not.
    """
    if not run.ledger.exists():
        found = traces(run)
        if found:
            raise LedgerCorrupt(
                f"{run.ledger} is gone but {found[0]} is there: how many steps were begun is not known. Restore it"
            )
        return None
    state = verify_chain(run.ledger, allow_torn=True)
    later = _past(run, state)
    if later is not None:
        raise LedgerCorrupt(f"{later} is past {run.ledger}, which is an older copy or was replaced; restore it")
    return state


def traces(run: RunDirectory) -> list[pathlib.Path]:
    """What a run without a ledger would not have: files that are made only once there is one."""
    certain = [head_path(run.ledger), run.manifest, run.privacy, run.release, run.staged, run.adapter, run.model]
    found = [path for path in certain if path.exists()]
    for directory, pattern in (
        (run.secret, "generation-*.key"),
        (run.checkpoints, "*"),
        (directory_of(run.ledger), "*"),
    ):
        found += sorted(directory.glob(pattern))
    return found


def _past(run: RunDirectory, state: LedgerState) -> pathlib.Path | None:
    """A file that rests on a record which the ledger does not have."""
    if run.manifest.exists() and state.generation < 0:
        return run.manifest
    steps = {step for _, step in state.commits}
    for path, generation, num_steps in checkpoint.listed(run.checkpoints):
        last = num_steps - 1
        is_known = last in steps if generation is None else (generation, last) in state.commits
        if not is_known:
            return path
    return None
