"""Times are the database's own: executors no longer keep a steady clock beside it."""

from alembic import op

revision = "data0011"
down_revision = "data0010"
branch_labels = None
depends_on = None

# Stored times were `now() - skew`. `steady_clock` stays for executors of the release before: they take a correction by
# rank 0 for one by an older process, and adopt it. The locks keep them from writing times in between.
_FOLD_SKEW = """
DO $$
DECLARE
    jumped INTERVAL;
BEGIN
    SELECT c.skew INTO jumped FROM steady_clock c FOR UPDATE;
    IF jumped <> INTERVAL '0' THEN
        LOCK TABLE query_runs, query_leases IN SHARE ROW EXCLUSIVE MODE;
        UPDATE query_runs r
        SET queued_at = r.queued_at + jumped, started_at = r.started_at + jumped, deadline = r.deadline + jumped,
            ended_at = r.ended_at + jumped, expires_at = r.expires_at + jumped;
        UPDATE query_leases l SET expires_at = l.expires_at + jumped;
        UPDATE steady_clock SET skew = '0', corrected_by = 0, updated_at = now();
    END IF;
END
$$;
"""


def upgrade() -> None:
    op.execute(_FOLD_SKEW)
