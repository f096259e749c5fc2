"""Records as a replay reads them, and the offsets that a plan means."""

from datetime import UTC, datetime, timedelta
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from db.connection import Connection
from queryd.kafka.record import Record
from replay.kinds import Note, Skip, Verdict, judge_records
from replay.log import OffsetRange, Window
from replay.marks import Marks

_NOWHERE = cast(Connection, None)


def _record(offset: int, *, has_headers: bool = True) -> Record:
    return Record("topic", 0, offset, b"key", b"value", (), 0, True, 0.0, 0, has_headers)


async def test_a_record_whose_headers_can_t_be_read_is_passed_over() -> None:
    async def judge(_connection: Connection, records: Any) -> list[Verdict]:
        return [Verdict(record, note=Note.FINISHED) for record in records]

    judged = await judge_records(judge, _NOWHERE, [_record(1), _record(2, has_headers=False), _record(3)])
    assert [(each.record.offset, each.note, each.skip) for each in judged] == [
        (1, Note.FINISHED, None),
        (2, None, Skip.UNREADABLE),
        (3, Note.FINISHED, None),
    ]


@given(st.integers(0, 10**9), st.sets(st.integers(0, 500)))
def test_marks_are_read_as_they_were_written(start: int, places: set[int]) -> None:
    within = OffsetRange("topic", 0, start, start + 501)
    marks = Marks.of(within)
    for place in places:
        marks.add(start + place)
    read = Marks.load(within, marks.dump())
    assert {offset for offset in range(start - 20, start + 520) if read.holds(offset)} == {
        start + each for each in places
    }


def test_a_window_holds_its_beginning_and_not_its_end() -> None:
    begin = datetime(2026, 11, 23, tzinfo=UTC)
    window = Window(since=begin, until=begin + timedelta(seconds=1))
    millis = int(begin.timestamp() * 1000)
    assert [window.holds(millis + more) for more in (-1, 0, 999, 1000)] == [False, True, True, False]
    # A producer may write any time, or none.
    assert not window.holds(2**62)
    assert not window.holds(None)
    assert Window().holds(None)
