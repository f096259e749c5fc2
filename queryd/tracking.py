"""What a client knows of its queries: the newest event of each that somebody holds a handle of, and of no other.

One thread follows `query.status` from where it ended when the client was made. What lies before that is found by a
look-up: a query's events are in the partition that its id decides, which another thread reads once from its beginning
to its end. The topic keeps every query's last event until the query is deleted, and then says so.
"""

import logging
import math
import threading
import time
import uuid
import weakref
import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from queryd.codec import NoRegistry, Undecodable, decode_status
from queryd.errors import ClientStopped, QueryDeleted
from queryd.events import Invalid, QueryId, QueryStatusChanged, Topic
from queryd.forks import Origin
from queryd.kafka.bounded_reader import BoundedReader, is_answer
from queryd.kafka.outages import QUIET, explain_error
from queryd.registry import RegistryAway

_log = logging.getLogger("queryd.client")

# How long the broker may take to say where its topics end.
_BROKER_SECONDS = 15.0
# What the broker says of a topic that it is about to have; it is asked again this often.
_NOT_YET = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
}
_LOOK_SECONDS = 0.1
# How long one poll blocks its thread; only `close` waits for it.
_POLL_SECONDS = 0.2
# How many records are taken at once.
_AT_ONCE = 500
# How often a schema registry that is away is asked again.
_AGAIN_SECONDS = 1.0
# A request that is new has its first event after some tenths of a second, and needs no look-up, which reads megabytes.
# One that has been finished for long has none: it is looked up when this silence is over.
SILENCE_SECONDS = 1.0

_READING = {
    "enable.auto.commit": False,
    "isolation.level": "read_committed",
    # A topic that was made anew is read from its beginning.
    "auto.offset.reset": "earliest",
}


class _Refused(Exception):
    """Reading ends; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the log says of a query, up to some record of its."""

    event: QueryStatusChanged | None = None
    deleted: bool = False

    @property
    def over(self) -> bool:
        """True when nothing follows any more."""
        return self.deleted or (self.event is not None and self.event.status.terminal)

    def after(self, event: QueryStatusChanged | None) -> "Known":
        """What is known after the query's next record: an event, or None for its tombstone.

        The same event may come again, by a replay or without its inline result once that has expired, and even behind a
        later one or the tombstone. Only a first event begins another story after a tombstone.
        """
        if event is None:
            return Known(self.event, deleted=True)
        if self.deleted:
            return Known(event) if event.sequence == 1 else self
        if self.event is not None and event.sequence < self.event.sequence:
            return self
        return Known(event)


class Track:
    """What is known of one query now, and futures for who waits. They are never failed: `answer` says what came out."""

    def __init__(self, query_id: QueryId) -> None:
        self.query_id = query_id
        self.known = Known()
        # Done when the query has ended, was deleted, or can't be followed any more.
        self.ended: Future[None] = _uncancellable()
        # Done when something has been heard of the query, or the log was read in vain.
        self.looked_up: Future[None] = _uncancellable()
        self._stopped: str | None = None
        self._lock = threading.Lock()

    def hear(self, event: QueryStatusChanged | None) -> None:
        """The topic's next record of the query: an event, or None for its tombstone."""
        with self._lock:
            # Who holds a handle of a deleted query is told so, whatever comes.
            if not self.known.deleted:
                self._tell(self.known.after(event))

    def find(self, known: Known) -> None:
        """What a look-up has found; what was heard meanwhile is newer."""
        with self._lock:
            self._tell(known if self.known == Known() else self.known)

    def stop(self, reason: str) -> None:
        """Nothing more will be heard."""
        with self._lock:
            self._stopped = reason
            _resolve(self.looked_up)
            _resolve(self.ended)

    def answer(self) -> QueryStatusChanged:
        """The terminal event, once `ended` is done; raises `QueryDeleted` and `ClientStopped`."""
        self.check()
        assert self.known.event is not None
        return self.known.event

    def check(self) -> None:
        """Raises `QueryDeleted`, and `ClientStopped` where more was to be heard."""
        if self.known.deleted:
            raise QueryDeleted(self.query_id)
        if self._stopped is not None and not self.known.over:
            raise ClientStopped(self._stopped)

    def _tell(self, known: Known) -> None:
        self.known = known
        _resolve(self.looked_up)
        if known.over:
            _resolve(self.ended)


class Tracking:
    """Follows the queries of one client. Safe for several threads."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        """Blocks until the broker has said where its topic ends; raises `KafkaException` after 15 s."""
        # The group is only a name that the protocol wants.
        self._kafka = dict(kafka) | QUIET | _READING | {"group.id": f"queryd-client-{uuid.uuid4()}"}
        # The client's memory is that of its handles: a track lives as long as somebody holds it.
        self._tracks: weakref.WeakValueDictionary[bytes, Track] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._stopped: str | None = None
        self._closing = threading.Event()
        self.origin = Origin(self)
        self._consumer, self._partitions = self._open_at_the_end()
        self._wanted: list[tuple[float, weakref.ref[Track]]] = []
        self._wanting = threading.Condition()
        self._searcher: threading.Thread | None = None
        self._follower = threading.Thread(target=self._follow, name="queryd-follower", daemon=True)
        self._follower.start()

    def take(self, query_id: QueryId) -> Track:
        """Track a query; the track receives all events published from now on.

        Raises `ClientStopped` in a fork of the process.
        """
        self.origin.check()
        with self._lock:
            track = self._tracks.get(query_id.encode())
            if track is None:
                track = self._tracks[query_id.encode()] = Track(query_id)
                if self._stopped is not None:
                    track.stop(self._stopped)
            return track

    def look_up(self, track: Track, silence: float = 0.0) -> None:
        """Read in the background what the log says of the query, unless something is heard of it within the silence."""
        with self._wanting:
            self._wanted.append((time.monotonic() + silence, weakref.ref(track)))
            self._wanting.notify()
            if self._searcher is None:
                self._searcher = threading.Thread(target=self._search, name="queryd-look-up", daemon=True)
                self._searcher.start()

    def close(self) -> None:
        """Follow no more; who waits is told so."""
        self._closing.set()
        with self._wanting:
            self._wanting.notify()
            searcher = self._searcher
        self._follower.join()
        if searcher is not None:
            searcher.join()
        self._consumer.close()
        self._stop("the client was closed")

    def _stop(self, reason: str) -> None:
        self._closing.set()
        with self._lock:
            self._stopped = self._stopped or reason
            for track in list(self._tracks.values()):
                track.stop(self._stopped)

    # The follower's thread.

    def _open_at_the_end(self) -> tuple[Consumer, int]:
        consumer = Consumer(self._kafka)
        try:
            ends = _await_ends(consumer)
            consumer.assign(ends)
        except KafkaException:
            consumer.close()
            raise
        return consumer, len(ends)

    def _follow(self) -> None:
        try:
            while not self._closing.is_set():
                # One blocking poll for the first record, then what is already here.
                first = self._consumer.poll(_POLL_SECONDS)
                for message in [] if first is None else [first, *self._consumer.consume(_AT_ONCE - 1, 0)]:
                    if is_answer(message):
                        self._hear(message)
        except (KafkaException, _Refused, NoRegistry) as error:
            self._stop(explain_error(error))

    def _hear(self, message: Message) -> None:
        track = self._tracks.get(_key(message))
        if track is None:
            return
        try:
            track.hear(self._read(message))
        except _Unreadable as error:
            _log.warning("an event of a query that is followed can't be read: %s", error)

    def _read(self, message: Message) -> QueryStatusChanged | None:
        """The event, or None for a tombstone; raises `_Unreadable`, `NoRegistry`, and `_Refused` at a close."""
        value: Any = message.value()
        while value is not None:
            try:
                return decode_status(value)
            except RegistryAway:
                if self._closing.wait(_AGAIN_SECONDS):
                    raise _Refused("the client was closed") from None
            except NoRegistry:
                raise
            except (Undecodable, Invalid) as error:
                raise _Unreadable(str(error)) from None
        return None

    # The look-ups' thread.

    def _search(self) -> None:
        try:
            while not self._closing.is_set():
                self._find(self._await_due())
        except (KafkaException, _Refused, NoRegistry) as error:
            self._stop(explain_error(error))

    def _await_due(self) -> "list[weakref.ref[Track]]":
        """What is to be looked up, as soon as anything is; nothing at a close."""
        with self._wanting:
            while not self._closing.is_set():
                now = time.monotonic()
                if due := [track for moment, track in self._wanted if moment <= now]:
                    self._wanted = [each for each in self._wanted if each[0] > now]
                    return due
                self._wanting.wait(min((moment - now for moment, _ in self._wanted), default=None))
        return []

    def _find(self, due: "list[weakref.ref[Track]]") -> None:
        found = {key: Known() for each in due if (key := _unheard(each)) is not None}
        if found and self._read_partitions(found):
            for each in due:
                if (track := each()) is not None and (known := found.get(track.query_id.encode())) is not None:
                    track.find(known)

    def _read_partitions(self, found: dict[bytes, Known]) -> bool:
        """Read the partitions of the keys from beginning to end, for what they say of them; False at a close."""
        starts = {(str(Topic.STATUS), partition_of(key, self._partitions)): 0 for key in found}
        # Offset 0 and not `OFFSET_BEGINNING`, which costs a request that librdkafka repeats only after 0.5 s.
        with BoundedReader(self._kafka, starts, reset="earliest") as reader:
            for messages in reader.read_to(silence_seconds=math.inf, stopping=self._closing):
                for message in messages:
                    if (key := _key(message)) in found:
                        found[key] = self._follow_story(found[key], message)
        return not self._closing.is_set()

    def _follow_story(self, known: Known, message: Message) -> Known:
        try:
            return known.after(self._read(message))
        except _Unreadable:
            # Not one of queryd's events.
            return known


class _Unreadable(Exception):
    """The record holds no event."""


def _await_ends(consumer: Consumer) -> list[TopicPartition]:
    """Where the topic ends now, in every partition: everything about a later submit lies behind."""
    deadline = time.monotonic() + _BROKER_SECONDS
    while True:
        try:
            return _read_ends(consumer)
        except KafkaException as error:
            # A topic that was just made has no leaders yet.
            if error.args[0].code() not in _NOT_YET or time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECONDS)


def _read_ends(consumer: Consumer) -> list[TopicPartition]:
    topic = consumer.list_topics(Topic.STATUS, timeout=_BROKER_SECONDS).topics[Topic.STATUS]
    if topic.error is not None:
        raise KafkaException(topic.error)
    ends = [TopicPartition(Topic.STATUS, number) for number in topic.partitions]
    for partition in ends:
        _, partition.offset = consumer.get_watermark_offsets(partition, timeout=_BROKER_SECONDS)
    return ends


def _unheard(reference: "weakref.ref[Track]") -> bytes | None:
    """The key of a query that is still held and was not heard of."""
    track = reference()
    return None if track is None or track.looked_up.done() else track.query_id.encode()


def partition_of(key: bytes, partitions: int) -> int:
    """Where a query's events lie: librdkafka's default partitioner, by which the relay publishes, takes the key's
    CRC-32 modulo the number of partitions.

    Source: librdkafka's CONFIGURATION.md, `partitioner`, `consistent_random`; held by a test.
    """
    return zlib.crc32(key) % partitions


def _uncancellable() -> "Future[None]":
    """A future that several wait for: none of them can cancel it for the others."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _resolve(future: "Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _key(message: Message) -> bytes:
    key: Any = message.key()
    return key if isinstance(key, bytes) else b""
