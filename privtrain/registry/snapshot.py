"""What a run's budgets are and what is charged to them, read at one version of its population.

A *population* is a group of people, over one or more data sets. Its version number grows with every change that could
spend budget, so that a decision made on an older snapshot is noticed. A budget is for a data set (scope ``dataset``) or
for each user of a population over all its data sets (scope ``user``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from privtrain.errors import PrivtrainError
from privtrain.registry import clock
from privtrain.registry.requests import BudgetKey, RunRequest
from privtrain.registry.spending import Limit, Part
from privtrain.registry.tables import (
    Budget,
    Dataset,
    DatasetVersion,
    Mechanism,
    Population,
    ReservationRow,
)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The budgets that a run draws on, at one version of their population."""

    dataset_id: int
    population_id: int
    version: int  # of the population
    budgets: tuple[tuple[BudgetKey, Limit], ...]


def snapshot_of(connection: sa.Connection, request: RunRequest, manifest: str) -> Snapshot:
    """Read the budgets that a run draws on, and what is charged to each.

    Args:
        connection: a transaction.
        request: the run that asks.
        manifest: HMAC of the digest of its data set's content.

    Raises:
        PrivtrainError: if the data set is unknown, has no budget, has another unit than the run, or is known by
            another name.
    """
    dataset = connection.execute(sa.select(Dataset).where(Dataset.name == request.dataset)).one_or_none()
    command = f"privtrain registry budget set {request.dataset} --epsilon E --delta D --per user"
    if dataset is None:
        raise PrivtrainError(f"registry.dataset: the registry knows no data set {request.dataset!r}; run: {command}")
    # The version first: whatever is charged after this line makes the reservation fail.
    version = connection.execute(
        sa.select(Population.version).where(Population.id == dataset.population_id)
    ).scalar_one()
    if request.unit != dataset.unit:
        raise PrivtrainError(
            f"privacy.unit: given {request.unit}; the budgets of {request.dataset!r} are per {dataset.unit}, and a "
            f"guarantee for one {request.unit} is none for one {dataset.unit}"
        )
    check_unit(connection, request.dataset, dataset.population_id, dataset.unit)
    check_name(connection, dataset.id, request.dataset, manifest)
    now = clock.now(connection)
    budgets = []
    for row in active_budgets(connection, dataset.id):
        since = None if row.period_seconds is None else now - row.period_seconds  # the budget's window begins here
        spent = charges(connection, population_id=row.population_id, dataset_id=row.dataset_id, since=since)
        name = row.population if row.scope == "user" else row.dataset
        key = BudgetKey(
            scope=row.scope, name=name, epsilon=row.epsilon, delta=row.delta, period_seconds=row.period_seconds
        )
        budgets.append((key, Limit(epsilon=row.epsilon, delta=row.delta, spent=spent)))
    if not budgets:
        raise PrivtrainError(f"the data set {request.dataset!r} has no budget; run: {command}")
    return Snapshot(dataset_id=dataset.id, population_id=dataset.population_id, version=version, budgets=tuple(budgets))


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


def charges(
    connection: sa.Connection, *, population_id: int, dataset_id: int | None, since: float | None
) -> list[Part]:
    """Return the mechanisms charged to a budget, each with its repetitions over all runs.

    Args:
        connection: a transaction.
        population_id: the budget's population.
        dataset_id: the budget's data set; ``None`` if it is for users over all data sets of the population.
        since: beginning of the budget's window. Reservations closed before it have left the budget; ones that are not
            closed always count. ``None`` for no window.
    """
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
    # Added up before the join: to join every reservation with its mechanism, of a kilobyte, takes several times longer.
    totals = chosen.subquery()
    mechanisms = sa.select(Mechanism.event, Mechanism.divergences, totals.c.count).join(
        totals, totals.c.mechanism_id == Mechanism.id
    )
    return [
        Part(text, int(count), None if divergences is None else np.frombuffer(divergences))
        for text, divergences, count in connection.execute(mechanisms).all()
    ]


def check_unit(connection: sa.Connection, dataset: str, population_id: int, unit: str) -> None:
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


def check_name(connection: sa.Connection, dataset_id: int, name: str, manifest: str) -> None:
    """Raise if exactly these records are known as a data set of another name.

    Args:
        connection: a transaction.
        dataset_id: the data set of the name given.
        name: that name.
        manifest: HMAC of the digest of the records.
    """
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
