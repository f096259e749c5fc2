"""Runs an executor with one of its safeguards taken out, in this process alone: the judge must notice.

    python -m tests.faults.sabotaged SABOTAGE executor

The product knows nothing of this; what is replaced here must be there to be replaced, or the start fails.
"""

import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, cast
from unittest.mock import patch

from confluent_kafka import Message, Producer

from consumers.executor import admission, transitions
from consumers.executor.attempt import Attempts
from consumers.executor.query import Attempt
from db.connection import Connection, DatabaseUnavailable
from db.data import admission as admission_rows
from db.data import attempts as attempt_rows
from db.retrying import until_available
from processes.failpoints import Failpoint, failpoint
from queryd.events import Topic
from queryd.headers import to_kafka
from queryd.kafka.consumer import Subscription
from queryd.kafka.record import Record
from results.store import StoreUnavailable
from service.run import Service, run_service
from service.settings import load_settings

_BROKER_SECONDS = 15.0


class Sabotage(StrEnum):
    """What is broken."""

    OFFSET_BEFORE_FINISH = "offset-before-finish"
    NO_FENCING = "no-fencing"
    NO_OUTBOX = "no-outbox"
    PUBLISH_BEFORE_COMMIT = "publish-before-commit"
    SKIP_ON_ERROR = "skip-on-error"


# Offset before finish: a record counts as done once it is received.


def _finish_on_receipt() -> None:
    receive = Subscription._receive

    def receive_and_finish(subscription: Subscription, message: Message) -> Record | None:
        record = receive(subscription, message)
        if record is not None:
            subscription.finish(record)
        return record

    patch.object(Subscription, "_receive", receive_and_finish).start()
    # And the very next poll says so to the broker, so that no crash comes before.
    patch("queryd.kafka.consumer._COMMIT_SECONDS", 0.0).start()


# No fencing: an attempt ends its query whoever holds it by now, and however it stands. The sequence fences as the token
# does, and so does the deadline that a terminal query has no more.


def _take_fences_down() -> None:
    statement = attempt_rows.END
    for fence in ("r.token = i.token", "r.sequence = i.sequence", "r.deadline IS NOT NULL"):
        statement = _replace(statement, fence, "true")
    patch.object(attempt_rows, "END", statement).start()


# No outbox, and publish before commit: what would be written to the outbox is given back instead and published by the
# executor itself, after or before its transaction is committed. The two named steps around a finish are passed where
# the crash hurts: between the two halves of what should be one.


def _publish_after_commit() -> None:
    async def change(connection: Connection, run: Callable[[], Awaitable[list[Any]]], finishes: bool) -> None:
        rows = await run()
        await connection.commit()
        if finishes:
            failpoint(Failpoint.FINISH_AFTER)
        _publish(rows)

    # psycopg refuses `commit()` inside a transaction block.
    patch.object(admission, "_open_transaction_for_locks", lambda *_: nullcontext()).start()
    _bypass_outbox(change)


def _publish_before_commit() -> None:
    async def change(connection: Connection, run: Callable[[], Awaitable[list[Any]]], finishes: bool) -> None:
        async with connection.transaction():
            _publish(await run())
            if finishes:
                failpoint(Failpoint.FINISH_BEFORE)

    _bypass_outbox(change)


# What the statements return, beside which the events are returned here. No org has limits here, so no claim is refused.
_ANSWERS = {
    "CLAIM": (
        "SELECT query_id::text, NULL, token::text FROM moved",
        "SELECT m.query_id::text, NULL, token::text, e.* FROM moved m JOIN told e USING (query_id)",
    ),
    "END": (
        "SELECT query_id::text, token::text, topic, total FROM moved",
        "SELECT m.query_id::text, m.token::text, m.topic, m.total, e.* FROM moved m JOIN told e USING (query_id)",
    ),
    "INSERT_QUERIES": (
        "       clock_timestamp()\nFROM runs",
        "       clock_timestamp(), e.*\nFROM runs JOIN events e USING (query_id)",
    ),
}
_REFUSED_CLAIMS = "SELECT query_id::text, org_id::text, NULL FROM judged WHERE NOT granted\nUNION ALL\n"
_EVENT_COLUMNS = 6

_Bypass = Callable[[Connection, Callable[[], Awaitable[list[Any]]], bool], Awaitable[None]]


def _bypass_outbox(change: _Bypass) -> None:
    insert = "INSERT INTO outbox (shard, event_id, query_id, type, payload, headers)\n"
    patch.object(attempt_rows, "CLAIM", _replace(attempt_rows.CLAIM, _REFUSED_CLAIMS, "")).start()
    for module, name in ((attempt_rows, "CLAIM"), (attempt_rows, "END"), (admission_rows, "INSERT_QUERIES")):
        statement = _replace(_replace(getattr(module, name), insert, ""), *_ANSWERS[name])
        patch.object(module, name, statement).start()

    def divert(statement: Callable[..., Awaitable[Any]], finishes: bool) -> Callable[..., Awaitable[Any]]:
        async def diverted(connection: Connection, *items: Any, **limits: Any) -> Any:
            ear = _Ear(connection)
            answer: Any = None

            async def run() -> list[Any]:
                nonlocal answer
                answer = await statement(cast(Connection, ear), *items, **limits)
                return ear.rows

            await change(connection, run, finishes)
            return answer

        return diverted

    patch.object(transitions, "claim", divert(attempt_rows.claim, finishes=False)).start()
    patch.object(transitions, "end", divert(attempt_rows.end, finishes=True)).start()
    patch.object(admission, "insert_queries", divert(admission_rows.insert_queries, finishes=False)).start()
    patch("consumers.executor.attempt.failpoint", _pass_all_but_finishing).start()


def _pass_all_but_finishing(place: Failpoint) -> None:
    if place not in (Failpoint.FINISH_BEFORE, Failpoint.FINISH_AFTER):
        failpoint(place)


class _Ear:
    """A connection that keeps the events that its statement returns, and passes on the rest."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.rows: list[Any] = []

    async def execute(self, statement: Any, arguments: Any) -> Any:
        """As the connection's own."""
        cursor = await self._connection.execute(statement, arguments)
        rows = await cursor.fetchall()
        self.rows = [row[-_EVENT_COLUMNS:] for row in rows]
        return _Answer([row[:-_EVENT_COLUMNS] for row in rows])


@dataclass(frozen=True, slots=True)
class _Answer:
    rows: list[Any]

    async def fetchall(self) -> list[Any]:
        return self.rows


def _publish(rows: Sequence[Any]) -> None:
    """Publish what would have been rows of the outbox, and wait until it is acknowledged."""
    producer = _producer()
    for _, _, query_id, _, payload, headers in rows:
        producer.produce(Topic.STATUS, key=str(query_id).encode(), value=payload, headers=to_kafka(headers))
    if producer.flush(_BROKER_SECONDS):
        raise TimeoutError("the broker acknowledged nothing")


@cache
def _producer() -> Producer:
    return Producer(load_settings().kafka | {"enable.idempotence": True, "acks": "all"})


# Skip on error: a store that is away is tried twice, then the query's record counts as done.


def _skip_on_error() -> None:
    async def give_up(
        work: Callable[[], Awaitable[Any]],
        dependency: str,
        *,
        unavailable: type[Exception] = DatabaseUnavailable,
        **_: Any,
    ) -> Any:
        return await until_available(work, dependency, unavailable=unavailable, give_up_after=0.001)

    run = Attempts.run

    async def run_or_skip(attempts: Attempts, claimed: Attempt, executed: Callable[[], None]) -> bool:
        try:
            return await run(attempts, claimed, executed)
        except StoreUnavailable:
            return True

    patch("consumers.executor.attempt.until_available", give_up).start()
    patch.object(Attempts, "run", run_or_skip).start()


def _replace(statement: str, what: str, by: str) -> str:
    if what not in statement:
        raise LookupError(f"there is no `{what.strip()}` to take out any more: sabotage what took its place")
    return statement.replace(what, by)


_SABOTAGES: dict[Sabotage, Callable[[], None]] = {
    Sabotage.OFFSET_BEFORE_FINISH: _finish_on_receipt,
    Sabotage.NO_FENCING: _take_fences_down,
    Sabotage.NO_OUTBOX: _publish_after_commit,
    Sabotage.PUBLISH_BEFORE_COMMIT: _publish_before_commit,
    Sabotage.SKIP_ON_ERROR: _skip_on_error,
}


def main() -> None:
    """Break it, then run it."""
    sabotage, service = sys.argv[1:]
    _SABOTAGES[Sabotage(sabotage)]()
    sys.exit(run_service(Service(service), load_settings()))


if __name__ == "__main__":
    main()
