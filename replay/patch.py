"""New values of fields of dead letters."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from queryd.codec import EventTooLarge, decode_fields, decode_request, encode_fields
from queryd.contract import contract
from queryd.events import Invalid, Mode, QueryRequested
from queryd.identity import hash_sql
from replay.refused import ReplayRefused

_EVENT = QueryRequested.__name__
# Enough to tell two patches apart by accident.
_DIGEST_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Patch:
    """New values of some of a request's fields. They may be SQL or parameters, and so are kept nowhere."""

    values: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def check(self) -> None:
        """Whether an otherwise valid request is one with these values; raises `ReplayRefused`."""
        known = {each["name"] for each in contract().newest[_EVENT].parsed["fields"]}
        if unknown := sorted(self.values.keys() - known):
            raise ReplayRefused(f"a request has no field {unknown[0]}; its fields are {', '.join(sorted(known))}")
        if "query_id" in self.values:
            raise ReplayRefused("one query_id for all letters makes them conflicts; a letter gets a new id by itself")
        try:
            # Encoded first: what does not fit the schema can't be judged.
            encoded = encode_fields(_EXAMPLE | _statement(self.values) | dict(self.values), _EVENT, Mode.BATCH.topic)
            decode_request(encoded)
            self._check_kept(decode_fields(encoded, _EVENT))
        except (Invalid, EventTooLarge) as error:
            raise ReplayRefused(
                f"{self._find_misfit() or 'the new values'} would make every request invalid: {error}"
            ) from None

    def _check_kept(self, read: Mapping[str, Any]) -> None:
        """A text where a list is wanted becomes a list of letters, and a number too wide is rounded: what is read back
        must be what was given."""
        for name, value in self.values.items():
            if json.dumps(read[name], sort_keys=True) != json.dumps(value, sort_keys=True):
                raise Invalid(f"{name} would not stay as it is given; a list or an object is written as JSON")

    def _find_misfit(self) -> str | None:
        """The first field whose value alone does not fit, by name."""
        for name, value in self.values.items():
            try:
                encode_fields(_EXAMPLE | {name: value}, _EVENT, Mode.BATCH.topic)
            except (Invalid, EventTooLarge):
                return name
        return None

    def digest(self, key: str | None) -> str | None:
        """Tells patches apart without their values, as `hash_sql` does it; None of an empty one."""
        return hash_sql(json.dumps(self.values, sort_keys=True), key)[:_DIGEST_DIGITS] if self.values else None


# A request that nothing is wrong with, to try a patch on.
_EXAMPLE: dict[str, Any] = {
    each["name"]: each.get("default") for each in contract().newest[_EVENT].parsed["fields"]
} | {
    "query_id": str(uuid.UUID(int=0)),
    "org_id": str(uuid.UUID(int=0)),
    "mode": Mode.BATCH.value,
    "sql": "a statement",
}


def _statement(values: Mapping[str, Any]) -> dict[str, Any]:
    """A patch that names a saved query takes the place of SQL, and leaves it to the letter to have none."""
    return {"sql": None} if values.get("saved_query_id") is not None and values.get("sql") is None else {}
