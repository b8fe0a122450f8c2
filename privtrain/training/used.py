"""After training: how often each canary was really drawn. A planted secret that no step saw proves nothing."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from privtrain.data.canaries import Canary
from privtrain.data.manifest import read_sealed, with_contributions
from privtrain.data.units import UnitData
from privtrain.ledger import LedgerState, charged_units
from privtrain.rundir import RunDirectory, write_json
from privtrain.secret import pseudonym


def note_canaries(run: RunDirectory, state: LedgerState, canaries: Sequence[Canary], units: UnitData) -> None:
    """Write into ``secret/used.json`` how many records of each canary entered steps, counted once a step.

    Args:
        run: the run.
        state: its ledger.
        canaries: what was planted.
        units: what was trained on.

    Raises:
        PlanMismatch: if the file was altered since training began.
    """
    if not canaries:
        return
    key = run.load_key("pseudonym")
    planted = {canary.user for canary in canaries}
    named = zip(units.names, units.owners, strict=True)
    owners = {pseudonym(key, name): owner for name, owner in named if owner in planted}
    drawn: collections.Counter[str] = collections.Counter()
    for name, num_records in charged_units(run.ledger, state):
        if name in owners:
            drawn[owners[name]] += num_records
    write_json(run.used, with_contributions(read_sealed(run.used), drawn), mode=0o600)
