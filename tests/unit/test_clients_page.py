"""The store of the clients' page, as it is printed: what a member brings late changes nothing."""

from pathlib import Path
from typing import Any

from queryd.events import Topic
from queryd.kafka.record import Record
from queryd.status_records import StatusRecord
from queryd.topics import TopicIdentity
from tests.acceptance.printed import read_blocks
from tests.unit.samples import QUERY_ID, make_status

TOPIC = TopicIdentity("a cluster", "a topic")


def _record(offset: int, *, deleted: bool = False, **fields: Any) -> StatusRecord:
    record = Record(Topic.STATUS, 0, offset, QUERY_ID.encode(), None, (), None, False, 0.0, 1)
    event = None if deleted else make_status(**fields)
    return StatusRecord(make_status().query_id, event, record)


def _make_store(path: Path) -> Any:
    [code] = read_blocks("docs/clients.md", "python", "Your own tables")
    printed: dict[str, Any] = {}
    exec(code.removesuffix("asyncio.run(main())\n"), printed)  # noqa: S102 — what the page prints
    return printed["Spending"](str(path))


def test_a_member_that_wakes_brings_back_neither_offsets_nor_a_deleted_query(tmp_path: Path) -> None:
    store = _make_store(tmp_path / "spending.db")
    late = [_record(0, sequence=1), _record(1, sequence=2)]
    store.apply(TOPIC, [*late, _record(2, deleted=True)], {0: 3})
    store.apply(TOPIC, late, {0: 2})
    assert store.read_offsets(TOPIC) == {0: 3}
    assert store.database.execute("SELECT * FROM queries").fetchall() == []
    # The new story of the id is not deleted by the old tombstone.
    store.apply(TOPIC, [_record(3, sequence=1)], {0: 4})
    store.apply(TOPIC, [_record(2, deleted=True)], {0: 3})
    assert store.read_offsets(TOPIC) == {0: 4}
    assert store.database.execute("SELECT id, sequence FROM queries").fetchall() == [(QUERY_ID, 1)]
    store.database.close()
