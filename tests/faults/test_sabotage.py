"""The judge can fail: with one safeguard of the product taken out, and the fault that it guards against, it finds each.

And it can pass: the product itself, under all of these faults, has no violation.
"""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psycopg
import pytest

from processes.failpoints import Failpoint
from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.faults.checker import judge
from tests.faults.sabotaged import Sabotage
from tests.faults.small_stack import SmallStack, await_condition, run_small_stack
from tests.faults.world import to_servers
from tests.servers.kafka import Kafka
from tests.servers.kafka import run as run_broker

# On a machine that is busy with other tests, all the cold starts of the longest test take minutes.
pytestmark = pytest.mark.timeout(900)

QUERIES = 16

_Run = Callable[..., AbstractContextManager[SmallStack]]


@pytest.fixture(scope="module")
def servers(lifeline: Lifeline) -> Iterator[tuple[Path, Postgres, ObjectStore]]:
    """A folder, a Postgres and an S3 server for this module alone, whose faults would disturb others."""
    # Not below pytest's folder: that is closed to the user whom an embedded Postgres runs as when started by root.
    with tempfile.TemporaryDirectory(prefix="queryd-") as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        postgres = Postgres(folder / "postgres", folder / "postgres.log", lifeline)
        store = ObjectStore(folder / "s3", folder / "s3.log", lifeline)
        try:
            postgres.start()
            store.start()
            yield folder, postgres, store
        finally:
            postgres.stop()
            store.stop()


@pytest.fixture
def run(
    kafka: Kafka, servers: tuple[Path, Postgres, ObjectStore], lifeline: Lifeline, request: pytest.FixtureRequest
) -> _Run:
    """Runs a small stack on a broker of its own, so that what is there was sent there."""
    folder, postgres, store = servers

    @contextmanager
    def start(sabotage: Sabotage | None = None, executors: int = 1) -> Iterator[SmallStack]:
        own = folder / request.node.name
        own.mkdir()
        with (
            run_broker(kafka.kind, own / "kafka", lifeline) as broker,
            run_small_stack(
                own / "stack", broker, postgres, store, lifeline, executors=executors, sabotage=sabotage
            ) as stack,
        ):
            yield stack
            for service in stack.services.values():
                print(service.name, service.log_tail(), sep="\n")

    return start


def kill_while_queries_wait(stack: SmallStack) -> None:
    """SIGKILL of an executor after its first execution: it has read far more than it has finished."""
    _kill_at(stack, Failpoint.EXECUTE_AFTER)


def stop_past_the_lease(stack: SmallStack) -> None:
    """SIGSTOP before a finish, SIGCONT when another executor has finished the query; dead once its own is through."""
    with stack.fault("executor stopped", 1):
        stack.arm(Failpoint.FINISH_BEFORE, "STOP")
        stack.send(QUERIES)
        executor = stack.find_stopped()
        stack.await_terminal()
        endings = len(executor.endings)
        stack.arm(Failpoint.FINISH_AFTER)
        os.kill(executor.pid or 0, signal.SIGCONT)
        stack.await_restart(executor, endings)


def kill_after_the_commit(stack: SmallStack) -> None:
    """SIGKILL between a finish's commit and whatever comes after it."""
    _kill_at(stack, Failpoint.FINISH_AFTER)


def kill_before_the_commit(stack: SmallStack) -> None:
    """SIGKILL before a finish is committed."""
    _kill_at(stack, Failpoint.FINISH_BEFORE)


def _kill_at(stack: SmallStack, place: Failpoint) -> None:
    endings = {service.name: len(service.endings) for service in stack.executors}
    with stack.fault("executor killed", 1):
        stack.arm(place)
        stack.send(QUERIES)
        stack.await_passed(place)
        await_condition(
            lambda: any(len(each.endings) > endings[each.name] and each.ready for each in stack.executors),
            "the killed executor to be back",
        )


def take_the_store_away(stack: SmallStack) -> None:
    """S3 killed, and back once an executor has missed it."""
    told = {service.name: stack.log_of(service).count(_AWAY) for service in stack.executors}
    with stack.fault("S3 killed", 4):
        stack.store.server.kill()
        stack.send(QUERIES)
        await_condition(
            lambda: any(stack.log_of(each).count(_AWAY) > told[each.name] for each in stack.executors),
            "an executor to miss the store",
        )
        stack.store.start()


_AWAY = '"dependency": "s3", "reason"'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "executors", "fault", "invariant"),
    [
        (Sabotage.OFFSET_BEFORE_FINISH, 1, kill_while_queries_wait, 1),
        (Sabotage.NO_FENCING, 2, stop_past_the_lease, 3),
        (Sabotage.NO_OUTBOX, 1, kill_after_the_commit, 3),
        (Sabotage.PUBLISH_BEFORE_COMMIT, 1, kill_before_the_commit, 3),
        (Sabotage.SKIP_ON_ERROR, 1, take_the_store_away, 1),
    ],
)
def test_the_judge_finds(
    run: _Run, sabotage: Sabotage, executors: int, fault: Callable[[SmallStack], None], invariant: int
) -> None:
    with run(sabotage, executors) as stack:
        fault(stack)
        stack.settle()
        found = judge(stack.evidence()).violations
    assert invariant in {violation.invariant for violation in found}, [str(violation) for violation in found]


@pytest.mark.slow
def test_the_judge_finds_nothing_in_the_product_itself_but_what_is_planted_there(run: _Run) -> None:
    with run(executors=2) as stack:
        for fault in FAULTS:
            fault(stack)
        stack.settle()
        stack.sweep()
        verdict = judge(stack.evidence())
        planted = plant(stack)
        found = judge(stack.evidence())
    assert [str(violation) for violation in verdict.violations] == []
    assert verdict.counts.ends == {"Succeeded": len(FAULTS) * QUERIES}
    assert verdict.counts.retried > 0
    assert {(each.invariant, each.sentence) for each in found.violations} == planted


def plant(stack: SmallStack) -> set[tuple[int, str]]:
    """Leave SQL and litter wherever the judge has to look; what it must say of each."""
    place, query = stack.place, stack.evidence().queries[0]
    known = {"canary": query.canary, "id": query.query_id, "org": query.org_id}
    with psycopg.connect(place.data_url) as connection:
        connection.execute("UPDATE query_runs SET last_event = %(canary)s::bytea WHERE query_id = %(id)s", known)
        connection.execute(
            "INSERT INTO query_cancellations (query_id, org_id, reason) VALUES (%(id)s, %(org)s, %(canary)s)", known
        )
        connection.execute(
            "INSERT INTO replays (kind, scope, status, actor, reason, plan) "
            "VALUES ('', '', 'Done', '', '', jsonb_build_object('sql', %(canary)s::text))",
            known,
        )
    with psycopg.connect(place.state_url) as connection:
        connection.execute("INSERT INTO orgs (id, name) VALUES (%(org)s, %(canary)s)", known)
    with stack.services["relay"].log.open("a") as log:
        log.write(f"an error near {query.canary}\n")
    key = f"results/{query.org_id}/{query.query_id}/9-00000000/result.csv"
    s3 = to_servers(place).s3()
    s3.put_object(Bucket=place.bucket, Key=key, Body=b"answer\r\n42\r\n")
    s3.create_multipart_upload(Bucket=place.bucket, Key=key)
    leaving = stack.evidence().scratch[0] / "result.csv"
    leaving.touch()
    leaks = ("relay/service.log", "table query_cancellations", "table query_runs", "table replays", "table orgs")
    return {
        *((7, f"the canary {query.canary} is in {where}") for where in leaks),
        (6, f"no terminal row points to the object {key}"),
        (6, f"the upload of {key} was never completed"),
        (6, f"{leaving} is left in scratch"),
    }


FAULTS = (
    kill_while_queries_wait,
    stop_past_the_lease,
    kill_after_the_commit,
    kill_before_the_commit,
    take_the_store_away,
)
