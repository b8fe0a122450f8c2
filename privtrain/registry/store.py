"""Reserve before a run, settle after it: what changes the registry. Every call is one transaction and may be repeated.

A reservation is decided on a snapshot, outside any transaction, and written only if nothing that could spend budget
happened to the population since: its version number is compared and raised by the same statement. Two jobs that race
for the last of a budget therefore cannot both get it, and no lock is held while the accountants work.
"""

from __future__ import annotations

import dataclasses
import enum
import unicodedata
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from privtrain.errors import BudgetExceeded, GuaranteeLost, PlanMismatch, PrivtrainError
from privtrain.privacy.secret import pseudonym
from privtrain.registry import clock, endings, evidence, spending
from privtrain.registry.database import Database
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.refusal import explain
from privtrain.registry.requests import SCOPES, BudgetKey, Reservation, RunRequest
from privtrain.registry.spending import Limit, Part
from privtrain.registry.tables import (
    Base,
    Budget,
    Dataset,
    DatasetVersion,
    Mechanism,
    Meta,
    OptOut,
    Population,
    ReservationRow,
    Run,
    Settlement,
)

#: Every lost race means that somebody else won one; more than this in a row is a fault.
_MAX_RACES = 1000


class Settled(enum.Enum):
    """The outcome of a settlement.

    ``OWN``: charged on the run's reservation; ``BESIDE``: it had none left and was charged in full beside another;
    ``ALREADY``: it was settled before; ``LATE``: the registry did not know the run, and charged it now;
    ``UNKNOWN``: it does not know the run or its data set, which is charged nowhere.
    """

    OWN = "own"
    BESIDE = "beside"
    ALREADY = "already"
    LATE = "late"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    dataset_id: int
    population_id: int
    version: int
    budgets: tuple[tuple[BudgetKey, Limit], ...]


class Registry:
    """The budgets of an organisation. Opens, and makes if it is a SQLite file that does not exist, the database.

    Args:
        url: SQLAlchemy URL or SQLite path.
        retry_seconds: how long an unreachable server is waited for.
        read_only: for readers that must not change anything.

    Raises:
        RegistryUnreachable: if no server answers in time.
        PrivtrainError: if the database holds another schema.
    """

    def __init__(self, url: str, *, retry_seconds: float = 60.0, read_only: bool = False) -> None:
        self.database = Database(url, retry_seconds=retry_seconds, read_only=read_only)
        self.database.prepare()

    def pseudonym(self, user: str) -> str:
        """Return a user's pseudonym, the same in all runs of this registry and for all Unicode forms of an id.

        Who opts out may type an accented letter as one character that the data hold as two.
        """
        return pseudonym(self.database.key(), unicodedata.normalize("NFC", user))

    def set_budget(
        self,
        dataset: str,
        *,
        epsilon: float,
        delta: float,
        scope: str = "user",
        period_seconds: float | None = None,
        population: str | None = None,
        unit: str = "user",
    ) -> BudgetKey:
        """Set or change a budget; makes the data set if the registry does not know it.

        Args:
            dataset: name of the data set.
            epsilon: what all runs together may spend,
            delta: at this δ.
            scope: ``"user"``: every user of the data set's population, over all its data sets; ``"dataset"``: this one.
            period_seconds: the bound holds in every window of this length; ``None``: for ever.
            population: who the records are about, for a new data set; its own name if not given.
            unit: ``"user"`` or ``"example"``, for a new data set.

        Raises:
            PrivtrainError: if a value is out of range, or differs from what the data set was made with, or the unit
                from that of the population's other data sets.
        """
        if not 0 < epsilon < float("inf") or not 0 < delta < 1 or not _is_period(period_seconds):
            raise PrivtrainError(
                f"given ε {epsilon:g}, δ {delta:g}, period {period_seconds}: ε must be positive and finite, δ in "
                "(0, 1), the period none or finite and at least one hour, which clocks are compared to"
            )
        if scope not in SCOPES:
            raise PrivtrainError(f"given --per {scope}; it is one of {', '.join(SCOPES)}")
        if scope == "user" and unit != "user":
            raise PrivtrainError("a per-user budget needs a user-level guarantee: use --unit user, or --per dataset")

        def work(connection: sa.Connection) -> BudgetKey:
            dataset_id, population_id, population_name = _ensure_dataset(connection, dataset, population, unit)
            own = None if scope == "user" else dataset_id
            same = (
                Budget.population_id == population_id,
                Budget.scope == scope,
                Budget.dataset_id.is_not_distinct_from(own),
            )
            now = clock.estimate(connection)
            connection.execute(sa.update(Budget).where(*same, Budget.superseded_at.is_(None)).values(superseded_at=now))
            values = {"epsilon": epsilon, "delta": delta, "period_seconds": period_seconds}
            connection.execute(
                sa.insert(Budget).values(
                    scope=scope, population_id=population_id, dataset_id=own, created_at=now, **values
                )
            )
            raised = sa.update(Population).where(Population.id == population_id)
            connection.execute(raised.values(version=Population.version + 1))
            # After the update, which makes whoever changes this population at the same time wait.
            _check_unit(connection, dataset, population_id, unit)
            return BudgetKey(scope, population_name if scope == "user" else dataset, **values)

        return self.database.write(work)

    def reserve(self, request: RunRequest) -> Reservation:
        """Reserve what a run may spend, or find the reservation that it already holds.

        Raises:
            BudgetExceeded: if a budget does not allow it; with what is left and what would fit. Nothing is reserved.
            PrivtrainError: if the data set is unknown, has no budget, or is held under another name; or if another copy
                of the run directory holds the reservation.
            RegistryUnreachable: if no server answers in time.
        """
        if request.relation != "add_or_remove_one":
            raise PrivtrainError(f"budgets are for add_or_remove_one, the run's relation is {request.relation}")
        manifest = self._manifest(request)
        part = spending.part_of(request.event)
        for _ in range(_MAX_RACES):
            if self.database.read(lambda c: _holds(c, request.uid)):
                held = self.database.write(lambda c: _take_over(c, request, part, manifest))
                if held is not None:
                    return held
            snapshot = self.database.read(lambda c: _snapshot(c, request, manifest))
            refused = [
                (key, limit)
                for key, limit in snapshot.budgets
                if not spending.fits([*limit.spent, part], limit.epsilon, limit.delta)
            ]
            if refused:
                raise BudgetExceeded(explain(request, part, refused, [limit for _, limit in snapshot.budgets]))
            made = self.database.write(lambda c, s=snapshot: _insert(c, s, request, part, manifest))
            if made is not None:
                return made
        raise PrivtrainError(f"the budget of {request.dataset} changed {_MAX_RACES} times while it was being reserved")

    def renew(
        self,
        reservation_id: str,
        lease_seconds: float,
        claim: str | None = None,
        shown: LedgerEvidence | None = None,
    ) -> None:
        """Renew a run's lease; an expired reservation opens again, and its charge never stopped counting.

        Args:
            reservation_id: the reservation.
            lease_seconds: how long it stays open without news.
            claim: the number with which the run directory holds it.
            shown: what the run's ledger shows so far; from then on no other ledger ends the reservation.

        Raises:
            GuaranteeLost: if it was closed, or another copy of the run directory holds it, or the ledger is another or
                an older one than before: the run must stop.
        """
        live = (ReservationRow.id == reservation_id, ReservationRow.state != "closed", _holds_claim(claim))

        def work(connection: sa.Connection) -> bool:
            row = connection.execute(sa.select(ReservationRow).where(*live).with_for_update()).one_or_none()
            if row is None:
                return False
            if shown is not None:
                evidence.note(connection, row, shown)
            # A sign of life is never refused; a clock that is not believed makes the lease no longer than a right one.
            now = clock.estimate(connection)
            values = {"state": "open", "lease_until": now + lease_seconds, "seen_at": max(now, row.seen_at)}
            connection.execute(sa.update(ReservationRow).where(ReservationRow.id == row.id).values(**values))
            return True

        if not self.database.write(work):
            raise GuaranteeLost(
                f"reservation {reservation_id[:12]} was closed, or taken over by another copy of this run directory, "
                "while the run was training; nothing is released. Started again, the run asks for its budget again"
            )

    def opted_out(self, reservation: Reservation) -> frozenset[str]:
        """Return the pseudonyms opted out when the run began; a resumed run drops the same ones."""
        chosen = sa.select(OptOut.user_pseudonym).where(OptOut.number <= reservation.num_opt_outs)
        return frozenset(self.database.read(lambda c: c.execute(chosen).scalars().all()))

    def do_not_train(self) -> frozenset[str]:
        """Return the pseudonyms on the do-not-train list now."""
        return frozenset(self.database.read(lambda c: c.execute(sa.select(OptOut.user_pseudonym)).scalars().all()))

    def settle(
        self,
        uid: str,
        shown: LedgerEvidence,
        *,
        contributions: Mapping[str, tuple[int, int]],
        claims: Collection[str] = (),
        request: RunRequest | None = None,
    ) -> Settled:
        """Charge a finished run what its ledger shows, and keep what each user contributed.

        ε is computed from the event that was reserved. A reservation that has expired and was not renewed stays charged
        in full, and so does one that was closed by hand, from now on. Does nothing if the release with this ledger is
        settled. One with another ledger, of a copy of the run directory, is charged in full beside the first. A run
        that the registry does not know, as after it was restored from a backup, is charged in full too, whatever is
        left of the budget: it is released.

        Args:
            uid: the run.
            shown: what the run's verified ledger shows.
            contributions: pseudonym (of this registry) → steps, records; out of the ledger's verified bodies.
            claims: with one of which the run directory claimed the reservation.
            request: what the run would have asked for, should the registry not know it; without, it is charged nowhere.

        Raises:
            GuaranteeLost: if the ledger shows more steps than were reserved, or is not the run's, or an older one.
            ClockRefused: if the database has no server, and this machine's clock cannot be right.
        """

        def work(connection: sa.Connection) -> Settled:
            now = clock.now(connection)
            endings.expire(connection, now)
            rows = endings.reservations_of(connection, uid)
            if not rows:
                row = None if request is None else self._record(connection, request, now)
                if row is None:
                    return Settled.UNKNOWN
                endings.outdate(connection, row.dataset_id)
                endings.close(connection, row, "settle", endings.charge_in_full(row, shown.num_steps), shown.head, now)
                endings.add_contributions(connection, row.run_id, contributions)
                return Settled.LATE
            if shown.head in endings.settled_heads(connection, rows):
                return Settled.ALREADY
            row = rows[-1]
            is_ours = row.claim is None or row.claim in claims
            outcome = Settled.OWN
            if row.state != "closed" and is_ours:
                evidence.check(connection, row, shown)
                charged = endings.charge_of(row, shown.num_steps)
                charged = row.num_reserved if row.state == "expired" else charged
                endings.close(connection, row, "settle", charged, shown.head, now)
            else:
                endings.outdate(connection, row.dataset_id)
                charged_separately = not is_ours or endings.closed_by(connection, row) != "close"
                own = endings.beside(connection, row, now) if charged_separately else row
                connection.execute(sa.delete(Settlement).where(Settlement.reservation_id == own.id))
                endings.close(connection, own, "settle", endings.charge_in_full(row, shown.num_steps), shown.head, now)
                outcome = Settled.BESIDE if charged_separately else Settled.OWN
            endings.add_contributions(connection, row.run_id, contributions)
            return outcome

        self._warm_up(uid, shown.num_steps)
        return self.database.write(work)

    def _record(self, connection: sa.Connection, request: RunRequest, now: float) -> Any:
        """Write a reservation for a run that is released; ``None`` if its data set is not known by that unit.

        Records that are known by another name are charged under that one.
        """
        manifest = self._manifest(request)
        of_records = sa.select(Dataset).join(DatasetVersion, DatasetVersion.dataset_id == Dataset.id)
        dataset = connection.execute(of_records.where(DatasetVersion.manifest == manifest)).one_or_none()
        if dataset is None:
            dataset = connection.execute(sa.select(Dataset).where(Dataset.name == request.dataset)).one_or_none()
        if dataset is None or dataset.unit != request.unit or request.relation != "add_or_remove_one":
            return None
        part = spending.part_of(request.event)
        made = _write_reservation(connection, dataset.id, request, part, manifest, now)
        return connection.execute(sa.select(ReservationRow).where(ReservationRow.id == made.id)).one()

    def _manifest(self, request: RunRequest) -> str:
        return self.database.key().derive("dataset-manifest", request.manifest_sha256).hex()

    def is_settled(self, uid: str, ledger_head: str) -> bool:
        """Return whether the release with this ledger is settled."""
        chosen = sa.select(Settlement.id).join(ReservationRow).join(Run)
        chosen = chosen.where(Run.uid == uid, Settlement.ledger_head == ledger_head, Settlement.kind == "settle")
        return self.database.read(lambda c: c.execute(chosen).first()) is not None

    def refund(self, uid: str, shown: LedgerEvidence, *, claims: Collection[str] = ()) -> int:
        """End a run that was given up, and charge only the steps that its ledger shows as begun.

        The caller holds the run's lock and has verified its ledger: steps that no ledger shows were never computed, so
        nothing of them was released.

        Returns:
            Repetitions given back.

        Raises:
            PrivtrainError: if the run holds no reservation, or another copy of its directory does.
            GuaranteeLost: if the ledger is not the run's, or an older one.
        """

        def work(connection: sa.Connection) -> int:
            now = clock.now(connection)
            row = _live(connection, uid, now)
            if row is None:
                raise PrivtrainError("the run holds no open reservation; there is nothing to refund")
            _check_claim(row, claims)
            evidence.check(connection, row, shown)
            charged = endings.charge_of(row, shown.num_steps)
            return row.num_reserved - endings.close(connection, row, "refund", charged, shown.head, now)

        self._warm_up(uid, shown.num_steps)
        return self.database.write(work)

    def _warm_up(self, uid: str, num_steps: int) -> None:
        """Compute and cache the charge's ε before the transaction, which holds locks."""
        chosen = sa.select(ReservationRow).join(Run).where(Run.uid == uid, ReservationRow.state != "closed")

        def work(connection: sa.Connection) -> None:
            row = connection.execute(chosen).one_or_none()
            if row is not None and 0 <= num_steps <= row.num_reserved:
                evidence.epsilon_of(connection, row, endings.charge_of(row, num_steps))

        self.database.read(work)

    def close(self, reservation_id: str) -> None:
        """End an expired reservation as charged in full, so that a budget's period begins to run for it.

        Raises:
            PrivtrainError: if there is no such reservation, or its run may still be alive.
        """

        def work(connection: sa.Connection) -> None:
            now = clock.now(connection)
            endings.expire(connection, now)
            row = connection.execute(sa.select(ReservationRow).where(ReservationRow.id == reservation_id)).one_or_none()
            if row is None:
                raise PrivtrainError(f"no reservation {reservation_id}; see: privtrain registry runs")
            if row.state == "open":
                raise PrivtrainError(f"reservation {reservation_id} is open: its run may be alive until its lease ends")
            if row.state == "expired":
                endings.close(connection, row, "close", row.num_reserved, "", now)

        self.database.write(work)

    def forget(self, user_pseudonym: str) -> None:
        """Put a user on the do-not-train list. Nothing happens to runs that have begun."""

        def work(connection: sa.Connection) -> None:
            # First the counter: it is the lock that numbers the list without gaps.
            connection.execute(sa.update(Meta).values(num_opt_outs=Meta.num_opt_outs + 1))
            number = connection.execute(sa.select(Meta.num_opt_outs)).scalar_one()
            known = connection.execute(sa.select(OptOut.number).where(OptOut.user_pseudonym == user_pseudonym)).first()
            if known is not None:
                connection.execute(sa.update(Meta).values(num_opt_outs=Meta.num_opt_outs - 1))
                return
            now = clock.estimate(connection)
            connection.execute(sa.insert(OptOut).values(number=number, user_pseudonym=user_pseudonym, created_at=now))

        self.database.write(work)


def _is_period(seconds: float | None) -> bool:
    return seconds is None or clock.LEAST_SILENCE_SECONDS <= seconds < float("inf")


def charges(
    connection: sa.Connection, *, population_id: int, dataset_id: int | None, since: float | None
) -> list[Part]:
    """Return the mechanisms charged to a budget: of live reservations and of those closed after ``since``."""
    chosen = (
        sa.select(ReservationRow.mechanism_id, sa.func.sum(ReservationRow.num_charged).label("count"))
        .where(ReservationRow.num_charged > 0)
        .group_by(ReservationRow.mechanism_id)
    )
    if dataset_id is not None:
        chosen = chosen.where(ReservationRow.dataset_id == dataset_id)
    else:
        members = sa.select(Dataset.id).where(Dataset.population_id == population_id)
        chosen = chosen.where(ReservationRow.dataset_id.in_(members))
    if since is not None:
        chosen = chosen.where(sa.or_(ReservationRow.state != "closed", ReservationRow.closed_at > since))
    # Added up first: joining every reservation with its mechanism's kilobyte takes several times as long.
    totals = chosen.subquery()
    mechanisms = sa.select(Mechanism.event, Mechanism.divergences, totals.c.count).join(
        totals, totals.c.mechanism_id == Mechanism.id
    )
    return [
        Part(text, int(count), None if divergences is None else np.frombuffer(divergences))
        for text, divergences, count in connection.execute(mechanisms).all()
    ]


def active_budgets(connection: sa.Connection, dataset_id: int | None = None) -> Sequence[Any]:
    """Return the budgets in force, with their names; those that a data set draws on if one is given."""
    chosen = (
        sa.select(Budget, Population.name.label("population"), Dataset.name.label("dataset"))
        .join(Population, Population.id == Budget.population_id)
        .outerjoin(Dataset, Dataset.id == Budget.dataset_id)
        .where(Budget.superseded_at.is_(None))
        .order_by(Population.name, Budget.scope, Dataset.name)
    )
    if dataset_id is not None:
        population = sa.select(Dataset.population_id).where(Dataset.id == dataset_id).scalar_subquery()
        own = sa.or_(Budget.dataset_id == dataset_id, Budget.dataset_id.is_(None))
        chosen = chosen.where(Budget.population_id == population, own)
    return connection.execute(chosen).all()


def _snapshot(connection: sa.Connection, request: RunRequest, manifest: str) -> _Snapshot:
    found = connection.execute(sa.select(Dataset).where(Dataset.name == request.dataset)).one_or_none()
    command = f"privtrain registry budget set {request.dataset} --epsilon E --delta D --per user"
    if found is None:
        raise PrivtrainError(f"registry.dataset: the registry knows no data set {request.dataset!r}; run: {command}")
    # The version first: whatever is charged after this line makes the reservation fail.
    version = connection.execute(sa.select(Population.version).where(Population.id == found.population_id)).scalar_one()
    if request.unit != found.unit:
        raise PrivtrainError(
            f"privacy.unit: given {request.unit}; the budgets of {request.dataset!r} are per {found.unit}, and a "
            f"guarantee for one {request.unit} is none for one {found.unit}"
        )
    _check_unit(connection, request.dataset, found.population_id, found.unit)
    _check_name(connection, found.id, request.dataset, manifest)
    now = clock.now(connection)
    budgets = []
    for row in active_budgets(connection, found.id):
        since = None if row.period_seconds is None else now - row.period_seconds
        spent = charges(connection, population_id=row.population_id, dataset_id=row.dataset_id, since=since)
        name = row.population if row.scope == "user" else row.dataset
        key = BudgetKey(row.scope, name, row.epsilon, row.delta, row.period_seconds)
        budgets.append((key, Limit(row.epsilon, row.delta, spent)))
    if not budgets:
        raise PrivtrainError(f"the data set {request.dataset!r} has no budget; run: {command}")
    return _Snapshot(found.id, found.population_id, version, tuple(budgets))


def _check_unit(connection: sa.Connection, dataset: str, population_id: int, unit: str) -> None:
    """Raise unless the population's data sets share one unit; user-level and example-level ε do not compose."""
    chosen = sa.select(Dataset.name, Dataset.unit).where(Dataset.population_id == population_id, Dataset.unit != unit)
    other = connection.execute(chosen.order_by(Dataset.id)).first()
    if other is not None:
        raise PrivtrainError(
            f"the data set {dataset!r} has unit {unit}, but {other.name!r} of the same population has unit "
            f"{other.unit}, and their losses do not add up; give it the same --unit, or a --population of its own"
        )
    per_user = (Budget.population_id == population_id, Budget.scope == "user", Budget.superseded_at.is_(None))
    if unit != "user" and connection.execute(sa.select(Budget.id).where(*per_user)).first() is not None:
        raise PrivtrainError(
            f"the data set {dataset!r} has unit {unit}, but its population has a budget for every user, of which the "
            "loss of such a run is not known; give it a --population of its own"
        )


def _check_name(connection: sa.Connection, dataset_id: int, name: str, manifest: str) -> None:
    other = connection.execute(
        sa.select(Dataset.name)
        .join(DatasetVersion, DatasetVersion.dataset_id == Dataset.id)
        .where(DatasetVersion.manifest == manifest, Dataset.id != dataset_id)
    ).scalar_one_or_none()
    if other is not None:
        raise PrivtrainError(
            f"registry.dataset: given {name!r}, but exactly these records are the data set {other!r}; "
            "one data set has one name and one budget"
        )


def _insert(
    connection: sa.Connection, snapshot: _Snapshot, request: RunRequest, part: Part, manifest: str
) -> Reservation | None:
    """Write the reservation if nothing was charged since the snapshot; ``None`` if something was."""
    unchanged = (Population.id == snapshot.population_id, Population.version == snapshot.version)
    raised = connection.execute(sa.update(Population).where(*unchanged).values(version=Population.version + 1))
    if raised.rowcount != 1:
        return None
    now = clock.now(connection)
    endings.expire(connection, now)
    if _holds(connection, request.uid):
        return None  # another process of this run came between the first look and the snapshot
    return _write_reservation(connection, snapshot.dataset_id, request, part, manifest, now)


def _write_reservation(
    connection: sa.Connection, dataset_id: int, request: RunRequest, part: Part, manifest: str, now: float
) -> Reservation:
    _insert_missing(connection, DatasetVersion, manifest=manifest, dataset_id=dataset_id, created_at=now)
    # Again: another data set may have taken these records since the snapshot, and its population's version is another.
    _check_name(connection, dataset_id, request.dataset, manifest)
    stored = None if part.divergences is None else np.asarray(part.divergences, dtype="<f8").tobytes()
    digest = spending.event_digest(part.text)
    _insert_missing(connection, Mechanism, digest=digest, event=part.text, divergences=stored)
    version_id = connection.execute(
        sa.select(DatasetVersion.id).where(DatasetVersion.manifest == manifest)
    ).scalar_one()
    mechanism_id = connection.execute(sa.select(Mechanism.id).where(Mechanism.digest == digest)).scalar_one()
    _insert_missing(
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
    # Shared with other runs, not with an opt-out: one that comes first is on this run's list, one that comes later sees
    # this run among the unfinished.
    num_opt_outs = connection.execute(sa.select(Meta.num_opt_outs).with_for_update(read=True)).scalar_one()
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


def _holds(connection: sa.Connection, uid: str) -> bool:
    live = sa.select(ReservationRow.id).join(Run).where(Run.uid == uid, ReservationRow.state != "closed")
    return connection.execute(live).first() is not None


def _take_over(connection: sa.Connection, request: RunRequest, part: Part, manifest: str) -> Reservation | None:
    """Return the run's own reservation, open again if it had expired."""
    now = clock.now(connection)
    row = _live(connection, request.uid, now)
    if row is None:
        return None
    _check_claim(row, [request.claim, *request.earlier_claims])
    _check_same_run(connection, row.run_id, request, manifest)
    _check_same_charge(connection, row, request, part)
    values = {"state": "open", "lease_until": now + request.lease_seconds, "claim": request.claim}
    values["seen_at"] = max(now, row.seen_at)
    connection.execute(sa.update(ReservationRow).where(ReservationRow.id == row.id).values(**values))
    return Reservation(row.id, "open", row.num_opt_outs, is_new=False)


def _check_same_run(connection: sa.Connection, run_id: int, request: RunRequest, manifest: str) -> None:
    chosen = sa.select(Run.fingerprint, DatasetVersion.manifest).join(
        DatasetVersion, DatasetVersion.id == Run.dataset_version_id
    )
    if connection.execute(chosen.where(Run.id == run_id)).one() != (request.fingerprint, manifest):
        raise PlanMismatch(
            f"the registry knows the run {request.uid!r} with another plan or data set: secret/identity.json was "
            "altered or is another run's. Restore it, or set another run.name"
        )


def _check_same_charge(connection: sa.Connection, row: Any, request: RunRequest, part: Part) -> None:
    chosen = (
        sa.select(Mechanism.digest, Dataset.name)
        .select_from(ReservationRow)
        .join(Mechanism, Mechanism.id == ReservationRow.mechanism_id)
        .join(Dataset, Dataset.id == ReservationRow.dataset_id)
        .where(ReservationRow.id == row.id)
    )
    held = (*connection.execute(chosen).one(), row.num_reserved, row.delta)
    if held != (spending.event_digest(part.text), request.dataset, part.count, request.delta):
        raise PlanMismatch(
            f"the run holds reservation {row.id[:12]} for another mechanism, number of steps, δ or data set; restore "
            "the configuration it began with, or set another run.name"
        )


def _holds_claim(claim: str | None) -> sa.ColumnElement[bool]:
    return sa.or_(ReservationRow.claim.is_(None), ReservationRow.claim == claim)


def _check_claim(row: Any, known: Collection[str | None]) -> None:
    if row.claim is not None and row.claim not in known:
        raise PrivtrainError(
            f"reservation {row.id[:12]} is held by another copy of this run directory, or this one was restored from a "
            "backup: two copies would train twice and be charged once. Go on in the copy that trained last. If that "
            f"one is lost, wait until the reservation has expired, then: privtrain registry close {row.id}"
        )


def _live(connection: sa.Connection, uid: str, now: float) -> Any:
    """Return the run's reservation that is not closed, locked against others until the transaction ends."""
    endings.expire(connection, now)
    return connection.execute(
        sa.select(ReservationRow)
        .join(Run, Run.id == ReservationRow.run_id)
        .where(Run.uid == uid, ReservationRow.state != "closed")
        .with_for_update(of=ReservationRow)
    ).one_or_none()


def _ensure_dataset(connection: sa.Connection, name: str, population: str | None, unit: str) -> tuple[int, int, str]:
    """Return the data set's id with its population's id and name, made if it is new."""
    chosen = (
        sa.select(Dataset.id, Dataset.unit, Population.id.label("population_id"), Population.name)
        .join(Population, Population.id == Dataset.population_id)
        .where(Dataset.name == name)
    )
    found = connection.execute(chosen).one_or_none()
    if found is None:
        wanted = population or name
        _insert_missing(connection, Population, name=wanted, version=0)
        population_id = connection.execute(sa.select(Population.id).where(Population.name == wanted)).scalar_one()
        now = clock.estimate(connection)
        values = {"name": name, "population_id": population_id, "unit": unit, "created_at": now}
        _insert_missing(connection, Dataset, **values)
        found = connection.execute(chosen).one()
    if found.unit != unit or population not in (None, found.name):
        raise PrivtrainError(
            f"the data set {name!r} has unit {found.unit} and population {found.name!r}, which stay as they are"
        )
    return found.id, found.population_id, found.name


def _insert_missing(connection: sa.Connection, table: type[Base], **values: Any) -> None:
    """Insert unless a row with the same unique value is there, also if it comes from a transaction beside this one."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(insert(table).values(**values).on_conflict_do_nothing())
