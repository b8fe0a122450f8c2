"""The newest time at which a registry without a server was used."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_TIMES = {
    "datasets": ("created_at",),
    "budgets": ("created_at",),
    "runs": ("created_at",),
    "reservations": ("created_at", "closed_at"),
    "settlements": ("created_at",),
    "opt_outs": ("created_at",),
}


def upgrade() -> None:
    """Add ``meta.newest_at``, the newest time in the existing rows; ``NULL`` without rows."""
    op.add_column("meta", sa.Column("newest_at", sa.Double(), nullable=True))
    newest = " UNION ALL ".join(f"SELECT max({name}) AS t FROM {table}" for table in _TIMES for name in _TIMES[table])
    op.execute(f"UPDATE meta SET newest_at = (SELECT max(t) FROM ({newest}) AS times)")


def downgrade() -> None:
    """Drop ``meta.newest_at``."""
    op.drop_column("meta", "newest_at")
