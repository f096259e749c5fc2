"""What is to be replayed: which records, what their copies keep, and what is changed in them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from queryd.events import Mode, Topic
from queryd.kafka.record import Record
from queryd.registry import registry_in_use
from replay.log import Window
from replay.patch import Patch

_NOT_ASKED: tuple[object, ...] = (None, frozenset())


class ReplayName(StrEnum):
    """What is replayed; also the scope on which one replay at a time is active."""

    REQUESTS = "requests"
    DEAD_LETTERS = "dead-letters"
    STATUS = "status"
    STATE_DB = "state-db"


@dataclass(frozen=True, slots=True)
class Selection:
    """Which records of a window to take: all given conditions must hold; of several values of one, any.

    Ids are canonical UUID strings. `headers` are pairs of name and value. `statuses` and `error_codes` are the query's,
    from the database or a status event; of a dead letter the code is the letter's own.
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
        """True if only the decoded event, or the query of its id, can answer."""
        return any((self.org_id, self.user_id, self.mode, self.statuses))

    def takes_record(self, record: Record) -> bool:
        """Compare key and headers."""
        if self.keys and (record.key or b"").decode("utf-8", "replace") not in self.keys:
            return False
        present = {(name, (value or b"").decode("utf-8", "replace")) for name, value in record.headers}
        return self.headers <= present

    def takes_fields(self, fields: Mapping[str, Any] | None) -> bool:
        """Compare the decoded event; None is one that can't be read."""
        asked = {"org_id": self.org_id, "user_id": self.user_id, "mode": self.mode}
        wanted = {name: value for name, value in asked.items() if value is not None}
        if not wanted:
            return True
        return fields is not None and all(_fold(fields.get(name)) == value for name, value in wanted.items())

    def takes_standing(self, status: str | None, error_code: str | None) -> bool:
        """Compare the query's status and error code; None is unknown."""
        if self.statuses and status not in self.statuses:
            return False
        return not self.error_codes or error_code in self.error_codes


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """Which headers a copy keeps: all but `denied`, or only those `allowed` if any is named. Names in lower case."""

    allowed: frozenset[str] = frozenset()
    denied: frozenset[str] = frozenset()

    def keeps(self, name: str) -> bool:
        """True if a header of that name stays; names are compared without regard to case."""
        lower = name.lower()
        return lower not in self.denied and (not self.allowed or lower in self.allowed)


@dataclass(frozen=True, slots=True)
class ReplaySpec:
    """What is to be replayed. `as_new` is for requests, `patch` and `max_redrives` are for dead letters.

    `hash_key` is that of the requests' fingerprints.
    """

    name: ReplayName
    window: Window = field(default_factory=Window)
    selection: Selection = field(default_factory=Selection)
    headers: HeaderRules = field(default_factory=HeaderRules)
    lanes: tuple[Mode, ...] = tuple(Mode)
    as_new: bool = False
    patch: Patch = field(default_factory=Patch)
    max_redrives: int = 3
    hash_key: str | None = field(default=None, repr=False)

    @property
    def topics(self) -> Sequence[str]:
        """The topics of its records."""
        match self.name:
            case ReplayName.REQUESTS:
                return [lane.topic.value for lane in self.lanes]
            case ReplayName.DEAD_LETTERS:
                return [Topic.DEAD_LETTERS.value]
            case ReplayName.STATUS | ReplayName.STATE_DB:
                return [Topic.STATUS.value]

    @property
    def options(self) -> dict[str, Any]:
        """What else makes it another plan, as JSON without SQL or values."""
        own: dict[str, Any]
        match self.name:
            case ReplayName.REQUESTS:
                own = {"as_new": self.as_new}
            case ReplayName.DEAD_LETTERS:
                patched, digest = sorted(self.patch.values), self.patch.digest(self.hash_key)
                own = {"max_redrives": self.max_redrives, "patched": patched, "patch_digest": digest}
            case ReplayName.STATUS | ReplayName.STATE_DB:
                return {}
        return own | {"hash_key": _digest_key(self.hash_key), "registry": registry_in_use() is not None}

    @property
    def asked(self) -> dict[str, dict[str, Any]]:
        """Window, selection and header rules as JSON, without what was not asked for."""
        parts = {
            "window": asdict(self.window),
            "selection": asdict(self.selection),
            "headers": asdict(self.headers),
        }
        return {
            name: {key: _to_json(value) for key, value in part.items() if value not in _NOT_ASKED}
            for name, part in parts.items()
        }

    @classmethod
    def read(cls, name: str, plan: Mapping[str, Any], patch: Patch, hash_key: str | None) -> Self:
        """The spec in a plan's row. The row does not contain the patch and the key: they are given again."""
        asked, options = plan["asked"], plan["options"]
        window: dict[str, Any] = {
            key: datetime.fromisoformat(value) if key in ("since", "until") else _from_json(value)
            for key, value in asked["window"].items()
        }
        return cls(
            name=ReplayName(name),
            window=Window(**window),
            selection=Selection(**{key: _from_json(value) for key, value in asked["selection"].items()}),
            headers=HeaderRules(**{key: _from_json(value) for key, value in asked["headers"].items()}),
            lanes=tuple(mode for mode in Mode if mode.topic.value in plan["topics"]),
            as_new=bool(options.get("as_new", False)),
            patch=patch,
            max_redrives=int(options.get("max_redrives", 0)),
            hash_key=hash_key,
        )

    def takes_record(self, record: Record) -> bool:
        """True if the record's time, key and headers are asked for."""
        return self.window.holds(record.timestamp_ms) and self.selection.takes_record(record)


def _digest_key(key: str | None) -> str | None:
    """Tells the keys of fingerprints apart: under another one nothing is what it was."""
    return None if key is None else hashlib.sha256(f"queryd replay {key}".encode()).hexdigest()[:8]


def _fold(value: Any) -> Any:
    """Ids are the same in either case."""
    return value.lower() if isinstance(value, str) else value


def _to_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, frozenset):
        return sorted(list(each) if isinstance(each, tuple) else each for each in value)
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return frozenset(tuple(each) if isinstance(each, list) else each for each in value)
    return value
