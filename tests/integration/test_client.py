"""The client on a real broker and a real object store: what it knows of queries, whoever published the events."""

import asyncio
import gc
import hashlib
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any

import boto3
import pyarrow as pa
import pytest
from pyarrow import parquet

from queryd import (
    AsyncQueryClient,
    ClientStopped,
    ErrorCode,
    NotSubmitted,
    OutputFormat,
    QueryClient,
    QueryDeleted,
    QueryFailed,
    QueryStatusChanged,
    ResultDamaged,
    ResultExpired,
    ResultFile,
    ResultInline,
    Status,
    Topic,
)
from queryd.codec import decode_cancel, decode_request
from queryd.events import Column, Invalid, QueryId
from queryd.registry import RegistryAway
from service.embedded.object_store import ObjectStore
from tests.integration.queries import new_id
from tests.integration.records import PATIENCE_SECONDS, prepare_topics, read_topic
from tests.integration.stories import make_story, publish, publish_async
from tests.servers.kafka import Kafka

TABLE = pa.table({"n": list(range(300_000))})


@pytest.fixture(scope="module")
def config(kafka: Kafka) -> dict[str, Any]:
    return prepare_topics(kafka)


@pytest.fixture(scope="module")
def client(config: dict[str, Any]) -> Iterator[QueryClient]:
    """A client that is shared: each test has queries of its own."""
    with QueryClient(config) as opened:
        yield opened


@pytest.fixture
def store(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The store, as the environment names it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_store.endpoint_url)
    monkeypatch.setenv("AWS_REGION", object_store.region)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.writer.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.writer.secret_key)
    return object_store


def _to_parquet(table: pa.Table) -> bytes:
    body = BytesIO()
    parquet.write_table(table, body, row_group_size=100_000)
    return body.getvalue()


def _store(
    store: ObjectStore, body: bytes, output_format: OutputFormat = OutputFormat.PARQUET
) -> list[QueryStatusChanged]:
    """A story whose result is stored."""
    key = f"results/{new_id()}/result.{output_format}"
    boto3.session.Session().client("s3", region_name=store.region).put_object(Bucket=store.bucket, Key=key, Body=body)
    file = ResultFile(key, len(body), 3, "etag", hashlib.sha256(body).hexdigest())
    return make_story(files=(file,), output_location=f"s3://{store.bucket}/results/", output_format=output_format)


# What a client knows.


@pytest.mark.slow
def test_a_submitted_request_is_in_its_lane_and_its_story_is_followed(
    kafka: Kafka, config: dict[str, Any], client: QueryClient
) -> None:
    org_id = new_id()
    handle = client.submit("SELECT $x", org_id=org_id, parameters={"x": 1}, mode="batch", max_rows=7)
    assert (handle.status, handle.event) == (None, None)
    records = asyncio.run(read_topic(kafka, Topic.REQUESTS_BATCH))
    [value] = [record.value() for record in records if record.key() == handle.query_id.encode()]
    request = decode_request(value)
    assert (request.org_id, request.sql, request.parameters, request.max_rows) == (org_id, "SELECT $x", {"x": 1}, 7)
    story = make_story(handle.query_id)
    publish(config, story[0])
    assert handle.latest(PATIENCE_SECONDS) == story[0]
    assert handle.status is Status.QUEUED
    with pytest.raises(TimeoutError, match="goes on"):
        handle.wait(0.05)
    publish(config, *story[1:])
    assert handle.wait(PATIENCE_SECONDS) == story[-1] == handle.event


@pytest.mark.slow
def test_a_query_that_was_finished_before_the_client_was_made_is_found_in_the_log(config: dict[str, Any]) -> None:
    stories = [make_story() for _ in range(20)]
    publish(config, *(event for story in stories for event in story))
    with QueryClient(config) as late:
        handles = [late.handle(story[0].query_id) for story in stories]
        assert [handle.wait(PATIENCE_SECONDS) for handle in handles] == [story[-1] for story in stories]
        # The same request again, as after a crash between its submit and its answer.
        again = late.submit("SELECT 1", org_id=stories[0][0].org_id, query_id=stories[0][0].query_id.upper())
        assert again.wait(PATIENCE_SECONDS) == stories[0][-1]
    with QueryClient(config) as later:
        cold = later.submit("SELECT 1", org_id=stories[0][0].org_id, query_id=stories[0][0].query_id)
        assert cold.wait(PATIENCE_SECONDS) == stories[0][-1]


def test_a_query_that_the_log_does_not_know_is_none_and_is_heard_of_later(
    config: dict[str, Any], client: QueryClient
) -> None:
    handle = client.handle(new_id())
    assert handle.latest(PATIENCE_SECONDS) is None
    story = make_story(handle.query_id)
    publish(config, *story)
    assert handle.wait(PATIENCE_SECONDS) == story[-1]


@pytest.mark.slow
def test_a_deleted_query_ends_a_wait_whether_it_was_deleted_before_or_meanwhile(
    config: dict[str, Any], client: QueryClient
) -> None:
    before, meanwhile = make_story(), make_story()
    publish(config, *before, before[0].query_id)
    with pytest.raises(QueryDeleted, match=f"{before[0].query_id} was deleted for good"):
        client.handle(before[0].query_id).wait(PATIENCE_SECONDS)
    publish(config, *meanwhile[:2])
    handle = client.handle(meanwhile[0].query_id)
    assert handle.latest(PATIENCE_SECONDS) is not None
    threading.Timer(0.1, publish, (config, meanwhile[0].query_id)).start()
    with pytest.raises(QueryDeleted):
        handle.wait(PATIENCE_SECONDS)
    with pytest.raises(QueryDeleted):
        handle.latest(PATIENCE_SECONDS)


def test_only_what_somebody_holds_a_handle_of_is_kept(config: dict[str, Any], client: QueryClient) -> None:
    others = [make_story() for _ in range(50)]
    held = client.handle(new_id())
    story = make_story(held.query_id)
    publish(config, *(event for other in others for event in other), *story)
    assert held.wait(PATIENCE_SECONDS) == story[-1]
    tracks = client._session._tracking._tracks
    gc.collect()
    assert not {other[0].query_id.encode() for other in others} & set(tracks)
    key = held.query_id.encode()
    assert key in tracks
    del held
    gc.collect()
    assert key not in tracks


def test_a_cancel_is_published_for_the_querys_org(kafka: Kafka, config: dict[str, Any], client: QueryClient) -> None:
    story = make_story()
    publish(config, *story[:2])
    handle = client.handle(story[0].query_id)
    assert handle.latest(PATIENCE_SECONDS) == story[1]
    handle.cancel(reason="wrong table")
    org_id = new_id()
    unheard = client.handle(new_id(), org_id=org_id)
    unheard.cancel()
    # Other tests have written there too, and not only cancels.
    ours = {handle.query_id.encode(), unheard.query_id.encode()}
    records = [record for record in asyncio.run(read_topic(kafka, Topic.CANCELLATIONS)) if record.key() in ours]
    cancels = [decode_cancel(_value(record)) for record in records]
    told = {cancel.query_id: (cancel.org_id, cancel.reason) for cancel in cancels}
    assert told[handle.query_id] == (story[0].org_id, "wrong table")
    assert told[unheard.query_id] == (org_id, None)
    with pytest.raises(ValueError, match="org_id="):
        client.handle(new_id()).cancel()


def _value(record: Any) -> bytes:
    value: bytes = record.value()
    return value


def test_what_is_no_id_is_refused_before_anything_is_published(client: QueryClient) -> None:
    with pytest.raises(Invalid, match="org_id is not a UUID"):
        client.submit("SELECT 1", org_id="nobody")
    with pytest.raises(Invalid, match="query_id is not a UUID"):
        client.handle("nothing")


def test_a_closed_client_ends_its_waits(config: dict[str, Any]) -> None:
    client = QueryClient(config)
    handle = client.handle(new_id())
    threading.Timer(0.1, client.close).start()
    with pytest.raises(ClientStopped, match="closed"):
        handle.wait(PATIENCE_SECONDS)
    with pytest.raises(ClientStopped):
        client.handle(new_id()).wait(PATIENCE_SECONDS)


def test_a_closed_client_publishes_nothing(config: dict[str, Any]) -> None:
    client = QueryClient(config)
    handle = client.handle(new_id(), org_id=new_id())
    client.close()
    with pytest.raises(ClientStopped, match="closed"):
        client.submit("SELECT 1", org_id=new_id())
    with pytest.raises(ClientStopped, match="closed"):
        client.cancel(new_id(), org_id=new_id())
    with pytest.raises(ClientStopped, match="closed"):
        handle.cancel()


def test_a_replayed_event_behind_a_later_one_changes_nothing(config: dict[str, Any], client: QueryClient) -> None:
    story = make_story()
    handle = client.handle(story[0].query_id)
    publish(config, *story, story[1])
    marker = client.handle(new_id())
    assert handle.wait(PATIENCE_SECONDS) == story[-1]
    # Behind everything, in the same partition or another: by then the copy was heard, or will be ignored as well.
    publish(config, *make_story(marker.query_id))
    marker.wait(PATIENCE_SECONDS)
    assert handle.event == story[-1]


# Results.


def test_a_result_is_a_table_or_its_batches_or_links(
    config: dict[str, Any], client: QueryClient, store: ObjectStore
) -> None:
    story = _store(store, _to_parquet(TABLE))
    publish(config, *story)
    handle = client.handle(story[0].query_id)
    assert handle.result(PATIENCE_SECONDS).equals(TABLE)
    batches = list(handle.batches(PATIENCE_SECONDS))
    assert len(batches) >= 3
    assert pa.Table.from_batches(batches).equals(TABLE)
    [link] = handle.links(PATIENCE_SECONDS)
    assert "X-Amz-Expires=3600" in link
    with urllib.request.urlopen(link) as answer:  # noqa: S310 — the test's own store
        assert answer.headers["Content-Disposition"].startswith('attachment; filename="query-')
        assert parquet.read_table(BytesIO(answer.read())).equals(TABLE)


@pytest.mark.slow
def test_an_inline_result_is_read_from_its_event_and_has_no_links(config: dict[str, Any], client: QueryClient) -> None:
    body = b"n,text\r\n1,NULL\r\n2,\r\n"
    columns = (Column("n", "BIGINT"), Column("text", "VARCHAR"))
    story = make_story(inline_result=body, bytes=len(body), output_format=OutputFormat.CSV, columns=columns)
    publish(config, *story)
    handle = client.handle(story[0].query_id)
    assert handle.result(PATIENCE_SECONDS).to_pylist() == [{"n": 1, "text": "NULL"}, {"n": 2, "text": None}]
    with pytest.raises(ResultInline, match=r"result\(\)"):
        handle.links()
    # At its expiry the same event comes again without it.
    publish(config, replace(story[-1], inline_result=None))
    marker = make_story()
    publish(config, *marker)
    with QueryClient(config) as late, pytest.raises(ResultExpired, match="under another id"):
        late.handle(story[0].query_id).result(PATIENCE_SECONDS)


def test_a_result_that_has_gone_says_whether_it_had_expired(
    config: dict[str, Any], client: QueryClient, store: ObjectStore
) -> None:
    story = _store(store, b"gone")
    boto3.session.Session().client("s3", region_name=store.region).delete_object(
        Bucket=store.bucket, Key=story[-1].files[0].key
    )
    publish(config, *story)
    with pytest.raises(ResultDamaged, match="was removed before it had expired"):
        client.handle(story[0].query_id).result(PATIENCE_SECONDS)
    expired = [replace(event, query_id=QueryId(new_id())) for event in story]
    expired[-1] = replace(expired[-1], query_id=expired[0].query_id, expires_at=datetime.now(UTC) - timedelta(days=1))
    publish(config, expired[-1])
    with pytest.raises(ResultExpired, match="expired at"):
        client.handle(expired[0].query_id).result(PATIENCE_SECONDS)


@pytest.mark.parametrize("change", ["size", "content"])
def test_a_result_that_is_not_what_was_announced_is_not_handed_out(
    config: dict[str, Any], client: QueryClient, store: ObjectStore, change: str
) -> None:
    body = _to_parquet(TABLE)
    story = _store(store, body)
    other = body + b"x" if change == "size" else bytes([body[0] ^ 1]) + body[1:]
    key = story[-1].files[0].key
    boto3.session.Session().client("s3", region_name=store.region).put_object(Bucket=store.bucket, Key=key, Body=other)
    publish(config, *story)
    with pytest.raises(ResultDamaged, match="bytes" if change == "size" else "SHA-256"):
        next(client.handle(story[0].query_id).batches(PATIENCE_SECONDS))


def test_a_failed_query_has_its_reason_and_no_result(config: dict[str, Any], client: QueryClient) -> None:
    story = make_story(code=ErrorCode.QUERY_TIMEOUT)
    publish(config, *story)
    handle = client.handle(story[0].query_id)
    assert handle.wait(PATIENCE_SECONDS).status is Status.FAILED
    with pytest.raises(QueryFailed, match="QUERY_TIMEOUT: it failed") as failed:
        handle.result()
    assert failed.value.code is ErrorCode.QUERY_TIMEOUT
    with pytest.raises(QueryFailed):
        handle.batches()
    with pytest.raises(QueryFailed):
        handle.links()


# The twin.


@pytest.mark.slow
async def test_the_async_client_does_the_same(config: dict[str, Any], store: ObjectStore) -> None:
    stored, deleted = _store(store, _to_parquet(TABLE)), make_story()
    await publish_async(config, *stored, *deleted, deleted[0].query_id)
    async with AsyncQueryClient(config) as client, asyncio.timeout(PATIENCE_SECONDS):
        found = client.handle(stored[0].query_id)
        assert await found.latest() == stored[-1]
        assert (await found.result()).equals(TABLE)
        batches = [batch async for batch in found.batches()]
        assert len(batches) >= 3
        assert pa.Table.from_batches(batches).equals(TABLE)
        assert len(await found.links()) == 1
        with pytest.raises(QueryDeleted):
            await client.handle(deleted[0].query_id).wait()

        handle = await client.submit("SELECT 1", org_id=new_id())
        with pytest.raises(TimeoutError):
            await handle.wait(0.05)
        # Many wait for one, and one that gives up takes nothing from the others.
        waits = [asyncio.create_task(handle.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waits.pop().cancel()
        story = make_story(handle.query_id, code=ErrorCode.QUERY_ERROR)
        await publish_async(config, *story)
        assert await asyncio.gather(*waits) == [story[-1]] * 2
        with pytest.raises(QueryFailed):
            await handle.result()
        await handle.cancel()
        assert (await client.cancel(handle.query_id, org_id=new_id())).event == story[-1]


async def test_a_closed_async_client_publishes_nothing(config: dict[str, Any]) -> None:
    async with AsyncQueryClient(config) as client:
        handle = client.handle(new_id(), org_id=new_id())
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(ClientStopped, match="closed"):
            await client.submit("SELECT 1", org_id=new_id())
        with pytest.raises(ClientStopped, match="closed"):
            await client.cancel(new_id(), org_id=new_id())
        with pytest.raises(ClientStopped, match="closed"):
            await handle.cancel()


async def test_a_registry_that_is_away_holds_up_no_event_loop(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncQueryClient(config) as client, asyncio.timeout(PATIENCE_SECONDS):
        away = _Away(asyncio.get_running_loop())
        monkeypatch.setattr("queryd.codec.registry_in_use", lambda: away)
        monkeypatch.setattr("queryd.async_client.registry_in_use", lambda: away)
        for work in (
            client.submit("SELECT 1", org_id=new_id()),
            client.cancel(new_id(), org_id=new_id()),
            client.handle(new_id(), org_id=new_id()).cancel(),
        ):
            with pytest.raises(NotSubmitted, match="does not answer"):
                await work
        assert away.asked == 3


class _Away:
    """Answers that it is away, once the loop has had its turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.asked = 0

    def write(self, _topic: Topic, _fields: dict[str, Any]) -> bytes:
        self.asked += 1
        turned = threading.Event()
        self._loop.call_soon_threadsafe(turned.set)
        assert turned.wait(PATIENCE_SECONDS)
        raise RegistryAway("the schema registry does not answer")


async def test_a_client_that_is_not_open_says_so(config: dict[str, Any]) -> None:
    client = AsyncQueryClient(config)
    with pytest.raises(RuntimeError, match="async with"):
        await client.submit("SELECT 1", org_id=new_id())
    await client.close()
