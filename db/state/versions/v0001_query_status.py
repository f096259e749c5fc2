"""What the control plane knows of queries, and how far the projector has read."""

from alembic import op

revision = "state0001"
down_revision = None
branch_labels = None
depends_on = None

# query_status: one row per query, as of its newest event; `sequence` never falls.
# consumer_offsets: the next offset to read, written in the transaction of the rows; it only grows.
_TABLES = """
CREATE TABLE query_status (
    query_id UUID PRIMARY KEY,
    org_id UUID NOT NULL,
    user_id UUID,
    task_id UUID,
    mode TEXT NOT NULL,
    status TEXT NOT NULL,
    sequence INT NOT NULL,
    attempt INT NOT NULL,
    row_count BIGINT,
    bytes BIGINT,
    error_code TEXT,
    error_message TEXT,
    output_location TEXT,
    occurred_at TIMESTAMPTZ NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

CREATE INDEX idx_query_status_org ON query_status(org_id, occurred_at DESC);
CREATE INDEX idx_query_status_task ON query_status(task_id) WHERE task_id IS NOT NULL;

CREATE TABLE consumer_offsets (
    cluster_id TEXT NOT NULL,
    topic_id TEXT NOT NULL,
    partition INT NOT NULL,
    next_offset BIGINT NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (cluster_id, topic_id, partition)
);
"""


def upgrade() -> None:
    op.execute(_TABLES)
