"""Which ledger a reservation's run trains with, and how many steps it has shown."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add ledgers, known of a run that trains now from its next sign of life."""
    op.add_column("reservations", sa.Column("ledger_key", sa.String(), nullable=True))
    op.add_column("reservations", sa.Column("num_begun", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Forget it."""
    op.drop_column("reservations", "num_begun")
    op.drop_column("reservations", "ledger_key")
