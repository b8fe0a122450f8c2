"""End reservations inside a transaction: charge them, write settlements, store contributions.

A *reservation* is a row of :class:`~privtrain.registry.tables.ReservationRow`: a mechanism (usually one step) and how
often it was reserved and is charged, its *repetitions*. It is ``open``, ``expired`` (without news) or ``closed``. A
*settlement* says how it was closed: ``settle`` (its run was released), ``refund`` (given up) or ``close`` (by hand).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from privtrain.errors import GuaranteeLost
from privtrain.registry import evidence
from privtrain.registry.tables import Contribution, Dataset, Population, ReservationRow, Run, Settlement

_CHUNK = 2000


def reservations_of(connection: sa.Connection, uid: str) -> Sequence[Any]:
    """Return all of a run's reservations, the one that is not closed last, locked until the transaction ends."""
    chosen = sa.select(ReservationRow).join(Run, Run.id == ReservationRow.run_id).where(Run.uid == uid)
    is_live = sa.case((ReservationRow.state != "closed", 1), else_=0)
    ordered = chosen.order_by(is_live, ReservationRow.created_at)
    return connection.execute(ordered.with_for_update(of=ReservationRow)).all()


def settled_heads(connection: sa.Connection, rows: Sequence[Any]) -> set[str]:
    """Return which releases of these reservations are settled, by ledger head: the hash of a ledger's last record."""
    chosen = sa.select(Settlement.ledger_head).where(
        Settlement.reservation_id.in_([row.id for row in rows]), Settlement.kind == "settle"
    )
    return set(connection.execute(chosen).scalars())


def closed_by(connection: sa.Connection, row: Any) -> str:
    """Return how a closed reservation ended: ``settle``, ``refund`` or ``close``."""
    return connection.execute(sa.select(Settlement.kind).where(Settlement.reservation_id == row.id)).scalar_one()


def beside(connection: sa.Connection, row: Any, now: float) -> Any:
    """Insert a copy of a reservation, to charge one more release of the same run to; return its row.

    No budget is checked, since the release is public already. The caller closes it with its settlement.
    """
    copy_id = uuid.uuid4().hex
    changed = {"id": copy_id, "state": "closed", "created_at": now, "seen_at": now, "claim": None}
    connection.execute(sa.insert(ReservationRow).values(**(row._asdict() | changed)))
    return connection.execute(sa.select(ReservationRow).where(ReservationRow.id == copy_id)).one()


def outdate(connection: sa.Connection, dataset_id: int) -> None:
    """Raise the population's version: reservations decided on an older snapshot must be decided again."""
    population = sa.select(Dataset.population_id).where(Dataset.id == dataset_id).scalar_subquery()
    raised = sa.update(Population).where(Population.id == population)
    connection.execute(raised.values(version=Population.version + 1))


def add_contributions(connection: sa.Connection, run_id: int, added: Mapping[str, tuple[int, int]]) -> None:
    """Add users' contributions to those that earlier releases of the same run stored.

    Args:
        connection: a writing transaction.
        run_id: the run's id in the database.
        added: pseudonym of the user → (steps, records).
    """
    before = sa.select(Contribution).where(Contribution.run_id == run_id)
    known = {row.user_pseudonym: (row.num_steps, row.num_records) for row in connection.execute(before)}
    connection.execute(sa.delete(Contribution).where(Contribution.run_id == run_id))
    rows = []
    for user in known.keys() | added.keys():
        known_steps, known_records = known.get(user, (0, 0))
        new_steps, new_records = added.get(user, (0, 0))
        totals = {"num_steps": known_steps + new_steps, "num_records": known_records + new_records}
        rows.append({"run_id": run_id, "user_pseudonym": user, **totals})
    for start in range(0, len(rows), _CHUNK):
        connection.execute(sa.insert(Contribution), rows[start : start + _CHUNK])


def close(connection: sa.Connection, row: Any, kind: str, charged: int, ledger_head: str, now: float) -> None:
    """Close a reservation, and write its settlement.

    Args:
        connection: a writing transaction.
        row: of :class:`ReservationRow`.
        kind: ``settle``, ``refund`` or ``close``.
        charged: repetitions of the mechanism that stay charged.
        ledger_head: hash of the last record of the ledger that shows them; empty if none does.
        now: seconds since 1970, by the registry's clock.
    """
    now = max(now, row.created_at, row.seen_at)  # no period ends early because a server's clock was set back
    epsilon = evidence.epsilon_of(connection, row, charged)
    values = {"state": "closed", "num_charged": charged, "epsilon": epsilon, "closed_at": now}
    connection.execute(sa.update(ReservationRow).where(ReservationRow.id == row.id).values(**values))
    connection.execute(
        sa.insert(Settlement).values(
            reservation_id=row.id,
            kind=kind,
            num_charged=charged,
            epsilon=epsilon,
            ledger_head=ledger_head,
            created_at=now,
        )
    )


def charge_of(row: Any, num_steps: int) -> int:
    """Return the repetitions to charge for ``num_steps`` steps that a run's ledger shows.

    Raises:
        GuaranteeLost: if they are more than what was reserved; the reservation stays as it is.
    """
    if row.num_reserved == 1:  # one mechanism for the whole run, e.g. with correlated noise: all or nothing
        return 1 if num_steps > 0 else 0
    if not 0 <= num_steps <= row.num_reserved:
        raise GuaranteeLost(
            f"the ledger shows {num_steps} steps, but {row.num_reserved} were reserved (reservation {row.id}); the "
            "run spent what no budget allowed"
        )
    return num_steps


def charge_in_full(row: Any, num_steps: int) -> int:
    """Return the repetitions to charge for a release without a reservation of its own, whose ledger shows the steps.

    All that was planned, or the steps shown if they are more; a mechanism for the whole run once.
    """
    return 1 if row.num_reserved == 1 else max(row.num_reserved, num_steps)


def expire(connection: sa.Connection, now: float) -> None:
    """Mark the open reservations whose lease is over as expired; they stay charged in full."""
    late = (ReservationRow.state == "open", ReservationRow.lease_until < now)
    connection.execute(sa.update(ReservationRow).where(*late).values(state="expired"))
