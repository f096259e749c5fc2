"""The note about a dead letter says who writes it, so that the next can end that writer first."""

from alembic import op

revision = "data0006"
down_revision = "data0005"
branch_labels = None
depends_on = None

# writer: the transactional id of the session that set out to write the letter; '' without transactions.
_WRITER = "ALTER TABLE dead_letters ADD COLUMN writer TEXT NOT NULL DEFAULT ''"


def upgrade() -> None:
    op.execute(_WRITER)
