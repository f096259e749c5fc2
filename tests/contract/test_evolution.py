"""The schemas evolve FULL_TRANSITIVE: every version can read what any other version of the same name wrote."""

import json
import re
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import avro.schema
import pytest
from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType
from fastavro.schema import to_parsing_canonical_form

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"
HISTORIES = Path(__file__).resolve().parent / "histories"

_FILE_NAME = re.compile(r"(?P<name>[A-Z][A-Za-z]*)\.v(?P<version>[1-9][0-9]*)\.avsc")

# The avro package types this class only in part.
_CHECKER: Any = ReaderWriterCompatibilityChecker

Versions = dict[int, dict[str, Any]]


def find_violations(folder: Path) -> list[str]:
    """Every rule of the contract that the folder's schemas break, as one sentence each."""
    violations = []
    histories: dict[str, Versions] = {}
    for file in sorted(folder.iterdir()):
        match = _FILE_NAME.fullmatch(file.name)
        if match is None:
            violations.append(f"{file.name} is not named <Name>.v<N>.avsc")
            continue
        schema = json.loads(file.read_text())
        if (schema["name"], schema.get("namespace")) != (match["name"], "queryd"):
            violations.append(f"{file.name} holds {schema.get('namespace')}.{schema['name']}")
        violations += [f"{file.name}: {where} has no doc" for where in _find_undocumented(schema)]
        histories.setdefault(match["name"], {})[int(match["version"])] = schema
    for name, versions in histories.items():
        violations += _judge_history(name, versions)
    return violations


def _find_undocumented(schema: Any, where: str = "") -> Iterator[str]:
    """The path of every record and field without a doc."""
    match schema:
        case {"type": "record", "name": name, "fields": fields}:
            if not schema.get("doc"):
                yield f"{where}{name}"
            for field in fields:
                path = f"{where}{name}.{field['name']}"
                if not field.get("doc"):
                    yield path
                yield from _find_undocumented(field["type"], f"{path}: ")
        case {"items": inner} | {"values": inner}:
            yield from _find_undocumented(inner, where)
        case [*branches]:
            for branch in branches:
                yield from _find_undocumented(branch, where)


def _judge_history(name: str, versions: Versions) -> list[str]:
    violations = []
    if sorted(versions) != list(range(1, len(versions) + 1)):
        violations.append(f"{name} has the versions {sorted(versions)}, which are not consecutive")
    parsed = {number: avro.schema.parse(json.dumps(schema)) for number, schema in versions.items()}
    forms = {number: to_parsing_canonical_form(schema) for number, schema in versions.items()}
    for reader, writer in permutations(versions, 2):
        verdict = _CHECKER().get_compatibility(parsed[reader], parsed[writer])
        if verdict.compatibility is not SchemaCompatibilityType.compatible:
            violations.append(f"{name}: version {reader} can't read version {writer}: {sorted(verdict.messages)}")
        if reader < writer and forms[reader] == forms[writer]:
            # The fingerprint of the encoding could not tell them apart.
            violations.append(f"{name}: versions {reader} and {writer} have the same canonical form")
    return violations


def test_the_schemas_keep_the_contract() -> None:
    assert find_violations(SCHEMAS) == []


def test_an_added_optional_field_passes() -> None:
    assert find_violations(HISTORIES / "optional_field") == []


@pytest.mark.parametrize(
    ("history", "finding"),
    [
        ("required_field", "version 2 can't read version 1"),
        ("removed_field", "version 1 can't read version 2"),
        ("changed_type", "version 2 can't read version 1"),
        # int to long can be read forwards only.
        ("widened_type", "version 1 can't read version 2"),
        # Each version can be read by its neighbours, the last one not by the first.
        ("only_transitively", "version 3 can't read version 1"),
        ("same_form", "versions 1 and 2 have the same canonical form"),
        ("hole", "not consecutive"),
        ("no_doc", "Sample.size has no doc"),
    ],
)
def test_a_broken_history_is_found(history: str, finding: str) -> None:
    violations = find_violations(HISTORIES / history)
    assert any(finding in violation for violation in violations), violations


def test_a_file_by_another_name_is_found(tmp_path: Path) -> None:
    sample = (HISTORIES / "optional_field" / "Sample.v1.avsc").read_text()
    (tmp_path / "Sample.avsc").write_text(sample)
    (tmp_path / "Other.v1.avsc").write_text(sample)
    assert find_violations(tmp_path) == [
        "Other.v1.avsc holds queryd.Sample",
        "Sample.avsc is not named <Name>.v<N>.avsc",
    ]
