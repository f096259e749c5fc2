"""What becomes of a query whose org may not run more now, and of one that was claimed ahead of need."""

import asyncio
import inspect
import uuid
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from access.limits import OrgLimits
from consumers.executor import executor as module
from consumers.executor.executor import Executor, ExecutorRules, Lane
from consumers.executor.leases import Lease
from consumers.executor.query import Attempt, Query
from consumers.executor.transitions import Refusal
from queryd.events import Mode
from tests.unit.samples import make_admitted

# Longer than any test.
_LONG_SECONDS = 600.0
_NOBODY = {"bootstrap.servers": "127.0.0.1:1", "group.id": "group", "log_level": 0}


def _claimed(query: Query) -> Attempt:
    lease = Lease(query.facts.query_id, str(uuid.uuid4()))
    return Attempt(query, lease, run_seconds=60.0, queued_ms=0, datasets=(), scratch=Path("scratch"))


class Attempts:
    """Answers claims with these refusals, and then with success."""

    def __init__(self, *refusals: Refusal) -> None:
        self._refusals = list(refusals)
        self.asked: list[Query] = []
        self.returned: list[Attempt] = []
        self.has_returned = asyncio.Event()

    async def claim(self, queries: Sequence[Query]) -> list[Attempt | Refusal | None]:
        self.asked += queries
        return [self._refusals.pop(0) if self._refusals else _claimed(query) for query in queries]

    async def run(self, _claimed: Attempt, executed: Callable[[], None]) -> bool:
        executed()
        return True

    async def return_unstarted(self, claimed: Attempt) -> None:
        self.returned.append(claimed)
        self.has_returned.set()


def _make_executor(attempts: Attempts, monkeypatch: pytest.MonkeyPatch, *, owns: bool = True) -> tuple[Executor, Mock]:
    parts: dict[str, Any] = dict.fromkeys(inspect.signature(Executor).parameters, Mock())
    parts["subscription_config"] = _NOBODY
    parts["attempts"] = attempts
    parts["rules"] = ExecutorRules(dict.fromkeys(Mode, 1), lease_seconds=15.0, drain_seconds=0.0)
    executor = Executor(**parts)
    intake = Mock()
    # Before the claim, and after it.
    intake.owns.side_effect = chain([True, owns], repeat(True))
    monkeypatch.setattr(executor, "intake", intake)
    for refusal in Refusal:
        monkeypatch.setitem(module._HELD_SECONDS, refusal, _LONG_SECONDS)
    return executor, intake


async def _claim_one(executor: Executor, lane: Lane) -> None:
    """What a lane's claims do once."""
    await executor._claim(lane, [await lane.queue.take()])


async def _run_one(executor: Executor, lane: Lane) -> None:
    """What a slot does once."""
    await lane.unfinished.acquire()
    executed = asyncio.Event()
    await executor._run(lane, await lane.take_ready(), executed)
    assert executed.is_set()


@pytest.mark.parametrize("refusal", list(Refusal))
async def test_a_refused_query_goes_back_and_keeps_the_lease_that_it_may_take_over(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = Attempts(refusal)
    executor, intake = _make_executor(attempts, monkeypatch)
    lane, other = executor._lanes[Mode.INTERACTIVE], executor._lanes[Mode.BATCH]
    query = make_admitted(stale_lease_version=7)
    lane.queue.put(query)
    await _claim_one(executor, lane)
    assert len(lane.queue) == 1
    intake.finish.assert_not_called()
    waiting = asyncio.create_task(_claim_one(executor, lane))
    await asyncio.sleep(0)
    assert not waiting.done()
    # The end of another of the org's queries, in either lane, lets it go on.
    other.queue.put(make_admitted())
    await _claim_one(executor, other)
    await _run_one(executor, other)
    await waiting
    assert attempts.asked[0] == attempts.asked[2] == query


async def test_a_refused_query_of_a_partition_that_is_gone_is_the_next_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, _ = _make_executor(Attempts(Refusal.LIMIT), monkeypatch, owns=False)
    lane = executor._lanes[Mode.INTERACTIVE]
    lane.queue.put(make_admitted())
    await _claim_one(executor, lane)
    assert len(lane.queue) == 0


async def test_a_claimed_query_that_no_slot_takes_in_time_is_handed_back_and_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_UNSTARTED_SECONDS", 0.2)
    attempts = Attempts()
    executor, intake = _make_executor(attempts, monkeypatch)
    lane = executor._lanes[Mode.INTERACTIVE]
    for _ in range(2):
        lane.queue.put(make_admitted())
    await executor._claim(lane, [await lane.queue.take(), *lane.queue.take_now(5)])
    # A slot takes the first.
    await _run_one(executor, lane)
    async with asyncio.timeout(30):
        await attempts.has_returned.wait()
        await asyncio.gather(*executor._running)
    assert [claimed.query for claimed in attempts.returned] == attempts.asked[1:]
    assert executor._watch.queries == attempts.asked[1:]
    assert intake.finish.call_count == 1
    # A query that takes long must not have others claimed and handed back every second.
    assert lane.count_wanted() == 0


async def test_what_is_claimed_while_the_executor_stops_is_handed_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts()
    executor, _ = _make_executor(attempts, monkeypatch)
    lane = executor._lanes[Mode.INTERACTIVE]
    lane.queue.put(make_admitted())
    executor.stop()
    await _claim_one(executor, lane)
    assert len(attempts.returned) == 1
    assert lane.ready == []


async def test_a_lane_claims_for_its_idle_slots_and_for_what_starts_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = Lane(Mode.BATCH, slots=2)
    assert lane.count_wanted() == 0
    slots = [asyncio.create_task(lane.take_ready()) for _ in range(2)]
    await asyncio.sleep(0)
    # Nothing is known of run times yet.
    assert lane.count_wanted() == 2
    lane.note_run(0.02)
    assert lane.count_wanted() == 27
    await lane.put_ready([_claimed(make_admitted()) for _ in range(27)])
    await asyncio.gather(*slots)
    # A quarter of what was claimed ahead is enough for now.
    assert lane.count_wanted() == 0
    for _ in range(19):
        await lane.take_ready()
    assert lane.count_wanted() == 19
    for _ in range(100):
        lane.note_run(10.0)
    assert lane.count_wanted() == 0


async def test_a_query_that_was_claimed_before_is_not_claimed_ahead() -> None:
    lane = Lane(Mode.BATCH, slots=1)
    lane.queue.put(make_admitted())
    lane.queue.put(make_admitted(attempt=1))
    lane.queue.put(make_admitted())
    assert lane.queue.take_now(5) == []
    # It goes first, and the others behind it can be claimed ahead.
    assert (await lane.queue.take()).query.state.attempt == 1
    assert len(lane.queue.take_now(5)) == 2
    waiting = asyncio.create_task(lane.wait_for_idle_slot())
    await asyncio.sleep(0)
    assert not waiting.done()
    slot = asyncio.create_task(lane.take_ready())
    await waiting
    slot.cancel()


async def test_what_was_claimed_ahead_is_handed_back_when_the_executor_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts()
    executor, intake = _make_executor(attempts, monkeypatch)
    intake.close = AsyncMock()
    monkeypatch.setattr(executor, "_engine", AsyncMock())
    lane = executor._lanes[Mode.INTERACTIVE]
    for _ in range(3):
        lane.queue.put(make_admitted())
    await executor._claim(lane, [await lane.queue.take(), *lane.queue.take_now(5)])
    await executor._shut_down([])
    assert [claimed.query for claimed in attempts.returned] == attempts.asked
    assert len(attempts.returned) == 3


def test_no_more_of_an_org_are_claimed_together_than_may_run() -> None:
    lane = Lane(Mode.BATCH, slots=1)
    for _ in range(5):
        lane.queue.put(make_admitted(limits=OrgLimits(running_queries=2)))
    assert len(lane.queue.take_now(5)) == 2
    assert len(lane.queue) == 3
