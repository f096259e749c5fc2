"""The schemas of the two databases: the user's own document to the letter, and ours beside it."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, LiteralString

import psycopg
import pytest

from db.data.versions.v0004_relay_batches import _RELAY_BATCHES
from db.data.versions.v0011_no_steady_clock import _FOLD_SKEW
from db.migrations.upgrade import _UPGRADE_LOCK, upgrade_data, upgrade_state
from db.state.platform import create_platform_tables

# From the user's document, "Query Service Data Model".
_SEED = """
CREATE TABLE saved_queries (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id UUID NOT NULL, -- soft ref: Postgres state orgs(id)
    user_id UUID NOT NULL, -- soft ref: Postgres state users(id)
    name TEXT NOT NULL,
    query TEXT NOT NULL,
    visibility TEXT NOT NULL DEFAULT 'private',  -- see ../data_model/pii.md
    created_at TIMESTAMPTZ DEFAULT now(),
    updated_at TIMESTAMPTZ DEFAULT now()
);

CREATE INDEX idx_saved_queries_org ON saved_queries(org_id);

CREATE TABLE query_results (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id UUID NOT NULL, -- soft ref: Postgres state orgs(id)
    user_id UUID, -- soft ref: Postgres state users(id)
    mode TEXT NOT NULL,                -- 'interactive' | 'batch'
    status TEXT NOT NULL,              -- 'Queued' | 'Running' | 'Succeeded' | 'Failed'
    sql_hash TEXT NOT NULL,            -- hash only (avoid storing full SQL by default)
    saved_query_id UUID REFERENCES saved_queries(id),
    task_id UUID, -- soft ref: Postgres state tasks(id) (set for batch executions)
    output_format TEXT,                -- 'json' | 'csv' | 'parquet'
    output_location TEXT,              -- e.g., s3://bucket/results/{org_id}/{query_id}/
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

_CANONICAL = ["query_results", "saved_queries"]
_PLATFORM = ["orgs", "tasks", "users"]

# What makes a table what it is, each in Postgres's own words.
_CATALOG: dict[str, LiteralString] = {
    "table": """
        SELECT relname, relkind, relpersistence, relrowsecurity, relispartition, reloptions
        FROM pg_class WHERE oid = ANY(%s::regclass[]) ORDER BY relname
    """,
    "columns": """
        SELECT attrelid::regclass::text, attnum, attname, format_type(atttypid, atttypmod), attnotnull, attidentity,
               attgenerated, attcollation::regcollation::text, pg_get_expr(adbin, adrelid)
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid = ANY(%s::regclass[]) AND attnum > 0 ORDER BY attrelid::regclass::text, attnum
    """,
    "constraints": """
        SELECT conrelid::regclass::text, conname, contype, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE conrelid = ANY(%s::regclass[]) ORDER BY conrelid::regclass::text, conname
    """,
    "indexes": """
        SELECT indrelid::regclass::text, pg_get_indexdef(indexrelid), indisunique, indisprimary, indisvalid
        FROM pg_index WHERE indrelid = ANY(%s::regclass[]) ORDER BY indexrelid::regclass::text
    """,
}

# Frozen: strangers read this table.
_QUERY_STATUS = [
    "query_id",
    "org_id",
    "user_id",
    "task_id",
    "mode",
    "status",
    "sequence",
    "attempt",
    "row_count",
    "bytes",
    "error_code",
    "error_message",
    "output_location",
    "occurred_at",
    "updated_at",
]

# An interpreter with alembic takes a second to come up, several of them on a busy machine with two cores longer.
_PROCESS_SECONDS = 60.0
_LOOK_SECONDS = 0.02

Upgrade = Callable[[str], None]


def test_the_canonical_tables_are_the_seeds(data_url: str, postgres_url: str) -> None:
    upgrade_data(data_url)
    with psycopg.connect(postgres_url) as scratch:
        scratch.execute(_SEED)
    live, seed = _read_catalog(data_url, _CANONICAL), _read_catalog(postgres_url, _CANONICAL)
    assert [row[2] for row in seed["columns"]].count("id") == 2
    for aspect in _CATALOG:
        assert live[aspect] == seed[aspect], aspect


def test_no_trigger_and_no_rule_of_ours_hangs_on_the_canonical_tables(data_url: str) -> None:
    upgrade_data(data_url)
    with psycopg.connect(data_url) as connection:
        found = connection.execute(
            """
            SELECT tgname FROM pg_trigger WHERE tgrelid = ANY(%(tables)s::regclass[]) AND NOT tgisinternal
            UNION ALL SELECT rulename FROM pg_rewrite WHERE ev_class = ANY(%(tables)s::regclass[])
            UNION ALL SELECT polname FROM pg_policy WHERE polrelid = ANY(%(tables)s::regclass[])
            """,
            {"tables": _CANONICAL},
        ).fetchall()
    assert found == []


@pytest.mark.parametrize("upgrade", [upgrade_data, upgrade_state])
def test_a_second_upgrade_changes_nothing(upgrade: Upgrade, postgres_url: str) -> None:
    upgrade(postgres_url)
    tables = _read_tables(postgres_url)
    before = _read_catalog(postgres_url, tables), _read_rows(postgres_url, tables)
    upgrade(postgres_url)
    assert _read_tables(postgres_url) == tables
    assert (_read_catalog(postgres_url, tables), _read_rows(postgres_url, tables)) == before


def test_an_upgrade_keeps_the_outboxs_generation_and_what_waits_in_it(data_url: str) -> None:
    upgrade_data(data_url)
    with psycopg.connect(data_url) as connection:
        connection.execute(
            "INSERT INTO outbox (shard, event_id, query_id, type, headers) "
            "VALUES (0, gen_random_uuid(), gen_random_uuid(), 'QueryStatusChanged', '{}')"
        )
    before = _read_rows(data_url, ["outbox", "outbox_state"])
    upgrade_data(data_url)
    assert _read_rows(data_url, ["outbox", "outbox_state"]) == before


def test_a_relay_that_published_before_batches_were_counted_is_known_to_have_published(data_url: str) -> None:
    upgrade_data(data_url)
    with psycopg.connect(data_url) as connection:
        # As the first release left it.
        connection.execute("DROP TABLE relay_batches")
        connection.execute("UPDATE outbox_state SET publishers = '{queryd-relay-0}'")
        connection.execute(_RELAY_BATCHES)
        assert connection.execute("SELECT relay, batches FROM relay_batches").fetchall() == [("queryd-relay-0", 0)]


# A query that was written while the server's clock was 401 days ahead of the steady one.
_STEADY_ROWS = """
INSERT INTO query_results (id, org_id, mode, status, sql_hash)
VALUES ('{id}', gen_random_uuid(), 'interactive', 'Running', '');
INSERT INTO query_runs (query_id, fingerprint, topic, partition, record_offset, traceparent, sequence, last_event,
                        queued_at, started_at, deadline, ended_at, expires_at)
SELECT '{id}', '', 'lane', 0, 0, '', 2, '', t, t, t, NULL, t FROM (SELECT now() - interval '401 days' AS t) AS steady;
INSERT INTO query_leases (query_id, token, worker, renewal, expires_at)
VALUES ('{id}', gen_random_uuid(), '', 0, now() - interval '401 days');
UPDATE steady_clock SET skew = interval '401 days', corrected_by = nextval('steady_clock_ranks');
"""


def test_times_of_a_steady_clock_become_the_databases_own(data_url: str) -> None:
    upgrade_data(data_url)
    query_id = "5a0c0c62-8a9e-4a8f-8a44-6c3a4f7f4b01"
    with psycopg.connect(data_url) as connection:
        connection.execute(_STEADY_ROWS.format(id=query_id).encode())
        # A second upgrade must not move them again.
        for _ in range(2):
            connection.execute(_FOLD_SKEW)
        [times] = connection.execute(
            "SELECT queued_at, started_at, deadline, r.expires_at, l.expires_at, now(), ended_at"
            " FROM query_runs r JOIN query_leases l USING (query_id)"
        ).fetchall()
        assert len(set(times[:-1])) == 1
        assert times[-1] is None
        # An executor of the release before adopts what a lower rank than its own has corrected; ranks begin with 1.
        steady = connection.execute("SELECT skew = '0', corrected_by FROM steady_clock").fetchall()
        assert steady == [(True, 0)]


@pytest.mark.parametrize("which", ["upgrade_data", "upgrade_state"])
def test_two_processes_upgrade_at_once(which: str, postgres_url: str) -> None:
    program = f"import sys; from db.migrations.upgrade import {which}; {which}(sys.argv[1])"
    command = [sys.executable, "-W", "error", "-c", program, postgres_url]
    with psycopg.connect(postgres_url) as connection:
        # Both stand at the door before either may go in.
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_UPGRADE_LOCK])
        processes = [subprocess.Popen(command) for _ in range(2)]
        try:
            _await_upgrades(postgres_url, processes)
            connection.rollback()
            assert [process.wait(_PROCESS_SECONDS) for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    upgraded = "query_runs" if which == "upgrade_data" else "query_status"
    assert upgraded in _read_tables(postgres_url)


def test_the_platforms_tables_stay_as_they_are(state_url: str) -> None:
    create_platform_tables(state_url)
    with psycopg.connect(state_url) as connection:
        connection.execute("INSERT INTO orgs VALUES (gen_random_uuid(), 'an org')")
        connection.execute("INSERT INTO users VALUES (gen_random_uuid(), gen_random_uuid(), 'a user')")
        connection.execute("INSERT INTO tasks (id, org_id) VALUES (gen_random_uuid(), gen_random_uuid())")
    before = _read_catalog(state_url, _PLATFORM), _read_rows(state_url, _PLATFORM)
    upgrade_state(state_url)
    assert (_read_catalog(state_url, _PLATFORM), _read_rows(state_url, _PLATFORM)) == before


def test_the_state_upgrade_makes_no_table_of_the_platforms(state_url: str) -> None:
    upgrade_state(state_url)
    assert _read_tables(state_url) == ["consumer_offsets", "query_status", "queryd_state_version"]


def test_query_status_has_exactly_the_frozen_columns(state_url: str) -> None:
    upgrade_state(state_url)
    assert [row[2] for row in _read_catalog(state_url, ["query_status"])["columns"]] == _QUERY_STATUS


def test_both_schemas_can_share_one_database(postgres_url: str) -> None:
    upgrade_data(postgres_url)
    upgrade_state(postgres_url)
    assert {"query_runs", "query_status"} <= set(_read_tables(postgres_url))


def _read_catalog(url: str, tables: list[str]) -> dict[str, list[Any]]:
    with psycopg.connect(url) as connection:
        return {aspect: connection.execute(statement, [tables]).fetchall() for aspect, statement in _CATALOG.items()}


def _read_tables(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY 1"
        )
        return [row[0] for row in found.fetchall()]


def _read_rows(url: str, tables: list[str]) -> dict[str, list[Any]]:
    with psycopg.connect(url) as connection:
        return {
            table: connection.execute(f"SELECT t::text FROM {table} t ORDER BY 1".encode()).fetchall()
            for table in tables
        }


def _await_upgrades(url: str, processes: "list[subprocess.Popen[bytes]]") -> None:
    """Return once every process waits for the lock."""
    latest = time.monotonic() + _PROCESS_SECONDS
    with psycopg.connect(url, autocommit=True) as connection:
        while time.monotonic() < latest:
            waiting = connection.execute(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database())"
            ).fetchone()
            assert waiting is not None
            if waiting[0] == len(processes):
                return
            assert all(process.poll() is None for process in processes), "an upgrade ended without waiting"
            time.sleep(_LOOK_SECONDS)
    raise TimeoutError("the upgrades don't wait for each other")
