"""The table of rules: all are in it, and the tests that it names exist and are run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "consumer-rules.md"
RULES = 25
# Every test of these modules holds a rule, so each is named.
MODULES = (
    "tests/integration/test_consumer_rules.py",
    "tests/integration/test_executor_rules.py",
    "tests/integration/test_outbox_rules.py",
    "tests/unit/test_consumer_properties.py",
    "tests/unit/test_producers.py",
    "tests/unit/test_shutdown.py",
)
_ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
_NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_NONE = re.compile(r"none: \w.{20,}")


def _read_rows() -> dict[int, str]:
    """What holds each rule, by its number, as the table has it."""
    rows = _ROW.findall(TABLE.read_text(encoding="utf-8"))
    assert len(rows) == len({number for number, _, _ in rows}), "a rule stands twice"
    return {int(number): held_by for number, _, held_by in rows}


def _named() -> set[tuple[str, str]]:
    """The tests that the page names, each as module and name."""
    return set(_NODE.findall(TABLE.read_text(encoding="utf-8")))


def _tests_of(module: str) -> dict[str, list[str]]:
    """The tests of a module with the marks and decorators that they carry, the module's own among them."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    everywhere = [ast.unparse(node) for node in tree.body if "pytestmark" in _targets(node)]
    found: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            found[node.name] = everywhere + [ast.unparse(decorator) for decorator in node.decorator_list]
        for name in _targets(node):
            if name.startswith("Test"):
                found[name] = everywhere
    return found


def _targets(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_every_rule_is_in_the_table_and_held_by_a_test_or_says_why_by_none() -> None:
    rows = _read_rows()
    assert sorted(rows) == list(range(1, RULES + 1))
    for number, held_by in rows.items():
        assert _NODE.search(held_by) or _NONE.fullmatch(held_by.strip()), f"rule {number}: {held_by}"


@pytest.mark.parametrize("module", sorted({module for module, _ in _named()}))
def test_the_tests_that_hold_the_rules_exist_and_are_run(module: str) -> None:
    tests = _tests_of(module)
    for name in (name for named_module, name in _named() if named_module == module):
        assert name in tests, f"{module} has no {name}"
        # `needs_kafka` is a condition, and the only one: CI has an Apache Kafka.
        assert not [mark for mark in tests[name] if re.search(r"\b(skip|skipif|xfail)\b", mark)], name


@pytest.mark.parametrize("module", MODULES)
def test_no_test_of_a_rule_is_missing_from_the_table(module: str) -> None:
    assert {(module, name) for name in _tests_of(module)} <= _named()


def test_the_page_is_linked_from_what_is_promised() -> None:
    assert "(consumer-rules.md)" in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_a_test_that_is_gone_would_be_noticed() -> None:
    assert "test_that_is_not_there" not in _tests_of(MODULES[0])
    assert any("needs_kafka" in mark for marks in _tests_of(MODULES[0]).values() for mark in marks)
