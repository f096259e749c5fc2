"""Which records of a window are meant."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from queryd.kafka.record import Record


@dataclass(frozen=True, slots=True)
class Selection:
    """All that are given must hold; of several values of one, any. Ids are canonical UUID strings.

    `headers` are pairs of name and value. `statuses` and `error_codes` are the query's, as the database has them or as
    a status event says; of dead letters the code is the letter's own.
    """

    keys: frozenset[str] = frozenset()
    headers: frozenset[tuple[str, str]] = frozenset()
    org_id: str | None = None
    user_id: str | None = None
    mode: str | None = None
    statuses: frozenset[str] = frozenset()
    error_codes: frozenset[str] = frozenset()

    @property
    def looks_inside(self) -> bool:
        """Whether something is asked that only the decoded event, or the query of its id, can answer."""
        return any((self.org_id, self.user_id, self.mode, self.statuses))

    def takes_record(self, record: Record) -> bool:
        """Whether key and headers are as asked for."""
        if self.keys and (record.key or b"").decode("utf-8", "replace") not in self.keys:
            return False
        present = {(name, (value or b"").decode("utf-8", "replace")) for name, value in record.headers}
        return self.headers <= present

    def takes_fields(self, fields: Mapping[str, Any] | None) -> bool:
        """Whether the decoded event is as asked for; None is one that can't be read."""
        asked = {"org_id": self.org_id, "user_id": self.user_id, "mode": self.mode}
        wanted = {name: value for name, value in asked.items() if value is not None}
        if not wanted:
            return True
        return fields is not None and all(_fold(fields.get(name)) == value for name, value in wanted.items())

    def takes_standing(self, status: str | None, error_code: str | None) -> bool:
        """Whether the query stands as asked for; None is what is not known of it."""
        if self.statuses and status not in self.statuses:
            return False
        return not self.error_codes or error_code in self.error_codes


def _fold(value: Any) -> Any:
    """Ids are the same in either case."""
    return value.lower() if isinstance(value, str) else value
