"""Each query's last event again, byte for byte, for subscribers that have lost it."""

from collections.abc import Mapping, Sequence
from typing import Any

from db.connection import Connection
from db.data.replays import hold_last_events
from queryd.codec import NoRegistry, Undecodable, decode_fields
from queryd.events import Invalid, QueryStatusChanged, Status, parse_uuid
from queryd.kafka.record import Record
from replay.copies import copy_unchanged
from replay.kinds import Note, Skip, Verdict
from replay.spec import ReplaySpec

_TERMINAL = {status.value for status in Status if status.terminal}


class StatusJudge:
    """Copies the last events of finished queries. Behind an event of another query the relay may write the next, and
    the copy of the one before would come last.

    The judge holds the queries' rows in the connection's transaction: until it ends nothing follows their last events,
    no deletion either. It must see its window from the beginning: an event that was replayed before lies in the log
    twice, and is sent once.
    """

    def __init__(self, spec: ReplaySpec, replay_id: str) -> None:
        self._spec = spec
        self._replay_id = replay_id
        self._sent: set[str] = set()

    async def judge(self, connection: Connection, records: Sequence[Record]) -> list[Verdict]:
        """See `Judge`."""
        read = [_read(record) for record in records]
        last = await hold_last_events(connection, {query_id for query_id, _ in read if query_id is not None})
        return [self._judge(record, *each, last) for record, each in zip(records, read, strict=True)]

    def _judge(
        self, record: Record, query_id: str | None, fields: Mapping[str, Any] | None, last: Mapping[str, bytes]
    ) -> Verdict:
        spec, known = self._spec, fields or {}
        if not (
            spec.takes_record(record)
            and spec.selection.takes_fields(fields)
            and spec.selection.takes_standing(known.get("status"), known.get("error_code"))
        ):
            return Verdict(record)
        if (skip := self._find_skip(record, query_id, known, last)) is not None:
            return Verdict(record, skip=skip)
        assert query_id is not None
        self._sent.add(query_id)
        return Verdict(record, copy_unchanged(record, self._replay_id, spec.headers, query_id), Note.LAST_EVENT)

    def _find_skip(
        self, record: Record, query_id: str | None, fields: Mapping[str, Any], last: Mapping[str, bytes]
    ) -> Skip | None:
        if record.value is None:
            return Skip.DELETED
        if query_id is None:
            return Skip.UNREADABLE
        if query_id not in last:
            # Either it is in work, or its row is gone and its tombstone is on its way.
            return Skip.DELETED if fields["status"] in _TERMINAL else Skip.UNFINISHED
        if last[query_id] != record.value:
            return Skip.SUPERSEDED
        return Skip.REPEATED if query_id in self._sent else None


def _read(record: Record) -> tuple[str | None, dict[str, Any] | None]:
    """The query's id, and the event's fields; None for what can't be read, and for a tombstone."""
    try:
        fields = decode_fields(record.value, QueryStatusChanged.__name__)
        return parse_uuid(fields["query_id"], "query_id"), fields
    except NoRegistry:
        # This process lacks a setting; the record may be good.
        raise
    except (Undecodable, Invalid):
        return None, None
