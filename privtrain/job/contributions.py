"""What each user, and each canary, contributed so far, and what the plan's bound allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set

from privtrain.data.canaries import Canary
from privtrain.data.corpus import Corpus
from privtrain.data.manifest import USED_SCHEMA, with_contributions
from privtrain.data.selection import check_contributions
from privtrain.data.units import UnitData, example_name
from privtrain.errors import GuaranteeLost, LedgerCorrupt
from privtrain.ledger.bodies import charged_units
from privtrain.ledger.chain import LedgerState
from privtrain.ledger.groups import check_groups
from privtrain.ledger.log import verify_chain
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.secret import pseudonym
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import read_sealed_file, write_sealed


def check_contributed(run: RunDirectory, corpus: Corpus, plan: PrivacyPlan) -> None:
    """Raise unless the ledger keeps to the plan: each user's records over the run, and units in their groups.

    Groups are there where steps draw from groups in turn (cyclic Poisson sampling).

    Raises:
        GuaranteeLost: if one did, or the ledger names a unit that is nobody's.
        LedgerCorrupt: if a unit joined steps of two groups.
    """
    state = verify_chain(run.ledger)
    check_groups(run.ledger, state)
    if plan.records_per_user is None:
        return
    names = {name for name, _ in charged_units(run.ledger, state)}
    owner = _owners(run, corpus, plan, names)
    if not names <= owner.keys():
        raise GuaranteeLost(f"{run.ledger} names units that are no user's; nothing is released")
    check_contributions([owner[name] for name in names], plan.records_per_user)


def _owners(run: RunDirectory, corpus: Corpus, plan: PrivacyPlan, wanted: Set[str]) -> dict[str, str]:
    """Return pseudonym → user of the wanted units: nobody else is kept, however many there are."""
    key = run.load_key("pseudonym")
    owner = {}
    for user, texts in corpus.records.items():
        most = max(len(texts), plan.records_per_user or 0)  # chunks may be more than records
        for name in [user] if plan.unit == "user" else [example_name(user, index) for index in range(most)]:
            known_as = pseudonym(key, name)
            if known_as in wanted:
                owner[known_as] = user
    return owner


def contributions_of(run: RunDirectory, corpus: Corpus, plan: PrivacyPlan) -> dict[str, tuple[int, int]]:
    """Return user → (steps, records) of every user that the ledger charged; each of a user's units counts its steps."""
    steps: Counter[str] = Counter()
    records: Counter[str] = Counter()
    for name, num_records in charged_units(run.ledger, verify_chain(run.ledger)):
        steps[name] += 1
        records[name] += num_records
    owner = _owners(run, corpus, plan, steps.keys())
    if not steps.keys() <= owner.keys():
        raise LedgerCorrupt(f"{run.ledger} names units that are no user's of this data set; nothing was settled")
    return added((owner[name], (num_steps, records[name])) for name, num_steps in steps.items())


def added(parts: Iterable[tuple[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Return name → (steps, records), added up where a name comes more than once."""
    sums: dict[str, tuple[int, int]] = {}
    for name, (num_steps, num_records) in parts:
        steps, records = sums.get(name, (0, 0))
        sums[name] = (steps + num_steps, records + num_records)
    return sums


def note_canaries(run: RunDirectory, state: LedgerState, canaries: Sequence[Canary], units: UnitData) -> None:
    """Write into ``secret/used.json`` how many records of each canary entered steps, counted once a step.

    A planted secret that no step saw proves nothing.

    Raises:
        DamagedFile: if the file was altered since training began.
    """
    if not canaries:
        return
    key = run.load_key("pseudonym")
    planted = {canary.user for canary in canaries}
    named = zip(units.names, units.owners, strict=True)
    owners = {pseudonym(key, name): owner for name, owner in named if owner in planted}
    drawn: Counter[str] = Counter()
    for name, num_records in charged_units(run.ledger, state):
        if name in owners:
            drawn[owners[name]] += num_records
    used = read_sealed_file(run, run.used, schema=USED_SCHEMA, remedy="restore it")
    write_sealed(run, run.used, with_contributions(used, drawn))
