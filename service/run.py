"""One service as a process: logs, signals, the lifeline, and what its end says."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from enum import StrEnum
from functools import partial
from typing import Any

import structlog

from consumers.executor.executor import Executor
from db.health import DATA, STATE, require_schema
from db.retrying import until_available
from processes.garbage import collect_garbage_less_often
from processes.lifeline import hold_lifeline
from producers.relay.depth import measure_for_ever
from queryd.registry import announce_schemas
from service.dependencies import Dependencies, Dependency, kafka, postgres_data, postgres_state, s3
from service.http import Health, bind, make_app, serving
from service.settings import Settings, WrongSetting, check_kafka_options, load_settings
from service.wiring import make_executor, make_projector, make_relay
from telemetry.events import LogEvent
from telemetry.logs import set_up_logs
from telemetry.metrics import METRICS
from telemetry.traces import close_traces, set_up_traces

_log = structlog.get_logger("queryd.service")


class Service(StrEnum):
    """What can be run; each is a process of its own."""

    EXECUTOR = "executor"
    RELAY = "relay"
    PROJECTOR = "projector"


# What a service can't work without.
_NEEDED: dict[Service, tuple[Callable[[Settings], Dependency], ...]] = {
    Service.EXECUTOR: (kafka, postgres_data, s3),
    Service.RELAY: (kafka, postgres_data),
    Service.PROJECTOR: (kafka, postgres_state),
}


def http_variables(service: Service, port: int) -> dict[str, str]:
    """The environment of a service that shares its host with the others: they take `port` and the two that follow."""
    return {"QUERYD_HTTP_PORT": str(port + list(Service).index(service))} if port else {}


def run_service(service: Service, settings: Settings) -> int:
    """Run one service until SIGTERM or SIGINT; returns the exit code: 0 after a clean drain, 1 after a failure.

    Raises `WrongSetting` for a port that can't be had.
    """
    listener = bind(settings)
    set_up_logs(settings.log_level, service.value)
    set_up_traces(service.value)
    hold_lifeline()
    collect_garbage_less_often()
    _log.info(LogEvent.SERVICE_STARTED)
    try:
        asyncio.run(_run(service, settings, listener))
    # What no retry can mend ends the process, with one line that says why.
    except Exception as error:  # noqa: BLE001
        _log.error(LogEvent.SERVICE_FAILED, error=type(error).__name__, reason=_reason(error))
        return 1
    finally:
        close_traces()
    _log.info(LogEvent.SERVICE_STOPPED)
    return 0


async def _run(service: Service, settings: Settings, listener: socket.socket | None) -> None:
    """The service, with its health and its metrics to be asked for from its start to the end of its drain."""
    # Until it works there is nothing to end in order; but what runs as process 1 would not hear of SIGTERM at all.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, os._exit, 128 + signal.SIGTERM)
    dependencies = Dependencies([make(settings) for make in _NEEDED[service]])
    health = Health(service.value, dependencies, alive=lambda: not work.done())
    work = asyncio.create_task(_RUNNERS[service](settings, health), name=service.value)
    async with AsyncExitStack() as stack:
        if listener is not None:
            await stack.enter_async_context(serving(make_app(health, METRICS), listener))
        await work


async def _run_executor(settings: Settings, health: Health) -> None:
    await _require_data(settings)
    await announce_schemas()
    async with AsyncExitStack() as stack:
        executor, cancellations = await make_executor(settings, stack)
        stack.enter_context(METRICS.reading_lags(executor.count_behind))
        stack.enter_context(METRICS.reading_queues(executor.count_waiting))

        def stop() -> None:
            executor.stop()
            cancellations.stop()

        _stop_on_signal(stop, health)
        announcing = asyncio.create_task(_announce(executor, health))
        try:
            await _run_together(executor.run(), cancellations.run(), stop)
        finally:
            announcing.cancel()


async def _run_together(
    first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None], stop: Callable[[], None]
) -> None:
    """Both until they end; when one fails the other is stopped as well, and then the failure raised."""
    tasks = [asyncio.create_task(first), asyncio.create_task(second)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    stop()
    await asyncio.wait(tasks)
    for task in tasks:
        task.result()


async def _require_data(settings: Settings) -> None:
    await until_available(partial(require_schema, settings.data_url.get_secret_value(), DATA), "postgres data")


async def _announce(executor: Executor, health: Health) -> None:
    await executor.intake.wait_assigned()
    health.announce()


async def _run_relay(settings: Settings, health: Health) -> None:
    await _require_data(settings)
    relay = make_relay(settings, health.announce)
    _stop_on_signal(relay.stop, health)
    measuring = asyncio.create_task(measure_for_ever(settings.data_url.get_secret_value()), name="outbox depth")
    try:
        await relay.run()
    finally:
        measuring.cancel()


async def _run_projector(settings: Settings, health: Health) -> None:
    await until_available(partial(require_schema, settings.state_url.get_secret_value(), STATE), "postgres state")
    async with AsyncExitStack() as stack:
        projector = await make_projector(settings, stack, health.announce)
        _stop_on_signal(projector.stop, health)
        await projector.run()


_RUNNERS = {Service.EXECUTOR: _run_executor, Service.RELAY: _run_relay, Service.PROJECTOR: _run_projector}


def _stop_on_signal(stop: Callable[[], None], health: Health) -> None:
    def drain() -> None:
        health.stop()
        stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)


def _reason(error: Exception) -> str:
    """The sentence of an error of ours. Another library's may quote statements or values: its class must do."""
    ours = type(error).__module__.partition(".")[0] in _OUR_ROOMS
    return str(error) if ours else ""


_OUR_ROOMS = frozenset(
    {
        "queryd",
        "service",
        "replay",
        "consumers",
        "producers",
        "engines",
        "results",
        "access",
        "db",
        "processes",
        "telemetry",
    }
)


def main() -> None:
    """The process of one service, named by its only argument."""
    try:
        settings = load_settings()
        check_kafka_options(settings)
        code = run_service(Service(sys.argv[1]), settings)
    except WrongSetting as error:
        print(f"queryd: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)


if __name__ == "__main__":
    main()
