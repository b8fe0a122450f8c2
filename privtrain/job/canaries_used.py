"""After training: how often each canary was really drawn. A planted secret that no step saw proves nothing."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from privtrain.data.canaries import Canary
from privtrain.data.manifest import USED_SCHEMA, with_contributions
from privtrain.data.units import UnitData
from privtrain.ledger.bodies import charged_units
from privtrain.ledger.chain import LedgerState
from privtrain.privacy.secret import pseudonym
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import read_sealed_file, write_sealed


def note_canaries(run: RunDirectory, state: LedgerState, canaries: Sequence[Canary], units: UnitData) -> None:
    """Write into ``secret/used.json`` how many records of each canary entered steps, counted once a step.

    Raises:
        DamagedFile: if the file was altered since training began.
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
    used = read_sealed_file(run, run.used, schema=USED_SCHEMA, remedy="restore it")
    write_sealed(run, run.used, with_contributions(used, drawn))
