"""When queries ended, found by index: for whoever watches how many do."""

from alembic import op

revision = "data0008"
down_revision = "data0007"
branch_labels = None
depends_on = None

# ended_at: on the steady clock. NULL while the query waits or runs, and where it ended before this version, or under an
# executor of the release before.
_ENDED = """
ALTER TABLE query_runs ADD COLUMN ended_at TIMESTAMPTZ;

CREATE INDEX idx_query_runs_ended_at ON query_runs(ended_at) WHERE ended_at IS NOT NULL;
"""


def upgrade() -> None:
    op.execute(_ENDED)
