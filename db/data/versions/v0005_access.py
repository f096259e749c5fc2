"""What limits, grants and saved queries need: live queries by org, grants beyond visibility, removals."""

from alembic import op

revision = "data0005"
down_revision = "data0004"
branch_labels = None
depends_on = None

# org_id: the query's org once more, so that an org's live queries are counted by index; the canonical table's indexes
# are not ours to change. NULL only where an executor of the release before has admitted the query.
_LIVE = """
ALTER TABLE query_runs ADD COLUMN org_id UUID;

UPDATE query_runs r SET org_id = q.org_id FROM query_results q WHERE q.id = r.query_id AND r.deadline IS NOT NULL;

CREATE INDEX idx_query_runs_org_queued ON query_runs(org_id) WHERE deadline IS NOT NULL AND attempt = 0;
CREATE INDEX idx_query_runs_org_running ON query_runs(org_id) WHERE deadline IS NOT NULL AND attempt > 0;
"""

# dataset_grants: who may read a dataset beyond those whom its visibility names.
#   grantee: `user:<uuid>` and `role:<slug>` of the owner's own org, `org:<uuid>` of any other
# DuckDB compares names without regard to the case of ASCII letters, so that is how they are unique: where two of an org
# differ in nothing else, the one changed last keeps its name, and the others get digits of their ids behind theirs. The
# constraint of before would only make a race of two registrations an error.
_GRANTS = """
CREATE TABLE dataset_grants (
    dataset_id UUID NOT NULL REFERENCES datasets(id) ON DELETE CASCADE,
    grantee TEXT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (dataset_id, grantee)
);

CREATE INDEX idx_dataset_grants_grantee ON dataset_grants(grantee);

UPDATE datasets d SET name = d.name || '_' || left(d.id::text, 8), version = d.version + 1
FROM (
    SELECT id, row_number() OVER (PARTITION BY org_id, lower(name COLLATE "C") ORDER BY updated_at DESC, id) AS place
    FROM datasets
) AS alike
WHERE alike.id = d.id AND alike.place > 1;

CREATE UNIQUE INDEX idx_datasets_name ON datasets(org_id, lower(name COLLATE "C"));
ALTER TABLE datasets DROP CONSTRAINT datasets_org_id_name_key;
"""

# saved_query_removals: a saved query that results refer to keeps its row when it is removed, without its text, so that
# the results' history stays whole. Nobody can see or run it.
_SAVED = """
CREATE TABLE saved_query_removals (
    saved_query_id UUID PRIMARY KEY REFERENCES saved_queries(id) ON DELETE CASCADE,
    removed_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
"""


def upgrade() -> None:
    for statements in (_LIVE, _GRANTS, _SAVED):
        op.execute(statements)
