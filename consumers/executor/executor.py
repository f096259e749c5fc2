"""The executor: requests in, results out. This file holds the loops; a query's way through them is

    poll → admit → schedule → claim → execute → store → finish → commit

and each arrow is one function: `_take_in`, `_admit_batch`, `FairQueue.put`, `_claim`, then `Attempts.run` from top to
bottom.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from consumers.dead_letters import DeadLetter, DeadLetters
from consumers.executor.admission import Done, Legible, Refused, Rules, Verdict, admit, read_record
from consumers.executor.arrivals import Arrivals
from consumers.executor.attempt import Attempts, find_failure
from consumers.executor.cancel_news import follow_cancellations
from consumers.executor.cancelling import end_tasks
from consumers.executor.endings import Failure
from consumers.executor.intake import Intake
from consumers.executor.leases import Leases, Stop
from consumers.executor.query import Attempt, Query
from consumers.executor.reaper import Reaper
from consumers.executor.schedule import FairQueue, Turn
from consumers.executor.spacing import Spacing
from consumers.executor.transitions import Refusal, RowRefused, Transitions, run_batch
from consumers.executor.watch import Watch
from db.clock import DatabaseClock, elapsed
from db.connection import DatabaseUnavailable, DataPool
from db.retrying import until_available
from engines.protocol import Engine
from queryd.dead_letters import DeadCode
from queryd.events import Mode
from queryd.kafka.record import Partition, Record
from results.retention.sweep import Retention
from telemetry.events import LogEvent
from telemetry.traces import SpanAttribute, SpanName, Step, spans

_log = structlog.get_logger("queryd.executor")

# Requests read in one turn of the event loop, which takes some 2 ms: what runs needs the loop as well.
_PORTION = 50
# Requests in one admission batch, which then takes some 50 ms.
_ADMISSION = 500
# Under load, admission batches start this far apart. Each costs two statements, and claiming its queries two more:
# 25 batches a second are at most 100 statements a second.
_ADMISSIONS_APART_SECONDS = 0.04
# A handed-back query's next attempt starts within 2 s, so the watch looks twice a second; one statement for all.
_WATCH_SECONDS = 0.5
# Results waiting for the store or the finish, per lane: bounds what lies in scratch while S3 or Postgres is slow.
_UNFINISHED_RESULTS = 64
# Queries that will start within this time are claimed together: a statement for one costs nearly what one for 20 does.
_AHEAD_SECONDS = 0.25
_MOST_AHEAD = 32
# A claimed query that has not started after this long is handed back.
_UNSTARTED_SECONDS = 1.0
# The weight of the newest query in the moving average of run times.
_RUN_SHARE = 0.1
# How long an org's queries wait here before the next is tried. Where its limit is reached: what ends here is known at
# once, so this only says how late a place is noticed that another worker's query has left, at the price of one claim.
# Where another worker is counting: that takes some milliseconds.
_HELD_SECONDS = {Refusal.LIMIT: 0.5, Refusal.BUSY: 0.02}
# Whoever's query ends here knows first that there is a place, and would have it for ever while others, who ask twice a
# second, wait. So an org with a limit rests here after each of its queries, for this part of what the query took: after
# long ones, which others would never catch the end of, until everybody has asked.
_REST = 0.05
_LONGEST_REST_SECONDS = 0.65
# Leaving the group takes some 100 ms. With Kafka away it takes as long as the group's session, and a worker that is
# killed before it has handed back leaves crashes behind.
_LEAVE_SECONDS = 3.0
# Handing back is one transaction; longer than this the database is away, and the leases run out by themselves.
_HAND_BACK_SECONDS = 2.0

_UNSTORABLE = Refused(DeadCode.INVALID_REQUEST, "the database can't store a value of this request")


@dataclass(frozen=True, slots=True)
class ExecutorRules:
    """What the executor needs of the settings. Times in seconds."""

    slots: dict[Mode, int]
    lease_seconds: float
    drain_seconds: float


class Lane:
    """One lane: its waiting queries, its claimed queries that wait for a slot, and room for results to be stored."""

    def __init__(self, mode: Mode, slots: int) -> None:
        self.mode = mode
        self.slots = slots
        self.queue = FairQueue()
        self.unfinished = asyncio.Semaphore(slots + _UNFINISHED_RESULTS)
        self._ready: deque[Attempt] = deque()
        self._idle_slots = 0
        # Wakes slots for a claimed query, and the claims for a free slot.
        self._has_ready = asyncio.Condition()
        self._has_room = asyncio.Event()
        # A moving average, in seconds; None before the first query has run.
        self._run_seconds: float | None = None

    async def wait_for_room(self) -> None:
        """Return once queries should be claimed."""
        while self.count_wanted() == 0:
            self._has_room.clear()
            await self._has_room.wait()

    async def wait_for_idle_slot(self) -> None:
        """Return once a slot is idle for which no query is claimed."""
        while self._idle_slots <= len(self._ready):
            self._has_room.clear()
            await self._has_room.wait()

    def count_wanted(self) -> int:
        """How many queries to claim now: one for each idle slot, and those that start within the next `_AHEAD_SECONDS`.

        While enough are claimed for a quarter of that time, none: so that a statement claims many.
        """
        ready, idle = len(self._ready), self._idle_slots
        ahead = 0
        if self._run_seconds is not None and self._run_seconds < _UNSTARTED_SECONDS / 2:
            ahead = min(_MOST_AHEAD, int(self.slots * _AHEAD_SECONDS / max(self._run_seconds, 0.001)))
        return ahead + idle - ready if ready < idle or ready <= ahead // 4 else 0

    async def put_ready(self, claimed: Sequence[Attempt]) -> None:
        """Give claimed queries to the slots."""
        async with self._has_ready:
            self._ready.extend(claimed)
            self._has_ready.notify(len(claimed))

    async def take_ready(self) -> Attempt:
        """Wait for a claimed query, for a slot."""
        self._idle_slots += 1
        self._has_room.set()
        try:
            async with self._has_ready:
                await self._has_ready.wait_for(lambda: bool(self._ready))
                return self._ready.popleft()
        finally:
            self._idle_slots -= 1
            self._has_room.set()

    @property
    def ready(self) -> list[Attempt]:
        """The claimed queries that no slot has taken."""
        return list(self._ready)

    def withdraw(self, claimed: Collection[Attempt]) -> list[Attempt]:
        """Remove and return those of the claimed queries that no slot has taken."""
        withdrawn = [each for each in self._ready if each in claimed]
        for each in withdrawn:
            self._ready.remove(each)
        self._has_room.set()
        return withdrawn

    def note_run(self, seconds: float) -> None:
        """Learn from a query that a slot has run."""
        # One that takes longer stops claims ahead as well, and is forgotten sooner.
        seconds = min(seconds, _UNSTARTED_SECONDS)
        before = seconds if self._run_seconds is None else self._run_seconds
        self._run_seconds = before + (seconds - before) * _RUN_SHARE

    def note_delay(self) -> None:
        """Learn that claimed queries have not started in time: claim none ahead until queries have run again."""
        self._run_seconds = _UNSTARTED_SECONDS


class Executor:
    """One worker process. `run` returns once it has been asked to stop and has drained."""

    def __init__(
        self,
        *,
        pool: DataPool,
        clock: DatabaseClock,
        subscription_config: dict[str, Any],
        dead_letters: DeadLetters,
        engine: Engine,
        transitions: Transitions,
        attempts: Attempts,
        leases: Leases,
        reaper: Reaper,
        retention: Retention,
        admission_rules: Rules,
        rules: ExecutorRules,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._dead_letters = dead_letters
        self._engine = engine
        self._transitions = transitions
        self._attempts = attempts
        self._leases = leases
        self._reaper = reaper
        self._retention = retention
        self._admission_rules = admission_rules
        self._rules = rules
        self._lanes = {mode: Lane(mode, rules.slots[mode]) for mode in Mode}
        self._lane_of_topic = {mode.topic.value: self._lanes[mode] for mode in Mode}
        self._unread: deque[Record] = deque()
        self._has_arrived = asyncio.Event()
        self._arrivals = Arrivals()
        self._admission_spacing = Spacing(_ADMISSIONS_APART_SECONDS)
        self._watch = Watch(rules.lease_seconds)
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None
        self.intake = Intake(subscription_config, self._lane_of_topic, self._take_in, self._forget_partitions)

    def stop(self) -> None:
        """Ask `run` to drain and return."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`; raises what no retry can mend, such as a dead letter that can't be written."""
        await self._engine.start()
        intake = self.intake.start()
        loops = [
            asyncio.create_task(self._read_for_ever(), name="reading"),
            asyncio.create_task(self._admit_for_ever(), name="admission"),
            asyncio.create_task(self._leases.renew_for_ever(), name="leases"),
            asyncio.create_task(self._watch_for_ever(), name="watch"),
            asyncio.create_task(self._reaper.reap_for_ever(self.intake.is_over), name="reaper"),
            asyncio.create_task(self._retention.sweep_for_ever(), name="retention"),
            asyncio.create_task(follow_cancellations(self._pool, self._leases, self._reaper), name="cancel news"),
            *(
                asyncio.create_task(self._claim_for_ever(lane), name=f"claims {lane.mode.value}")
                for lane in self._lanes.values()
            ),
            *(
                asyncio.create_task(self._serve_slot(lane), name=f"slot {lane.mode.value}")
                for lane in self._lanes.values()
                for _ in range(lane.slots)
            ),
        ]
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        try:
            done, _ = await asyncio.wait([stopping, *intake, *loops], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await self._shut_down([stopping, *loops])
        if self._failure is not None:
            raise self._failure

    # Poll and admit.

    def _take_in(self, records: Sequence[Record]) -> None:
        """What lies between the poll and admission is bounded by the window."""
        self._unread.extend(records)
        self._has_arrived.set()

    async def _read_for_ever(self) -> None:
        """Read what has arrived at once, whatever waits for admission: whose a request is stands inside it."""
        while True:
            await self._has_arrived.wait()
            self._has_arrived.clear()
            while self._unread:
                await self._bury(await self._read(min(len(self._unread), _ADMISSION)))

    async def _read(self, count: int) -> list[tuple[Record, Refused]]:
        """Read so many records, and say which are none that can be admitted."""
        refused: list[tuple[Record, Refused]] = []
        for number in range(1, count + 1):
            record = self._unread.popleft()
            if self.intake.owns(record):
                mode = self._lane_of_topic[record.topic].mode
                match read_record(record, mode, self._admission_rules):
                    case Refused() as refusal:
                        refused.append((record, refusal))
                    case Legible() as item:
                        self._arrivals.put(item)
            if number % _PORTION == 0:
                await asyncio.sleep(0)
        return refused

    async def _admit_for_ever(self) -> None:
        while True:
            await self._arrivals.wait_for_requests()
            await self._admission_spacing.wait()
            batch = self._arrivals.take(_ADMISSION)
            await self._admit_batch([item for item in batch if self.intake.owns(item.record)])

    async def _admit_batch(self, batch: Sequence[Legible]) -> None:
        if not batch:
            return
        refused: list[tuple[Record, Refused]] = []
        verdicts = await run_batch(self._admit, batch)
        ending = [self._follow(item.record, verdict, refused) for item, verdict in zip(batch, verdicts, strict=True)]
        await self._bury(refused)
        # So that the endings of a backlog of overdue queries don't delay those of results.
        if tasks := [task for task in ending if task is not None]:
            await asyncio.wait(tasks)

    async def _admit(self, batch: Sequence[Legible]) -> list[Verdict]:
        with spans(SpanName.ADMIT, map(_to_step, batch)) as traced:
            return await admit(self._pool, self._clock, self._admission_rules, batch, traced)

    def _follow(
        self, record: Record, verdict: Verdict | RowRefused, refused: list[tuple[Record, Refused]]
    ) -> "asyncio.Task[None] | None":
        """Act on a verdict; returns the task that ends the query, if it can't run."""
        match verdict:
            case Refused():
                refused.append((record, verdict))
            case RowRefused():
                refused.append((record, _UNSTORABLE))
            case Done():
                self.intake.finish(record)
            # `Watch` decides whether the lease is dead.
            case Query() if verdict.state.lease_token is not None:
                self._park(verdict)
            case Query():
                return self._schedule(verdict)
        return None

    async def _bury(self, refused: Sequence[tuple[Record, Refused]]) -> None:
        """Commit dead letters before their records finish; if one can't be committed, the executor stops."""
        await self._dead_letters.write([DeadLetter(record, why.code, why.reason) for record, why in refused])
        for record, _ in refused:
            self.intake.finish(record)

    # Schedule and run.

    def _schedule(self, query: Query) -> "asyncio.Task[None] | None":
        failure = find_failure(query)
        if failure is not None:
            # It only has to be ended, and need not wait for a slot.
            return self._start(self._end_unclaimed(query, failure))
        self._lanes[query.facts.mode].queue.put(query)
        return None

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _claim_for_ever(self, lane: Lane) -> None:
        while True:
            await lane.wait_for_room()
            turn = await lane.queue.take()
            if turn.query.state.attempt or not lane.count_wanted():
                # A worker's death counts against all that it has claimed. A query that was claimed before is therefore
                # not claimed ahead: three deaths that it only waited through must not fail it.
                await lane.wait_for_idle_slot()
            # A claim that is under way when the executor stops must not be cut off: its leases would run out.
            claim = self._start(self._claim(lane, [turn, *lane.queue.take_now(lane.count_wanted() - 1)]))
            await asyncio.wait({claim})

    async def _claim(self, lane: Lane, turns: Sequence[Turn]) -> None:
        """Claim queries whose turn it is, ahead of need, and give them to the lane's slots."""
        wanted = [turn for turn in turns if self.intake.owns(turn.query.record)]
        claimed: list[Attempt] = []
        answers = await self._attempts.claim([turn.query for turn in wanted]) if wanted else []
        for turn, answer in zip(wanted, answers, strict=True):
            match answer:
                case Attempt():
                    claimed.append(answer)
                case Refusal():
                    if self.intake.owns(turn.query.record):
                        # Jitter, so that workers don't go on asking together.
                        lane.queue.put_back(turn, _HELD_SECONDS[answer] * random.uniform(0.75, 1.25))  # noqa: S311
                case None:
                    self._park(turn.query)
        if self._stopping.is_set():
            await asyncio.gather(*map(self._hand_back, claimed))
        elif claimed:
            await lane.put_ready(claimed)
            asyncio.get_running_loop().call_later(_UNSTARTED_SECONDS, self._return_unstarted, lane, claimed)

    def _return_unstarted(self, lane: Lane, claimed: Sequence[Attempt]) -> None:
        """Hand back claimed queries for which no slot was free soon enough: another worker may have one."""
        unstarted = lane.withdraw(claimed)
        if unstarted:
            lane.note_delay()
        for each in unstarted:
            self._start(self._hand_back(each))

    async def _hand_back(self, claimed: Attempt) -> None:
        await self._attempts.return_unstarted(claimed)
        self._release(claimed.query, 0.0)
        if not self._stopping.is_set():
            self._park(claimed.query)

    async def _serve_slot(self, lane: Lane) -> None:
        while True:
            await lane.unfinished.acquire()
            claimed = await lane.take_ready()
            executed = asyncio.Event()
            self._start(self._run(lane, claimed, executed))
            await executed.wait()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Nothing that an attempt may run into by design ends here, so nobody knows how its query stands: stop,
            # and let the leases and the redelivered records settle it.
            self._failure = self._failure or error
            self._stopping.set()

    async def _run(self, lane: Lane, claimed: Attempt, executed: asyncio.Event) -> None:
        started, query = time.monotonic(), claimed.query

        def note_executed() -> None:
            lane.note_run(time.monotonic() - started)
            executed.set()

        try:
            if await self._attempts.run(claimed, note_executed):
                self.intake.finish(query.record)
            elif not self._stopping.is_set():
                self._park(query)
            self._release(query, time.monotonic() - started)
        finally:
            lane.unfinished.release()
            executed.set()

    async def _end_unclaimed(self, query: Query, failure: Failure) -> None:
        if not self.intake.owns(query.record):
            return
        if await self._attempts.end_unclaimed(query, failure):
            self.intake.finish(query.record)
        elif not self._stopping.is_set():
            self._park(query)

    def _release(self, query: Query, run_seconds: float) -> None:
        """Let another query of the org have the place that this one had."""
        limited = query.limits.running_queries is not None
        rest_seconds = min(_LONGEST_REST_SECONDS, _REST * run_seconds) if limited else 0.0
        for lane in self._lanes.values():
            lane.queue.release(query.facts.org_id, rest_seconds)

    # Watch.

    async def _watch_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if self._watch.queries:
                await until_available(self._look_at_watched, "postgres data")

    async def _look_at_watched(self) -> None:
        asked, asked_at = [query.facts.query_id for query in self._watch.queries], elapsed()
        try:
            states = await self._transitions.read(asked)
        except DatabaseUnavailable:
            self._watch.forget_leases()
            raise
        finished, takeable = self._watch.observe(asked, states, asked_at)
        for query in finished:
            self.intake.finish(query.record)
        for query in takeable:
            self._schedule(query)

    def _park(self, query: Query) -> None:
        """Watch a query until it is finished or may be taken; what is another worker's record now is its to watch."""
        if self.intake.owns(query.record):
            self._watch.park(replace(query, stale_lease_version=None))

    def count_waiting(self) -> dict[str, int]:
        """How many queries wait here for a slot, by lane."""
        return {mode.value: len(lane.queue) for mode, lane in self._lanes.items()}

    def count_behind(self) -> dict[Partition, int]:
        """How many records of each partition held are not finished."""
        return self.intake.lags()

    # Rebalance and shutdown.

    async def _forget_partitions(self, partitions: set[Partition]) -> None:
        """Drop the partitions' waiting queries: the next owner reads them. Running queries keep their leases."""

        def gone(query: Query) -> bool:
            return (query.record.topic, query.record.partition) in partitions

        for lane in self._lanes.values():
            lane.queue.drop(gone)
        for query in self._watch.queries:
            if gone(query):
                self._watch.drop(query.facts.query_id)

    async def _shut_down(self, loops: Sequence["asyncio.Task[Any]"]) -> None:
        """Stop intake, commit and leave, finish or hand back, flush, close: each step guarded on its own.

        The group is left before the drain: the next owner then watches what still runs here, takes over at once what is
        handed back, and need not wait for what was only queued. What finishes during the drain it finds finished.
        """
        _log.info(LogEvent.SERVICE_STOPPING, running=len(self._running))
        self._stopping.set()
        keep = [task for task in loops if task.get_name() == "leases" and not task.done()]
        await end_tasks([task for task in loops if task not in keep])
        for lane in self._lanes.values():
            for claimed in lane.withdraw(lane.ready):
                self._start(self._hand_back(claimed))
        drained = time.monotonic() + self._rules.drain_seconds
        leaving = asyncio.create_task(_guarded("leave the group", self.intake.close()))
        await asyncio.wait({leaving}, timeout=_LEAVE_SECONDS)
        await _guarded("drain", self._drain(max(0.0, drained - time.monotonic())))
        await _guarded("engine", self._engine.close())
        await leaving
        await end_tasks(keep)

    async def _drain(self, seconds: float) -> None:
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)
        self._leases.stop_all(Stop.DRAINING)
        if self._running:
            _, left = await asyncio.wait(self._running, timeout=_HAND_BACK_SECONDS)
            await end_tasks(left)


def _to_step(item: Legible) -> Step:
    return item.traceparent, {SpanAttribute.QUERY_ID: item.query_id, SpanAttribute.ORG_ID: item.org_id}


async def _guarded(step: str, work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    # The next step must be reached whatever this one ran into; ending here is as safe as a kill -9.
    except Exception as error:  # noqa: BLE001
        _log.error(LogEvent.SERVICE_FAILED, step=step, error=type(error).__name__)
