"""Who runs next: fair between orgs, in order inside an org."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from access.limits import OrgLimits
from consumers.executor.query import Query
from consumers.executor.schedule import FairQueue, Turn
from tests.unit.samples import QUICK, make_admitted

CROWD = "c0c0c0c0-0000-4000-8000-000000000001"
ONE = "c0c0c0c0-0000-4000-8000-000000000002"
OTHER = "c0c0c0c0-0000-4000-8000-000000000003"

# Longer than any test: who is held this long is let go by the test.
_LONG_SECONDS = 600.0
_SHORT_SECONDS = 0.01


async def _take(queue: FairQueue, count: int) -> list[Query]:
    return [(await queue.take()).query for _ in range(count)]


def _orgs(queries: list[Query]) -> list[str]:
    return [query.facts.org_id for query in queries]


def _crowded(count: int = 10_000, weight: int = 1) -> FairQueue:
    """A queue in which one org has so many waiting."""
    queue = FairQueue()
    crowd = make_admitted(CROWD, limits=OrgLimits(weight=weight))
    for _ in range(count):
        queue.put(crowd)
    return queue


@pytest.mark.parametrize("taken", [1, 2, 5_000])
@pytest.mark.parametrize("weight", [1, 10])
async def test_ten_thousand_waiting_don_t_delay_another_orgs_one_beyond_what_runs(taken: int, weight: int) -> None:
    queue = _crowded(weight=weight)
    await _take(queue, taken)
    queue.put(make_admitted(ONE))
    assert _orgs(await _take(queue, 1)) == [ONE]


async def test_before_anything_runs_who_came_first_goes_first() -> None:
    queue = _crowded()
    queue.put(make_admitted(ONE))
    assert _orgs(await _take(queue, 2)) == [CROWD, ONE]


async def test_newcomers_of_many_orgs_all_go_before_the_crowd() -> None:
    queue = _crowded()
    await _take(queue, 3)
    newcomers = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(50)]
    for org in newcomers:
        queue.put(make_admitted(org))
    assert _orgs(await _take(queue, 50)) == newcomers


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
    queue = _crowded(300, weight=3)
    for _ in range(300):
        queue.put(make_admitted(ONE))
    for _ in range(5):
        served = _orgs(await _take(queue, 40))
        assert abs(served.count(CROWD) - 30) <= 1


async def test_a_changed_weight_holds_from_the_orgs_next_turn() -> None:
    queue = _crowded(200)
    for _ in range(200):
        queue.put(make_admitted(ONE))
    served = _orgs(await _take(queue, 40))
    assert abs(served.count(CROWD) - 20) <= 1
    # Whatever was admitted before the change: the newest query knows.
    queue.put(make_admitted(CROWD, limits=OrgLimits(weight=3)))
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
        taken: list[Query] = []
        for place, query in enumerate(put):
            queue.put(query)
            if place in pauses:
                taken.append((await queue.take()).query)
        taken += await _take(queue, len(queue))
        for org in (CROWD, ONE, OTHER):
            of_org = [query for query in taken if query.facts.org_id == org]
            assert of_org == [query for query in put if query.facts.org_id == org]
        assert len(taken) == len(put)

    asyncio.run(run())


async def test_dropped_queries_are_never_taken() -> None:
    queue = FairQueue()
    kept = [make_admitted(org) for org in (CROWD, ONE) for _ in range(3)]
    unwanted = [make_admitted(org) for org in (CROWD, OTHER) for _ in range(2)]
    for query in itertools.chain(unwanted, kept):
        queue.put(query)
    names = {query.facts.query_id for query in unwanted}
    queue.drop(lambda query: query.facts.query_id in names)
    assert len(queue) == len(kept)
    assert {query.facts.query_id for query in await _take(queue, 6)} == {query.facts.query_id for query in kept}
    assert len(queue) == 0


async def test_a_queue_that_was_dropped_empty_waits_and_works_on() -> None:
    queue = FairQueue()
    queue.put(make_admitted(ONE))
    queue.drop(lambda _query: True)
    taker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    assert not taker.done()
    query = make_admitted(ONE)
    queue.put(query)
    assert (await taker).query == query


async def test_each_waiting_slot_gets_a_query_of_its_own() -> None:
    queue = FairQueue()
    slots = [asyncio.create_task(queue.take()) for _ in range(3)]
    await asyncio.sleep(0)
    queries = [make_admitted(org) for org in (CROWD, ONE, OTHER)]
    for query in queries:
        queue.put(query)
    taken = [turn.query for turn in await asyncio.gather(*slots)]
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
    assert (await queue.take()).query == query


# Orgs that may not run more just now.


async def test_an_org_that_was_refused_waits_and_nobody_waits_for_it() -> None:
    queue = FairQueue()
    crowd = [make_admitted(CROWD) for _ in range(3)]
    for query in crowd:
        queue.put(query)
    queue.put_back(await queue.take(), _LONG_SECONDS)
    others = [make_admitted(org) for org in (ONE, OTHER, ONE)]
    for query in others:
        queue.put(query)
    assert await _take(queue, 3) == others
    assert len(queue) == 3
    slot = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    assert not slot.done()
    queue.release(CROWD)
    assert [(await slot).query, *await _take(queue, 2)] == crowd


async def test_an_org_is_let_go_when_its_time_is_over() -> None:
    queue = FairQueue()
    query = make_admitted(CROWD)
    queue.put(query)
    queue.put_back(await queue.take(), _SHORT_SECONDS)
    assert (await queue.take()).query == query


async def test_what_is_put_back_is_in_its_old_place_whatever_the_order_of_refusals() -> None:
    queue = FairQueue()
    crowd = [make_admitted(CROWD) for _ in range(5)]
    for query in crowd:
        queue.put(query)
    first, second, third = [await queue.take() for _ in range(3)]
    queue.put_back(second, _LONG_SECONDS)
    queue.put_back(third, _LONG_SECONDS)
    queue.put_back(first, _LONG_SECONDS)
    queue.release(CROWD)
    assert await _take(queue, 5) == crowd


async def test_who_was_released_while_it_was_refused_is_not_held() -> None:
    queue = FairQueue()
    query = make_admitted(CROWD)
    queue.put(query)
    turn = await queue.take()
    queue.release(CROWD)
    queue.put_back(turn, _LONG_SECONDS)
    assert (await queue.take()).query == query


async def test_an_org_that_rests_lets_others_go_first_whether_it_was_held_or_not() -> None:
    queue = FairQueue()
    for held in (True, False):
        mine = [make_admitted(CROWD) for _ in range(2)]
        for query in mine:
            queue.put(query)
        if held:
            queue.put_back(await queue.take(), _LONG_SECONDS)
        queue.release(CROWD, _SHORT_SECONDS)
        other = make_admitted(ONE)
        queue.put(other)
        assert await _take(queue, 3) == [other, *mine]


async def test_a_turn_that_was_refused_is_not_charged() -> None:
    queue = _crowded(100)
    for _ in range(100):
        queue.put(make_admitted(ONE))
    for _ in range(5):
        turn = await _take_of(queue, CROWD)
        queue.put_back(turn, _LONG_SECONDS)
        queue.release(CROWD)
    served = _orgs(await _take(queue, 40))
    assert abs(served.count(CROWD) - 20) <= 1


async def _take_of(queue: FairQueue, org: str) -> Turn:
    while True:
        turn = await queue.take()
        if turn.query.facts.org_id == org:
            return turn


async def test_queries_of_a_held_org_are_dropped_like_others() -> None:
    queue = FairQueue()
    for _ in range(2):
        queue.put(make_admitted(CROWD))
    queue.put_back(await queue.take(), _SHORT_SECONDS)
    queue.drop(lambda _query: True)
    assert len(queue) == 0
    slot = asyncio.create_task(queue.take())
    # Once it is let go there is nothing to run.
    await asyncio.sleep(2 * _SHORT_SECONDS)
    assert not slot.done()
    query = make_admitted(ONE)
    queue.put(query)
    assert (await slot).query == query


@QUICK
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "take", "refuse", "release"]), st.sampled_from([CROWD, ONE, OTHER])),
        max_size=60,
    )
)
def test_whatever_is_refused_and_released_all_run_in_their_orgs_order(steps: list[tuple[str, str]]) -> None:
    async def run() -> None:
        queue = FairQueue()
        put: list[Query] = []
        taken: list[Query] = []
        held: set[str] = set()
        for what, org in steps:
            waiting = [query for query in put if query not in taken and query.facts.org_id not in held]
            match what:
                case "put":
                    put.append(make_admitted(org))
                    queue.put(put[-1])
                case "release":
                    queue.release(org)
                    held.discard(org)
                case "take" if waiting:
                    taken.append((await queue.take()).query)
                case "refuse" if waiting:
                    turn = await queue.take()
                    held.add(turn.query.facts.org_id)
                    queue.put_back(turn, _LONG_SECONDS)
        for org in (CROWD, ONE, OTHER):
            queue.release(org)
        taken += await _take(queue, len(queue))
        for org in (CROWD, ONE, OTHER):
            of_org = [query for query in taken if query.facts.org_id == org]
            assert of_org == [query for query in put if query.facts.org_id == org]
        assert len(taken) == len(put)

    asyncio.run(run())
