"""Batches are counted, so that a relay recognizes a database that was restored to an earlier state."""

from alembic import op

revision = "data0004"
down_revision = "data0003"
branch_labels = None
depends_on = None

# relay_batches: how many batches a relay has published in Kafka transactions and then deleted. Kafka's record of the
# last batch holds its number: one more than here, and the relay died before the delete; two more, and this database is
# an older state of itself. It takes the place of `outbox_state.publishers`, which stays for the release before.
_RELAY_BATCHES = """
CREATE TABLE relay_batches (
    relay TEXT PRIMARY KEY,
    batches BIGINT NOT NULL
);

INSERT INTO relay_batches SELECT unnest(publishers), 0 FROM outbox_state;
"""


def upgrade() -> None:
    op.execute(_RELAY_BATCHES)
