"""Who runs next: fair between orgs, in order inside an org."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.executor.admission import Admitted
from consumers.executor.schedule import FairQueue
from tests.unit.samples import QUICK, make_admitted

CROWD = "c0c0c0c0-0000-4000-8000-000000000001"
ONE = "c0c0c0c0-0000-4000-8000-000000000002"
OTHER = "c0c0c0c0-0000-4000-8000-000000000003"


async def _take(queue: FairQueue, count: int) -> list[Admitted]:
    return [await queue.take() for _ in range(count)]


def _orgs(queries: list[Admitted]) -> list[str]:
    return [query.facts.org_id for query in queries]


@pytest.mark.parametrize("taken", [0, 1, 5_000])
async def test_ten_thousand_waiting_delay_another_orgs_one_by_at_most_one(taken: int) -> None:
    queue = FairQueue()
    crowd = make_admitted(CROWD)
    for _ in range(10_000):
        queue.put(crowd)
    await _take(queue, taken)
    queue.put(make_admitted(ONE))
    assert ONE in _orgs(await _take(queue, 2))


async def test_orgs_take_turns_whatever_each_has_waiting() -> None:
    queue = FairQueue()
    for org, waiting in ((CROWD, 50), (ONE, 3), (OTHER, 3)):
        for _ in range(waiting):
            queue.put(make_admitted(org))
    first = _orgs(await _take(queue, 9))
    assert {org: first.count(org) for org in (CROWD, ONE, OTHER)} == {CROWD: 3, ONE: 3, OTHER: 3}
    assert set(_orgs(await _take(queue, 47))) == {CROWD}
    assert len(queue) == 0


async def test_an_org_of_weight_three_gets_three_of_four() -> None:
    queue = FairQueue(lambda org: 3.0 if org == CROWD else 1.0)
    for org in (CROWD, ONE):
        for _ in range(300):
            queue.put(make_admitted(org))
    for _ in range(5):
        served = _orgs(await _take(queue, 40))
        assert abs(served.count(CROWD) - 30) <= 1


async def test_an_idle_org_has_saved_nothing_up() -> None:
    queue = FairQueue()
    for _ in range(1_000):
        queue.put(make_admitted(CROWD))
    await _take(queue, 500)
    for _ in range(100):
        queue.put(make_admitted(ONE))
    served = _orgs(await _take(queue, 40))
    assert abs(served.count(ONE) - 20) <= 1


async def test_an_org_that_comes_query_by_query_gets_no_more_than_its_share() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.put(make_admitted(CROWD))
    served = [ONE]
    for _ in range(60):
        # Never more than one waiting: an org must not jump the queue by being idle in between.
        if served[-1] == ONE:
            queue.put(make_admitted(ONE))
        served += _orgs(await _take(queue, 1))
    assert abs(served[1:].count(ONE) - 30) <= 1


@QUICK
@given(orgs=st.lists(st.sampled_from([CROWD, ONE, OTHER]), max_size=30), pauses=st.sets(st.integers(0, 30)))
def test_an_orgs_own_queries_keep_their_order_and_none_is_lost(orgs: list[str], pauses: set[int]) -> None:
    async def run() -> None:
        queue = FairQueue()
        put = [make_admitted(org) for org in orgs]
        taken: list[Admitted] = []
        for place, query in enumerate(put):
            queue.put(query)
            if place in pauses:
                taken.append(await queue.take())
        taken += await _take(queue, len(queue))
        for org in (CROWD, ONE, OTHER):
            of_org = [query for query in taken if query.facts.org_id == org]
            assert of_org == [query for query in put if query.facts.org_id == org]
        assert len(taken) == len(put)

    asyncio.run(run())


async def test_dropped_queries_are_returned_and_never_taken() -> None:
    queue = FairQueue()
    kept = [make_admitted(org) for org in (CROWD, ONE) for _ in range(3)]
    unwanted = [make_admitted(org) for org in (CROWD, OTHER) for _ in range(2)]
    for query in itertools.chain(unwanted, kept):
        queue.put(query)
    names = {query.facts.query_id for query in unwanted}
    dropped = queue.drop(lambda query: query.facts.query_id in names)
    assert sorted(query.facts.query_id for query in dropped) == sorted(names)
    assert len(queue) == len(kept)
    assert {query.facts.query_id for query in await _take(queue, 6)} == {query.facts.query_id for query in kept}
    assert len(queue) == 0


async def test_a_queue_that_was_dropped_empty_waits_and_works_on() -> None:
    queue = FairQueue()
    queue.put(make_admitted(ONE))
    assert len(queue.drop(lambda _query: True)) == 1
    taker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    assert not taker.done()
    query = make_admitted(ONE)
    queue.put(query)
    assert await taker == query


async def test_each_waiting_slot_gets_a_query_of_its_own() -> None:
    queue = FairQueue()
    slots = [asyncio.create_task(queue.take()) for _ in range(3)]
    await asyncio.sleep(0)
    queries = [make_admitted(org) for org in (CROWD, ONE, OTHER)]
    for query in queries:
        queue.put(query)
    taken = await asyncio.gather(*slots)
    assert sorted(query.facts.query_id for query in taken) == sorted(query.facts.query_id for query in queries)


async def test_a_slot_that_is_cancelled_while_it_waits_takes_nothing_along() -> None:
    queue = FairQueue()
    slot = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    slot.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slot
    query = make_admitted(ONE)
    queue.put(query)
    assert await queue.take() == query
