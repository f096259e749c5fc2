"""What a slot does with a query whose org may not run more just now."""

import asyncio
import inspect
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any
from unittest.mock import Mock

import pytest

from consumers.executor import executor as module
from consumers.executor.admission import Admitted
from consumers.executor.executor import Executor, ExecutorRules, Lane
from consumers.executor.transitions import Refusal
from queryd.events import Mode
from tests.unit.samples import make_admitted

# Longer than any test.
_LONG_SECONDS = 600.0
_NOBODY = {"bootstrap.servers": "127.0.0.1:1", "group.id": "group", "log_level": 0}


class Attempts:
    """Answers as it was told, and notes by which renewal it was asked."""

    def __init__(self, *answers: bool | Refusal) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[Admitted, int | None]] = []

    async def run(self, query: Admitted, still_renewal: int | None, executed: Callable[[], None]) -> bool | Refusal:
        self.asked.append((query, still_renewal))
        executed()
        return self._answers.pop(0)


def _make_executor(attempts: Attempts, monkeypatch: pytest.MonkeyPatch, *, owns: bool = True) -> tuple[Executor, Mock]:
    parts: dict[str, Any] = dict.fromkeys(inspect.signature(Executor).parameters, Mock())
    parts["subscription_config"] = _NOBODY
    parts["attempts"] = attempts
    parts["rules"] = ExecutorRules(dict.fromkeys(Mode, 1), lease_seconds=15.0, drain_seconds=0.0)
    executor = Executor(**parts)
    intake = Mock()
    # Before the attempt, and after it.
    intake.owns.side_effect = chain([True, owns], repeat(True))
    monkeypatch.setattr(executor, "intake", intake)
    for refusal in Refusal:
        monkeypatch.setitem(module._HELD_SECONDS, refusal, _LONG_SECONDS)
    return executor, intake


async def _serve_one(executor: Executor, lane: Lane) -> None:
    """What a slot does once."""
    await lane.unfinished.acquire()
    executed = asyncio.Event()
    await executor._run(lane, await lane.queue.take(), executed)
    assert executed.is_set()


@pytest.mark.parametrize("refusal", list(Refusal))
async def test_a_refused_query_goes_back_and_keeps_why_it_may_be_taken_over(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = Attempts(refusal, True, True)
    executor, intake = _make_executor(attempts, monkeypatch)
    lane, other = executor._lanes[Mode.INTERACTIVE], executor._lanes[Mode.BATCH]
    places = lane.unfinished._value
    query = make_admitted()
    executor._still_renewals[query.facts.query_id] = 7
    lane.queue.put(query)
    await _serve_one(executor, lane)
    # Neither a slot nor a place for a result is taken, and nothing is done.
    assert (len(lane.queue), lane.unfinished._value) == (1, places)
    intake.finish.assert_not_called()
    waiting = asyncio.create_task(_serve_one(executor, lane))
    await asyncio.sleep(0)
    assert not waiting.done()
    # The end of another of the org's queries, whichever lane's, lets it go on.
    other.queue.put(make_admitted())
    await _serve_one(executor, other)
    await waiting
    assert attempts.asked[0] == attempts.asked[2] == (query, 7)
    assert executor._still_renewals == {}


async def test_a_refused_query_of_a_partition_that_is_gone_is_the_next_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, _ = _make_executor(Attempts(Refusal.LIMIT), monkeypatch, owns=False)
    lane = executor._lanes[Mode.INTERACTIVE]
    lane.queue.put(make_admitted())
    await _serve_one(executor, lane)
    assert len(lane.queue) == 0
