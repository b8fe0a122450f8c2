"""Evidence for ending a reservation: a run's verified ledger, checked against what the registry knows of the run.

A run directory can be edited, restored from a backup or replaced by another run's. So the registry takes no number from
what a run publishes. Whenever a job renews its lease it shows its ledger, and the registry remembers which ledger that
is and how many steps it showed. Another ledger, or an older one, ends no reservation, which then stays charged in full.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import sqlalchemy as sa

from privtrain.errors import GuaranteeLost
from privtrain.registry import spending
from privtrain.registry.spending import Part
from privtrain.registry.tables import Mechanism, ReservationRow, Run


@dataclasses.dataclass(frozen=True)
class LedgerEvidence:
    """What a run's verified ledger shows. Made from the chain of records alone (:mod:`privtrain.job.evidence`).

    Attributes:
        num_steps: steps charged, over all generations.
        head: hash of the last record; empty if the run has no ledger.
        key_sha256: commitment to the ledger's key, which no other ledger has; empty if there is none.
        plan: the plan's public fingerprint by the release record; empty if the ledger shows no release.
    """

    num_steps: int
    head: str
    key_sha256: str = ""
    plan: str = ""


#: Of a run that never had a ledger.
NOTHING = LedgerEvidence(0, "")


def check(connection: sa.Connection, row: Any, shown: LedgerEvidence) -> None:
    """Raise unless the ledger is the reserved run's own and no older than the last one seen.

    Args:
        connection: a transaction of the registry.
        row: the reservation's, of :class:`ReservationRow`, with what the ledger showed before.
        shown: what the ledger shows now.

    Raises:
        GuaranteeLost: if it is another ledger, an older copy, or of another plan; the reservation stays as it is.
    """
    at = f"reservation {row.id[:12]} stays charged in full"
    if row.ledger_key and shown.key_sha256 != row.ledger_key:
        raise GuaranteeLost(
            f"the ledger in the run directory is not the one that this run trained with: it was replaced; {at}. "
            "Restore secret/ledger.jsonl, ledger.head and pseudonym.key"
        )
    if shown.num_steps < row.num_begun:
        raise GuaranteeLost(
            f"the ledger shows {shown.num_steps} steps, but the run had begun {row.num_begun}: it is an older copy; "
            f"{at}. Restore the newest"
        )
    plan = connection.execute(sa.select(Run.fingerprint).where(Run.id == row.run_id)).scalar_one()
    if shown.plan and shown.plan != plan:
        raise GuaranteeLost(
            f"the ledger is of plan {shown.plan[:12]}, the reservation of plan {plan[:12]}: one of them is another "
            f"run's; {at}"
        )


def note(connection: sa.Connection, row: Any, shown: LedgerEvidence) -> None:
    """Store in a reservation's row which ledger its run uses and how many steps that shows.

    Raises:
        GuaranteeLost: if it is another ledger or an older copy, as :func:`check` says.
    """
    check(connection, row, shown)
    values = {"ledger_key": shown.key_sha256 or None, "num_begun": shown.num_steps}
    connection.execute(sa.update(ReservationRow).where(ReservationRow.id == row.id).values(**values))


def epsilon_of(connection: sa.Connection, row: Any, num_steps: int) -> float:
    """Return the certified ε of ``num_steps`` repetitions of the reserved mechanism, at the run's own δ."""
    if num_steps == row.num_reserved:
        return row.epsilon
    text = connection.execute(sa.select(Mechanism.event).where(Mechanism.id == row.mechanism_id)).scalar_one()
    value = composed(text, num_steps, row.delta)
    # The reserved ε was computed by the run, maybe by another accountant, looser or tighter than this one. ε grows with
    # the steps, so fewer never cost more than that, and more never less.
    return min(value, row.epsilon) if num_steps < row.num_reserved else max(value, row.epsilon)


@functools.lru_cache(maxsize=1024)
def composed(event_text: str, count: int, delta: float) -> float:
    """Return the certified ε of ``count`` repetitions; cached, so that a transaction need not wait for it."""
    return spending.composed_epsilon([Part(event_text, count, None)], delta).epsilon
