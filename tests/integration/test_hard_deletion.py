"""Hard deletion on a real Postgres and a real S3: everything of an org or a user goes, whatever happens at once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from consumers.executor.admission import Done
from consumers.executor.query import Query
from db.connection import Connection
from db.data.datasets import NewDataset, grant, upsert_dataset
from db.data.replays import begin
from db.data.retention import Scope
from db.data.saved_queries import insert_saved
from results.retention import deletion
from results.retention.deletion import Deleted
from service.embedded.object_store import ObjectStore
from tests.integration.queries import (
    make_record,
    make_request,
    new_id,
    read_row,
)
from tests.integration.records import PATIENCE_SECONDS, until
from tests.integration.retention_place import (
    LONG_SECONDS,
    Attempt,
    Crash,
    Place,
    crash,
    follow_failure,
    log_access,
    opened_place,
)


@pytest.fixture
async def place(data_url: str, object_store: ObjectStore, tmp_path: Path) -> AsyncIterator[Place]:
    async with opened_place(data_url, object_store, tmp_path) as opened:
        yield opened


@dataclass(frozen=True, slots=True)
class Household:
    """An org with two users, with something of every kind, and a neighbour."""

    org_id: str
    user_id: str
    other_id: str
    own: tuple[Attempt, ...]
    others: tuple[Attempt, ...]
    neighbour: Attempt


async def _furnish(place: Place) -> Household:
    org_id, user_id, other_id = new_id(), new_id(), new_id()
    own, others = [await _furnish_user(place, org_id, each, limits=each == user_id) for each in (user_id, other_id)]
    neighbour = await place.announce()
    stranger = new_id()
    async with place.pool.connection() as connection:
        await grant(connection, org_id, f"d_{other_id[:8]}", [f"user:{user_id}"])
        await upsert_dataset(connection, NewDataset(stranger, None, "theirs", "parquet", "s3://b/d", "org", []))
        await grant(connection, stranger, "theirs", [f"org:{org_id}"])
    return Household(org_id, user_id, other_id, tuple(own), tuple(others), neighbour)


async def _furnish_user(place: Place, org_id: str, user_id: str, *, limits: bool) -> list[Attempt]:
    ids: dict[str, Any] = {"org_id": org_id, "user_id": user_id}
    async with place.pool.connection() as connection:
        saved = await insert_saved(connection, **ids, name="a", query="SELECT 1", visibility="public")
        await upsert_dataset(
            connection, NewDataset(org_id, user_id, f"d_{user_id[:8]}", "parquet", "s3://b/d", "org", [])
        )
        if limits:
            await connection.execute("INSERT INTO org_limits (org_id) VALUES (%s)", [org_id])
        # Somebody has replayed this user's requests, and names whom it was about.
        await begin(
            connection,
            replay_id=new_id(),
            kind="requests",
            scope=user_id,
            actor="an operator",
            reason="a test",
            plan={"selection": {"org_id": org_id, "user_id": user_id}},
            org_id=org_id,
            user_id=user_id,
        )
    announced = await place.announce(**ids, saved_query_id=saved.id)
    task = await place.announce(**ids, task_id=new_id())
    failed, running = await place.start(**ids), await place.start(**ids)
    place.put(failed.key, running.key)
    place.upload(running.key)
    await place.fail(failed)
    await log_access(place, announced)
    await log_access(place, task)
    await place.change(
        "INSERT INTO query_cancellations (query_id, org_id, user_id) VALUES (%s, %s, %s)", new_id(), org_id, user_id
    )
    return [announced, task, failed, running]


async def _find_everywhere(place: Place, wanted: Sequence[str]) -> set[str]:
    """The tables in which any of the ids stands."""
    async with place.pool.connection() as connection:
        tables = await (
            await connection.execute(
                "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
            )
        ).fetchall()
        found = set()
        for (table,) in tables:
            rows = await (await connection.execute(f"SELECT t::text FROM {table} t".encode())).fetchall()
            if any(each in row[0] for each in wanted for row in rows):
                found.add(table)
        return found


async def test_deleting_an_org_leaves_nothing_of_it_but_what_refuses_a_redelivery(place: Place) -> None:
    home = await _furnish(place)
    deleted = await place.delete(Scope(home.org_id))
    assert asdict(deleted) == {
        "queries": 8,
        "stopped": 2,
        "saved_queries": 2,
        "datasets": 2,
        "dataset_grants": 1,
        "org_limits": 1,
        "replays": 2,
        "query_cancellations": 4,
        "pii_access_log": 4,
        "objects": 8,
        "uploads": 2,
    }
    attempts = [*home.own, *home.others]
    ids = [attempt.query_id for attempt in attempts]
    assert await _find_everywhere(place, [home.org_id, home.user_id, home.other_id]) == set()
    assert await _find_everywhere(place, ids) == {"deleted_ids", "outbox"}
    # What waited for the relay is not told any more.
    assert sorted(await place.tombstones()) == sorted(ids)
    assert place.objects(f"results/{home.org_id}/") == []
    assert place.uploads(f"results/{home.org_id}/") == []
    # The neighbour has noticed nothing.
    assert await place.count("query_results") == 1
    assert place.objects(home.neighbour.prefix) == [home.neighbour.key]
    assert await place.delete(Scope(home.org_id)) == Deleted()


async def test_deleting_a_user_leaves_the_orgs_others_as_they_are(place: Place) -> None:
    home = await _furnish(place)
    deleted = await place.delete(Scope(home.org_id, home.user_id))
    assert (deleted.queries, deleted.stopped, deleted.objects, deleted.uploads) == (4, 1, 4, 1)
    assert (deleted.saved_queries, deleted.datasets, deleted.org_limits, deleted.pii_access_log) == (1, 1, 0, 2)
    assert await _find_everywhere(place, [home.user_id]) == set()
    for attempt in home.own:
        assert place.objects(attempt.prefix) == []
    for attempt in home.others:
        assert await read_row(place.pool, attempt.query_id) is not None
        assert len(place.objects(attempt.prefix)) == 1
    assert len(place.uploads(f"results/{home.org_id}/")) == 1
    assert await place.count("org_limits") == 1
    assert await place.count("replays") == 1
    # The same user in another org is another matter.
    elsewhere = await place.announce(user_id=home.user_id)
    assert await place.delete(Scope(home.org_id, home.user_id)) == Deleted()
    assert await read_row(place.pool, elsewhere.query_id) is not None


# In order; what happens before a step is what happens after the one before it.
_STEPS = (
    "read_unfinished",
    "cancel",
    "remember_deleted",
    "delete_results",
    "delete_queries",
    "delete_saved",
    "delete_belongings",
    "judge_deleted",
)


@pytest.mark.slow
async def test_a_deletion_that_dies_after_any_step_is_completed_by_its_repetition(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in _STEPS:
        home = await _furnish(place)
        ids = [attempt.query_id for attempt in home.own]
        with monkeypatch.context() as patched:
            patched.setattr(deletion, step, _dying_after(getattr(deletion, step)))
            with pytest.raises(Crash):
                await place.delete(Scope(home.org_id, home.user_id))
        await place.delete(Scope(home.org_id, home.user_id))
        assert await _find_everywhere(place, [home.user_id]) == set(), step
        assert await _find_everywhere(place, ids) == {"deleted_ids", "outbox"}, step
        assert set(ids) <= set(await place.tombstones()), step
        for attempt in home.own:
            assert place.objects(attempt.prefix) == [], step
        assert len(place.uploads(f"results/{home.org_id}/")) == 1, step


def _dying_after(real: Callable[..., Any]) -> Callable[..., Any]:
    async def die(*arguments: Any, **named: Any) -> None:
        await real(*arguments, **named)
        raise Crash

    return die


@pytest.mark.slow
async def test_a_deletion_that_is_never_repeated_is_completed_by_the_sweep(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = await _furnish(place)
    with monkeypatch.context() as patched:
        patched.setattr(deletion, "judge_deleted", crash)
        with pytest.raises(Crash):
            await place.delete(Scope(home.org_id))
    assert place.objects(f"results/{home.org_id}/") != []
    await place.sweep()
    assert place.objects(f"results/{home.org_id}/") == []
    assert place.uploads(f"results/{home.org_id}/") == []


@pytest.mark.slow
async def test_a_live_attempt_of_a_deleted_query_can_not_finish_and_what_it_stores_late_is_swept(
    place: Place,
) -> None:
    record = make_record(make_request())
    [verdict] = await place.worker.admit(record)
    assert isinstance(verdict, Query)
    attempt = Attempt(verdict.facts, await place.worker.start(verdict.facts))
    deleted = await place.delete(Scope(attempt.facts.org_id))
    assert (deleted.queries, deleted.stopped) == (1, 1)
    # Its worker was stopped, and wakes.
    place.put(attempt.key)
    assert await place.succeed(attempt) is None
    assert await place.worker.hand_back(attempt.state) is None
    assert await place.worker.claim(attempt.facts, attempt.state, new_id()) is None
    assert await place.worker.admit(record) == [Done()]
    assert await read_row(place.pool, attempt.query_id) is None
    assert await place.tombstones() == [attempt.query_id]
    assert (await place.sweep(lease_seconds=LONG_SECONDS)).objects == 0
    assert (await place.sweep()).objects == 1
    assert place.objects(attempt.prefix) == []


async def test_what_runs_is_cancelled_first_and_given_its_time_to_end(place: Place) -> None:
    attempt = await place.start()
    deleting = asyncio.create_task(place.delete(Scope(attempt.facts.org_id), stop_seconds=LONG_SECONDS))

    async def is_cancelled() -> bool:
        return (await place.worker.read(attempt.query_id)).cancelled

    await until(is_cancelled, follow_failure(deleting))
    assert not deleting.done()
    await place.fail(attempt)
    deleted = await deleting
    assert (deleted.queries, deleted.stopped) == (1, 1)
    assert await place.tombstones() == [attempt.query_id]


async def test_a_finish_that_holds_the_row_is_waited_for_and_goes_with_the_rest(place: Place) -> None:
    attempt = await place.start()
    place.put(attempt.key)
    async with place.pool.connection() as connection:
        await connection.execute("SELECT FROM query_runs WHERE query_id = %s FOR UPDATE", [attempt.query_id])
        deleting = asyncio.create_task(place.delete(Scope(attempt.facts.org_id)))
        # The cancel waits for the row first, as the deletion would.
        await until(lambda: _is_waited_for(place), follow_failure(deleting))
        await connection.execute(
            "UPDATE query_runs SET deadline = NULL, sequence = 3 WHERE query_id = %s", [attempt.query_id]
        )
        await connection.execute("UPDATE query_results SET status = 'Succeeded' WHERE id = %s", [attempt.query_id])
    deleted = await deleting
    assert (deleted.queries, deleted.objects) == (1, 1)
    assert await place.tombstones() == [attempt.query_id]
    assert place.objects(attempt.prefix) == []


async def _is_waited_for(place: Place) -> bool:
    async with place.pool.connection() as connection:
        row = await (await connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")).fetchone()
        assert row is not None
        return int(row[0]) > 0


async def _read_deleted(connection: Connection) -> set[str]:
    cursor = await connection.execute("SELECT query_id::text FROM deleted_ids")
    return {query_id for (query_id,) in await cursor.fetchall()}


@pytest.mark.slow
async def test_an_admission_under_way_is_waited_for_and_none_that_hangs_holds_up_the_others(place: Place) -> None:
    attempt = await place.start()
    async with place.pool.connection() as hanging:
        # As an admission does that has not inserted yet.
        assert await _read_deleted(hanging) == set()
        deleting = asyncio.create_task(place.delete(Scope(attempt.facts.org_id)))
        await until(lambda: _is_waited_for(place), follow_failure(deleting))
        # Others are admitted meanwhile, and the row stands while the first may still insert it.
        async with asyncio.timeout(PATIENCE_SECONDS):
            await place.announce()
        assert await read_row(place.pool, attempt.query_id) is not None
        assert not deleting.done()
    assert (await deleting).queries == 1


async def test_a_saved_query_that_others_have_run_goes_and_their_rows_stay(place: Place) -> None:
    org_id, author = new_id(), new_id()
    async with place.pool.connection() as connection:
        saved = await insert_saved(
            connection, org_id=org_id, user_id=author, name="a", query="SELECT 1", visibility="org"
        )
    run = await place.announce(org_id=org_id, saved_query_id=saved.id)
    assert (await place.delete(Scope(org_id, author))).saved_queries == 1
    row = await read_row(place.pool, run.query_id)
    assert row is not None
    assert (row.status, row.saved_query_id) == ("Succeeded", None)
    assert place.objects(run.prefix) == [run.key]
    assert await _find_everywhere(place, [saved.id, author]) == set()


@pytest.mark.slow
async def test_more_queries_than_a_batch_are_deleted(place: Place) -> None:
    org_id = new_id()
    await place.worker.admit(*(make_record(make_request(org_id=org_id)) for _ in range(1100)))
    deleted = await place.delete(Scope(org_id))
    assert (deleted.queries, deleted.stopped) == (1100, 1100)
    assert await place.count("query_results") == 0
    assert len(await place.tombstones()) == 1100
    async with place.pool.connection() as connection:
        assert await _read_deleted(connection) == set(await place.tombstones())


@pytest.mark.slow
async def test_results_in_a_bucket_of_an_earlier_setting_go_too(place: Place) -> None:
    earlier = f"earlier-{new_id()[:8]}"
    place.s3.create_bucket(Bucket=earlier)
    over, old, deleted = [await place.announce() for _ in range(3)]
    for attempt in (over, old, deleted):
        place.s3.put_object(Bucket=earlier, Key=attempt.key, Body=b"x")
        await place.change(
            "UPDATE query_results SET output_location = %s WHERE id = %s",
            f"s3://{earlier}/{attempt.prefix}",
            attempt.query_id,
        )
    await place.change("UPDATE query_runs SET expires_at = now() WHERE query_id = %s", over.query_id)
    await place.change(
        "UPDATE query_runs SET queued_at = now() - interval '401 days' WHERE query_id = %s", old.query_id
    )
    await place.sweep()
    await place.delete(Scope(deleted.facts.org_id))
    assert "Contents" not in place.s3.list_objects_v2(Bucket=earlier)


@pytest.mark.slow
async def test_results_of_a_bucket_that_is_gone_hold_up_neither_a_deletion_nor_the_sweep(place: Place) -> None:
    deleted, stuck, other = await place.announce(), await place.announce(), await place.announce()
    for attempt in (deleted, stuck):
        location = f"s3://gone-{new_id()[:8]}/{attempt.prefix}"
        await place.change("UPDATE query_results SET output_location = %s WHERE id = %s", location, attempt.query_id)
    await place.delete(Scope(deleted.facts.org_id))
    assert await place.count("query_results") == 2
    for attempt in (stuck, other):
        await place.change(
            "UPDATE query_runs SET queued_at = now() - interval '401 days', expires_at = now() + interval '9 days' "
            "WHERE query_id = %s",
            attempt.query_id,
        )
    await place.sweep()
    assert await place.count("query_results") == 0
