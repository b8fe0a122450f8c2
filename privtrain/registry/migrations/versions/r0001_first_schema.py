"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "mechanisms",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("divergences", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_mechanisms")),
        sa.UniqueConstraint("digest", name=op.f("uq_mechanisms_digest")),
    )
    op.create_table(
        "meta",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key_check", sa.String(), nullable=False),
        sa.Column("num_opt_outs", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_meta")),
    )
    op.create_table(
        "opt_outs",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("user_pseudonym", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_opt_outs")),
        sa.UniqueConstraint("user_pseudonym", name=op.f("uq_opt_outs_user_pseudonym")),
    )
    op.create_table(
        "populations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_populations")),
        sa.UniqueConstraint("name", name=op.f("uq_populations_name")),
    )
    op.create_table(
        "datasets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("population_id", sa.Integer(), nullable=False),
        sa.Column("unit", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["population_id"], ["populations.id"], name=op.f("fk_datasets_population_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
        sa.UniqueConstraint("name", name=op.f("uq_datasets_name")),
    )
    op.create_table(
        "budgets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("population_id", sa.Integer(), nullable=False),
        sa.Column("dataset_id", sa.Integer(), nullable=True),
        sa.Column("epsilon", sa.Double(), nullable=False),
        sa.Column("delta", sa.Double(), nullable=False),
        sa.Column("period_seconds", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("superseded_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_budgets_dataset_id")),
        sa.ForeignKeyConstraint(["population_id"], ["populations.id"], name=op.f("fk_budgets_population_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_budgets")),
    )
    op.create_index(op.f("ix_budgets_population_id"), "budgets", ["population_id"], unique=False)
    op.create_table(
        "dataset_versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("dataset_id", sa.Integer(), nullable=False),
        sa.Column("manifest", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_dataset_versions_dataset_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset_versions")),
        sa.UniqueConstraint("manifest", name=op.f("uq_dataset_versions_manifest")),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("uid", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("dataset_version_id", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_version_id"], ["dataset_versions.id"], name=op.f("fk_runs_dataset_version_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("uid", name=op.f("uq_runs_uid")),
    )
    op.create_table(
        "contributions",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("user_pseudonym", sa.String(), nullable=False),
        sa.Column("num_steps", sa.Integer(), nullable=False),
        sa.Column("num_records", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_contributions_run_id")),
        sa.PrimaryKeyConstraint("run_id", "user_pseudonym", name=op.f("pk_contributions")),
    )
    op.create_index(op.f("ix_contributions_user_pseudonym"), "contributions", ["user_pseudonym"], unique=False)
    op.create_table(
        "reservations",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("dataset_id", sa.Integer(), nullable=False),
        sa.Column("mechanism_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("num_reserved", sa.BigInteger(), nullable=False),
        sa.Column("num_charged", sa.BigInteger(), nullable=False),
        sa.Column("epsilon", sa.Double(), nullable=False),
        sa.Column("delta", sa.Double(), nullable=False),
        sa.Column("num_opt_outs", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("closed_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_reservations_dataset_id")),
        sa.ForeignKeyConstraint(["mechanism_id"], ["mechanisms.id"], name=op.f("fk_reservations_mechanism_id")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_reservations_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reservations")),
    )
    op.create_index(
        "ix_reservations_charges",
        "reservations",
        ["dataset_id", "state", "closed_at", "mechanism_id", "num_charged"],
        unique=False,
    )
    op.create_index(op.f("ix_reservations_run_id"), "reservations", ["run_id"], unique=False)
    op.create_index(
        "uq_reservations_one_live",
        "reservations",
        ["run_id"],
        unique=True,
        sqlite_where=sa.text("state != 'closed'"),
        postgresql_where=sa.text("state != 'closed'"),
    )
    op.create_table(
        "settlements",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("reservation_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("num_charged", sa.BigInteger(), nullable=False),
        sa.Column("epsilon", sa.Double(), nullable=False),
        sa.Column("ledger_head", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["reservation_id"], ["reservations.id"], name=op.f("fk_settlements_reservation_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_settlements")),
    )
    op.create_index(op.f("ix_settlements_reservation_id"), "settlements", ["reservation_id"], unique=False)


def downgrade() -> None:
    """Drop every table."""
    op.drop_index(op.f("ix_settlements_reservation_id"), table_name="settlements")
    op.drop_table("settlements")
    op.drop_index(
        "uq_reservations_one_live",
        table_name="reservations",
        sqlite_where=sa.text("state != 'closed'"),
        postgresql_where=sa.text("state != 'closed'"),
    )
    op.drop_index(op.f("ix_reservations_run_id"), table_name="reservations")
    op.drop_index("ix_reservations_charges", table_name="reservations")
    op.drop_table("reservations")
    op.drop_index(op.f("ix_contributions_user_pseudonym"), table_name="contributions")
    op.drop_table("contributions")
    op.drop_table("runs")
    op.drop_table("dataset_versions")
    op.drop_index(op.f("ix_budgets_population_id"), table_name="budgets")
    op.drop_table("budgets")
    op.drop_table("datasets")
    op.drop_table("populations")
    op.drop_table("opt_outs")
    op.drop_table("meta")
    op.drop_table("mechanisms")
