"""Results that their events carry: the same bytes as an object's, and gone when their time is over."""

import asyncio
import io
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from confluent_kafka import Message

from consumers.executor import query as queries
from consumers.executor.attempt import AttemptRules, Attempts
from consumers.executor.leases import Leases
from db.connection import transaction
from db.data.outbox import SHARDS, delete_published
from db.data.retention import Scope, expire_results
from db.data.runs import read_files, read_last_event
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from producers.relay import relay as relay_module
from producers.relay.relay import Relay, RelayRules
from queryd.codec import decode_status
from queryd.events import MAX_INLINE_BYTES, Delivery, Mode, OutputFormat, QueryStatusChanged, Topic
from queryd.headers import REPUBLISHED
from results.retention import expiry
from results.retention.sweep import Swept
from service.embedded.object_store import ObjectStore
from telemetry.metrics import METRICS
from tests.integration.queries import new_id, read_events, read_row
from tests.integration.records import headers_of, prepare_topics, read_topic, until
from tests.integration.retention_place import Attempt, Crash, Place, crash, end_event_of, opened_place
from tests.servers.kafka import Kafka

_LONG_SECONDS = 600.0
_MEMORY = 256 * 1024**2
_BODY = b"word\r\ncanary\r\n"
_OVER = timedelta(0)

_BOTH_WAYS = pytest.mark.parametrize(
    "transactions", [pytest.param(True, marks=pytest.mark.needs_kafka), False], ids=["transactional", "plain"]
)
# The first of its shards is a relay's name on the broker that all tests share; these are no shard of the outbox.
_names = itertools.count(3_000)


@pytest.fixture
async def place(data_url: str, object_store: ObjectStore, tmp_path: Path) -> AsyncIterator[Place]:
    async with opened_place(data_url, object_store, tmp_path) as opened:
        yield opened


@pytest.fixture
async def attempts(place: Place, object_store: ObjectStore, tmp_path: Path) -> AsyncIterator[Attempts]:
    """What runs attempts, on one thread, so that the same query has the same bytes."""
    settings = DuckDBSettings(
        memory_bytes=_MEMORY,
        threads=1,
        scratch_root=tmp_path / "children",
        endpoint_url=object_store.endpoint_url,
        region=object_store.region,
        access_key=object_store.reader.access_key,
        secret_key=object_store.reader.secret_key,
    )
    engine = DuckDBEngine(settings, 1, quiet=False)
    await engine.start()
    worker = place.worker
    yield Attempts(
        pool=place.pool,
        clock=worker.clock,
        transitions=worker.transitions,
        leases=Leases(place.pool, _LONG_SECONDS, _LONG_SECONDS),
        engine=engine,
        store=place.results,
        rules=AttemptRules(
            worker="worker",
            bucket=place.bucket,
            scratch=tmp_path / "attempts",
            lease_seconds=_LONG_SECONDS,
            default_seconds=dict.fromkeys(Mode, 30.0),
            longest_seconds=dict.fromkeys(Mode, 30.0),
            queue_seconds=dict.fromkeys(Mode, 30.0),
            retention=timedelta(days=7),
        ),
    )
    await engine.close()


# What is delivered.


@pytest.mark.slow
async def test_an_inline_result_is_the_file_that_would_have_been_stored(place: Place, attempts: Attempts) -> None:
    sql = "SELECT i AS number, 'a \"word\"' AS text, NULL AS nothing FROM range(0, 100) AS t(i)"
    for output_format in OutputFormat:
        inline = await _run(place, attempts, sql, Delivery.INLINE_IF_SMALL, output_format=output_format)
        stored = await _run(place, attempts, sql, Delivery.OBJECT, output_format=output_format)
        [file] = stored.files
        body = place.s3.get_object(Bucket=place.bucket, Key=file.key)["Body"].read()
        assert stored.inline_result is None
        assert inline.inline_result is not None
        if output_format is OutputFormat.PARQUET:
            # Its bytes are nobody's promise.
            assert pq.read_table(io.BytesIO(inline.inline_result)).equals(pq.read_table(io.BytesIO(body)))
        else:
            assert inline.inline_result == body, output_format
        assert (inline.row_count, inline.bytes) == (100, len(inline.inline_result))
        assert (inline.columns, inline.engine) == (stored.columns, stored.engine)
        assert (inline.files, inline.output_location) == ((), None)
        assert inline.expires_at == inline.occurred_at + timedelta(days=7)


async def test_a_result_without_rows_is_an_inline_result_too(place: Place, attempts: Attempts) -> None:
    event = await _run(place, attempts, "SELECT 1 AS x LIMIT 0", output_format=OutputFormat.JSON)
    assert (event.inline_result, event.row_count, event.bytes) == (b"", 0, 0)


@pytest.mark.slow
async def test_nothing_is_stored_and_the_row_has_the_numbers(place: Place, attempts: Attempts) -> None:
    counted = METRICS.registry.get_sample_value
    before = counted("queryd_result_bytes_sum", {"lane": "interactive"}) or 0.0
    event = await _run(place, attempts, "SELECT 7 AS x")
    assert counted("queryd_result_bytes_sum", {"lane": "interactive"}) == before + len("x\r\n7\r\n")
    row = await read_row(place.pool, event.query_id)
    assert row is not None
    assert (row.status, row.output_location, row.row_count, row.bytes) == ("Succeeded", None, 1, 6)
    assert place.objects(f"results/{event.org_id}/") == []
    async with transaction(place.pool) as connection:
        assert await read_files(connection, event.query_id) == []


async def test_what_takes_one_byte_more_than_64_kib_is_an_object(place: Place, attempts: Attempts) -> None:
    frame = len("x\r\n\r\n")
    sql = "SELECT repeat('a', $length) AS x"
    fits = await _run(place, attempts, sql, parameters={"length": MAX_INLINE_BYTES - frame})
    assert fits.inline_result is not None
    assert (fits.bytes, fits.files) == (65_536, ())
    above = await _run(place, attempts, sql, parameters={"length": MAX_INLINE_BYTES - frame + 1})
    assert above.inline_result is None
    assert [file.bytes for file in above.files] == [65_537]
    [file] = above.files
    assert place.objects(f"results/{above.org_id}/") == [file.key]


async def test_a_batch_result_is_an_object(place: Place, attempts: Attempts) -> None:
    event = await _run(place, attempts, "SELECT 7 AS x", mode=Mode.BATCH)
    assert event.inline_result is None
    assert place.objects(f"results/{event.org_id}/") == [file.key for file in event.files]


# When its time is over.


@pytest.mark.slow
async def test_an_expired_inline_result_leaves_the_row_and_is_told_again_without_itself(place: Place) -> None:
    over, object_over = await place.announce_inline(_BODY, _OVER), await place.announce(_OVER)
    fresh = await place.announce_inline(_BODY)
    before = await _read_last_event(place, over)
    assert (await place.sweep()).expired == 2
    *_, told, again = await read_events(place.pool, over.query_id)
    assert (told.event.inline_result, again.event.inline_result) == (_BODY, None)
    assert again.event == await _read_last_event(place, over)
    # But for the result it is the same event, and said when the other was.
    assert (again.event_id, again.event.sequence) == (told.event_id, 3)
    assert (again.event.occurred_at, again.event.expires_at) == (before.occurred_at, before.expires_at)
    assert (again.event.row_count, again.event.bytes) == (1, len(_BODY))
    changed = {"traceparent", REPUBLISHED}
    assert _without(again.headers, changed) == _without(told.headers, changed)
    assert again.headers["traceparent"][:35] == told.headers["traceparent"][:35]
    assert again.headers[REPUBLISHED] == "result_expired"
    # Others are not told again, and nothing is left to do.
    for attempt in (object_over, fresh):
        assert len(await read_events(place.pool, attempt.query_id)) == 3
    assert (await _read_last_event(place, fresh)).inline_result == _BODY
    assert await place.sweep() == Swept()


async def test_sweeps_at_the_same_time_tell_it_again_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = await place.announce_inline(_BODY, _OVER)
    met = asyncio.Barrier(2)

    async def meet(*arguments: Any) -> Any:
        # Both have read what is due.
        await met.wait()
        return await expire_results(*arguments)

    monkeypatch.setattr(expiry, "expire_results", meet)
    async with place.pool.connection() as one, place.pool.connection() as other:
        expired = await asyncio.gather(expiry.expire_batch(one), expiry.expire_batch(other))
    assert [result.query_id for results in expired for result in results] == [attempt.query_id]
    assert len(await read_events(place.pool, attempt.query_id)) == 4


@pytest.mark.slow
async def test_a_query_that_is_deleted_meanwhile_is_not_told_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = await place.announce_inline(_BODY, _OVER)

    async def delete_first(*arguments: Any) -> Any:
        await place.delete(Scope(attempt.facts.org_id))
        return await expire_results(*arguments)

    monkeypatch.setattr(expiry, "expire_results", delete_first)
    assert (await place.sweep()).expired == 0
    assert await place.tombstones() == [attempt.query_id]


@pytest.mark.slow
async def test_a_deletion_leaves_no_inline_result_behind(place: Place) -> None:
    over, fresh = await place.announce_inline(_BODY, _OVER), await place.announce_inline(_BODY)
    await place.sweep()
    for attempt in (over, fresh):
        deleted = await place.delete(Scope(attempt.facts.org_id))
        assert (deleted.queries, deleted.objects) == (1, 0)
    assert sorted(await place.tombstones()) == sorted([over.query_id, fresh.query_id])
    assert await place.count("query_runs") == 0


@pytest.mark.slow
async def test_an_event_that_cannot_be_read_keeps_its_result_for_a_newer_release(place: Place) -> None:
    other, attempt = await place.announce_inline(_BODY, _OVER), await place.announce_inline(_BODY, _OVER)
    unknown = b"\xc3\x01" + bytes(8) + _BODY
    await place.change("UPDATE query_runs SET last_event = %s WHERE query_id = %s", unknown, other.query_id)
    assert (await place.sweep()).expired == 1
    assert len(await read_events(place.pool, attempt.query_id)) == 4
    assert len(await read_events(place.pool, other.query_id)) == 3
    assert (await place.sweep()).expired == 0


# What subscribers see of it.


@pytest.mark.slow
@_BOTH_WAYS
async def test_the_log_has_the_event_once_more_without_its_result(
    place: Place, kafka: Kafka, *, transactions: bool
) -> None:
    rules = _make_rules(place, kafka, transactions=transactions)
    attempt = await place.announce_inline(_BODY, _OVER)
    async with _publishing(place, rules):
        pass
    await place.sweep()
    async with _publishing(place, rules):
        pass
    *_, told, again = _assert_told(await _read_log(kafka, attempt), [_BODY, None])
    assert (headers_of(told)["ce_id"], told.key()) == (headers_of(again)["ce_id"], again.key())
    assert headers_of(again)[REPUBLISHED] == b"result_expired"
    assert REPUBLISHED not in headers_of(told)
    await place.delete(Scope(attempt.facts.org_id))
    async with _publishing(place, rules):
        pass
    messages = await _read_log(kafka, attempt)
    assert (len(messages), messages[-1].value()) == (5, None)
    assert headers_of(messages[-1])["ce_id"] == end_event_of(attempt.query_id).encode()


@pytest.mark.slow
@_BOTH_WAYS
async def test_a_relay_that_dies_before_or_after_the_expiry_publishes_each_once(
    place: Place, kafka: Kafka, monkeypatch: pytest.MonkeyPatch, *, transactions: bool
) -> None:
    rules = _make_rules(place, kafka, transactions=transactions)
    attempt = await place.announce_inline(_BODY, _OVER)
    # The event with its result is published, and its row is still there when it is published again: both have one id.
    await _publish_and_die(rules, monkeypatch)
    await place.sweep()
    assert len(await read_events(place.pool, attempt.query_id)) == 4
    await _publish_and_die(rules, monkeypatch)
    async with _publishing(place, rules):
        pass
    messages = await _read_log(kafka, attempt)
    if transactions:
        _assert_told(messages, [_BODY, None])
    else:
        # Each batch comes again. What compaction keeps is the event without its result.
        assert {message.value() for message in messages[4:]} <= {message.value() for message in messages[:7]}
        assert decode_status(messages[-1].value()).inline_result is None


@pytest.mark.slow
async def test_large_events_are_published_in_batches_that_a_slow_link_takes(
    place: Place, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [bytes([number]) * MAX_INLINE_BYTES for number in range(4)]
    told = [await place.announce_inline(body) for body in bodies]
    # Two of them fit, and one that is too large by itself goes alone.
    monkeypatch.setattr(relay_module, "_BATCH_BYTES", 2 * MAX_INLINE_BYTES + 10_000)
    batches: list[int] = []

    async def count(connection: Any, name: str, number: int, positions: Sequence[int]) -> None:
        batches.append(len(positions))
        await delete_published(connection, name, number, positions)

    monkeypatch.setattr(relay_module, "delete_published", count)
    async with _publishing(place, _make_rules(place, kafka, transactions=False)):
        pass
    assert len(batches) > 1
    assert sum(batches) == 3 * len(told)
    for attempt, body in zip(told, bodies, strict=True):
        _assert_told(await _read_log(kafka, attempt), [body])


async def _run(
    place: Place, attempts: Attempts, sql: str, delivery: Delivery = Delivery.INLINE_IF_SMALL, **changes: Any
) -> QueryStatusChanged:
    """Admit a query of an org of its own and run one attempt, which must succeed; its last event."""
    changes = {"output_format": OutputFormat.CSV} | changes
    admitted = await place.worker.admit_new(sql=sql, delivery=delivery, org_id=new_id(), **changes)
    [claimed] = await attempts.claim([admitted])
    assert isinstance(claimed, queries.Attempt)
    assert await attempts.run(claimed, lambda: None) is True
    event = (await read_events(place.pool, admitted.facts.query_id))[-1].event
    assert event.status == "Succeeded", event.error_message
    return event


async def _read_last_event(place: Place, attempt: Attempt) -> QueryStatusChanged:
    async with transaction(place.pool) as connection:
        return decode_status(await read_last_event(connection, attempt.query_id))


def _without(headers: dict[str, str], names: set[str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in names}


def _make_rules(place: Place, kafka: Kafka, *, transactions: bool) -> RelayRules:
    return RelayRules(place.url, prepare_topics(kafka), transactions, (next(_names), *range(SHARDS)))


@asynccontextmanager
async def _publishing(place: Place, rules: RelayRules) -> AsyncIterator[None]:
    """A relay from its start until the outbox is empty."""
    relay = Relay(rules, lambda: None)
    running = asyncio.create_task(relay.run())

    async def empty() -> bool:
        return await place.count("outbox") == 0

    try:
        yield
        await until(empty, running)
    finally:
        relay.stop()
        await running


async def _publish_and_die(rules: RelayRules, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that has published all that waits, and dies before it deletes a row of that."""
    with monkeypatch.context() as patched:
        patched.setattr(relay_module, "delete_published", crash)
        with pytest.raises(Crash):
            await Relay(rules, lambda: None).run()


async def _read_log(kafka: Kafka, attempt: Attempt) -> list[Message]:
    """The query's records."""
    return [message for message in await read_topic(kafka, Topic.STATUS) if message.key() == attempt.query_id.encode()]


def _assert_told(messages: Sequence[Message], results: Sequence[bytes | None]) -> Sequence[Message]:
    """The whole story is there, and its end once with each of these results."""
    events = [decode_status(message.value()) for message in messages]
    assert [event.sequence for event in events] == [1, 2, *([3] * len(results))]
    assert [event.inline_result for event in events[2:]] == results
    return messages
