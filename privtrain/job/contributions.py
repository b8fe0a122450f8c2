"""What each user, and each canary, contributed so far, and what the plan's bound allows.

The ledger names the units of each step (users or records, by ``privacy.unit``) by keyed pseudonyms. To say whose they
are, the pseudonyms of the data set's own units are computed and looked up.
"""

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
    """Raise unless the ledger keeps to the plan.

    With ``records_per_user`` k, at most k records of a user took part in the run. Where steps draw from groups of
    units in turn (cyclic Poisson sampling), every unit took part in the steps of one group only.

    Raises:
        GuaranteeLost: if a user has more records, or the ledger names a unit that is nobody's.
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
    """Return the ledger's pseudonym of a unit → the user whose unit it is, for the ``wanted`` pseudonyms alone.

    Only these are kept, since a corpus may hold millions of users of whom few took part.
    """
    key = run.load_key("pseudonym")
    owner = {}
    for user, texts in corpus.records.items():
        if plan.unit == "user":
            unit_names = [user]
        else:
            # A long record may be cut into chunks, each a unit, so a user may have more units than records.
            most = max(len(texts), plan.records_per_user or 0)
            unit_names = [example_name(user, index) for index in range(most)]
        for name in unit_names:
            unit_pseudonym = pseudonym(key, name)
            if unit_pseudonym in wanted:
                owner[unit_pseudonym] = user
    return owner


def contributions_of(run: RunDirectory, corpus: Corpus, plan: PrivacyPlan) -> dict[str, tuple[int, int]]:
    """Return user → (steps, records) of every user that the ledger charged.

    Where the unit is the record, a step counts once for each of the user's records in it.

    Raises:
        LedgerCorrupt: if the ledger names a unit that is nobody's.
    """
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

    The attack job reads it: a planted secret that no step saw proves nothing.

    Args:
        run: the run directory.
        state: of its verified ledger.
        canaries: the planted users.
        units: the training units, with the user of each.

    Raises:
        DamagedFile: if the file was altered since training began.
    """
    if not canaries:
        return
    key = run.load_key("pseudonym")
    planted = {canary.user for canary in canaries}
    canary_of = {}  # the ledger's pseudonym of a canary's unit → the canary user
    for name, owner in zip(units.names, units.owners, strict=True):
        if owner in planted:
            canary_of[pseudonym(key, name)] = owner
    num_drawn: Counter[str] = Counter()  # canary user → records that entered steps
    for unit_pseudonym, num_records in charged_units(run.ledger, state):
        if unit_pseudonym in canary_of:
            num_drawn[canary_of[unit_pseudonym]] += num_records
    used = read_sealed_file(run, run.used, schema=USED_SCHEMA, remedy="restore it")
    write_sealed(run, run.used, with_contributions(used, num_drawn))
