"""What the registry says, for people and machines: budgets, runs, one user. Reads only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import aliased

from privtrain.registry import clock, spending
from privtrain.registry.database import Database
from privtrain.registry.snapshot import active_budgets, charges
from privtrain.registry.spending import Part
from privtrain.registry.tables import (
    Contribution,
    Dataset,
    DatasetVersion,
    Mechanism,
    OptOut,
    Population,
    ReservationRow,
    Run,
    Settlement,
)

#: A budget's history has at most so many points; ε is exact with at most so many different mechanisms, else Rényi's.
_MAX_POINTS = 16
_MAX_EXACT_HISTORY = 8


@dataclasses.dataclass(frozen=True)
class BudgetView:
    """A budget and what counts against it now.

    Attributes:
        scope, name: ``user`` and a population, or ``dataset`` and a data set.
        epsilon, delta, period_seconds: the budget.
        spent: certified ε of all charges together at ``delta``; ``method`` certified it.
        sum_of_epsilons, sum_of_deltas: what adding up the runs' own guarantees would have said.
        num_runs: reservations that count; ``num_live`` of them have not ended.
        as_of: the time of all this, in seconds since 1970.
        history: (time, ε spent) after some of the runs, oldest first; only of runs that count now, so ε rises.
    """

    scope: str
    name: str
    epsilon: float
    delta: float
    period_seconds: float | None
    spent: float
    method: str
    sum_of_epsilons: float
    sum_of_deltas: float
    num_runs: int
    num_live: int
    as_of: float
    history: tuple[tuple[float, float], ...]

    @property
    def left(self) -> float:
        """ε not spent; what a run may use of it depends on its mechanism."""
        return max(0.0, self.epsilon - self.spent)


@dataclasses.dataclass(frozen=True)
class RunView:
    """A reservation with its run.

    Attributes:
        reservation: its id.
        uid, name: of the run.
        dataset, population: what the run is trained on.
        unit: whom the guarantee protects, ``user`` or ``example``.
        state: ``open``, ``expired`` or ``closed``.
        mechanism: what is charged, of :func:`.spending.settings_of`.
        num_reserved, num_charged: repetitions of the mechanism, usually steps.
        epsilon, delta: of the run.
        created_at, lease_until, closed_at: seconds since 1970.
    """

    reservation: str
    uid: str
    name: str
    dataset: str
    population: str
    unit: str
    state: str
    mechanism: dict[str, Any]
    num_reserved: int
    num_charged: int
    epsilon: float
    delta: float
    created_at: float
    lease_until: float
    closed_at: float | None


@dataclasses.dataclass(frozen=True)
class HeldRun:
    """A run whose model holds a user's contribution."""

    run: RunView
    num_steps: int  # a step counts once for each of the user's units in it
    num_records: int  # counted once a step


@dataclasses.dataclass(frozen=True)
class UserView:
    """One user, by pseudonym.

    Attributes:
        pseudonym: the registry's.
        opted_out_at: when the user was put on the do-not-train list, if so.
        held: settled runs with the user's contribution, each with its whole ε; none of a user who was never drawn.
        unfinished: runs that have not ended and began before the user opted out (all of them if it did not): who
            contributes to them is not known before they settle.
    """

    pseudonym: str
    opted_out_at: float | None
    held: tuple[HeldRun, ...]
    unfinished: tuple[RunView, ...]


def budgets(database: Database, *, history: bool = False) -> list[BudgetView]:
    """Return every budget in force with what is spent of it; ``history``: also how that grew over time."""
    now = database.read(clock.estimate)
    views = []
    for row in database.read(active_budgets):
        since = None if row.period_seconds is None else now - row.period_seconds  # the budget's window begins here
        # Defaults bind this turn's values: a query may be called again, when a connection broke.
        counted = database.read(lambda c, r=row, s=since: _counted(c, r, s))
        parts = database.read(
            lambda c, r=row, s=since: charges(c, population_id=r.population_id, dataset_id=r.dataset_id, since=s)
        )
        spent = spending.composed_epsilon(parts, row.delta)
        views.append(
            BudgetView(
                scope=row.scope,
                name=row.population if row.scope == "user" else row.dataset,
                epsilon=row.epsilon,
                delta=row.delta,
                period_seconds=row.period_seconds,
                spent=spent.epsilon,
                method=spent.method,
                sum_of_epsilons=sum(item.epsilon for item in counted),
                sum_of_deltas=sum(item.delta for item in counted),
                num_runs=len(counted),
                num_live=sum(item.state != "closed" for item in counted),
                as_of=now,
                history=_history(counted, parts, row.delta, spent.epsilon) if history else (),
            )
        )
    return views


def runs(database: Database, limit: int | None = None) -> list[RunView]:
    """Return the reservations, newest first."""
    chosen = _run_columns().order_by(ReservationRow.created_at.desc())
    now = database.read(clock.estimate)
    return [_run_view(row, now) for row in database.read(lambda c: c.execute(chosen.limit(limit)).all())]


def user(database: Database, pseudonym: str) -> UserView:
    """Return what is known of the user with this pseudonym of the registry."""
    out = sa.select(OptOut).where(OptOut.user_pseudonym == pseudonym)
    listed = database.read(lambda c: c.execute(out).one_or_none())
    held_runs = (
        _run_columns()
        .add_columns(Contribution.num_steps, Contribution.num_records)
        .join(Contribution, Contribution.run_id == Run.id)
        # Not the run's other reservations, as one before a refund: the settlement's ε is that of its whole ledger.
        .join(Settlement, sa.and_(Settlement.reservation_id == ReservationRow.id, Settlement.kind == "settle"))
        .where(Contribution.user_pseudonym == pseudonym)
        .order_by(ReservationRow.created_at)
    )
    now = database.read(clock.estimate)
    unfinished = _run_columns().where(ReservationRow.state != "closed").order_by(ReservationRow.created_at)
    if listed is not None:
        unfinished = unfinished.where(ReservationRow.num_opt_outs < listed.number)
    held_rows = database.read(lambda c: c.execute(held_runs).all())
    unfinished_rows = database.read(lambda c: c.execute(unfinished).all())
    return UserView(
        pseudonym=pseudonym,
        opted_out_at=None if listed is None else listed.created_at,
        held=tuple(HeldRun(_run_view(row, now), row.num_steps, row.num_records) for row in held_rows),
        unfinished=tuple(_run_view(row, now) for row in unfinished_rows),
    )


def populations_shared_with(database: Database, uid: str) -> list[str]:
    """Return the names of the other populations that a user of a settled run has contributed to.

    A user is then protected by two budgets of which neither counts what the other allows.

    Args:
        database: the registry's.
        uid: of the settled run.
    """
    population_of = (
        sa.select(Run.id, Run.uid, Dataset.population_id)
        .join(DatasetVersion, DatasetVersion.id == Run.dataset_version_id)
        .join(Dataset, Dataset.id == DatasetVersion.dataset_id)
    )
    own, other = population_of.subquery(), population_of.subquery()
    ours, theirs = aliased(Contribution), aliased(Contribution)
    chosen = (
        sa.select(Population.name)
        .distinct()
        .select_from(own)
        .join(ours, ours.run_id == own.c.id)
        .join(theirs, theirs.user_pseudonym == ours.user_pseudonym)
        .join(other, sa.and_(other.c.id == theirs.run_id, other.c.population_id != own.c.population_id))
        .join(Population, Population.id == other.c.population_id)
        .where(own.c.uid == uid)
        .order_by(Population.name)
    )
    return list(database.read(lambda c: c.execute(chosen).scalars().all()))


def _run_columns() -> sa.Select[*tuple[Any, ...]]:
    """Select reservations, with what :func:`_run_view` needs of run, data set, population and mechanism."""
    return (
        sa.select(
            ReservationRow,
            Run.uid,
            Run.name,
            Dataset.name.label("dataset"),
            Dataset.unit,
            Population.name.label("population"),
            Mechanism.event,
        )
        .join(Run, Run.id == ReservationRow.run_id)
        .join(Dataset, Dataset.id == ReservationRow.dataset_id)
        .join(Population, Population.id == Dataset.population_id)
        .join(Mechanism, Mechanism.id == ReservationRow.mechanism_id)
    )


def _run_view(row: Any, now: float) -> RunView:
    """Return a reservation's view; an open one whose lease is over shows as expired."""
    late = row.state == "open" and row.lease_until < now
    return RunView(
        reservation=row.id,
        uid=row.uid,
        name=row.name,
        dataset=row.dataset,
        population=row.population,
        unit=row.unit,
        state="expired" if late else row.state,
        mechanism=spending.settings_of(row.event, row.num_charged),
        num_reserved=row.num_reserved,
        num_charged=row.num_charged,
        epsilon=row.epsilon,
        delta=row.delta,
        created_at=row.created_at,
        lease_until=row.lease_until,
        closed_at=row.closed_at,
    )


def _counted(connection: sa.Connection, budget: Any, since: float | None) -> Sequence[Any]:
    """Return the reservations that count against a budget, with event and divergences, oldest first.

    ``since``: beginning of the budget's window: reservations closed before it have left the budget; ``None`` for none.
    """
    chosen = (
        sa.select(ReservationRow, Mechanism.event, Mechanism.divergences)
        .join(Mechanism, Mechanism.id == ReservationRow.mechanism_id)
        .join(Dataset, Dataset.id == ReservationRow.dataset_id)
        .where(ReservationRow.num_charged > 0, Dataset.population_id == budget.population_id)
        .order_by(ReservationRow.created_at)
    )
    if budget.dataset_id is not None:
        chosen = chosen.where(Dataset.id == budget.dataset_id)
    if since is not None:
        chosen = chosen.where(sa.or_(ReservationRow.state != "closed", ReservationRow.closed_at > since))
    return connection.execute(chosen).all()


def _history(
    counted: Sequence[Any], parts: Sequence[Part], delta: float, final: float
) -> tuple[tuple[float, float], ...]:
    """Return (time, ε spent) after each of at most ``_MAX_POINTS`` runs, evenly chosen; the last is the present ε.

    Args:
        counted: the reservations that count against the budget, oldest first.
        parts: the mechanisms charged to it.
        delta: the budget's.
        final: ε spent now.
    """
    if not counted:
        return ()
    num_points = min(len(counted), _MAX_POINTS)
    chosen = set(np.linspace(1, len(counted), num_points).astype(int).tolist()) - {len(counted)}  # numbers of runs
    is_exact = len(parts) <= _MAX_EXACT_HISTORY
    points = []
    so_far: dict[str, Part] = {}  # event → mechanism with its repetitions in the runs so far
    for number, row in enumerate(counted, start=1):
        known = so_far.get(row.event)
        count = row.num_charged if known is None else known.count + row.num_charged
        divergences = None if row.divergences is None else np.frombuffer(row.divergences)
        so_far[row.event] = Part(row.event, count, divergences)
        if number not in chosen:
            continue
        composed = list(so_far.values())
        if is_exact:
            value = spending.composed_epsilon(composed, delta).epsilon
        else:
            value = spending.renyi_epsilon(composed, delta)
        points.append((row.created_at, min(value, final)))  # a Rényi bound may lie above the exact ε of now
    return (*points, (counted[-1].created_at, final))
