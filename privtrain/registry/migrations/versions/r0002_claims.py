"""Which copy of a run directory holds a reservation."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add claims: a run that holds a reservation of before claims it at its next start."""
    op.add_column("reservations", sa.Column("claim", sa.String(), nullable=True))


def downgrade() -> None:
    """Forget the claims."""
    op.drop_column("reservations", "claim")
