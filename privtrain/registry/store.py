"""Reserve before a run, settle after it: what changes the registry. Every call is one transaction and may be repeated.

A *reservation* sets a run's ε aside before it starts; it is ``open`` while the run renews its lease, ``expired`` if no
news came (and charged in full), ``closed`` when it was settled or refunded. A *claim* is a random token by which one
copy of a run directory holds a reservation. A *population* is a group of people over one or more data sets. *Evidence*
is what a run's verified ledger shows (:mod:`.evidence`).

Whether a run fits is decided on a snapshot, outside any transaction. The reservation is written only if nothing that
could spend budget happened to the population since: its version number is compared and raised by the same statement.
Two jobs that race for the last of a budget therefore cannot both get it, and no lock is held while the accountants
work.
"""

from __future__ import annotations

import enum
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa

from privtrain.errors import BudgetExceeded, GuaranteeLost, PrivtrainError
from privtrain.privacy.secret import pseudonym
from privtrain.registry import clock, endings, evidence, spending
from privtrain.registry.database import Database
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.refusal import explain
from privtrain.registry.requests import SCOPES, BudgetKey, Reservation, RunRequest
from privtrain.registry.reservations import (
    check_claim,
    holds,
    holds_claim,
    insert,
    insert_missing,
    live,
    take_over,
    write_reservation,
)
from privtrain.registry.snapshot import check_unit, snapshot_of
from privtrain.registry.tables import (
    Budget,
    Dataset,
    DatasetVersion,
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

    ``OWN``: the release was charged on the run's reservation.
    ``BESIDE``: another copy of the run holds or settled that; the release was charged in full beside it.
    ``ALREADY``: the release was settled before.
    ``LATE``: the registry did not know the run, and charged it in full now.
    ``UNKNOWN``: the registry knows neither the run nor its data set; the release is charged nowhere.
    """

    OWN = "own"
    BESIDE = "beside"
    ALREADY = "already"
    LATE = "late"
    UNKNOWN = "unknown"


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
            own_id = None if scope == "user" else dataset_id  # a budget per user is for no single data set
            same = (
                Budget.population_id == population_id,
                Budget.scope == scope,
                Budget.dataset_id.is_not_distinct_from(own_id),
            )
            now = clock.estimate(connection)
            connection.execute(sa.update(Budget).where(*same, Budget.superseded_at.is_(None)).values(superseded_at=now))
            values = {"epsilon": epsilon, "delta": delta, "period_seconds": period_seconds}
            connection.execute(
                sa.insert(Budget).values(
                    scope=scope, population_id=population_id, dataset_id=own_id, created_at=now, **values
                )
            )
            raised = sa.update(Population).where(Population.id == population_id)
            connection.execute(raised.values(version=Population.version + 1))
            # Checked after the update, which locks the population: a concurrent change waits, and sees this one.
            check_unit(connection, dataset, population_id, unit)
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
        for _ in range(_MAX_RACES):  # again whenever another run was charged in between
            if self.database.read(lambda c: holds(c, request.uid)):
                held = self.database.write(lambda c: take_over(c, request, part, manifest))
                if held is not None:
                    return held
            snapshot = self.database.read(lambda c: snapshot_of(c, request, manifest))
            refused = []
            for key, limit in snapshot.budgets:
                if not spending.fits([*limit.spent, part], limit.epsilon, limit.delta):
                    refused.append((key, limit))
            if refused:
                limits = [limit for _, limit in snapshot.budgets]
                raise BudgetExceeded(explain(request, part, refused, limits))
            reserved = self.database.write(lambda c, s=snapshot: insert(c, s, request, part, manifest))
            if reserved is not None:
                return reserved
        raise PrivtrainError(f"the budget of {request.dataset} changed {_MAX_RACES} times while it was being reserved")

    def renew(
        self,
        reservation_id: str,
        lease_seconds: float,
        claim: str | None = None,
        shown: LedgerEvidence | None = None,
    ) -> None:
        """Renew a run's lease, and note its ledger. An expired reservation opens again; it was charged all the time.

        Args:
            reservation_id: the reservation.
            lease_seconds: how long it stays open without news.
            claim: the token with which the run directory holds it.
            shown: what the run's ledger shows so far; from then on no other ledger ends the reservation.

        Raises:
            GuaranteeLost: if it was closed, or another copy of the run directory holds it, or the ledger is another or
                an older one than before: the run must stop.
        """
        live = (ReservationRow.id == reservation_id, ReservationRow.state != "closed", holds_claim(claim))

        def work(connection: sa.Connection) -> bool:
            row = connection.execute(sa.select(ReservationRow).where(*live).with_for_update()).one_or_none()
            if row is None:
                return False
            if shown is not None:
                evidence.note(connection, row, shown)
            # Not clock.now, which may refuse: a sign of life is taken under any clock. The estimate is never too late.
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
        """Return the pseudonyms of users who had opted out when the run began; a resumed run drops the same users."""
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
        """Charge a released run for the steps that its ledger shows, and keep what each user contributed.

        ε is computed from the event that was reserved. In full are charged, since they are released, whatever is left
        of the budget:

        * a run whose reservation has expired or was closed by hand;
        * a release of another copy of the run directory, beside the first copy's charge;
        * a run that the registry does not know, as after it was restored from a backup.

        Nothing happens if the release with this ledger is settled already.

        Args:
            uid: the run.
            shown: what the run's verified ledger shows.
            contributions: this registry's pseudonym of a user → (steps, records), from the verified ledger.
            claims: tokens of which the run directory's reservation must have one.
            request: what the run would have asked for, to charge a run that the registry does not know; without it,
                such a run is charged nowhere.

        Raises:
            GuaranteeLost: if the ledger shows more steps than were reserved, or is not the run's, or an older one.
            ClockRefused: if the database has no server, and this machine's clock cannot be right.
        """

        def work(connection: sa.Connection) -> Settled:
            now = clock.now(connection)
            endings.expire(connection, now)
            rows = endings.reservations_of(connection, uid)
            if not rows:  # the registry does not know the run
                row = None if request is None else self._record(connection, request, now)
                if row is None:
                    return Settled.UNKNOWN
                outcome = Settled.LATE
            else:
                if shown.head in endings.settled_heads(connection, rows):
                    return Settled.ALREADY
                row = rows[-1]  # the one that is not closed, if there is one
                is_ours = row.claim is None or row.claim in claims
                if row.state != "closed" and is_ours:
                    _settle_own(connection, row, shown, now)
                    endings.add_contributions(connection, row.run_id, contributions)
                    return Settled.OWN
                # Our own reservation that was closed by hand, charged in full, is settled after all. Any other one
                # belongs to another release, so this one is charged beside it.
                if is_ours and endings.closed_by(connection, row) == "close":
                    outcome = Settled.OWN
                    connection.execute(sa.delete(Settlement).where(Settlement.reservation_id == row.id))
                else:
                    outcome = Settled.BESIDE
                    row = endings.beside(connection, row, now)
            # No open reservation covers this release: it is charged in full, whatever is left of the budget.
            endings.outdate(connection, row.dataset_id)
            endings.close(connection, row, "settle", endings.charge_in_full(row, shown.num_steps), shown.head, now)
            endings.add_contributions(connection, row.run_id, contributions)
            return outcome

        self._warm_up(uid, shown.num_steps)
        return self.database.write(work)

    def _record(self, connection: sa.Connection, request: RunRequest, now: float) -> Any:
        """Write a reservation for a released run that the registry does not know, and return its row.

        The data set is the one that holds exactly these records, whatever its name, else the one that the request
        names. ``None`` if there is neither, or its privacy unit is not the run's.
        """
        manifest = self._manifest(request)
        with_version = sa.select(Dataset).join(DatasetVersion, DatasetVersion.dataset_id == Dataset.id)
        dataset = connection.execute(with_version.where(DatasetVersion.manifest == manifest)).one_or_none()
        if dataset is None:
            dataset = connection.execute(sa.select(Dataset).where(Dataset.name == request.dataset)).one_or_none()
        if dataset is None or dataset.unit != request.unit or request.relation != "add_or_remove_one":
            return None
        part = spending.part_of(request.event)
        made = write_reservation(connection, dataset.id, request, part, manifest, now)
        return connection.execute(sa.select(ReservationRow).where(ReservationRow.id == made.id)).one()

    def _manifest(self, request: RunRequest) -> str:
        return self.database.key().derive("dataset-manifest", request.manifest_sha256).hex()

    def is_settled(self, uid: str, ledger_head: str) -> bool:
        """Return whether the release of this run whose ledger ends with the hash ``ledger_head`` is settled."""
        chosen = sa.select(Settlement.id).join(ReservationRow).join(Run)
        chosen = chosen.where(Run.uid == uid, Settlement.ledger_head == ledger_head, Settlement.kind == "settle")
        return self.database.read(lambda c: c.execute(chosen).first()) is not None

    def refund(self, uid: str, shown: LedgerEvidence, *, claims: Collection[str] = ()) -> int:
        """End a run that was given up: charge the steps that its ledger shows, and give back the others.

        The caller holds the run's lock and has verified its ledger: steps that no ledger shows were never computed, so
        nothing of them was released.

        Args:
            uid: the run.
            shown: what the run's verified ledger shows.
            claims: tokens of which the run directory's reservation must have one.

        Returns:
            How many repetitions of the mechanism, usually steps, were given back.

        Raises:
            PrivtrainError: if the run holds no reservation, or another copy of its directory does.
            GuaranteeLost: if the ledger is not the run's, or an older one.
        """

        def work(connection: sa.Connection) -> int:
            now = clock.now(connection)
            row = live(connection, uid, now)
            if row is None:
                raise PrivtrainError("the run holds no open reservation; there is nothing to refund")
            check_claim(row, claims)
            evidence.check(connection, row, shown)
            charged = endings.charge_of(row, shown.num_steps)
            endings.close(connection, row, "refund", charged, shown.head, now)
            return row.num_reserved - charged

        self._warm_up(uid, shown.num_steps)
        return self.database.write(work)

    def _warm_up(self, uid: str, num_steps: int) -> None:
        """Compute and cache the ε of ``num_steps`` steps of a run, which takes long, before a transaction has locks."""
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
        """Put a user on the do-not-train list, unless the user is on it. Nothing happens to runs that have begun."""

        def work(connection: sa.Connection) -> None:
            # The counter first: to raise it locks it, so the list is numbered without gaps.
            connection.execute(sa.update(Meta).values(num_opt_outs=Meta.num_opt_outs + 1))
            number = connection.execute(sa.select(Meta.num_opt_outs)).scalar_one()
            known = connection.execute(sa.select(OptOut.number).where(OptOut.user_pseudonym == user_pseudonym)).first()
            if known is not None:  # take the number back
                connection.execute(sa.update(Meta).values(num_opt_outs=Meta.num_opt_outs - 1))
                return
            now = clock.estimate(connection)
            connection.execute(sa.insert(OptOut).values(number=number, user_pseudonym=user_pseudonym, created_at=now))

        self.database.write(work)


def _settle_own(connection: sa.Connection, row: Any, shown: LedgerEvidence, now: float) -> None:
    """Settle a run's own reservation, if the ledger is the run's: for the steps shown, or in full if it has expired."""
    evidence.check(connection, row, shown)
    charged = endings.charge_of(row, shown.num_steps)  # also checks that they are not more than what was reserved
    if row.state == "expired":
        charged = row.num_reserved
    endings.close(connection, row, "settle", charged, shown.head, now)


def _is_period(seconds: float | None) -> bool:
    return seconds is None or clock.LEAST_SILENCE_SECONDS <= seconds < float("inf")


def _ensure_dataset(connection: sa.Connection, name: str, population: str | None, unit: str) -> tuple[int, int, str]:
    """Return (id of the data set, id of its population, name of its population); a new data set is added.

    Raises:
        PrivtrainError: if the data set has another unit or population.
    """
    chosen = (
        sa.select(Dataset.id, Dataset.unit, Population.id.label("population_id"), Population.name)
        .join(Population, Population.id == Dataset.population_id)
        .where(Dataset.name == name)
    )
    row = connection.execute(chosen).one_or_none()
    if row is None:
        wanted = population or name
        insert_missing(connection, Population, name=wanted, version=0)
        population_id = connection.execute(sa.select(Population.id).where(Population.name == wanted)).scalar_one()
        now = clock.estimate(connection)
        values = {"name": name, "population_id": population_id, "unit": unit, "created_at": now}
        insert_missing(connection, Dataset, **values)
        row = connection.execute(chosen).one()
    if row.unit != unit or population not in (None, row.name):
        raise PrivtrainError(
            f"the data set {name!r} has unit {row.unit} and population {row.name!r}, which stay as they are"
        )
    return row.id, row.population_id, row.name
