"""Dead letters back to their topic, with new values of some fields or unchanged."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from db.connection import Connection
from db.data.replays import Standing, read_standings
from queryd.codec import EventTooLarge, encode_fields
from queryd.dead_letters import DEAD_PREFIX, DeadCode
from queryd.events import ErrorCode, Invalid, Mode, QueryRequested, parse_uuid
from queryd.headers import find_traceparent
from queryd.identity import fingerprint_request
from queryd.kafka.record import Record
from replay.copies import Copy, copy_headers, read_number, read_text
from replay.kinds import Note, Skip, Verdict
from replay.refused import ReplayRefused
from replay.requests import ReadRequest, find_request, headers_of_id, read_request
from replay.spec import ReplaySpec

_EVENT = QueryRequested.__name__
_REDRIVES = f"{DEAD_PREFIX}redrives"
_LANES = {mode.topic.value for mode in Mode}
# The namespace of the ids that `name_anew` makes.
_NAMES = uuid.uuid5(uuid.NAMESPACE_URL, "queryd:dead-letters")


class LetterJudge:
    """Copies dead letters to their topics. Raises `ReplayRefused`, and so does `judge`."""

    def __init__(self, spec: ReplaySpec, replay_id: str) -> None:
        spec.patch.check()
        self._spec = spec
        self._patch = spec.patch.values
        self._replay_id = replay_id

    async def judge(self, connection: Connection, records: Sequence[Record]) -> list[Verdict]:
        """See `Judge`."""
        read = [read_request(record, read_text(record, f"{DEAD_PREFIX}topic")) for record in records]
        ids = {each.query_id for each in read if each.query_id is not None}
        standings = await read_standings(connection, ids | {name_anew(record) for record in records})
        return [self._judge(each, standings) for each in read]

    def _judge(self, read: ReadRequest, standings: Mapping[str, Standing]) -> Verdict:
        record, standing = read.record, standings.get(read.query_id or "")
        if not self._is_asked_for(read, standing):
            return Verdict(record)
        topic = read_text(record, f"{DEAD_PREFIX}topic")
        if topic not in _LANES:
            return Verdict(record, skip=Skip.FOREIGN)
        if (skip := self._find_skip(read, standings)) is not None:
            return Verdict(record, skip=skip)
        if read.fields is None:
            return Verdict(record, self._copy(record, topic, record.value, None), Note.OWN_ID)
        return self._mend(read, read.fields | dict(self._patch), topic, standing)

    def _is_asked_for(self, read: ReadRequest, standing: Standing | None) -> bool:
        selection = self._spec.selection
        if not self._spec.takes_record(read.record):
            return False
        code = read_text(read.record, f"{DEAD_PREFIX}code")
        if read.needs_registry:
            # Its content is not known: it may be asked for, whatever is asked of its query.
            return not selection.error_codes or code in selection.error_codes
        status = None if standing is None else standing.status
        return selection.takes_fields(read.fields) and selection.takes_standing(status, code)

    def _find_skip(self, read: ReadRequest, standings: Mapping[str, Standing]) -> Skip | None:
        standing = standings.get(read.query_id or "")
        if name_anew(read.record) in standings:
            return Skip.REDRIVEN
        if read_number(read.record, _REDRIVES) >= self._spec.max_redrives:
            return Skip.PARKED
        if standing is not None and standing.status is None:
            return Skip.DELETED
        if read.needs_registry and not self._goes_back(read.record):
            return Skip.NO_REGISTRY
        # Its bytes are sent again unchanged, or not at all.
        return Skip.UNREADABLE if read.fields is None and self._patch else None

    def _goes_back(self, record: Record) -> bool:
        """True if a letter that only a registry makes readable is sent back unchanged: the executors could not read it
        either, and nothing is asked of its content."""
        undecodable = read_text(record, f"{DEAD_PREFIX}code") == DeadCode.UNDECODABLE
        return undecodable and not self._spec.selection.looks_inside and not self._patch

    def _mend(self, read: ReadRequest, fields: dict[str, Any], topic: str, standing: Standing | None) -> Verdict:
        record, query_id = read.record, read.query_id
        if "mode" in self._patch:
            topic = Mode(fields["mode"]).topic.value
        if read.request is not None and find_request(fields, topic) is None:
            raise ReplayRefused(
                f"the new values make a valid request invalid: the letter at {record.partition}/{record.offset}"
            )
        if standing is not None and self._was_mended(fields, standing):
            return Verdict(record, skip=Skip.REDRIVEN)
        if query_id is not None and standing is None and not self._patch:
            return Verdict(record, self._copy(record, topic, record.value, query_id), Note.OWN_ID)
        # An accepted id belongs to its query for good, and one that is no UUID to none.
        new_id = name_anew(record) if query_id is None or standing is not None else None
        try:
            value = encode_fields(fields if new_id is None else fields | {"query_id": new_id}, _EVENT, topic)
        except (Invalid, EventTooLarge) as error:
            raise ReplayRefused(f"the letter at {record.partition}/{record.offset} can't be mended: {error}") from None
        copied = self._copy(record, topic, value, query_id, new_id)
        return Verdict(record, copied, Note.OWN_ID if new_id is None else Note.NEW_ID)

    def _was_mended(self, fields: Mapping[str, Any], standing: Standing) -> bool:
        """True if its query is the letter with these new values: sent before, under the letter's own id."""
        accepted = standing.error_code != ErrorCode.INVALID_REQUEST
        return accepted and standing.fingerprint == fingerprint_request(dict(fields), self._spec.hash_key)

    def _copy(
        self, record: Record, topic: str, value: bytes | None, query_id: str | None, new_id: str | None = None
    ) -> Copy:
        # The reason of its death is over; the number of redrives stays with it.
        changed: dict[str, str | None] = {} if new_id is None else headers_of_id(new_id)
        changed |= {name: None for name, _ in record.headers if name.startswith(DEAD_PREFIX)}
        redrives = str(read_number(record, _REDRIVES) + 1)
        headers = copy_headers(record, self._replay_id, self._spec.headers, changed)
        return Copy(
            topic=topic,
            key=record.key if new_id is None else new_id.encode(),
            value=value,
            headers=[*headers, (_REDRIVES, redrives.encode())],
            query_id=new_id or query_id,
            origin=find_traceparent(record.headers),
            was=None if new_id is None else query_id,
        )


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
