"""Saved queries on a real Postgres: who sees them, what an edit and a removal leave, and how parameters are bound."""

import asyncio
import itertools
import json
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import psycopg
import pytest
import pytest_asyncio
from typer.testing import CliRunner

from access.saved_queries import NoSuchSavedQuery, edit_saved, find_saved, remove_saved, save_query
from access.visibility import InvalidRegistration
from consumers.executor.query import Query
from db.connection import DataPool, statement
from db.data.admission import SavedLookup, resolve_saved
from db.data.retention import forget_notes, opened_sweep
from db.data.saved_queries import EMPTY, LOCK, list_saved, list_visible
from db.migrations.upgrade import upgrade_data
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import Execution
from queryd.errors import NotSubmitted
from queryd.events import ErrorCode, OrgId, OutputFormat, Parameter, QueryId
from service.cli import app, query
from service.embedded.postgres import Postgres
from tests.integration.outputs import read_output
from tests.integration.queries import Worker, make_record, make_request, new_id, opened_pool, read_row
from tests.integration.recorded import recorded_statements

_MIB = 1024 * 1024
_TEXT = "SELECT $x AS x"


@pytest.fixture(scope="module")
def database(postgres_server: Postgres) -> Iterator[str]:
    """One migrated data database for all of these tests: each has orgs of its own."""
    name = f"saved_{uuid.uuid4().hex}"
    postgres_server.create_database(name)
    upgrade_data(postgres_server.url(name))
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[DataPool]:
    async with opened_pool(database) as opened:
        yield opened


@pytest.fixture
def worker(pool: DataPool) -> Worker:
    return Worker(pool)


async def _save(pool: DataPool, org_id: str, user_id: str, visibility: str = "org", query: str = _TEXT) -> str:
    saved = await save_query(pool, org_id=org_id, user_id=user_id, name="a name", query=query, visibility=visibility)
    return saved.id


async def _resolve(pool: DataPool, saved_query_id: str, org_id: str, user_id: str | None, *roles: str) -> str | None:
    async with pool.connection() as connection:
        found = await resolve_saved(connection, [SavedLookup(0, saved_query_id, org_id, user_id, roles)])
        return found.get(0)


async def _list(pool: DataPool, org_id: str, user_id: str | None, *roles: str) -> set[str]:
    async with pool.connection() as connection:
        return {saved.id for saved in await list_visible(connection, org_id, user_id, roles)}


# Visibility.


def _may_run(caller: tuple[str, str | None, tuple[str, ...]], owner: str, author: str, visibility: str) -> bool:
    """The rule once more, in words that no statement shares."""
    org_id, user_id, roles = caller
    if visibility == "public":
        return True
    if org_id != owner:
        return False
    if visibility == "private":
        return user_id == author
    return visibility == "org" or visibility.removeprefix("role:") in roles


async def test_whoever_may_run_a_query_finds_it_listed_and_nobody_else(pool: DataPool) -> None:
    orgs, users = [new_id(), new_id()], [new_id(), new_id(), None]
    saved = {
        (org, author, visibility): await _save(pool, org, author, visibility)
        for org in orgs
        for author in (users[0], users[1])
        for visibility in ("private", "org", "role:analyst", "public")
        if author is not None
    }
    callers = list(itertools.product(orgs, users, ((), ("analyst",), ("analyst2", "%", "role:analyst"))))
    for caller in callers:
        org_id, user_id, roles = caller
        expected = {each for key, each in saved.items() if _may_run(caller, *key)}
        assert await _list(pool, org_id, user_id, *roles) & set(saved.values()) == expected
        for each in saved.values():
            found = await _resolve(pool, each, org_id, user_id, *roles)
            assert found == (_TEXT if each in expected else None)


async def test_another_orgs_saved_query_costs_the_same_statements_as_none(worker: Worker) -> None:
    hidden = await _save(worker.pool, new_id(), new_id())
    org_id, user_id = new_id(), new_id()
    said = []
    for wanted in (hidden, new_id(), hidden):
        request = make_request(org_id=org_id, user_id=user_id, saved_query_id=wanted)
        with recorded_statements() as statements:
            await worker.admit(make_record(request))
        row = await read_row(worker.pool, request.query_id)
        assert row is not None
        assert (row.error_code, row.saved_query_id) == (ErrorCode.SAVED_QUERY_NOT_FOUND, None)
        said.append((list(statements), row.error_message))
    assert said[0] == said[1] == said[2]
    assert any("saved_queries" in statement for statement in said[0][0])


# Edits.


async def test_an_edit_keeps_what_it_does_not_name_and_tells_its_time(pool: DataPool) -> None:
    saved = await find_saved(pool, await _save(pool, new_id(), new_id()))
    renamed = await edit_saved(pool, saved.id, name="another", query=None, visibility=None)
    assert (renamed.name, renamed.query, renamed.visibility) == ("another", _TEXT, "org")
    assert (renamed.created_at, renamed.updated_at > saved.updated_at) == (saved.created_at, True)
    changed = await edit_saved(pool, saved.id, name=None, query="SELECT 2", visibility="public")
    assert (changed.name, changed.query, changed.visibility) == ("another", "SELECT 2", "public")
    assert changed.updated_at > renamed.updated_at
    for wrong in ({"name": " "}, {"query": "\n"}, {"visibility": "team"}):
        with pytest.raises(InvalidRegistration):
            await edit_saved(pool, saved.id, **({"name": None, "query": None, "visibility": None} | wrong))
    with pytest.raises(NoSuchSavedQuery):
        await edit_saved(pool, new_id(), name="x", query=None, visibility=None)


@pytest.mark.parametrize("change", ["edit", "remove"])
async def test_an_attempt_that_finds_another_text_than_was_admitted_has_none(worker: Worker, change: str) -> None:
    org_id, user_id = new_id(), new_id()
    saved = await _save(worker.pool, org_id, user_id)
    record = make_record(make_request(org_id=org_id, user_id=user_id, saved_query_id=saved))
    [first] = await worker.admit(record)
    if change == "edit":
        await edit_saved(worker.pool, saved, name=None, query="SELECT 2", visibility=None)
    else:
        assert not await remove_saved(worker.pool, saved)
    [again] = await worker.admit(record)
    assert isinstance(first, Query)
    assert isinstance(again, Query)
    assert (first.sql, again.sql) == (_TEXT, None)
    # Its row says still what it said at its admission.
    row = await read_row(worker.pool, first.facts.query_id)
    assert row is not None
    assert (row.status, row.saved_query_id, row.sql_hash) == ("Queued", saved, first.facts.sql_hash)


# Removals.


async def test_a_saved_query_that_nobody_ran_is_gone_when_it_is_removed(pool: DataPool) -> None:
    org_id, author = new_id(), new_id()
    saved = await _save(pool, org_id, author)
    assert await remove_saved(pool, saved)
    assert await _read_rows(pool, saved) == []
    with pytest.raises(NoSuchSavedQuery):
        await remove_saved(pool, saved)


async def test_a_removed_saved_query_keeps_the_history_of_its_results_and_nothing_else(
    worker: Worker, database: str
) -> None:
    pool, org_id, author = worker.pool, new_id(), new_id()
    saved = await _save(pool, org_id, author, "public")
    ran = await worker.admit_new(org_id=org_id, user_id=author, saved_query_id=saved)
    assert not await remove_saved(pool, saved)
    row = await read_row(pool, ran.facts.query_id)
    assert row is not None
    assert row.saved_query_id == saved
    assert await _read_rows(pool, saved) == [("a name", "", "private")]
    # Not even its author sees or runs it.
    assert await _resolve(pool, saved, org_id, author) is None
    assert saved not in await _list(pool, org_id, author)
    async with pool.connection() as connection:
        assert saved not in {each.id for each in await list_saved(connection, org_id)}
    for change in (find_saved(pool, saved), remove_saved(pool, saved), _rename(pool, saved)):
        with pytest.raises(NoSuchSavedQuery):
            await change
    async with opened_sweep(database) as connection:
        assert (await forget_notes(connection))["saved_queries"] == 0
        await connection.execute("DELETE FROM query_results WHERE id = %s", [ran.facts.query_id])
        assert (await forget_notes(connection))["saved_queries"] == 1
    assert await _read_rows(pool, saved) == []


async def test_a_removal_waits_for_the_admission_that_has_seen_the_text(pool: DataPool) -> None:
    org_id, author = new_id(), new_id()
    saved = await _save(pool, org_id, author)
    async with pool.connection() as admission:
        found = await resolve_saved(admission, [SavedLookup(0, saved, org_id, author, ())])
        assert found == {0: _TEXT}
        removal = asyncio.create_task(remove_saved(pool, saved))
        await _until_somebody_waits(pool)
        assert not removal.done()
        await admission.execute(
            "INSERT INTO query_results (org_id, mode, status, sql_hash, saved_query_id) "
            "VALUES (%s, 'interactive', 'Queued', '', %s)",
            [org_id, saved],
        )
    assert not await removal
    assert await _read_rows(pool, saved) == [("a name", "", "private")]


async def test_an_admission_that_waits_for_a_removal_finds_nothing(pool: DataPool) -> None:
    org_id, author = new_id(), new_id()
    saved = await _save(pool, org_id, author)
    async with pool.connection() as removal:
        await removal.execute(LOCK, {"id": saved})
        await removal.execute(EMPTY, {"id": saved})
        admission = asyncio.create_task(_resolve(pool, saved, org_id, author))
        await _until_somebody_waits(pool)
        assert not admission.done()
    assert await admission is None


async def _rename(pool: DataPool, saved_query_id: str) -> None:
    await edit_saved(pool, saved_query_id, name="x", query=None, visibility=None)


async def _read_rows(pool: DataPool, saved_query_id: str) -> list[tuple[str, str, str]]:
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT name, query, visibility FROM saved_queries WHERE id = %s", [saved_query_id]
        )
        return [(name, text, visibility) for name, text, visibility in await cursor.fetchall()]


async def _until_somebody_waits(pool: DataPool) -> None:
    """Until a session of this database waits for another's lock."""
    # Each look is a transaction of its own: within one the activity stays as it was first seen.
    async with statement(pool) as connection:
        waiting = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"
        )
        async with asyncio.timeout(30):
            while (await (await connection.execute(waiting)).fetchone()) == (0,):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)


# Parameters.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DuckDBEngine]:
    made = DuckDBEngine(DuckDBSettings(512 * _MIB, 2, tmp_path_factory.mktemp("scratch")), 1)
    await made.start()
    yield made
    await made.close()


async def _run(engine: DuckDBEngine, folder: Path, text: str, parameters: dict[str, Parameter]) -> list[Any]:
    scratch = folder / uuid.uuid4().hex
    scratch.mkdir()
    execution = Execution(
        query_id=QueryId(new_id()),
        org_id=OrgId(new_id()),
        sql=text,
        parameters=parameters,
        relations=(),
        output_format=OutputFormat.JSON,
        scratch=scratch,
        timeout_seconds=60.0,
    )
    output = await engine.execute(execution)
    return [json.loads(line) for line in read_output(output).decode().splitlines()]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_parameter_is_a_value_whatever_it_holds(engine: DuckDBEngine, tmp_path: Path) -> None:
    text = "SELECT $x AS x, '$x' AS text, \"$y\" AS named, length($x) AS n -- $z\nFROM (SELECT '$x$x' AS \"$y\")"
    for value in (
        "",
        "'",
        "''",
        "'; SELECT 1; --",
        "' || (SELECT 'spliced') || '",
        '"$y"',
        "$x",
        "$1",
        "?",
        "{x}",
        "%(x)s",
        "$$ x $$",
        "\\'",
        "/* ",
        "--\n",
        ")",
        "NULL",
        "\u00e4\U0001f986",
    ):
        expected = {"x": value, "text": "$x", "named": "$x$x", "n": len(value)}
        assert await _run(engine, tmp_path, text, {"x": value}) == [expected]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_parameter_has_the_type_of_its_value(engine: DuckDBEngine, tmp_path: Path) -> None:
    values: dict[str, Parameter] = {"a": 1, "b": 2**63 - 1, "c": 1.5, "d": True, "e": "1", "f": "true"}
    text = "SELECT $a + 1 AS a, $b AS b, $c * 2 AS c, NOT $d AS d, $e || '1' AS e, $f || '' AS f, $g IS NULL AS g"
    [row] = await _run(engine, tmp_path, text, {**values, "g": None})
    assert row == {"a": 2, "b": 2**63 - 1, "c": 3.0, "d": False, "e": "11", "f": "true", "g": True}
    # A text that looks like a number does not become one, nor a keyword.
    [row] = await _run(engine, tmp_path, "SELECT $a = '1' AS same, $b AS b", {"a": "1", "b": "current_date"})
    assert row == {"same": True, "b": "current_date"}


# By the command.


@pytest.fixture
def environment(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings of a command, and a folder of its own."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    os.environ |= {
        "QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:9",
        "QUERYD_DATA_URL": database,
        "QUERYD_STATE_URL": database,
        "QUERYD_RESULTS_URL": "s3://queryd",
    }
    yield
    os.environ.clear()
    os.environ.update(before)


def _command(*arguments: str) -> tuple[int, str, str]:
    said = CliRunner().invoke(app, ["saved", *arguments])
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exception
    return said.exit_code, said.stdout, said.stderr


def _json(*arguments: str) -> Any:
    code, out, err = _command(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_the_command_saves_shows_changes_and_removes(database: str) -> None:
    org, user = new_id(), new_id()
    text = "SELECT $shop AS shop, sum(x) AS x FROM finance.sales WHERE day > $since"
    added = _json("add", "sales", "--org", org, "--user", user, "--sql", text, "--visibility", "role:clerk")
    assert added["parameters"] == ["shop", "since"]
    assert "query" not in added
    shown = _json("show", added["id"])
    assert (shown["query"], shown["parameters"]) == (text, ["shop", "since"])
    for caller, names in (
        (("--org", org), ["sales"]),
        (("--org", org, "--user", user), []),
        (("--org", org, "--user", user, "--role", "clerk"), ["sales"]),
        (("--org", new_id(), "--role", "clerk"), []),
    ):
        assert [each["name"] for each in _json("list", *caller) if each["id"] == added["id"]] == names
    changed = _json("edit", added["id"], "--sql", "SELECT $a", "--visibility", "org")
    assert (changed["parameters"], changed["visibility"], changed["name"]) == (["a"], "org", "sales")
    assert changed["updated_at"] > added["updated_at"]
    with psycopg.connect(database) as connection:
        connection.execute(
            "INSERT INTO query_results (org_id, mode, status, sql_hash, saved_query_id) "
            "VALUES (%s, 'batch', 'Succeeded', '', %s)",
            [org, added["id"]],
        )
    assert _json("remove", added["id"]) == {"removed": added["id"], "kept_for_results": True}
    for arguments in (("show",), ("remove",), ("edit", "--name", "x")):
        code, out, err = _command(arguments[0], added["id"], *arguments[1:])
        assert (code, out, err) == (1, "", "queryd: there is no saved query with that id\n")


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("DROP TABLE x", "rejected"),
        ("SELECT 1; SELECT 2", "rejected"),
        ("SELECT * FROM read_csv('/etc/passwd')", "rejected"),
        ("SELECT FROM WHERE", "syntax"),
        (" ", "needs a text"),
    ],
)
def test_a_text_that_could_never_run_is_not_saved(text: str, sentence: str) -> None:
    org = new_id()
    code, out, err = _command("add", "x", "--org", org, "--user", new_id(), "--sql", text)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err
    assert _json("list", "--org", org) == []
    saved = _json("add", "x", "--org", org, "--user", new_id(), "--sql", "SELECT 1", "--visibility", "org")
    assert _command("edit", saved["id"], "--sql", text)[0] == 2
    assert _json("show", saved["id"])["query"] == "SELECT 1"


class _Nowhere:
    """In place of a client: keeps what it is asked to publish, and can't."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, _config: dict[str, Any]) -> None:
        self.asked.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def submit(self, sql: str | None, **request: Any) -> None:
        self.asked.append({"sql": sql} | request)
        raise NotSubmitted("the test has no Kafka")


@pytest.mark.usefixtures("environment")
def test_running_one_is_submitting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "QueryClient", _Nowhere)
    monkeypatch.setattr(query, "require_topics", lambda _kafka: None)
    saved, org, user, task = (new_id() for _ in range(4))
    said = CliRunner().invoke(
        app,
        [
            "saved",
            *("run", saved, "--org", org, "--user", user, "--role", "a", "--role", "b", "--task", task),
            *("--param", "n=1", "--param", "text=it's", "--mode", "batch", "--format", "csv", "--wait"),
        ],
    )
    # The command line's own entry point makes one line of it.
    assert isinstance(said.exception, NotSubmitted)
    assert _Nowhere.asked == [
        {
            "sql": None,
            "org_id": org,
            "user_id": user,
            "roles": ["a", "b"],
            "query_id": None,
            "saved_query_id": saved,
            "parameters": {"n": 1, "text": "it's"},
            "mode": "batch",
            "task_id": task,
            "output_format": "csv",
            "delivery": "object",
            "timeout_seconds": None,
            "max_rows": None,
            "max_bytes_scanned": None,
        }
    ]
