"""Dead letters back to their topic, mended or as they are."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from db.connection import Connection
from db.data.replays import Standing, read_standings
from queryd.codec import EventTooLarge, decode_fields, decode_request, encode_fields
from queryd.contract import contract
from queryd.dead_letters import DEAD_PREFIX, DeadCode
from queryd.events import ErrorCode, Invalid, Mode, QueryRequested, Topic, parse_uuid
from queryd.headers import find_traceparent
from queryd.identity import fingerprint_request, hash_sql
from queryd.kafka.record import BY_KEY, Record
from queryd.registry import registry_in_use
from replay.copies import Copy, HeaderRules, Pairs, copy_headers, read_number, read_text
from replay.kinds import Judge, Note, ReplayName, Skip, Verdict
from replay.log import Window
from replay.requests import ReadRequest, changes_of_id, digest_key, find_request, read_request
from replay.selection import Selection

_EVENT = QueryRequested.__name__
_REDRIVES = f"{DEAD_PREFIX}redrives"
# Enough to tell two patches apart by accident.
_DIGEST_DIGITS = 16
_LANES = {mode.topic.value for mode in Mode}


class PatchRefused(ValueError):
    """The patch is no use: the sentence says why."""


@dataclass(frozen=True, slots=True)
class Patch:
    """New values of some of a request's fields. They may be SQL or parameters, and so are kept nowhere."""

    values: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def check(self) -> None:
        """Whether an otherwise valid request is one with these values; raises `PatchRefused`."""
        known = {each["name"] for each in contract().newest[_EVENT].parsed["fields"]}
        if unknown := sorted(self.values.keys() - known):
            raise PatchRefused(f"a request has no field {unknown[0]}; its fields are {', '.join(sorted(known))}")
        if "query_id" in self.values:
            raise PatchRefused("one query_id for all letters makes them conflicts; a letter gets a new id by itself")
        try:
            # Encoded first: what does not fit the schema can't be judged.
            encoded = encode_fields(_EXAMPLE | _statement(self.values) | dict(self.values), _EVENT, Mode.BATCH.topic)
            decode_request(encoded)
            self._check_kept(decode_fields(encoded, _EVENT))
        except (Invalid, EventTooLarge) as error:
            raise PatchRefused(
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


@dataclass(frozen=True, slots=True)
class LetterReplay:
    """Implements `ReplayKind`. A letter redriven `max_redrives` times stays where it is."""

    replay_id: str
    window: Window
    selection: Selection
    headers: HeaderRules = field(default_factory=HeaderRules)
    patch: Patch = field(default_factory=Patch)
    max_redrives: int = 3
    hash_key: str | None = field(default=None, repr=False)

    name = ReplayName.DEAD_LETTERS
    topics: Sequence[str] = (Topic.DEAD_LETTERS.value,)
    follows_all = False

    @property
    def options(self) -> Mapping[str, Any]:
        """See `ReplayKind`."""
        return {
            "max_redrives": self.max_redrives,
            "patched": sorted(self.patch.values),
            "patch_digest": self.patch.digest(self.hash_key),
            "hash_key": digest_key(self.hash_key),
            "registry": registry_in_use() is not None,
        }

    def begin(self) -> Judge:
        """See `ReplayKind`. Raises `PatchRefused`; so does the judge."""
        self.patch.check()
        return self._judge

    async def _judge(self, connection: Connection, records: Sequence[Record]) -> list[Verdict]:
        read = [read_request(record, read_text(record, f"{DEAD_PREFIX}topic")) for record in records]
        ids = {each.query_id for each in read if each.query_id is not None}
        standings = await read_standings(connection, ids | {name_anew(record) for record in records})
        return [self._judge_one(each, standings) for each in read]

    def _judge_one(self, read: ReadRequest, standings: Mapping[str, Standing]) -> Verdict:
        record, standing = read.record, standings.get(read.query_id or "")
        if not self._means(read, standing):
            return Verdict(record)
        topic = read_text(record, f"{DEAD_PREFIX}topic")
        if topic not in _LANES:
            return Verdict(record, skip=Skip.FOREIGN)
        if (skip := self._find_skip(read, standings)) is not None:
            return Verdict(record, skip=skip)
        if read.fields is None:
            return Verdict(record, self._copy(record, topic, record.value, None), Note.OWN_ID)
        return self._mend(read, topic, standing)

    def _means(self, read: ReadRequest, standing: Standing | None) -> bool:
        if not (self.window.holds(read.record.timestamp_ms) and self.selection.takes_record(read.record)):
            return False
        status = None if standing is None else standing.status
        code = read_text(read.record, f"{DEAD_PREFIX}code")
        if read.needs_registry:
            # What it says is not known: it may be meant, whatever is asked of its query.
            return not self.selection.error_codes or code in self.selection.error_codes
        return self.selection.takes_fields(read.fields) and self.selection.takes_standing(status, code)

    def _find_skip(self, read: ReadRequest, standings: Mapping[str, Standing]) -> Skip | None:
        standing = standings.get(read.query_id or "")
        if name_anew(read.record) in standings:
            return Skip.REDRIVEN
        if read_number(read.record, _REDRIVES) >= self.max_redrives:
            return Skip.PARKED
        if standing is not None and standing.status is None:
            return Skip.DELETED
        if read.needs_registry and not self._goes_back(read.record):
            return Skip.NO_REGISTRY
        # Its bytes are sent again as they are, or not at all.
        return Skip.UNREADABLE if read.fields is None and self.patch.values else None

    def _goes_back(self, record: Record) -> bool:
        """Whether a letter that takes a registry to be read is sent back as it is: what the executors could not read
        either, as long as nothing is asked of what it says."""
        undecodable = read_text(record, f"{DEAD_PREFIX}code") == DeadCode.UNDECODABLE
        return undecodable and not self.selection.looks_inside and not self.patch.values

    def _mend(self, read: ReadRequest, topic: str, standing: Standing | None) -> Verdict:
        assert read.fields is not None
        record, fields = read.record, read.fields | dict(self.patch.values)
        if "mode" in self.patch.values:
            topic = Mode(fields["mode"]).topic.value
        if read.request is not None and find_request(fields, topic) is None:
            raise PatchRefused(
                f"the new values make a valid request invalid: the letter at {record.partition}/{record.offset}"
            )
        if standing is not None and self._was_mended(fields, standing):
            return Verdict(record, skip=Skip.REDRIVEN)
        # An id that was accepted is its query's for good, and one that is no UUID is nobody's.
        renamed = standing is not None or read.query_id is None
        query_id = read.query_id
        if query_id is None or renamed:
            query_id = name_anew(record)
            fields["query_id"] = query_id
        if not renamed and not self.patch.values:
            return Verdict(record, self._copy(record, topic, record.value, query_id), Note.OWN_ID)
        try:
            value = encode_fields(fields, _EVENT, topic)
        except (Invalid, EventTooLarge) as error:
            raise PatchRefused(f"the letter at {record.partition}/{record.offset} can't be mended: {error}") from None
        copied = self._copy(record, topic, value, query_id, was=read.query_id if renamed else None, renamed=renamed)
        return Verdict(record, copied, Note.NEW_ID if renamed else Note.OWN_ID)

    def _was_mended(self, fields: Mapping[str, Any], standing: Standing) -> bool:
        """Whether its query is the letter with these new values: sent before, under the letter's own id."""
        accepted = standing.error_code != ErrorCode.INVALID_REQUEST
        return accepted and standing.fingerprint == fingerprint_request(dict(fields), self.hash_key)

    def _copy(
        self,
        record: Record,
        topic: str,
        value: bytes | None,
        query_id: str | None,
        *,
        was: str | None = None,
        renamed: bool = False,
    ) -> Copy:
        return Copy(
            topic=topic,
            partition=BY_KEY,
            key=query_id.encode() if renamed and query_id is not None else record.key,
            value=value,
            headers=self._headers(record, query_id if renamed else None),
            query_id=query_id,
            origin=find_traceparent(record.headers),
            was=was,
        )

    def _headers(self, record: Record, query_id: str | None) -> Pairs:
        """What it died of is over; how often it was sent again stays with it."""
        changed: dict[str, str | None] = {} if query_id is None else changes_of_id(query_id)
        changed |= {name: None for name, _ in record.headers if name.startswith(DEAD_PREFIX)}
        redrives = str(read_number(record, _REDRIVES) + 1)
        return [*copy_headers(record, self.replay_id, self.headers, changed), (_REDRIVES, redrives.encode())]


@dataclass(frozen=True, slots=True)
class LetterLine:
    """What is to be known of a letter without its request's text or values. `skip` says why it would not be sent."""

    partition: int
    offset: int
    buried_at: str | None
    code: str | None
    redrives: int
    query_id: str | None
    org_id: str | None
    reason: str | None
    skip: Skip | None


def describe_letter(verdict: Verdict) -> LetterLine:
    """One letter that was asked for."""
    record = verdict.record
    read = read_request(record)
    return LetterLine(
        partition=record.partition,
        offset=record.offset,
        buried_at=read_text(record, f"{DEAD_PREFIX}time"),
        code=read_text(record, f"{DEAD_PREFIX}code"),
        redrives=read_number(record, _REDRIVES),
        query_id=read.query_id,
        org_id=None if read.fields is None else _find_uuid(read.fields["org_id"]),
        reason=read_text(record, f"{DEAD_PREFIX}reason"),
        skip=verdict.skip,
    )


def _find_uuid(value: object) -> str | None:
    """An id that is one; anything else may be anything."""
    try:
        return parse_uuid(value, "org_id")
    except Invalid:
        return None


def name_anew(letter: Record) -> str:
    """The id that a letter's copy gets where its own is taken: of this letter, by its place and time, whatever replays
    it, so that it runs once. Two letters of one id are two requests."""
    place = f"{letter.topic}/{letter.partition}/{letter.offset}/{letter.timestamp_ms}"
    return str(uuid.uuid5(_NAMES, f"{place}/{(letter.key or b'').hex()}"))


# Of the ids that letters get.
_NAMES = uuid.uuid5(uuid.NAMESPACE_URL, "queryd:dead-letters")

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
