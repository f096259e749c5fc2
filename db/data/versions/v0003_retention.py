"""What retention looks for, found by index, and how far the sweep of a bucket has come."""

from alembic import op

revision = "data0003"
down_revision = "data0002"
branch_labels = None
depends_on = None

# Both indexes of query_runs get a query once, when it ends: the first while its result is there, the second for as long
# as its row is.
_INDEXES = """
CREATE INDEX idx_query_runs_result ON query_runs(expires_at) WHERE files <> '[]';
CREATE INDEX idx_query_runs_ended ON query_runs(queued_at) WHERE deadline IS NULL;

CREATE INDEX idx_query_cancellations_time ON query_cancellations(created_at);
CREATE INDEX idx_deleted_ids_time ON deleted_ids(deleted_at);
CREATE INDEX idx_dead_letters_time ON dead_letters(created_at);
"""

# sweeps: one row a bucket. A sweep that was cut short goes on behind `position`, the last key that it has judged; ''
# means that the next begins anew.
_SWEEPS = """
CREATE TABLE sweeps (
    bucket TEXT PRIMARY KEY,
    position TEXT NOT NULL DEFAULT '',
    finished_at TIMESTAMPTZ
);
"""


def upgrade() -> None:
    for statements in (_INDEXES, _SWEEPS):
        op.execute(statements)
