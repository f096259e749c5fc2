"""The plans of the statements that services repeat: no plan reads a large table from its beginning to its end.

`QUERYD_TEST_ROWS` sets how many queries are stored; `make bench` measures with ten million. The plans are
generic, as in services: Postgres makes a plan once and uses it for arrays of any length.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from db import connection as connections
from db.data import (
    activity,
    admission,
    attempts,
    audit,
    cancellations,
    datasets,
    last_events,
    limits,
    outbox,
    retention,
    runs,
)
from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state import query_status
from db.state.platform import create_platform_tables
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline

_ROWS = int(os.environ.get("QUERYD_TEST_ROWS", "200000"))
# Filling ten million rows takes most of it.
_TIMEOUT_SECONDS = 30 * 60

_LARGE = frozenset(
    {"query_results", "query_runs", "query_cancellations", "deleted_ids", "pii_access_log", "query_status", "outbox"}
)
# They contain only queries that have not ended.
_SMALL_INDEXES = frozenset({"idx_query_runs_cancelled", "idx_query_runs_deadline"})
_DATA = {
    "insert queries": admission.INSERT_QUERIES,
    "resolve saved queries": admission.RESOLVE_SAVED,
    "read own limits": limits.READ_OWN,
    "find surplus": limits.FIND_SURPLUS,
    "claim": attempts.CLAIM,
    "read granted datasets": datasets.READ_GRANTED,
    "end": attempts.END,
    "renew": attempts.RENEW,
    "hand back": attempts.HAND_BACK,
    "read states": runs.READ_STATES,
    "read overdue": runs.READ_OVERDUE,
    "read canonical rows": runs.READ_CANONICAL,
    "list an org's queries": runs.LIST_CANONICAL,
    "read files": runs.READ_FILES,
    "read the last event": runs.READ_LAST_EVENT,
    "cancel": cancellations.CANCEL,
    "audit reads": audit.INSERT_READS,
    "read waiting events": outbox.READ_WAITING,
    "delete published events": outbox.DELETE_PUBLISHED,
    "read due results": retention.READ_DUE,
    "expire results": retention.EXPIRE,
    "read outlived queries": retention.READ_OUTLIVED,
    "lock rows": retention.LOCK_ROWS,
    "delete rows": retention.DELETE_ROWS,
    "judge objects": retention.JUDGE,
    "judge deleted queries' objects": retention.JUDGE_DELETED,
    "keep young queries' ids": retention.REMEMBER_YOUNG,
    "delete audit entries": retention.DELETE_AUDIT,
    "read an org's unfinished queries": retention.READ_UNFINISHED,
    "read an org's queries to delete": retention.READ_QUERIES,
    "read last events": last_events.READ,
    "watch waiting queries": activity.READ_WAITING.replace("__SCOPE__", ""),
    "watch running queries": activity.READ_RUNNING.replace("__SCOPE__", ""),
    "watch ended queries": activity.READ_ENDED.replace("__SCOPE__", ""),
    "watch queries": activity.READ_SEEN,
    "watch an org's queries": activity.READ_SEEN_OF_ORG,
}
_STATE = {
    "write statuses": query_status.UPSERT,
    "delete statuses": query_status.DELETE,
    "move tasks": query_status.MOVE_TASKS,
}

# 1% of the queries are Queued, which is a backlog of thousands on a large installation.
_FILL_DATA = """
INSERT INTO query_results (id, org_id, user_id, mode, status, sql_hash, output_format, created_at)
SELECT md5(i::text)::uuid, md5((i %% 1000)::text)::uuid, md5((i %% 5000)::text)::uuid, 'interactive',
       CASE WHEN i %% 100 = 0 THEN 'Queued' ELSE 'Succeeded' END, md5(i::text), 'parquet',
       now() - i * interval '1 second'
FROM generate_series(1, %(rows)s) AS t(i);

INSERT INTO query_runs (query_id, org_id, fingerprint, topic, partition, record_offset, traceparent, sequence,
                        queued_at, deadline, ended_at, expires_at, files, last_event)
SELECT id, org_id, '', 'query.requests.interactive', 0, 0, '', 1, created_at,
       CASE WHEN status = 'Queued' THEN now() + interval '1 hour' END,
       CASE WHEN status <> 'Queued' THEN created_at END,
       CASE WHEN status <> 'Queued' THEN created_at + interval '7 days' END,
       CASE WHEN status = 'Queued' THEN '[]' ELSE '[{"key": "result.parquet"}]' END::jsonb, ''
FROM query_results;

INSERT INTO outbox (shard, event_id, query_id, type, payload, headers)
SELECT 0, gen_random_uuid(), id, 'QueryStatusChanged', '', '{}' FROM query_results LIMIT %(rows)s / 10;

INSERT INTO pii_access_log (org_id, user_id, dataset, record_id)
SELECT org_id, user_id, 'people', id FROM query_results LIMIT %(rows)s / 10;

INSERT INTO query_cancellations (query_id, org_id) SELECT id, org_id FROM query_results LIMIT %(rows)s / 10;
INSERT INTO deleted_ids (query_id) SELECT gen_random_uuid() FROM generate_series(1, %(rows)s / 10);
"""
_FILL_STATE = """
INSERT INTO query_status (query_id, org_id, mode, status, sequence, attempt, occurred_at)
SELECT md5(i::text)::uuid, md5((i %% 1000)::text)::uuid, 'interactive', 'Succeeded', 3, 1, now()
FROM generate_series(1, %(rows)s) AS t(i)
"""


@pytest.fixture(scope="module")
def filled(lifeline: Lifeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A server of these tests alone, for the tables are large."""
    folder = tmp_path_factory.mktemp("plans")
    server = Postgres(folder / "postgres", folder / "postgres.log", lifeline)
    server.start()
    try:
        for name in ("data", "state"):
            server.create_database(name)
        create_platform_tables(server.url("state"))
        upgrade_data(server.url("data"))
        upgrade_state(server.url("state"))
        for name, statements in (("data", _FILL_DATA), ("state", _FILL_STATE)):
            with psycopg.connect(server.url(name), autocommit=True) as connection:
                for statement in statements.split(";\n"):
                    connection.execute(statement.encode(), {"rows": _ROWS})
                connection.execute("VACUUM ANALYZE")
        yield server
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(_TIMEOUT_SECONDS)
@pytest.mark.parametrize("name", _DATA)
def test_no_statement_of_the_services_reads_a_whole_table(filled: Postgres, name: str) -> None:
    assert not list(_find_whole_reads(_explain(filled.url("data"), _DATA[name])))


@pytest.mark.slow
@pytest.mark.timeout(_TIMEOUT_SECONDS)
@pytest.mark.parametrize("name", _STATE)
def test_no_statement_of_the_projector_reads_a_whole_table(filled: Postgres, name: str) -> None:
    assert not list(_find_whole_reads(_explain(filled.url("state"), _STATE[name])))


@pytest.mark.slow
@pytest.mark.timeout(_TIMEOUT_SECONDS)
def test_a_plan_that_reads_a_whole_table_is_found(filled: Postgres) -> None:
    for statement in ("SELECT count(*) FROM query_runs", "SELECT 1 FROM query_results q JOIN query_runs r ON true"):
        assert list(_find_whole_reads(_explain(filled.url("data"), statement)))


def _explain(url: str, statement: str) -> Any:
    """The statement's generic plan, with the settings of services' connections."""
    numbers: dict[str, int] = {}

    def number(found: "re.Match[str]") -> str:
        return f"${numbers.setdefault(found[1], len(numbers) + 1)}"

    text = re.sub(r"%\((\w+)\)s", number, statement).replace("%%", "%")
    with psycopg.connect(connections.conninfo(url, "plans")) as connection:
        row = connection.execute(f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {text}".encode(), prepare=False).fetchone()
    assert row is not None
    return json.loads(row[0])[0]["Plan"] if isinstance(row[0], str) else row[0][0]["Plan"]


def _find_whole_reads(plan: dict[str, Any], *, limited: bool = False) -> Iterator[str]:
    """The nodes that read all rows of a large table. A `limited` scan of an index ends after some rows."""
    kind, relation = plan["Node Type"], plan.get("Relation Name")
    is_scan = kind in ("Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Heap Scan") and relation in _LARGE
    has_condition = bool(plan.keys() & {"Index Cond", "Recheck Cond"})
    is_short = "Index Name" in plan and (limited or plan["Index Name"] in _SMALL_INDEXES)
    if is_scan and not has_condition and not is_short:
        yield f"{kind} on {relation}"
    for child in plan.get("Plans", ()):
        yield from _find_whole_reads(child, limited=kind == "Limit")
