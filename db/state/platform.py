"""The platform's own tables in the state database, made here only for the embedded stack and for tests."""

import psycopg

CREATE = """
CREATE TABLE IF NOT EXISTS orgs (id UUID PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS users (id UUID PRIMARY KEY, org_id UUID NOT NULL, name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tasks (
    id UUID PRIMARY KEY,
    org_id UUID NOT NULL,
    status TEXT NOT NULL DEFAULT 'Queued'
        CHECK (status IN ('Queued', 'Running', 'Completed', 'Failed', 'Canceled')),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
"""


def create_platform_tables(url: str) -> None:
    """Make `orgs`, `users` and `tasks` where they are missing; `url` is a libpq URI of Postgres state."""
    with psycopg.connect(url, connect_timeout=5) as connection:
        connection.execute(CREATE)
