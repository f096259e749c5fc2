"""Cancellations that whoever locks the row first wins, and a clock that does not jump."""

from alembic import op

revision = "data0002"
down_revision = "data0001"
branch_labels = None
depends_on = None

# cancelled: set by the cancel under the row's lock, so that a finish that waited for the lock sees it.
_CANCELLED = """
ALTER TABLE query_runs ADD COLUMN cancelled BOOLEAN NOT NULL DEFAULT false;

CREATE INDEX idx_query_runs_cancelled ON query_runs(query_id) WHERE cancelled AND deadline IS NOT NULL;
"""

# steady_clock: how far the server's clock has jumped since the tables were made. `now() - skew` goes on steadily, and
# all deadlines, leases and waiting times are counted by it; times that people read are plain `now()`.
# corrected_by: the rank of the process that has set the skew last. A lower rank has watched for longer.
_STEADY_CLOCK = """
CREATE SEQUENCE steady_clock_ranks;

CREATE TABLE steady_clock (
    only_row BOOLEAN PRIMARY KEY DEFAULT true CHECK (only_row),
    skew INTERVAL NOT NULL DEFAULT '0',
    corrected_by BIGINT NOT NULL DEFAULT 0,
    updated_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

INSERT INTO steady_clock DEFAULT VALUES;
"""


def upgrade() -> None:
    for statements in (_CANCELLED, _STEADY_CLOCK):
        op.execute(statements)
