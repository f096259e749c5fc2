"""Requests again: as they were, for whoever has lost what came of them; or as new queries, for another answer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from db.connection import Connection
from db.data.replays import Standing, read_standings
from queryd.codec import EventTooLarge, NoRegistry, Undecodable, decode_fields, encode, to_request
from queryd.contract import contract
from queryd.events import ErrorCode, Invalid, Mode, QueryId, QueryRequested, Status, parse_uuid
from queryd.headers import find_traceparent
from queryd.identity import fingerprint_request
from queryd.kafka.record import BY_KEY, Record
from queryd.registry import registry_in_use
from replay.copies import Copy, HeaderRules, copy_as_it_is, copy_headers, mint
from replay.kinds import Judge, Note, ReplayName, Skip, Verdict
from replay.log import Window
from replay.selection import Selection

_EVENT = QueryRequested.__name__


@dataclass(frozen=True, slots=True)
class RequestReplay:
    """Implements `ReplayKind`. `as_new` gives each copy the id `uuid5(replay_id, query_id)`.

    `hash_key` is that of the requests' fingerprints.
    """

    replay_id: str
    lanes: tuple[Mode, ...]
    window: Window
    selection: Selection
    headers: HeaderRules = field(default_factory=HeaderRules)
    as_new: bool = False
    hash_key: str | None = field(default=None, repr=False)

    name = ReplayName.REQUESTS
    follows_all = False

    @property
    def topics(self) -> Sequence[str]:
        """See `ReplayKind`."""
        return [lane.topic.value for lane in self.lanes]

    @property
    def options(self) -> Mapping[str, Any]:
        """See `ReplayKind`."""
        return {
            "as_new": self.as_new,
            "hash_key": digest_key(self.hash_key),
            "registry": registry_in_use() is not None,
        }

    def begin(self) -> Judge:
        """See `ReplayKind`."""
        return self._judge

    async def _judge(self, connection: Connection, records: Sequence[Record]) -> list[Verdict]:
        read = [read_request(record) for record in records]
        standings = await read_standings(connection, {each.query_id for each in read if each.query_id is not None})
        return [self._judge_one(each, standings.get(each.query_id or "")) for each in read]

    def _judge_one(self, read: "ReadRequest", standing: Standing | None) -> Verdict:
        if not self._means(read, standing):
            return Verdict(read.record)
        if (skip := self._find_skip(read, standing)) is not None:
            return Verdict(read.record, skip=skip)
        assert read.request is not None
        if self.as_new:
            try:
                copied = self._copy_as_new(read.record, read.request)
            except (EventTooLarge, Invalid):
                # It came in another's encoding, which had room for it.
                return Verdict(read.record, skip=Skip.TOO_LARGE)
            return Verdict(read.record, copied, Note.AS_NEW)
        return Verdict(
            read.record,
            copy_as_it_is(read.record, self.replay_id, self.headers, read.request.query_id),
            _note(standing),
        )

    def _means(self, read: "ReadRequest", standing: Standing | None) -> bool:
        if not (self.window.holds(read.record.timestamp_ms) and self.selection.takes_record(read.record)):
            return False
        if read.needs_registry:
            # What it says is not known: it may be meant.
            return True
        status, error_code = (None, None) if standing is None else (standing.status, standing.error_code)
        return self.selection.takes_fields(read.fields) and self.selection.takes_standing(status, error_code)

    def _find_skip(self, read: "ReadRequest", standing: Standing | None) -> Skip | None:
        if read.fields is None or read.query_id is None:
            return Skip.NO_REGISTRY if read.needs_registry else Skip.UNREADABLE
        if standing is not None and standing.status is None:
            return Skip.DELETED
        if read.request is None or (standing is not None and standing.error_code == ErrorCode.INVALID_REQUEST):
            return Skip.INVALID
        if standing is not None and standing.fingerprint not in (None, fingerprint_request(read.fields, self.hash_key)):
            return Skip.CONFLICT
        if self.as_new and standing is not None and not Status(standing.status or Status.FAILED).terminal:
            # There is nothing to compare yet, and its task would hear of two ends.
            return Skip.UNFINISHED
        return None

    def _copy_as_new(self, record: Record, request: QueryRequested) -> Copy:
        query_id = mint(self.replay_id, request.query_id)
        return Copy(
            topic=record.topic,
            partition=BY_KEY,
            key=query_id.encode(),
            value=encode(replace(request, query_id=QueryId(query_id))),
            headers=copy_headers(record, self.replay_id, self.headers, changes_of_id(query_id)),
            query_id=query_id,
            origin=find_traceparent(record.headers),
            was=request.query_id,
        )


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A record of a request as far as it can be read: its fields, its id, and the request where it is valid.

    `needs_registry` says something of this process and nothing of the record: another may read it.
    """

    record: Record
    fields: dict[str, Any] | None = field(default=None, repr=False)
    query_id: str | None = None
    request: QueryRequested | None = field(default=None, repr=False)
    needs_registry: bool = False


def read_request(record: Record, topic: str | None = None) -> ReadRequest:
    """Read as far as possible; a request is valid on one lane only, `topic` where it is not the record's own."""
    try:
        fields = decode_fields(record.value, _EVENT)
    except NoRegistry:
        return ReadRequest(record, needs_registry=True)
    except Undecodable:
        return ReadRequest(record)
    try:
        query_id = parse_uuid(fields["query_id"], "query_id")
    except Invalid:
        return ReadRequest(record, fields)
    return ReadRequest(record, fields, query_id, find_request(fields, topic or record.topic))


def find_request(fields: Mapping[str, Any], topic: str) -> QueryRequested | None:
    """The request that the fields make, if they make one that is valid on that topic."""
    try:
        request = to_request(dict(fields))
    except Invalid:
        return None
    return request if request.mode.topic == topic else None


def digest_key(key: str | None) -> str | None:
    """Tells the keys of fingerprints apart: under another one nothing is what it was."""
    return None if key is None else hashlib.sha256(f"queryd replay {key}".encode()).hexdigest()[:8]


def changes_of_id(query_id: str) -> dict[str, str | None]:
    """The headers that follow from a request's id, and from its being encoded anew."""
    schema = f"{_EVENT}.v{contract().newest[_EVENT].version}.avsc"
    return {"ce_id": query_id, "ce_subject": query_id, "ce_dataschema": schema}


def _note(standing: Standing | None) -> Note:
    if standing is None or standing.status is None:
        return Note.UNKNOWN
    return Note.FINISHED if Status(standing.status).terminal else Note.IN_WORK
