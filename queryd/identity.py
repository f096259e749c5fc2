"""What makes two requests the same, and the hash that stands in for SQL."""

import hashlib
import hmac
import json
from typing import Any

# Fields that do not change the result: when it was asked for.
_IGNORED = frozenset({"requested_at"})
_DEFAULTS: dict[str, Any] = {"roles": [], "parameters": {}, "output_format": "parquet", "delivery": "object"}
_IDS = frozenset({"query_id", "org_id", "user_id", "task_id", "saved_query_id"})


def hash_sql(sql: str, key: str | None) -> str:
    """SHA-256 of the SQL's UTF-8 bytes in hex; an HMAC with a key, as a plain hash of a short text can be guessed."""
    return _digest(sql.encode(), key).hex()


def fingerprint_request(fields: dict[str, Any], key: str | None) -> bytes:
    """What a request asks for, by field name and with defaults left out: an honest retry has the same fingerprint,
    even when it was written with another version of the schema."""
    asked = {
        name: value.lower() if name in _IDS and isinstance(value, str) else value
        for name, value in fields.items()
        if name not in _IGNORED and value is not None and value != _DEFAULTS.get(name)
    }
    # Parameters keep their types: JSON writes 1, 1.0, "1" and true differently.
    return _digest(json.dumps(asked, sort_keys=True, ensure_ascii=True).encode(), key)


def _digest(data: bytes, key: str | None) -> bytes:
    if key is None:
        return hashlib.sha256(data).digest()
    return hmac.new(key.encode(), data, hashlib.sha256).digest()
