"""The two canonical tables, and ours beside them."""

from alembic import op

revision = "data0001"
down_revision = None
branch_labels = None
depends_on = None

# Column for column as in the user's own document; nothing of ours is added to them.
_CANONICAL = """
CREATE TABLE saved_queries (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id UUID NOT NULL,
    user_id UUID NOT NULL,
    name TEXT NOT NULL,
    query TEXT NOT NULL,
    visibility TEXT NOT NULL DEFAULT 'private',
    created_at TIMESTAMPTZ DEFAULT now(),
    updated_at TIMESTAMPTZ DEFAULT now()
);

CREATE INDEX idx_saved_queries_org ON saved_queries(org_id);

CREATE TABLE query_results (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id UUID NOT NULL,
    user_id UUID,
    mode TEXT NOT NULL,
    status TEXT NOT NULL,
    sql_hash TEXT NOT NULL,
    saved_query_id UUID REFERENCES saved_queries(id),
    task_id UUID,
    output_format TEXT,
    output_location TEXT,
    row_count BIGINT,
    bytes BIGINT,
    duration_ms INT,
    error_code TEXT,
    error_message TEXT,
    created_at TIMESTAMPTZ DEFAULT now(),
    updated_at TIMESTAMPTZ DEFAULT now()
);

CREATE INDEX idx_query_results_org_time ON query_results(org_id, created_at DESC);
CREATE INDEX idx_query_results_user_time ON query_results(user_id, created_at DESC);
CREATE INDEX idx_query_results_task ON query_results(task_id);
"""

# query_runs: what the executor must know of a query beyond its canonical row. A row is born at admission with the
# query_results row, moves with it, and dies with it.
#   deadline: Queued → when it fails with QUEUE_TIMEOUT; Running → when it fails with QUERY_TIMEOUT; terminal → NULL
#   token:    Queued → NULL; Running → its attempt's (NULL once handed back); terminal → the last attempt's
_RUNS = """
CREATE TABLE query_runs (
    query_id UUID PRIMARY KEY REFERENCES query_results(id) ON DELETE CASCADE,
    fingerprint BYTEA NOT NULL,
    topic TEXT NOT NULL,
    partition INT NOT NULL,
    record_offset BIGINT NOT NULL,
    traceparent TEXT NOT NULL,
    sequence INT NOT NULL,
    attempt INT NOT NULL DEFAULT 0,
    crashes INT NOT NULL DEFAULT 0,
    token UUID,
    queued_at TIMESTAMPTZ NOT NULL,
    started_at TIMESTAMPTZ,
    deadline TIMESTAMPTZ,
    engine TEXT,
    files JSONB NOT NULL DEFAULT '[]',
    expires_at TIMESTAMPTZ,
    last_event BYTEA NOT NULL
);

CREATE INDEX idx_query_runs_deadline ON query_runs(deadline) WHERE deadline IS NOT NULL;
"""

# query_leases: one row for each query that somebody runs. Renewed every few seconds, so it is narrow and has room in
# its pages: an update that touches no index then stays in its page.
_LEASES = """
CREATE TABLE query_leases (
    query_id UUID PRIMARY KEY REFERENCES query_runs(query_id) ON DELETE CASCADE,
    token UUID NOT NULL,
    worker TEXT NOT NULL,
    renewal BIGINT NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL
) WITH (fillfactor = 50);
"""

_ASKED_AND_GONE = """
CREATE TABLE query_cancellations (
    query_id UUID NOT NULL,
    org_id UUID NOT NULL,
    user_id UUID,
    reason TEXT,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (query_id, org_id)
);

-- Ids of rows that were deleted for good, kept so that a late redelivery does not run the query again.
CREATE TABLE deleted_ids (
    query_id UUID PRIMARY KEY,
    deleted_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
"""

# outbox: events committed with the change that they tell of, and not yet published. `position` is drawn after the
# query's row lock, so one query's events have rising positions. A row leaves once Kafka has it.
# outbox_state: `generation` names this very table in the relay's committed offsets; a restored or remade database has
# another one. `publishers` are the relays that have ever published from here.
_OUTBOX = """
CREATE TABLE outbox (
    position BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    shard SMALLINT NOT NULL,
    event_id UUID NOT NULL,
    query_id UUID NOT NULL,
    type TEXT NOT NULL,
    payload BYTEA,
    headers JSONB NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

CREATE TABLE outbox_state (
    only_row BOOLEAN PRIMARY KEY DEFAULT true CHECK (only_row),
    generation UUID NOT NULL DEFAULT gen_random_uuid(),
    publishers TEXT[] NOT NULL DEFAULT '{}'
);

INSERT INTO outbox_state DEFAULT VALUES;

-- Whoever writes events wakes the relay at the commit; notifications of one transaction are one.
CREATE FUNCTION notify_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY queryd_outbox;
    RETURN NULL;
END
$$;

CREATE TRIGGER outbox_written AFTER INSERT ON outbox FOR EACH STATEMENT EXECUTE FUNCTION notify_outbox();

-- Where each partition of the status topic ended when a relay without transactions last deleted what it had published.
CREATE TABLE relay_positions (
    cluster_id TEXT NOT NULL,
    topic_id TEXT NOT NULL,
    partition INT NOT NULL,
    next_offset BIGINT NOT NULL,
    PRIMARY KEY (cluster_id, topic_id, partition)
);
"""

_DEAD_LETTERS = """
-- Records that became dead letters, so that reading one again does not make a second.
-- sent_at NULL: the broker may have it or not.
CREATE TABLE dead_letters (
    topic_id TEXT NOT NULL,
    partition INT NOT NULL,
    record_offset BIGINT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    sent_at TIMESTAMPTZ,
    PRIMARY KEY (topic_id, partition, record_offset)
);
"""

_ACCESS = """
CREATE TABLE datasets (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id UUID NOT NULL,
    user_id UUID,
    name TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('parquet', 'postgres')),
    location TEXT NOT NULL,
    visibility TEXT NOT NULL,
    pii_columns TEXT[] NOT NULL DEFAULT '{}',
    version BIGINT NOT NULL DEFAULT 1,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    UNIQUE (org_id, name)
);

CREATE INDEX idx_datasets_public ON datasets(name) WHERE visibility = 'public';

CREATE TABLE org_limits (
    org_id UUID PRIMARY KEY,
    weight INT NOT NULL DEFAULT 1 CHECK (weight > 0),
    running_queries INT,
    queued_queries INT,
    timeout_seconds INT,
    bytes_scanned BIGINT,
    result_bytes BIGINT,
    result_rows BIGINT
);

CREATE TABLE pii_access_log (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id UUID NOT NULL,
    user_id UUID,
    task_id UUID,
    dataset TEXT NOT NULL,
    column_name TEXT,
    record_id UUID NOT NULL,
    action TEXT NOT NULL DEFAULT 'read',
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    CHECK ((user_id IS NULL) <> (task_id IS NULL))
);

CREATE UNIQUE INDEX idx_pii_access_log_once
    ON pii_access_log(record_id, dataset, column_name) NULLS NOT DISTINCT;
CREATE INDEX idx_pii_access_log_org ON pii_access_log(org_id, created_at DESC);

CREATE TABLE replays (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    kind TEXT NOT NULL,
    scope TEXT NOT NULL,
    status TEXT NOT NULL,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    plan JSONB NOT NULL,
    checkpoint JSONB NOT NULL DEFAULT '{}',
    counts JSONB NOT NULL DEFAULT '{}',
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
"""


def upgrade() -> None:
    for statements in (_CANONICAL, _RUNS, _LEASES, _ASKED_AND_GONE, _OUTBOX, _DEAD_LETTERS, _ACCESS):
        op.execute(statements)
