"""Each query's last event again, byte for byte, for subscribers that have lost it."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from db.connection import Connection
from db.data.replays import hold_last_events
from queryd.codec import NoRegistry, Undecodable, decode_fields
from queryd.events import Invalid, QueryStatusChanged, Status, Topic, parse_uuid
from queryd.kafka.record import Record
from replay.copies import HeaderRules, copy_as_it_is
from replay.kinds import Judge, Note, ReplayName, Skip, Verdict
from replay.log import Window
from replay.selection import Selection

_TERMINAL = {status.value for status in Status if status.terminal}


@dataclass(frozen=True, slots=True)
class StatusReplay:
    """Implements `ReplayKind`. Only finished queries are replayed: behind an event of another one the relay may
    write the next, and the copy of the one before would come last.

    The judge holds the queries' rows in the connection's transaction: until it ends nothing follows their last events,
    no deletion either, and whoever sends the copies within it puts none behind a tombstone.
    """

    replay_id: str
    window: Window
    selection: Selection
    headers: HeaderRules = field(default_factory=HeaderRules)

    name = ReplayName.STATUS
    topics: Sequence[str] = (Topic.STATUS.value,)
    # An event that was replayed before lies in the log twice, and is sent once.
    follows_all = True

    @property
    def options(self) -> Mapping[str, Any]:
        """See `ReplayKind`."""
        return {}

    def begin(self) -> Judge:
        """See `ReplayKind`."""
        sent: set[str] = set()

        async def judge(connection: Connection, records: Sequence[Record]) -> list[Verdict]:
            read = [_read(record) for record in records]
            wanted = {query_id for query_id, fields in read if query_id is not None and fields is not None}
            last = await hold_last_events(connection, wanted)
            verdicts = []
            for record, (query_id, fields) in zip(records, read, strict=True):
                if not self._means(record, fields):
                    verdicts.append(Verdict(record))
                elif (skip := _find_skip(record, query_id, fields, last, sent)) is not None:
                    verdicts.append(Verdict(record, skip=skip))
                else:
                    assert query_id is not None
                    sent.add(query_id)
                    verdicts.append(
                        Verdict(record, copy_as_it_is(record, self.replay_id, self.headers, query_id), Note.LAST_EVENT)
                    )
            return verdicts

        return judge

    def _means(self, record: Record, fields: Mapping[str, Any] | None) -> bool:
        status, error_code = (None, None) if fields is None else (fields["status"], fields["error_code"])
        return (
            self.window.holds(record.timestamp_ms)
            and self.selection.takes_record(record)
            and self.selection.takes_fields(fields)
            and self.selection.takes_standing(status, error_code)
        )


def _find_skip(
    record: Record,
    query_id: str | None,
    fields: Mapping[str, Any] | None,
    last: Mapping[str, bytes],
    sent: AbstractSet[str],
) -> Skip | None:
    if record.value is None:
        return Skip.DELETED
    if query_id is None or fields is None:
        return Skip.UNREADABLE
    if query_id not in last:
        # Either it is in work, or its row is gone and its tombstone is on its way.
        return Skip.DELETED if fields["status"] in _TERMINAL else Skip.UNFINISHED
    if last[query_id] != record.value:
        return Skip.SUPERSEDED
    return Skip.REPEATED if query_id in sent else None


def _read(record: Record) -> tuple[str | None, dict[str, Any] | None]:
    """The query's id, and the event's fields; None for what can't be read, or says that the query is gone."""
    try:
        fields = decode_fields(record.value, QueryStatusChanged.__name__)
        return parse_uuid(fields["query_id"], "query_id"), fields
    except NoRegistry:
        # That says something of this process, and nothing of the record.
        raise
    except (Undecodable, Invalid):
        return None, None
