"""Store a dataset's columns as `datasets add` read them, so that new files don't change its schema."""

from alembic import op

revision = "data0009"
down_revision = "data0008"
branch_labels = None
depends_on = None

# registered: the fields of engines.protocol.Registered as JSON. NULL if `datasets add` did not read the files: for a
# Postgres dataset, and for one that was added with --no-check or before this version. Only `datasets add` changes it.
_REGISTERED = "ALTER TABLE datasets ADD COLUMN registered JSONB"


def upgrade() -> None:
    op.execute(_REGISTERED)
