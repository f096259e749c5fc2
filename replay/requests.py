"""Requests again: as they were, for subscribers that lost what came of them; or as new queries, to compare answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from db.connection import Connection
from db.data.replays import Standing, read_standings
from queryd.codec import EventTooLarge, NoRegistry, Undecodable, decode_fields, encode, to_request
from queryd.contract import contract
from queryd.events import ErrorCode, Invalid, QueryId, QueryRequested, Status, parse_uuid
from queryd.headers import find_traceparent
from queryd.identity import fingerprint_request
from queryd.kafka.record import Record
from replay.copies import Copy, copy_headers, copy_unchanged, make_new_id
from replay.kinds import Note, Skip, Verdict
from replay.spec import ReplaySpec

_EVENT = QueryRequested.__name__


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A request's record as far as it can be read: its fields, its id, and the request if it is valid.

    `needs_registry` is about this process and not about the record: another process may read it.
    """

    record: Record
    fields: dict[str, Any] | None = field(default=None, repr=False)
    query_id: str | None = None
    request: QueryRequested | None = field(default=None, repr=False)
    needs_registry: bool = False


@dataclass(frozen=True, slots=True)
class RequestJudge:
    """Copies requests. With `spec.as_new` each copy has the id `uuid5(replay_id, query_id)`."""

    spec: ReplaySpec
    replay_id: str

    async def judge(self, connection: Connection, records: Sequence[Record]) -> list[Verdict]:
        """See `Judge`."""
        read = [read_request(record) for record in records]
        standings = await read_standings(connection, {each.query_id for each in read if each.query_id is not None})
        return [self._judge(each, standings.get(each.query_id or "")) for each in read]

    def _judge(self, read: ReadRequest, standing: Standing | None) -> Verdict:
        record = read.record
        if not self._is_asked_for(read, standing):
            return Verdict(record)
        if (skip := self._find_skip(read, standing)) is not None:
            return Verdict(record, skip=skip)
        assert read.request is not None
        if not self.spec.as_new:
            copied = copy_unchanged(record, self.replay_id, self.spec.headers, read.request.query_id)
            return Verdict(record, copied, _note(standing))
        try:
            return Verdict(record, self._copy_as_new(record, read.request), Note.AS_NEW)
        except (EventTooLarge, Invalid):
            # It came in another encoding, which had room for it.
            return Verdict(record, skip=Skip.TOO_LARGE)

    def _is_asked_for(self, read: ReadRequest, standing: Standing | None) -> bool:
        if not self.spec.takes_record(read.record):
            return False
        if read.needs_registry:
            # Its content is not known: it may be asked for.
            return True
        status, error_code = (None, None) if standing is None else (standing.status, standing.error_code)
        selection = self.spec.selection
        return selection.takes_fields(read.fields) and selection.takes_standing(status, error_code)

    def _find_skip(self, read: ReadRequest, standing: Standing | None) -> Skip | None:
        if read.fields is None or read.query_id is None:
            return Skip.NO_REGISTRY if read.needs_registry else Skip.UNREADABLE
        if standing is None:
            return Skip.INVALID if read.request is None else None
        return self._find_skip_of_known(read, read.fields, standing)

    def _find_skip_of_known(self, read: ReadRequest, fields: dict[str, Any], standing: Standing) -> Skip | None:
        if standing.status is None:
            return Skip.DELETED
        if read.request is None or standing.error_code == ErrorCode.INVALID_REQUEST:
            return Skip.INVALID
        if standing.fingerprint not in (None, fingerprint_request(fields, self.spec.hash_key)):
            return Skip.CONFLICT
        if self.spec.as_new and not Status(standing.status).terminal:
            # There is nothing to compare yet, and its task would receive two ends.
            return Skip.UNFINISHED
        return None

    def _copy_as_new(self, record: Record, request: QueryRequested) -> Copy:
        query_id = make_new_id(self.replay_id, request.query_id)
        return Copy(
            topic=record.topic,
            key=query_id.encode(),
            value=encode(replace(request, query_id=QueryId(query_id))),
            headers=copy_headers(record, self.replay_id, self.spec.headers, headers_of_id(query_id)),
            query_id=query_id,
            origin=find_traceparent(record.headers),
            was=request.query_id,
        )


def read_request(record: Record, topic: str | None = None) -> ReadRequest:
    """Read as far as possible; a request is valid on one topic only, by default the record's own."""
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
    """The request that the fields make, if it is valid on that topic."""
    try:
        request = to_request(dict(fields))
    except Invalid:
        return None
    return request if request.mode.topic == topic else None


def headers_of_id(query_id: str) -> dict[str, str | None]:
    """The headers that follow from a request's id, and from its being encoded anew."""
    schema = f"{_EVENT}.v{contract().newest[_EVENT].version}.avsc"
    return {"ce_id": query_id, "ce_subject": query_id, "ce_dataschema": schema}


def _note(standing: Standing | None) -> Note:
    if standing is None or standing.status is None:
        return Note.UNKNOWN
    return Note.FINISHED if Status(standing.status).terminal else Note.IN_WORK
