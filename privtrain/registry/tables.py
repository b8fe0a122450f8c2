"""The registry's tables. The same on SQLite and PostgreSQL; Alembic migrations in ``migrations/`` make them.

Times are seconds since 1970 (UTC), by the database's clock (:mod:`.clock`). No row holds a user id or a data set's
digest in the clear: both are HMACs under the registry's key, which lies outside the database.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Base of all tables."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Meta(Base):
    """A single row of facts about the registry itself.

    ``key_check``: a value derived from the pseudonym key, by which another key is noticed.
    ``uid``: drawn when the registry is made; a copy has the same (:mod:`.seen`).
    ``num_opt_outs``: how many users have opted out.
    ``newest_at``: the newest time at which a registry on SQLite was used (:mod:`.clock`).
    """

    __tablename__ = "meta"
    id: Mapped[int] = mapped_column(primary_key=True)
    key_check: Mapped[str]
    uid: Mapped[str]
    num_opt_outs: Mapped[int]
    newest_at: Mapped[float | None] = mapped_column(sa.Double)


class Population(Base):
    """People who may be in several data sets. ``version`` grows with every change that could spend budget."""

    __tablename__ = "populations"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    version: Mapped[int] = mapped_column(default=0)


class Dataset(Base):
    """A data set: the name that configs use, its population, and whom ε protects in it (``user`` or ``example``)."""

    __tablename__ = "datasets"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    population_id: Mapped[int] = mapped_column(sa.ForeignKey("populations.id"))
    unit: Mapped[str]
    created_at: Mapped[float] = mapped_column(sa.Double)


class DatasetVersion(Base):
    """The content of a data set at some time: the HMAC of its manifest's digest. One content has one name."""

    __tablename__ = "dataset_versions"
    id: Mapped[int] = mapped_column(primary_key=True)
    dataset_id: Mapped[int] = mapped_column(sa.ForeignKey("datasets.id"))
    manifest: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float] = mapped_column(sa.Double)


class Budget(Base):
    """What may be spent on one data set, or by each user of its population; a change is a new row.

    ``scope``: ``dataset``: by all runs on ``dataset_id``; ``user``: by all runs on any data set of the population, each
    user by itself (``dataset_id`` is ``NULL``).
    ``period_seconds``: the bound holds in every window of that length; ``NULL``: for ever.
    ``superseded_at``: when a later row replaced it; ``NULL``: in force.
    """

    __tablename__ = "budgets"
    id: Mapped[int] = mapped_column(primary_key=True)
    scope: Mapped[str]
    population_id: Mapped[int] = mapped_column(sa.ForeignKey("populations.id"), index=True)
    dataset_id: Mapped[int | None] = mapped_column(sa.ForeignKey("datasets.id"))
    epsilon: Mapped[float] = mapped_column(sa.Double)
    delta: Mapped[float] = mapped_column(sa.Double)
    period_seconds: Mapped[float | None] = mapped_column(sa.Double)
    created_at: Mapped[float] = mapped_column(sa.Double)
    superseded_at: Mapped[float | None] = mapped_column(sa.Double)


class Mechanism(Base):
    """What one repetition releases, e.g. one step: runs with equal settings share a row.

    ``event``: the DP event as canonical JSON; ``digest``: SHA-256 of it.
    ``divergences``: the event's Rényi divergences as float64; ``NULL`` if it has none.
    """

    __tablename__ = "mechanisms"
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    event: Mapped[str] = mapped_column(sa.Text)
    divergences: Mapped[bytes | None] = mapped_column(sa.LargeBinary)


class Run(Base):
    """A training run. ``uid`` is made with its run directory and stays the same when it is resumed.

    ``fingerprint`` is its plan's, without the data.
    """

    __tablename__ = "runs"
    id: Mapped[int] = mapped_column(primary_key=True)
    uid: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    fingerprint: Mapped[str]
    dataset_version_id: Mapped[int] = mapped_column(sa.ForeignKey("dataset_versions.id"))
    created_at: Mapped[float] = mapped_column(sa.Double)


class ReservationRow(Base):
    """The budget that a run has reserved and is charged. The charge counts in every state.

    ``state``: ``open``; ``expired`` (its lease ran out: charged in full until it comes back or is closed); ``closed``.
    ``num_reserved`` and ``num_charged`` count the mechanism's repetitions. ``epsilon`` is the run's own at ``delta``.
    ``num_opt_outs`` says which users the run leaves out: the opt-outs numbered up to it.
    ``claim`` is a random token, known to the run directory that holds the reservation; a new one at every start.
    ``ledger_key`` commits to the key of the run's ledger, which showed ``num_begun`` steps when it was last seen.
    ``seen_at`` is the newest time of a sign of life: whatever the clock says later, the run ended no earlier.
    """

    __tablename__ = "reservations"
    id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(sa.ForeignKey("runs.id"), index=True)
    dataset_id: Mapped[int] = mapped_column(sa.ForeignKey("datasets.id"))
    mechanism_id: Mapped[int] = mapped_column(sa.ForeignKey("mechanisms.id"))
    state: Mapped[str]
    num_reserved: Mapped[int] = mapped_column(sa.BigInteger)
    num_charged: Mapped[int] = mapped_column(sa.BigInteger)
    epsilon: Mapped[float] = mapped_column(sa.Double)
    delta: Mapped[float] = mapped_column(sa.Double)
    num_opt_outs: Mapped[int]
    created_at: Mapped[float] = mapped_column(sa.Double)
    lease_until: Mapped[float] = mapped_column(sa.Double)
    seen_at: Mapped[float] = mapped_column(sa.Double, default=0.0, server_default="0")
    closed_at: Mapped[float | None] = mapped_column(sa.Double)
    claim: Mapped[str | None]
    ledger_key: Mapped[str | None]
    num_begun: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")

    __table_args__ = (
        # A run holds at most one reservation that is not closed, whoever races.
        sa.Index(
            "uq_reservations_one_live",
            "run_id",
            unique=True,
            sqlite_where=sa.text("state != 'closed'"),
            postgresql_where=sa.text("state != 'closed'"),
        ),
        sa.Index("ix_reservations_charges", "dataset_id", "state", "closed_at", "mechanism_id", "num_charged"),
    )


class Settlement(Base):
    """How a reservation ended.

    ``kind``: ``settle`` (released), ``refund`` (given up, with its ledger as proof) or ``close`` (by hand).
    ``ledger_head``: hash of the last record of the run's ledger; empty for ``close``.
    """

    __tablename__ = "settlements"
    id: Mapped[int] = mapped_column(primary_key=True)
    reservation_id: Mapped[str] = mapped_column(sa.ForeignKey("reservations.id"), index=True)
    kind: Mapped[str]
    num_charged: Mapped[int] = mapped_column(sa.BigInteger)
    epsilon: Mapped[float] = mapped_column(sa.Double)
    ledger_head: Mapped[str]
    created_at: Mapped[float] = mapped_column(sa.Double)


class Contribution(Base):
    """What one user, by pseudonym, contributed to one run in all."""

    __tablename__ = "contributions"
    run_id: Mapped[int] = mapped_column(sa.ForeignKey("runs.id"), primary_key=True)
    user_pseudonym: Mapped[str] = mapped_column(primary_key=True, index=True)
    num_steps: Mapped[int]
    num_records: Mapped[int] = mapped_column(sa.BigInteger)


class OptOut(Base):
    """A user, by pseudonym, whom no later run trains on. Numbered without gaps, so that a run's list is a number."""

    __tablename__ = "opt_outs"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    user_pseudonym: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float] = mapped_column(sa.Double)
