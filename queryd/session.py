"""What both clients are made of: a sender, the tracking of their queries, and a reader of results."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any
from uuid import UUID

from confluent_kafka import KafkaException

from queryd.errors import QueryFailed
from queryd.events import OrgId, QueryId, QueryStatusChanged, Status, parse_uuid
from queryd.requests import SubmitOptions, make_cancel, make_request
from queryd.results import ResultReader
from queryd.sender import Sender
from queryd.tracking import SILENCE_SECONDS, Track, Tracking


class Session:
    """One client's dealings with Kafka and S3. Safe for several threads."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        """`kafka` is librdkafka's configuration. Blocks; raises `KafkaException` when the broker is silent for 15 s."""
        if not isinstance(kafka, Mapping):
            raise TypeError('the client takes librdkafka\'s properties, {"bootstrap.servers": "host:port"}')
        self.kafka = dict(kafka)
        self._sender = Sender(self.kafka)
        try:
            self._tracking = Tracking(self.kafka)
        except BaseException as error:
            if isinstance(error, KafkaException):
                brokers = self.kafka.get("bootstrap.servers")
                error.add_note(f"The client asked Kafka at {brokers}. `queryd doctor` says what is wrong.")
            self._sender.close()
            raise
        self._reader: ResultReader | None = None
        self._reading = threading.Lock()

    def submit(self, sql: str | None, options: SubmitOptions) -> "tuple[Query, Future[None]]":
        """The query, and its request's acknowledgement; see `Sender.send`."""
        request = make_request(sql, **options)
        # Before the request, so that no event of it is missed.
        track = self._tracking.take(request.query_id)
        answer = self._sender.send(request)
        if options.get("query_id") is not None:
            self._tracking.look_up(track, SILENCE_SECONDS)
        return Query(self, track, request.org_id), answer

    def cancel(
        self, query_id: str | UUID, org_id: str | UUID, user_id: str | UUID | None, reason: str | None
    ) -> "tuple[Query, Future[None]]":
        """The query that is to stop, and the acknowledgement; see `Sender.send`."""
        cancel = make_cancel(query_id, org_id=org_id, user_id=user_id, reason=reason)
        track = self._tracking.take(cancel.query_id)
        answer = self._sender.send(cancel)
        self._tracking.look_up(track, SILENCE_SECONDS)
        return Query(self, track, cancel.org_id), answer

    def find(self, query_id: str | UUID, org_id: str | UUID | None) -> "Query":
        """A query that somebody has submitted. Raises `Invalid` where an id is no UUID."""
        track = self._tracking.take(QueryId(parse_uuid(query_id, "query_id")))
        self._tracking.look_up(track)
        return Query(self, track, None if org_id is None else OrgId(parse_uuid(org_id, "org_id")))

    def check_process(self) -> None:
        """Raises `ClientStopped` in a fork of the process that created the client."""
        self._tracking.origin.check()

    @property
    def reader(self) -> ResultReader:
        """Made when the first result is read: its settings take a tenth of a second to look up."""
        with self._reading:
            if self._reader is None:
                self._reader = ResultReader()
            return self._reader

    def close(self) -> None:
        """Wait for what is under way to the broker, and follow no more. Blocks."""
        self._sender.close()
        self._tracking.close()


class Query:
    """One query of a client: what is known of it, without waiting for anything."""

    def __init__(self, session: Session, track: Track, org_id: OrgId | None) -> None:
        self.session = session
        self.track = track
        self._org_id = org_id

    @property
    def org_id(self) -> OrgId:
        """Who may cancel it. Raises `ValueError` where neither the caller nor an event has said so."""
        known = self.track.known.event
        org_id = self._org_id if known is None else known.org_id
        if org_id is None:
            raise ValueError("nothing is known of the query yet: say whose it is, handle(query_id, org_id=…)")
        return org_id

    def succeeded(self) -> QueryStatusChanged:
        """The event of a query that has ended; raises `QueryFailed`, and what `Track.answer` does."""
        event = self.track.answer()
        if event.status is Status.FAILED:
            raise QueryFailed(event)
        return event


class KnownQuery:
    """What both kinds of handle tell without waiting."""

    def __init__(self, query: Query) -> None:
        self._query = query

    @property
    def query_id(self) -> QueryId:
        """The request's own id."""
        return self._query.track.query_id

    @property
    def event(self) -> QueryStatusChanged | None:
        """The newest event that has been heard of it; None before the first."""
        return self._query.track.known.event

    @property
    def status(self) -> Status | None:
        """What the newest event says; None before the first. `latest` waits for what the log knows."""
        return None if self.event is None else self.event.status


def still_waiting(timeout: float | None) -> TimeoutError:
    """For a wait that took too long."""
    return TimeoutError(f"the query is not finished after {timeout} s; it goes on, wait again or cancel it")
