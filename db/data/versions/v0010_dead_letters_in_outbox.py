"""Dead letters go through the outbox, with a topic and a key of their own."""

from alembic import op

revision = "data0010"
down_revision = "data0009"
branch_labels = None
depends_on = None

# topic: NULL means query.status, keyed by query_id, with headers as a JSON object of text. A dead letter has its topic,
# its record's key, and headers as a list of pairs in base64; it may have no query_id. The previous release's relay does
# not read the dead letters' shard.
_OUTBOX = """
ALTER TABLE outbox ALTER COLUMN query_id DROP NOT NULL;
ALTER TABLE outbox ADD COLUMN topic TEXT, ADD COLUMN key BYTEA;
"""


def upgrade() -> None:
    op.execute(_OUTBOX)
