"""The schemas of the contract, every version, found by their fingerprint.

Source of the encoding: the Avro specification, "Single-object encoding" and "Parsing Canonical Form for Schemas".
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastavro.schema import fingerprint, parse_schema, to_parsing_canonical_form

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class SchemaVersion:
    """One version of one event's schema; `fingerprint` is its CRC-64-AVRO, 8 bytes, little-endian, and `text` what its
    file says."""

    name: str
    version: int
    fingerprint: bytes
    parsed: Any
    text: str


@dataclass(frozen=True, slots=True)
class Contract:
    """All versions of all events, by fingerprint, and the newest one of each event, by name."""

    by_fingerprint: dict[bytes, SchemaVersion]
    newest: dict[str, SchemaVersion]

    def versions(self, name: str) -> list[SchemaVersion]:
        """All versions of one event's schema, the oldest first."""
        known = [schema for schema in self.by_fingerprint.values() if schema.name == name]
        return sorted(known, key=lambda schema: schema.version)


def schema_folder() -> Path:
    """Where the `.avsc` files lie: inside an installed package, beside it in a checkout."""
    installed = _PACKAGE / "schemas"
    return installed if installed.is_dir() else _PACKAGE.parent / "schemas"


def load_contract(folder: Path) -> Contract:
    """Read `<Name>.v<N>.avsc` files; raises `ValueError` when two versions share one fingerprint."""
    by_fingerprint: dict[bytes, SchemaVersion] = {}
    newest: dict[str, SchemaVersion] = {}
    for path in sorted(folder.glob("*.avsc")):
        name, version = path.stem.split(".v")
        text = path.read_text(encoding="utf-8").strip()
        schema = json.loads(text)
        loaded = SchemaVersion(name, int(version), _fingerprint(schema), parse_plainly(schema), text)
        if loaded.fingerprint in by_fingerprint:
            raise ValueError(f"{path.name} has the fingerprint of another schema")
        by_fingerprint[loaded.fingerprint] = loaded
        if name not in newest or newest[name].version < loaded.version:
            newest[name] = loaded
    return Contract(by_fingerprint, newest)


@cache
def contract() -> Contract:
    """The contract that this package carries."""
    return load_contract(schema_folder())


def parse_plainly(schema: Any) -> Any:
    """A schema as fastavro takes it, without logical types; raises fastavro's errors for what is no schema."""
    # They would turn strings into UUIDs while decoding and so make one bad id look like broken bytes. Without them the
    # values arrive as the wire has them, and `queryd.codec` judges them field by field.
    return parse_schema(_without_logical_types(schema))


def _fingerprint(schema: Any) -> bytes:
    # fastavro prints the bytes in the order in which the wire has them.
    return bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))


def _without_logical_types(schema: Any) -> Any:
    match schema:
        case dict():
            return {key: _without_logical_types(value) for key, value in schema.items() if key != "logicalType"}
        case list():
            return [_without_logical_types(part) for part in schema]
        case _:
            return schema
