"""Version 1 of each schema has exactly the fields, types and defaults that strangers rely on, written out here."""

import json
from pathlib import Path
from typing import Any

import pytest

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"

# A field is its type, and after " = " its default where it has one; `?` is an optional field, null by default.
FIELDS = {
    "QueryRequested": {
        "query_id": "uuid",
        "org_id": "uuid",
        "user_id": "uuid?",
        "roles": "array<string> = []",
        "mode": "string",
        "sql": "string?",
        "saved_query_id": "uuid?",
        "parameters": "map<null | boolean | long | double | string> = {}",
        "task_id": "uuid?",
        "output_format": 'string = "parquet"',
        "delivery": 'string = "object"',
        "engine": "string?",
        "timeout_seconds": "int?",
        "max_rows": "long?",
        "max_bytes_scanned": "long?",
        "requested_at": "timestamp-millis?",
    },
    "QueryCancelRequested": {
        "query_id": "uuid",
        "org_id": "uuid",
        "user_id": "uuid?",
        "reason": "string?",
        "requested_at": "timestamp-millis?",
    },
    "QueryStatusChanged": {
        "event_id": "uuid",
        "query_id": "uuid",
        "sequence": "int",
        "previous_status": "string?",
        "status": "string",
        "attempt": "int",
        "org_id": "uuid",
        "user_id": "uuid?",
        "task_id": "uuid?",
        "saved_query_id": "uuid?",
        "mode": "string",
        "sql_hash": "string",
        "output_format": "string?",
        "output_location": "string?",
        "files": "array<ResultFile{key: string, bytes: long, rows: long, etag: string, sha256: string?}> = []",
        "columns": "array<Column{name: string, type: string}> = []",
        "row_count": "long?",
        "bytes": "long?",
        "bytes_scanned": "long?",
        "duration_ms": "int?",
        "queued_ms": "long?",
        "engine": "string?",
        "inline_result": "bytes?",
        "expires_at": "timestamp-millis?",
        "error_code": "string?",
        "error_message": "string?",
        "occurred_at": "timestamp-millis",
    },
}

# What each logical type is on the wire.
_PHYSICAL = {"uuid": "string", "timestamp-millis": "long"}


def describe_fields(schema: dict[str, Any]) -> dict[str, str]:
    """Each field of a record in the notation of `FIELDS`, in the schema's order."""
    return {field["name"]: describe_field(field) for field in schema["fields"]}


def describe_field(field: dict[str, Any]) -> str:
    match field:
        case {"type": ["null", other], "default": None}:
            return f"{describe_type(other)}?"
        case {"type": declared, "default": default}:
            return f"{describe_type(declared)} = {json.dumps(default)}"
        case _:
            return describe_type(field["type"])


def describe_type(declared: Any) -> str:
    match declared:
        case str():
            return declared
        case [*branches]:
            return " | ".join(describe_type(branch) for branch in branches)
        case {"logicalType": str(logical), "type": physical}:
            assert physical == _PHYSICAL[logical]
            return logical
        case {"type": "array", "items": items}:
            return f"array<{describe_type(items)}>"
        case {"type": "map", "values": values}:
            return f"map<{describe_type(values)}>"
        case {"type": "record", "name": name}:
            return f"{name}{{{', '.join(f'{key}: {text}' for key, text in describe_fields(declared).items())}}}"
    raise AssertionError(f"a type that the contract has no word for: {declared}")


@pytest.mark.parametrize("name", FIELDS)
def test_version_1_has_exactly_the_frozen_fields(name: str) -> None:
    schema = json.loads((SCHEMAS / f"{name}.v1.avsc").read_text())
    assert (schema["name"], schema["namespace"]) == (name, "queryd")
    # As lists: a value's bytes follow the order of the fields.
    assert list(describe_fields(schema).items()) == list(FIELDS[name].items())


def test_the_folder_holds_these_schemas_and_nothing_else() -> None:
    assert {file.name.split(".")[0] for file in SCHEMAS.iterdir()} == set(FIELDS)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"name": "a", "type": "int", "default": 0}, "int = 0"),
        ({"name": "a", "type": ["null", "int"]}, "null | int"),
        ({"name": "a", "type": ["int", "null"], "default": 0}, "int | null = 0"),
    ],
)
def test_the_notation_tells_optional_fields_from_others(field: dict[str, Any], text: str) -> None:
    assert describe_field(field) == text
