"""What `datasets add` has seen of a dataset, so that new files don't change what it means."""

from alembic import op

revision = "data0009"
down_revision = "data0008"
branch_labels = None
depends_on = None

# registered: columns, partition columns and until when all files had these columns, as engines.protocol.Registered has
# them. NULL where nobody has looked: a Postgres dataset, one that was added with --no-check or before this version.
# Nothing changes it but another `datasets add`.
_REGISTERED = "ALTER TABLE datasets ADD COLUMN registered JSONB"


def upgrade() -> None:
    op.execute(_REGISTERED)
