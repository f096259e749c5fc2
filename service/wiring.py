"""The composition root: settings become services."""

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from consumers.cancellations import Cancellations
from consumers.dead_letters import DeadLetters
from consumers.executor.admission import Rules
from consumers.executor.attempt import AttemptRules, Attempts
from consumers.executor.executor import Executor, ExecutorRules
from consumers.executor.leases import Leases
from consumers.executor.reaper import Reaper
from consumers.executor.transitions import Transitions
from consumers.projector import Projector
from db.clock import read_clock
from db.connection import DataPool, StatePool, make_pool
from db.health import DATA, require_schema
from db.retrying import until_available
from engines.duckdb.pool import FOLDER_PREFIX, DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from processes.scratch import ScratchFolder, sweep
from producers.relay.relay import Relay, RelayRules
from queryd.events import Mode, Topic
from queryd.topics import wait_for_topic
from results.retention.sweep import Retention, RetentionRules
from results.store import ResultStore, StoreAccess
from service.settings import Settings

# Admission, claims, endings, renewals and the grants of as many slots: each holds a connection for milliseconds.
_EXECUTOR_CONNECTIONS = 8
_PROJECTOR_CONNECTIONS = 2
_ATTEMPTS_PREFIX = "attempts-"


async def make_executor(settings: Settings, stack: AsyncExitStack) -> tuple[Executor, Cancellations]:
    """An executor with everything it uses, and the consumer of cancellations that runs beside it.

    Waits for Postgres data and for Kafka; `stack` closes what they do not close themselves.
    """
    pool = DataPool(make_pool(settings.data_url.get_secret_value(), "executor", _EXECUTOR_CONNECTIONS))
    await pool.open()
    stack.push_async_callback(pool.close)
    scratch = settings.scratch.resolve()
    sweep(scratch, _ATTEMPTS_PREFIX)
    folder = ScratchFolder.make(scratch, _ATTEMPTS_PREFIX)
    stack.callback(folder.remove)
    clock = await until_available(partial(read_clock, pool), "postgres data")
    lanes = {mode.topic.value: await wait_for_topic(settings.kafka, mode.topic) for mode in Mode}
    cancellations = await _make_cancellations(settings, stack)
    transitions = Transitions(pool, clock, settings.org_running_queries)
    leases = Leases(pool, settings.lease_seconds, settings.lease_seconds / 3)
    engine = DuckDBEngine(duckdb_settings(settings, scratch), sum(settings.slots().values()))
    access = StoreAccess()
    attempts = Attempts(
        pool=pool,
        clock=clock,
        transitions=transitions,
        leases=leases,
        engine=engine,
        store=ResultStore(settings.bucket, access),
        rules=_attempt_rules(settings, folder.path),
    )
    executor = Executor(
        pool=pool,
        clock=clock,
        subscription_config=settings.kafka | settings.requests_group,
        dead_letters=DeadLetters(pool, lanes),
        engine=engine,
        transitions=transitions,
        attempts=attempts,
        leases=leases,
        reaper=Reaper(pool, clock, transitions, settings.lease_seconds),
        retention=make_retention(settings, access),
        admission_rules=Rules(
            queue_seconds=_queue_seconds(settings),
            engines=frozenset({"duckdb"}),
            hash_key=settings.hash_key,
            limits=settings.org_limits(),
        ),
        rules=ExecutorRules(settings.slots(), settings.lease_seconds, settings.drain_seconds),
    )
    return executor, cancellations


async def _make_cancellations(settings: Settings, stack: AsyncExitStack) -> Cancellations:
    pool = DataPool(make_pool(settings.data_url.get_secret_value(), "cancellations", 1))
    await pool.open()
    stack.push_async_callback(pool.close)
    topics = {Topic.CANCELLATIONS.value: await wait_for_topic(settings.kafka, Topic.CANCELLATIONS)}
    return Cancellations(
        pool,
        settings.kafka | settings.group("cancellations"),
        DeadLetters(pool, topics),
    )


def make_retention(settings: Settings, access: StoreAccess) -> Retention:
    """What sweeps the bucket, the rows and this machine's scratch."""
    return Retention(
        RetentionRules(
            data_url=settings.data_url.get_secret_value(),
            bucket=settings.bucket,
            lease_seconds=settings.lease_seconds,
            result_seconds=settings.result_retention,
            row_seconds=settings.row_retention,
            interval_seconds=settings.retention_interval,
            scratch=settings.scratch.resolve(),
            scratch_prefixes=(_ATTEMPTS_PREFIX, FOLDER_PREFIX),
        ),
        access,
    )


@asynccontextmanager
async def opened_data_pool(settings: Settings) -> AsyncIterator[DataPool]:
    """Open a small pool for a command.

    Raises `DatabaseUnavailable` and `SchemaMissing` immediately; the pool itself would retry for 10 s.
    """
    await require_schema(settings.data_url.get_secret_value(), DATA)
    pool = DataPool(make_pool(settings.data_url.get_secret_value(), "command", 1))
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()


def make_relay(settings: Settings, ready: Callable[[], None]) -> Relay:
    """A relay of all shards."""
    rules = RelayRules(settings.data_url.get_secret_value(), settings.kafka, settings.relay_transactions)
    return Relay(rules, ready)


async def make_projector(settings: Settings, stack: AsyncExitStack, ready: Callable[[], None]) -> Projector:
    """The projector of the state database."""
    pool = StatePool(make_pool(settings.state_url.get_secret_value(), "projector", _PROJECTOR_CONNECTIONS))
    await pool.open()
    stack.push_async_callback(pool.close)
    return Projector(pool, settings.kafka, settings.group("projector"), ready)


def _queue_seconds(settings: Settings) -> dict[Mode, float]:
    return {Mode.INTERACTIVE: settings.queue_timeout_interactive, Mode.BATCH: settings.queue_timeout_batch}


def _attempt_rules(settings: Settings, scratch: Path) -> AttemptRules:
    return AttemptRules(
        worker=f"{socket.gethostname()}:{os.getpid()}",
        bucket=settings.bucket,
        scratch=scratch,
        lease_seconds=settings.lease_seconds,
        default_seconds={Mode.INTERACTIVE: settings.timeout_interactive, Mode.BATCH: settings.timeout_batch},
        longest_seconds={Mode.INTERACTIVE: settings.timeout_interactive_max, Mode.BATCH: settings.timeout_batch_max},
        queue_seconds=_queue_seconds(settings),
        retention=timedelta(seconds=settings.result_retention),
    )


def duckdb_settings(settings: Settings, scratch: Path) -> DuckDBSettings:
    """What the engine's children are told; they work below `scratch`."""
    access_key, secret_key, session_token = reader_credentials(settings)
    return DuckDBSettings(
        memory_bytes=settings.child_memory,
        threads=settings.child_threads,
        scratch_root=scratch,
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        access_key=access_key,
        secret_key=secret_key,
        session_token=session_token,
        postgres_url=None if settings.datasets_pg_url is None else settings.datasets_pg_url.get_secret_value(),
        max_scratch_bytes=settings.scratch_bytes,
    )


def reader_credentials(settings: Settings) -> tuple[str | None, str | None, str | None]:
    """Key, secret and session token by which datasets are read: those for reading only, else the service's own."""
    if settings.datasets_access_key_id is not None and settings.datasets_secret_access_key is not None:
        token = settings.datasets_session_token
        return (
            settings.datasets_access_key_id,
            settings.datasets_secret_access_key.get_secret_value(),
            None if token is None else token.get_secret_value(),
        )
    environment = os.environ
    return (
        environment.get("AWS_ACCESS_KEY_ID"),
        environment.get("AWS_SECRET_ACCESS_KEY"),
        environment.get("AWS_SESSION_TOKEN"),
    )
