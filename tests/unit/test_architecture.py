"""What the folder tree promises, read from the code itself."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from telemetry.events import LogEvent

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "queryd",
    "telemetry",
    "processes",
    "db",
    "access",
    "results",
    "engines",
    "producers",
    "consumers",
    "replay",
    "service",
)

# Statements, by the words that only a statement has side by side; upper case, as all SQL of ours is written.
SQL = re.compile(
    r"\b(SELECT\s+\S.*\bFROM\b|SELECT\s+(\*|\d|count\(|pg_)|INSERT\s+INTO|UPDATE\s+\w+\s+(\w+\s+)?SET|DELETE\s+FROM|WITH\s+\w+\s+AS\s*\("
    r"|(CREATE|ALTER|DROP|TRUNCATE|COMMENT\s+ON)\s+(TABLE|INDEX|SCHEMA|VIEW|TYPE|ROLE|USER|EXTENSION|FUNCTION)"
    r"|COPY\s+[\w(\"{]|(LISTEN|NOTIFY)\s+\w|ATTACH\s+|GRANT\s+\w+\s+ON|FOR\s+UPDATE|ON\s+CONFLICT)",
    re.DOTALL,
)
# Where DuckDB's SQL lives: the engine that runs it, the comparison of results, and what the demo asks.
DUCKDB_SQL = ("engines/", "replay/result_difference.py", "service/demo/questions.py")
# Where people are spoken to. Everywhere else what there is to say is a log event.
SPOKEN = ("service/cli/", "service/demo/", "service/up.py", "service/run.py")
# structlog's loggers are told apart from the standard library's by how a module makes its own.
_STRUCTLOG = "structlog.get_logger"
_LEVELS = {"debug", "info", "warning", "error", "critical", "exception", "log"}


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), _parse(path)


def _docstrings(tree: ast.Module) -> set[int]:
    """The ids of the constants that are docstrings, or stand alone as one does."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def _strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every string of a module that is no docstring: of an f-string all its constant parts, joined."""
    docstrings = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_in_one_sentence_what_it_answers(room: str) -> None:
    said = ast.get_docstring(_parse(ROOT / room / "__init__.py"))
    assert said is not None
    question, _, answer = said.partition("? ")
    assert "\n" not in said
    assert answer.endswith(".")
    assert "." not in answer[:-1]
    assert question[0].isupper()


def test_every_folder_of_code_is_a_package_that_says_what_it_is() -> None:
    for name, tree in _modules():
        folder = (ROOT / name).parent
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} has no __init__.py"
        assert ast.get_docstring(tree), f"{name} has no docstring"


def test_no_sql_outside_db() -> None:
    found = [
        f"{name}:{line}"
        for name, tree in _modules()
        if not name.startswith(("db/", *DUCKDB_SQL))
        for line, text in _strings(tree)
        if SQL.search(text)
    ]
    assert found == []


def test_the_search_for_sql_finds_it_where_it_is() -> None:
    for name in ("db/data/attempts.py", "db/data/runs.py", "db/state/query_status.py", "service/demo/questions.py"):
        assert any(SQL.search(text) for _, text in _strings(_parse(ROOT / name))), name
    assert not SQL.search("the database does not answer, select another with `queryd doctor`")


def test_log_event_names_come_from_telemetry_alone() -> None:
    seen: set[str] = set()
    for name, tree in _modules():
        loggers = {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(_STRUCTLOG)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in _calls(tree):
            function = call.func
            if not (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and function.value.id in loggers
                and function.attr in _LEVELS
            ):
                continue
            event = ast.unparse(call.args[0]) if call.args else ""
            assert event.startswith("LogEvent."), f"{name}:{call.lineno} logs {event}"
            seen.add(event.removeprefix("LogEvent."))
    assert seen
    assert seen <= {event.name for event in LogEvent}


def test_a_log_events_value_is_its_name() -> None:
    assert all(event.value == event.name.lower() for event in LogEvent)


def test_nothing_prints_but_what_speaks_to_people() -> None:
    found = [
        f"{name}:{call.lineno}"
        for name, tree in _modules()
        if not name.startswith(SPOKEN)
        for call in _calls(tree)
        if ast.unparse(call.func) in {"print", "sys.stdout.write", "sys.stderr.write"}
    ]
    assert found == []


def test_the_public_package_imports_none_of_the_rooms() -> None:
    others = set(ROOMS) - {"queryd"}
    for name, tree in _modules():
        if not name.startswith("queryd/"):
            continue
        imported = {
            module.partition(".")[0]
            for node in ast.walk(tree)
            for module in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        assert not imported & others, name


def test_schemas_hold_one_file_per_event_and_version_and_nothing_else() -> None:
    names = sorted(path.name for path in (ROOT / "schemas").iterdir())
    assert names
    assert all(re.fullmatch(r"Query[A-Za-z]+\.v[1-9][0-9]*\.avsc", name) for name in names), names
