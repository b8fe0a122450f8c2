"""The rows of a reservation: written, found again, and checked to be the run's own.

In all functions ``connection`` is a transaction of the registry, ``part`` the run's mechanism with its number of
repetitions, ``manifest`` an HMAC of the digest of the data set's content, and ``now`` the registry's time in seconds. A
*claim* is a random token by which one copy of a run directory holds a reservation; a new one at every start.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from privtrain.errors import PlanMismatch, PrivtrainError
from privtrain.registry import clock, endings, spending
from privtrain.registry.requests import Reservation, RunRequest
from privtrain.registry.snapshot import Snapshot, check_name
from privtrain.registry.spending import Part
from privtrain.registry.tables import (
    Base,
    Dataset,
    DatasetVersion,
    Mechanism,
    Meta,
    Population,
    ReservationRow,
    Run,
)


def insert(
    connection: sa.Connection, snapshot: Snapshot, request: RunRequest, part: Part, manifest: str
) -> Reservation | None:
    """Write the reservation if nothing was charged to the population since the snapshot; ``None`` if something was.

    The population's version tells: whatever is charged raises it.
    """
    unchanged = (Population.id == snapshot.population_id, Population.version == snapshot.version)
    raised = connection.execute(sa.update(Population).where(*unchanged).values(version=Population.version + 1))
    if raised.rowcount != 1:
        return None
    now = clock.now(connection)
    endings.expire(connection, now)
    if holds(connection, request.uid):
        return None  # another process of this run came between the first look and the snapshot
    return write_reservation(connection, snapshot.dataset_id, request, part, manifest, now)


def write_reservation(
    connection: sa.Connection, dataset_id: int, request: RunRequest, part: Part, manifest: str, now: float
) -> Reservation:
    """Write an open reservation, with the mechanism, run and version of the data set that it names."""
    # The rows that it refers to, unless they are there.
    insert_missing(connection, DatasetVersion, manifest=manifest, dataset_id=dataset_id, created_at=now)
    # Again: another data set may have taken these records since the snapshot, and its population's version is another.
    check_name(connection, dataset_id, request.dataset, manifest)
    stored = None if part.divergences is None else np.asarray(part.divergences, dtype="<f8").tobytes()
    digest = spending.event_digest(part.text)
    insert_missing(connection, Mechanism, digest=digest, event=part.text, divergences=stored)
    version_id = connection.execute(
        sa.select(DatasetVersion.id).where(DatasetVersion.manifest == manifest)
    ).scalar_one()
    mechanism_id = connection.execute(sa.select(Mechanism.id).where(Mechanism.digest == digest)).scalar_one()
    insert_missing(
        connection,
        Run,
        uid=request.uid,
        name=request.name,
        fingerprint=request.fingerprint,
        dataset_version_id=version_id,
        created_at=now,
    )
    run_id = connection.execute(sa.select(Run.id).where(Run.uid == request.uid)).scalar_one()
    _check_same_run(connection, run_id, request, manifest)

    # Which users the run leaves out.
    # The lock is shared with other runs, but not with an opt-out. So an opt-out either comes first and is on this run's
    # list, or comes later and finds this run among the unfinished ones.
    num_opt_outs = connection.execute(sa.select(Meta.num_opt_outs).with_for_update(read=True)).scalar_one()
    # A run whose split is drawn must go on with the same users, so it keeps the list that it began with.
    earlier = sa.select(ReservationRow.num_opt_outs).where(ReservationRow.run_id == run_id)
    last = connection.execute(earlier.order_by(ReservationRow.created_at.desc())).scalars().first()
    if request.has_split and last is not None:
        num_opt_outs = last

    reservation_id = uuid.uuid4().hex
    connection.execute(
        sa.insert(ReservationRow).values(
            id=reservation_id,
            run_id=run_id,
            dataset_id=dataset_id,
            mechanism_id=mechanism_id,
            state="open",
            num_reserved=part.count,
            num_charged=part.count,
            epsilon=request.epsilon,
            delta=request.delta,
            num_opt_outs=num_opt_outs,
            created_at=now,
            lease_until=now + request.lease_seconds,
            seen_at=now,
            claim=request.claim,
        )
    )
    return Reservation(reservation_id, "open", num_opt_outs, is_new=True)


def holds(connection: sa.Connection, uid: str) -> bool:
    """Return whether a run has a reservation that is not closed."""
    live = sa.select(ReservationRow.id).join(Run).where(Run.uid == uid, ReservationRow.state != "closed")
    return connection.execute(live).first() is not None


def take_over(connection: sa.Connection, request: RunRequest, part: Part, manifest: str) -> Reservation | None:
    """Return the reservation that the run holds already, open again if it had expired, under the request's new claim.

    ``None`` if the run holds none.

    Raises:
        PrivtrainError: if another copy of the run directory holds it.
        PlanMismatch: if it is for another plan, data set or mechanism.
    """
    now = clock.now(connection)
    row = live(connection, request.uid, now)
    if row is None:
        return None
    check_claim(row, [request.claim, *request.earlier_claims])
    _check_same_run(connection, row.run_id, request, manifest)
    _check_same_charge(connection, row, request, part)
    values = {
        "state": "open",
        "lease_until": now + request.lease_seconds,
        "claim": request.claim,
        "seen_at": max(now, row.seen_at),
    }
    connection.execute(sa.update(ReservationRow).where(ReservationRow.id == row.id).values(**values))
    return Reservation(row.id, "open", row.num_opt_outs, is_new=False)


def live(connection: sa.Connection, uid: str, now: float) -> Any:
    """Return the run's one reservation that is not closed, or ``None``; locked until the transaction ends.

    Reservations whose lease is over are marked as expired first.
    """
    endings.expire(connection, now)
    return connection.execute(
        sa.select(ReservationRow)
        .join(Run, Run.id == ReservationRow.run_id)
        .where(Run.uid == uid, ReservationRow.state != "closed")
        .with_for_update(of=ReservationRow)
    ).one_or_none()


def _check_same_run(connection: sa.Connection, run_id: int, request: RunRequest, manifest: str) -> None:
    """Raise unless the registry knows the run with this plan and data set."""
    chosen = sa.select(Run.fingerprint, DatasetVersion.manifest).join(
        DatasetVersion, DatasetVersion.id == Run.dataset_version_id
    )
    if connection.execute(chosen.where(Run.id == run_id)).one() != (request.fingerprint, manifest):
        raise PlanMismatch(
            f"the registry knows the run {request.uid!r} with another plan or data set: secret/identity.json was "
            "altered or is another run's. Restore it, or set another run.name"
        )


def _check_same_charge(connection: sa.Connection, row: Any, request: RunRequest, part: Part) -> None:
    """Raise unless the reservation is for this mechanism, data set, count and δ."""
    chosen = (
        sa.select(Mechanism.digest, Dataset.name)
        .select_from(ReservationRow)
        .join(Mechanism, Mechanism.id == ReservationRow.mechanism_id)
        .join(Dataset, Dataset.id == ReservationRow.dataset_id)
        .where(ReservationRow.id == row.id)
    )
    mechanism, dataset = connection.execute(chosen).one()
    held = (mechanism, dataset, row.num_reserved, row.delta)
    asked = (spending.event_digest(part.text), request.dataset, part.count, request.delta)
    if held != asked:
        raise PlanMismatch(
            f"the run holds reservation {row.id[:12]} for another mechanism, number of steps, δ or data set; restore "
            "the configuration it began with, or set another run.name"
        )


def holds_claim(claim: str | None) -> sa.ColumnElement[bool]:
    """Return the SQL condition that a reservation is held by the run directory with this claim, or by no claim."""
    return sa.or_(ReservationRow.claim.is_(None), ReservationRow.claim == claim)


def check_claim(row: Any, known: Collection[str | None]) -> None:
    """Raise unless the reservation is held under one of these claims."""
    if row.claim is not None and row.claim not in known:
        raise PrivtrainError(
            f"reservation {row.id[:12]} is held by another copy of this run directory, or this one was restored from a "
            "backup: two copies would train twice and be charged once. Go on in the copy that trained last. If that "
            f"one is lost, wait until the reservation has expired, then: privtrain registry close {row.id}"
        )


def insert_missing(connection: sa.Connection, table: type[Base], **values: Any) -> None:
    """Insert a row unless one with the same unique value is there, also if a concurrent transaction just wrote it."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(insert(table).values(**values).on_conflict_do_nothing())
