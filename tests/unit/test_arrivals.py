"""Who is admitted next: orgs in turns, in order inside an org."""

import asyncio
import uuid
from dataclasses import replace

from consumers.executor.admission import Legible
from consumers.executor.arrivals import Arrivals
from queryd.events import Mode, OrgId, QueryId
from tests.unit.samples import make_record

CROWD, ONE, OTHER = (OrgId(str(uuid.UUID(int=number))) for number in range(3))


def _arrive(arrivals: Arrivals, org: OrgId, count: int = 1) -> list[Legible]:
    items = [
        Legible(
            record=make_record(b""),
            query_id=QueryId(str(uuid.uuid4())),
            org_id=org,
            mode=Mode.INTERACTIVE,
            fields={},
            fingerprint=b"",
            traceparent="",
            request=None,
            reason=None,
        )
        for _ in range(count)
    ]
    for item in items:
        arrivals.put(item)
    return items


def test_a_request_behind_anothers_burst_is_in_the_next_batch() -> None:
    arrivals = Arrivals()
    burst = _arrive(arrivals, CROWD, 10_000)
    [one] = _arrive(arrivals, ONE)
    batch = arrivals.take(500)
    assert batch[:2] == [burst[0], one]
    assert batch[2:] == burst[1:499]


def test_orgs_take_turns_and_none_is_lost() -> None:
    arrivals = Arrivals()
    arrived = {org: _arrive(arrivals, org, count) for org, count in ((CROWD, 5), (ONE, 2), (OTHER, 1))}
    taken = [*arrivals.take(4), *arrivals.take(100)]
    assert [item.org_id for item in taken] == [CROWD, ONE, OTHER, CROWD, ONE, CROWD, CROWD, CROWD]
    for org, items in arrived.items():
        assert [item for item in taken if item.org_id == org] == items


def test_of_one_id_the_first_comes_first_whoever_else_claims_it() -> None:
    arrivals = Arrivals()
    burst = _arrive(arrivals, CROWD, 3)
    thief = replace(burst[2], org_id=ONE)
    arrivals.put(thief)
    [honest] = _arrive(arrivals, ONE)
    assert arrivals.take(10) == [burst[0], honest, burst[1], burst[2], thief]
    # What is known already is admission's to find.
    arrivals.put(thief)
    assert arrivals.take(10) == [thief]


async def test_the_wait_for_requests_ends_with_the_first() -> None:
    arrivals = Arrivals()
    waiting = asyncio.create_task(arrivals.wait_for_requests())
    await asyncio.sleep(0)
    assert not waiting.done()
    items = _arrive(arrivals, ONE, 3)
    await waiting
    assert arrivals.take(10) == items
    again = asyncio.create_task(arrivals.wait_for_requests())
    await asyncio.sleep(0)
    assert not again.done()
    _arrive(arrivals, ONE)
    await again
