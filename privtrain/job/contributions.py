"""What each user contributed so far, and what the plan's bound allows."""

from __future__ import annotations

from collections.abc import Iterator, Set

from privtrain.data.corpus import Corpus
from privtrain.data.selection import check_contributions
from privtrain.data.units import example_name
from privtrain.errors import GuaranteeLost, LedgerCorrupt
from privtrain.ledger.bodies import charged_units
from privtrain.ledger.groups import check_groups
from privtrain.ledger.log import verify_chain
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.secret import pseudonym
from privtrain.run.directory import RunDirectory


def check_contributed(run: RunDirectory, corpus: Corpus, plan: PrivacyPlan) -> None:
    """See in the ledger that no user contributed more records over the whole run than the plan's bound on users.

    And that units stayed in their groups, where steps draw from groups in turn.

    Raises:
        GuaranteeLost: if one did, or the ledger names a unit that is nobody's.
        LedgerCorrupt: if a unit joined steps of two groups.
    """
    check_groups(run.ledger, verify_chain(run.ledger))
    if plan.records_per_user is None:
        return
    names = {name for name, _, _ in _charged_units(run)}
    owner = _owners(run, corpus, plan, names)
    if not names <= owner.keys():
        raise GuaranteeLost(f"{run.ledger} names units that are no user's; nothing is released")
    check_contributions([owner[name] for name in names], plan.records_per_user)


def _owners(run: RunDirectory, corpus: Corpus, plan: PrivacyPlan, wanted: Set[str]) -> dict[str, str]:
    """Pseudonym of a unit → its user, for the units that are wanted: nobody else is kept, however many there are."""
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
    """User → (steps, records), of every user that the run's ledger charged; each of a user's units counts its steps."""
    charged: dict[str, tuple[int, int]] = {}
    for name, num_steps, num_records in _charged_units(run):
        steps, records = charged.get(name, (0, 0))
        charged[name] = (steps + num_steps, records + num_records)
    owner = _owners(run, corpus, plan, charged.keys())
    if not charged.keys() <= owner.keys():
        raise LedgerCorrupt(f"{run.ledger} names units that are no user's of this data set; nothing was settled")
    totals: dict[str, tuple[int, int]] = {}
    for name, (num_steps, num_records) in charged.items():
        steps, records = totals.get(owner[name], (0, 0))
        totals[owner[name]] = (steps + num_steps, records + num_records)
    return totals


def _charged_units(run: RunDirectory) -> Iterator[tuple[str, int, int]]:
    """Units by the run's own pseudonyms, with steps and records; a unit may come more than once."""
    for name, num_records in charged_units(run.ledger, verify_chain(run.ledger)):
        yield name, 1, num_records
