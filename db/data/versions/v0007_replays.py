"""What replays need: one active at a time on a scope, and the org that one was about, for hard deletion."""

from alembic import op

revision = "data0007"
down_revision = "data0006"
branch_labels = None
depends_on = None

# replays: who re-drove what, why, and how far it has come.
#   status: Active → Done | Failed; Active → Cancelling → Cancelled; Active → Cancelled where no process works on it
#   org_id, user_id: whose records it was narrowed to, if it was
_REPLAYS = """
ALTER TABLE replays
    ADD COLUMN org_id UUID,
    ADD COLUMN user_id UUID,
    ADD CONSTRAINT replays_status_check CHECK (status IN ('Active', 'Cancelling', 'Cancelled', 'Done', 'Failed'));

CREATE UNIQUE INDEX idx_replays_active ON replays(scope) WHERE status IN ('Active', 'Cancelling');
CREATE INDEX idx_replays_created ON replays(created_at DESC);
"""


def upgrade() -> None:
    op.execute(_REPLAYS)
