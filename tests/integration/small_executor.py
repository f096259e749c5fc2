"""A whole executor in this process, on a real broker and a real Postgres, whose engine does what a test says.

Nothing is computed and nothing stored: what is seen is which query begins when, on which worker, and by what limits.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from access.limits import OrgLimits
from consumers.dead_letters import DeadLetters
from consumers.executor.admission import Rules
from consumers.executor.attempt import AttemptRules, Attempts
from consumers.executor.executor import Executor, ExecutorRules
from consumers.executor.leases import Leases
from consumers.executor.reaper import Reaper
from consumers.executor.transitions import Transitions
from db.clock import DatabaseClock
from db.connection import DataPool
from engines.protocol import Execution, Output
from queryd.events import Mode
from queryd.kafka.outages import QUIET
from results.retention.sweep import Retention
from results.store import ResultStore, StoredObject
from service.embedded.broker import Broker
from service.embedded.servers import Lifeline
from service.topics import apply_topics
from tests.integration.queries import opened_pool

# Longer than any test: leases and limits end when a test says so.
_LONG_SECONDS = 600.0


class Stage:
    """What runs on all executors together. A query that has begun runs until the test lets it end."""

    def __init__(self) -> None:
        # In order of their beginning.
        self.begun: list[Execution] = []
        # How many of each org run now, and what the most was.
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self._ends: deque[asyncio.Event] = deque()
        self._free = False
        self._changed = asyncio.Condition()

    async def play(self, execution: Execution) -> None:
        """Be on stage until it is over."""
        end = asyncio.Event()
        if self._free:
            end.set()
        self._ends.append(end)
        self.begun.append(execution)
        self.running[execution.org_id] += 1
        self.most |= self.running
        try:
            await self._tell()
            await end.wait()
        finally:
            self.running[execution.org_id] -= 1

    async def until_begun(self, count: int) -> None:
        """Wait until so many have begun."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.begun) >= count)

    def end_one(self) -> None:
        """Let the one end that has run for longest; there must be one."""
        self._ends.popleft().set()

    def end_all(self) -> None:
        """Let all end, and from now on each as soon as it has begun."""
        self._free = True
        for end in self._ends:
            end.set()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class StageEngine:
    """An engine that only says that it runs."""

    name = "stage"

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def start(self) -> None:
        """Nothing to start."""

    async def execute(self, execution: Execution) -> Output:
        """Run for as long as the stage wants."""
        await self._stage.play(execution)
        return Output(b"", rows=0, bytes=0, columns=())

    async def close(self) -> None:
        """Nothing to close."""


class _NoStore:
    """Takes every file and keeps none."""

    async def put(self, key: str, _content: bytes | Path, _content_type: str) -> StoredObject:
        return StoredObject(key, bytes=0, etag="etag", sha256="0" * 64)


class _NoSweep:
    async def sweep_for_ever(self) -> None:
        await asyncio.Event().wait()


def _make_executor(
    pool: DataPool, kafka: dict[str, Any], scratch: Path, stage: Stage, slots: int, limits: OrgLimits
) -> Executor:
    clock = DatabaseClock(datetime.now(UTC))
    transitions = Transitions(pool, clock, limits.running_queries)
    leases = Leases(pool, _LONG_SECONDS, _LONG_SECONDS / 3)
    engine = StageEngine(stage)
    seconds = dict.fromkeys(Mode, _LONG_SECONDS)
    attempts = Attempts(
        pool=pool,
        clock=clock,
        transitions=transitions,
        leases=leases,
        engine=engine,
        store=cast(ResultStore, _NoStore()),
        rules=AttemptRules("worker", "bucket", scratch, _LONG_SECONDS, seconds, seconds, seconds, timedelta(days=1)),
    )
    return Executor(
        pool=pool,
        clock=clock,
        subscription_config=kafka | {"group.id": "stage", "session.timeout.ms": 3000},
        dead_letters=DeadLetters(pool, {}),
        engine=engine,
        transitions=transitions,
        attempts=attempts,
        leases=leases,
        reaper=Reaper(pool, clock, transitions, _LONG_SECONDS),
        retention=cast(Retention, _NoSweep()),
        admission_rules=Rules(seconds, frozenset({"stage"}), None, limits),
        rules=ExecutorRules(dict.fromkeys(Mode, slots), _LONG_SECONDS, drain_seconds=0.0),
    )


@contextmanager
def own_broker(folder: Path, lifeline: Lifeline, partitions: int) -> Iterator[dict[str, Any]]:
    """Run a broker of one test alone, since the request topics have fixed names; yields librdkafka's configuration."""
    broker = Broker(folder / "kafka", folder / "kafka.log", lifeline)
    broker.start()
    try:
        config: dict[str, Any] = QUIET | {"bootstrap.servers": broker.bootstrap}
        apply_topics(config, partitions, replication=1)
        yield config
    finally:
        broker.stop()


@asynccontextmanager
async def running_executor(
    url: str, kafka: dict[str, Any], scratch: Path, stage: Stage, *, slots: int, limits: OrgLimits | None = None
) -> AsyncIterator[Executor]:
    """An executor that holds its partitions, with so many slots in each lane; it drains at the end."""
    async with opened_pool(url) as pool:
        executor = _make_executor(pool, kafka, scratch, stage, slots, limits or OrgLimits())
        running = asyncio.create_task(executor.run())
        assigned = asyncio.create_task(executor.intake.wait_assigned())
        try:
            await asyncio.wait([running, assigned], return_when=asyncio.FIRST_COMPLETED)
            yield executor
        finally:
            assigned.cancel()
            with suppress(asyncio.CancelledError):
                await assigned
            executor.stop()
            await running
