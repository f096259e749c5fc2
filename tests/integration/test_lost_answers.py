"""The ambiguous cases: the server has done it and its answer is lost. Decided by reading back, never by guessing.

Postgres and S3 are real and stand behind a proxy that drops one answer and cuts the connection. Kafka's addresses lead
past a proxy, so that there the client is told of a failure after the broker has acted.
"""

import asyncio
import itertools
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from confluent_kafka import KafkaError, KafkaException, Producer
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from access.limits import OrgLimits
from consumers.executor.admission import Verdict
from consumers.executor.query import Query
from db.connection import DataPool
from db.data.outbox import CHANNEL, shard_of
from db.data.runs import RunState
from db.migrations.upgrade import upgrade_data
from db.retrying import until_available
from producers.relay.relay import Relay, RelayRules
from queryd.events import OrgId, QueryId, Topic
from queryd.kafka import transactional_producer
from queryd.kafka.record import Record
from results.location import prefix
from results.store import ResultStore, StoreAccess, StoredObject, StoreRefused, StoreUnavailable
from service.embedded.object_store import ObjectStore
from tests.integration.queries import (
    Worker,
    make_record,
    make_request,
    new_id,
    opened_pool,
    read_story,
)
from tests.integration.records import PATIENCE_SECONDS, headers_of, prepare_topics, read_topic, until
from tests.servers.kafka import Kafka
from tests.servers.tcp_proxy import TcpProxy, Trigger

_MIB = 1024 * 1024

# The tests share a broker, and a relay is named there by the first of its shards: here by one that no query has.
_names = itertools.count(1_000)

# What becomes of a request whose answer the client never gets.
_Losing = Callable[[TcpProxy, bytes], Trigger]
_BOTH_FATES = pytest.mark.parametrize(
    "lose",
    [
        pytest.param(lambda proxy, request: proxy.lose_answer(request), id="done"),
        pytest.param(lambda proxy, request: proxy.cut_before(request), id="never arrived"),
    ],
)


# Postgres: each transition is one statement and so its own transaction. An admission under a limit ends with COMMIT.


@dataclass(frozen=True, slots=True)
class Place:
    """A worker whose connections go through the proxy, and the way around it for the test itself."""

    worker: Worker
    proxy: TcpProxy
    proxied_url: str
    direct: DataPool


@pytest.fixture
async def place(data_url: str) -> AsyncIterator[Place]:
    upgrade_data(data_url)
    address = conninfo_to_dict(data_url)
    with TcpProxy(str(address["host"]), int(address["port"] or 0)) as proxy:
        proxied = make_conninfo(data_url, host="127.0.0.1", port=proxy.port)
        async with opened_pool(proxied) as pool, opened_pool(data_url) as direct:
            yield Place(Worker(pool), proxy, proxied, direct)


async def _losing_one(trigger: Trigger, work: Awaitable[Any]) -> Any:
    """The work's answer, and the certainty that an answer was lost on the way."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        answer = await work
    assert trigger.fired
    return answer


@_BOTH_FATES
async def test_an_admission_whose_answer_is_lost_admits_once(place: Place, lose: _Losing) -> None:
    record = make_record(make_request())
    await _lose_admission(place, place.worker, record, lose(place.proxy, record.key or b""))


@_BOTH_FATES
async def test_an_admission_whose_commit_is_not_answered_admits_once(place: Place, lose: _Losing) -> None:
    # Its org's queue is locked until the commit.
    limited = Worker(place.worker.pool, OrgLimits(queued_queries=1))
    await _lose_admission(place, limited, make_record(make_request()), lose(place.proxy, b"COMMIT"))


async def _lose_admission(place: Place, worker: Worker, record: Record, trigger: Trigger) -> None:
    async def admit() -> list[Verdict]:
        return await worker.admit(record)

    [verdict] = await _losing_one(trigger, until_available(admit, "postgres data"))
    assert isinstance(verdict, Query)
    assert await read_story(place.direct, verdict.facts.query_id) == [(1, "Queued", 0)]


@_BOTH_FATES
async def test_a_claim_that_is_not_answered_is_ours_once(place: Place, lose: _Losing) -> None:
    worker = place.worker
    query = await worker.admit_new()
    facts, token = query.facts, new_id()
    state: RunState = await _losing_one(lose(place.proxy, token.encode()), worker.claim(facts, query.state, token))
    assert (state.status, state.token, state.lease_token, state.attempt) == ("Running", token, token, 1)
    assert await read_story(place.direct, facts.query_id) == [(1, "Queued", 0), (2, "Running", 1)]


async def test_a_claim_that_is_not_answered_and_was_anothers_is_not_ours(place: Place) -> None:
    query = await place.worker.admit_new()
    token = new_id()
    lost = place.proxy.cut_before(token.encode())
    # The other comes first, by a connection of its own.
    winner = await Worker(place.direct).start(query.facts)
    state: RunState = await _losing_one(lost, place.worker.claim(query.facts, query.state, token))
    assert (state.token, state.attempt) == (winner.token, 1)
    assert state.token != token


@_BOTH_FATES
async def test_a_finish_that_is_not_answered_finishes_once(place: Place, lose: _Losing) -> None:
    worker = place.worker
    facts = (await worker.admit_new()).facts
    running = await worker.start(facts)
    assert running.token is not None
    state: RunState = await _losing_one(lose(place.proxy, running.token.encode()), worker.finish(facts, running))
    # Its own token on the terminal row says that the first answer was lost, and not the fence.
    assert (state.status, state.token, state.sequence) == ("Succeeded", running.token, running.sequence + 1)
    assert await read_story(place.direct, facts.query_id) == [
        (1, "Queued", 0),
        (2, "Running", 1),
        (3, "Succeeded", 1),
    ]


@_BOTH_FATES
@pytest.mark.parametrize("crashed", [False, True])
async def test_a_hand_back_that_is_not_answered_counts_once(place: Place, lose: _Losing, crashed: bool) -> None:
    worker = place.worker
    facts = (await worker.admit_new()).facts
    running = await worker.start(facts)
    assert running.token is not None
    trigger = lose(place.proxy, running.token.encode())
    state: RunState = await _losing_one(trigger, worker.hand_back(running, crashed=crashed))
    assert (state.token, state.lease_token, state.crashes) == (None, None, int(crashed))
    # The next attempt starts at once.
    assert (await worker.start(facts)).attempt == 2


async def test_a_hand_back_that_is_repeated_leaves_the_next_attempt_alone(place: Place) -> None:
    worker, other = place.worker, Worker(place.direct)
    facts = (await worker.admit_new()).facts
    running = await worker.start(facts)
    assert running.token is not None
    lost = place.proxy.lose_answer(running.token.encode())
    giving_back = asyncio.create_task(worker.hand_back(running))
    assert await asyncio.to_thread(lost.wait, PATIENCE_SECONDS)
    following = await other.start(facts)
    await giving_back
    state = await other.read(facts.query_id)
    assert (state.token, state.lease_token, state.attempt) == (following.token, following.token, 2)


@pytest.mark.slow
async def test_a_postgres_that_accepts_and_never_answers_is_waited_for(place: Place) -> None:
    query = await place.worker.admit_new()
    token = new_id()
    place.proxy.hang()
    claiming = asyncio.create_task(place.worker.claim(query.facts, query.state, token))
    accepted = place.proxy.accepted_connections
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(claiming), 1)
    # What hung is cut, as a dead peer is by its timeouts.
    place.proxy.cut()
    async with asyncio.timeout(PATIENCE_SECONDS):
        state = await claiming
    assert state is not None
    assert (state.token, state.attempt) == (token, 1)
    assert place.proxy.accepted_connections > accepted


# The relay: Postgres's answer to the delete, and Kafka's to the commit or to the records.


async def _publish(url: str, kafka: Kafka, shard: int, direct: DataPool, *, transactions: bool) -> None:
    """A relay until the outbox is empty and it has begun to wait for more."""
    rules = RelayRules(url, prepare_topics(kafka), transactions, (next(_names), shard))
    ready = asyncio.Event()
    relay = Relay(rules, ready.set)
    running = asyncio.create_task(relay.run())
    try:
        await until(lambda: _is_empty(direct), running)
    finally:
        relay.stop()
        async with direct.connection() as connection:
            await connection.execute(f"NOTIFY {CHANNEL}".encode())
        async with asyncio.timeout(PATIENCE_SECONDS):
            await running


async def _is_empty(pool: DataPool) -> bool:
    async with pool.connection() as connection:
        return await (await connection.execute("SELECT FROM outbox LIMIT 1")).fetchone() is None


async def _read_events(kafka: Kafka, query_id: str) -> list[str]:
    """The statuses that a query's published events tell of, in order."""
    published = [each for each in await read_topic(kafka, Topic.STATUS) if each.key() == query_id.encode()]
    return [(headers_of(each)["ce_id"] or b"").decode() for each in published]


async def _tell_a_story(place: Place) -> tuple[str, list[str]]:
    """A query from its admission to its success: its id, and its events' ids in order."""
    worker = Worker(place.direct)
    facts = (await worker.admit_new()).facts
    await worker.finish(facts, await worker.start(facts))
    async with place.direct.connection() as connection:
        cursor = await connection.execute("SELECT event_id::text FROM outbox ORDER BY position")
        return facts.query_id, [row[0] for row in await cursor.fetchall()]


@pytest.mark.slow
@_BOTH_FATES
@pytest.mark.parametrize(
    "transactions", [pytest.param(True, marks=pytest.mark.needs_kafka), False], ids=["transactional", "plain"]
)
async def test_after_a_relays_delete_that_is_not_answered_every_event_is_there(
    place: Place, kafka: Kafka, lose: _Losing, transactions: bool
) -> None:
    query_id, expected = await _tell_a_story(place)
    # In either case what follows the publishing; a transaction of its own where offsets are kept as well.
    lost = lose(place.proxy, b"DELETE FROM outbox")
    await _publish(place.proxied_url, kafka, shard_of(query_id), place.direct, transactions=transactions)
    assert lost.fired
    _assert_published(await _read_events(kafka, query_id), expected, exactly_once=transactions)


def _assert_published(found: list[Any], expected: list[Any], *, exactly_once: bool) -> None:
    """Without transactions the last batch may come again, the same events in the same order."""
    assert found == expected if exactly_once else found in (expected, expected * 2)


def _failing_once(method: str, *, after: bool) -> type[Producer]:
    """A producer that tells of a failure at its first call of a method, before or after the broker has acted."""
    failed = False

    def fail() -> None:
        nonlocal failed
        failed = True
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    class Failing(Producer):
        def commit_transaction(self, *args: Any) -> None:
            if method == "commit_transaction" and not failed and not after:
                super().flush(PATIENCE_SECONDS)
                fail()
            super().commit_transaction(*args)
            if method == "commit_transaction" and not failed:
                fail()

        def flush(self, *args: Any) -> int:
            if method == "flush" and not failed and not after:
                super().purge()
                super().flush(PATIENCE_SECONDS)
                fail()
            left = super().flush(*args)
            if method == "flush" and not failed:
                fail()
            return left

    return Failing


@pytest.mark.slow
@pytest.mark.parametrize("after", [True, False], ids=["done", "never arrived"])
@pytest.mark.parametrize(
    ("method", "transactions"),
    [pytest.param("commit_transaction", True, marks=pytest.mark.needs_kafka), ("flush", False)],
)
async def test_a_batch_whose_commit_is_not_answered_is_published_once(
    place: Place, kafka: Kafka, monkeypatch: pytest.MonkeyPatch, method: str, transactions: bool, after: bool
) -> None:
    query_id, expected = await _tell_a_story(place)
    monkeypatch.setattr(transactional_producer, "Producer", _failing_once(method, after=after))
    await _publish(place.proxied_url, kafka, shard_of(query_id), place.direct, transactions=transactions)
    _assert_published(await _read_events(kafka, query_id), expected, exactly_once=transactions)


# S3: an object is adopted when it holds our own bytes, and only then.


@dataclass(frozen=True, slots=True)
class Bucket:
    """A result store behind a proxy, and a reader that is not."""

    results: ResultStore
    proxy: TcpProxy
    s3: Any
    name: str

    async def store(self, path: Path, key: str) -> StoredObject:
        """As the executor stores: while the store is away, again."""

        async def put() -> StoredObject:
            return await self.results.put(key, path, "text/csv")

        return await until_available(put, "s3", unavailable=StoreUnavailable)

    def read(self, key: str) -> bytes:
        return bytes(self.s3.get_object(Bucket=self.name, Key=key)["Body"].read())

    def count_uploads(self, key: str) -> int:
        """Multipart uploads that were begun and neither completed nor aborted."""
        return len(self.s3.list_multipart_uploads(Bucket=self.name, Prefix=key).get("Uploads", []))


@pytest.fixture
def store_proxy(object_store: ObjectStore) -> Iterator[TcpProxy]:
    address = urlsplit(object_store.endpoint_url)
    with TcpProxy(address.hostname or "", address.port or 0) as proxy:
        yield proxy


@pytest.fixture
async def bucket(object_store: ObjectStore, store_proxy: TcpProxy) -> AsyncIterator[Bucket]:
    credentials = {
        "AWS_REGION": object_store.region,
        "AWS_ACCESS_KEY_ID": object_store.writer.access_key,
        "AWS_SECRET_ACCESS_KEY": object_store.writer.secret_key,
    }
    variables = credentials | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{store_proxy.port}"}
    results = ResultStore(object_store.bucket, StoreAccess.from_variables(variables))
    s3 = boto3.client(
        "s3",
        endpoint_url=object_store.endpoint_url,
        region_name=object_store.region,
        aws_access_key_id=object_store.writer.access_key,
        aws_secret_access_key=object_store.writer.secret_key,
    )
    yield Bucket(results, store_proxy, s3, object_store.bucket)
    s3.close()


def _key() -> str:
    return prefix(OrgId(new_id()), QueryId(new_id()), 1, str(uuid.uuid4())) + "result.csv"


def _write(path: Path, size: int) -> bytes:
    body = os.urandom(size)
    path.write_bytes(body)
    return body


_ANSWERS = pytest.mark.parametrize(
    ("size", "request_bytes"),
    [
        pytest.param(4_096, b"PUT /", id="PUT"),
        pytest.param(17 * _MIB, b"<CompleteMultipartUpload", id="CompleteMultipartUpload"),
    ],
)


@_ANSWERS
async def test_an_object_whose_answer_is_lost_is_adopted_as_our_own(
    bucket: Bucket, tmp_path: Path, size: int, request_bytes: bytes
) -> None:
    path, key = tmp_path / "result", _key()
    body = _write(path, size)
    lost = bucket.proxy.lose_answer(request_bytes, answer=b"HTTP/1.1 200")
    stored: StoredObject = await _losing_one(lost, bucket.store(path, key))
    assert (stored.key, stored.bytes) == (key, size)
    assert bucket.read(key) == body
    assert bucket.s3.head_object(Bucket=bucket.name, Key=key)["ETag"].strip('"') == stored.etag
    assert bucket.count_uploads(key) == 0


@_ANSWERS
async def test_an_object_whose_request_never_arrives_is_stored_whole(
    bucket: Bucket, tmp_path: Path, size: int, request_bytes: bytes
) -> None:
    path, key = tmp_path / "result", _key()
    body = _write(path, size)
    stored: StoredObject = await _losing_one(bucket.proxy.cut_before(request_bytes), bucket.store(path, key))
    assert (stored.key, stored.bytes) == (key, size)
    assert bucket.read(key) == body
    assert bucket.count_uploads(key) == 0


@pytest.mark.parametrize("size", [12 * _MIB, 17 * _MIB], ids=["PUT", "parts"])
async def test_an_upload_that_is_cut_in_the_middle_leaves_nothing_visible_and_is_stored_whole(
    bucket: Bucket, tmp_path: Path, size: int
) -> None:
    path, key = tmp_path / "result", _key()
    body = _write(path, size)
    bucket.proxy.cut_after(5 * _MIB)
    stored = await bucket.store(path, key)
    assert (stored.key, stored.bytes) == (key, size)
    assert bucket.read(key) == body
    assert bucket.count_uploads(key) == 0


@pytest.mark.slow
async def test_a_result_is_never_taken_for_stored_because_another_lies_there(bucket: Bucket, tmp_path: Path) -> None:
    path, key = tmp_path / "result", _key()
    body = _write(path, 4_096)
    bucket.s3.put_object(Bucket=bucket.name, Key=key, Body=os.urandom(len(body)))
    theirs = bucket.read(key)
    lost = bucket.proxy.lose_answer(b"PUT /", answer=b"HTTP/1.1 412")
    with pytest.raises(StoreRefused, match="another object"):
        await bucket.store(path, key)
    assert lost.fired
    assert bucket.read(key) == theirs
