"""One service as a process: logs, signals, the lifeline, and what its end says."""

import asyncio
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from enum import StrEnum
from functools import partial

import structlog

from consumers.executor.executor import Executor
from db.health import DATA_TABLES, STATE_TABLES, require_tables
from db.retrying import until_available
from processes.lifeline import hold_lifeline
from service.readiness import announce_ready
from service.settings import Settings, WrongSetting, check_kafka_options, load_settings
from service.wiring import make_executor, make_projector, make_relay
from telemetry.events import LogEvent
from telemetry.logs import set_up_logs

_log = structlog.get_logger("queryd.service")


class Service(StrEnum):
    """What can be run; each is a process of its own."""

    EXECUTOR = "executor"
    RELAY = "relay"
    PROJECTOR = "projector"


def run_service(service: Service, settings: Settings) -> int:
    """Run one service until SIGTERM or SIGINT; returns the exit code: 0 after a clean drain, 1 after a failure."""
    set_up_logs(settings.log_level)
    hold_lifeline()
    _log.info(LogEvent.SERVICE_STARTED, service=service.value)
    try:
        asyncio.run(_RUNNERS[service](settings))
    # What no retry can mend ends the process, with one line that says why.
    except Exception as error:  # noqa: BLE001
        _log.error(LogEvent.SERVICE_FAILED, service=service.value, error=type(error).__name__, reason=_reason(error))
        return 1
    _log.info(LogEvent.SERVICE_STOPPED, service=service.value)
    return 0


async def _run_executor(settings: Settings) -> None:
    await _require_data(settings)
    async with AsyncExitStack() as stack:
        executor = await make_executor(settings, stack)
        _stop_on_signal(executor.stop)
        announcing = asyncio.create_task(_announce(executor))
        try:
            await executor.run()
        finally:
            announcing.cancel()


async def _require_data(settings: Settings) -> None:
    await until_available(partial(require_tables, settings.data_url.get_secret_value(), DATA_TABLES), "postgres data")


async def _announce(executor: Executor) -> None:
    await executor.subscription.wait_assigned()
    announce_ready(Service.EXECUTOR)


async def _run_relay(settings: Settings) -> None:
    await _require_data(settings)
    relay = make_relay(settings, lambda: announce_ready(Service.RELAY))
    _stop_on_signal(relay.stop)
    await relay.run()


async def _run_projector(settings: Settings) -> None:
    await until_available(
        partial(require_tables, settings.state_url.get_secret_value(), STATE_TABLES), "postgres state"
    )
    async with AsyncExitStack() as stack:
        projector = await make_projector(settings, stack, lambda: announce_ready(Service.PROJECTOR))
        _stop_on_signal(projector.stop)
        await projector.run()


_RUNNERS = {Service.EXECUTOR: _run_executor, Service.RELAY: _run_relay, Service.PROJECTOR: _run_projector}


def _stop_on_signal(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _reason(error: Exception) -> str:
    """The sentence of an error of ours. Another library's may quote statements or values: its class must do."""
    ours = type(error).__module__.partition(".")[0] in _OUR_ROOMS
    return str(error) if ours else ""


_OUR_ROOMS = frozenset(
    {"queryd", "service", "consumers", "producers", "engines", "results", "access", "db", "processes", "telemetry"}
)


def main() -> None:
    """The process of one service, named by its only argument."""
    try:
        settings = load_settings()
        check_kafka_options(settings)
    except WrongSetting as error:
        print(f"queryd: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run_service(Service(sys.argv[1]), settings))


if __name__ == "__main__":
    main()
