"""Which registry this is, and when each run gave its last sign of life."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Give this registry its id; the time known of a run is that of its reservation."""
    op.add_column("meta", sa.Column("uid", sa.String(), nullable=False, server_default=secrets.token_hex(16)))
    op.add_column("reservations", sa.Column("seen_at", sa.Double(), nullable=False, server_default="0"))
    op.execute("UPDATE reservations SET seen_at = created_at")


def downgrade() -> None:
    """Forget both."""
    op.drop_column("reservations", "seen_at")
    op.drop_column("meta", "uid")
