"""`queryd up` and `queryd run`."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from enum import StrEnum
from typing import Annotated

import typer

from queryd.__main__ import room_command
from service.cli.output import complain, print_json
from service.cli.query import Json
from service.environment import isolate, isolate_from_sourced_stack
from service.http import check_ports
from service.run import Service, http_variables, run_service
from service.settings import STATE_DIRECTORY, check_kafka_options, load_settings
from telemetry.logs import set_up_logs

# How often `run all` checks its services: short compared with a service's start or drain, which take seconds.
_LOOK_SECONDS = 0.2


class Runnable(StrEnum):
    """A service, or all of them."""

    EXECUTOR = "executor"
    RELAY = "relay"
    PROJECTOR = "projector"
    ALL = "all"


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(up)
    app.command()(demo)
    app.command()(run)


def up() -> None:
    """Start Postgres, S3, Kafka and queryd's services under .queryd/, print `ready`, and stay until stopped."""
    from service.embedded.servers import EmbeddedError  # noqa: PLC0415 — an extra that a production install lacks
    from service.up import UpFailed, run_up  # noqa: PLC0415

    isolate_from_sourced_stack()
    # Only `ready` goes to stdout.
    set_up_logs("INFO", "up")
    try:
        asyncio.run(run_up(STATE_DIRECTORY))
    except (UpFailed, EmbeddedError) as error:
        complain(str(error))


def demo(as_json: Json = False) -> None:
    """Ask a year of New York's flights 14 questions, on a stack of its own, and check the answers."""
    from service.demo.demo import DemoFailed, run_demo  # noqa: PLC0415 — an extra that a production install lacks
    from service.embedded.servers import EmbeddedError  # noqa: PLC0415
    from service.up import UpFailed  # noqa: PLC0415

    # The demo always starts its own stack and ignores the shell's variables.
    isolate(settings=False)
    set_up_logs("ERROR")
    try:
        answer = asyncio.run(run_demo(STATE_DIRECTORY / "demo", quiet=as_json))
    except (DemoFailed, UpFailed, EmbeddedError) as error:
        complain(str(error))
    except (KeyboardInterrupt, asyncio.CancelledError):
        complain("stopped", 130)
    if as_json:
        print_json(answer)


def run(service: Annotated[Runnable, typer.Argument(help="Which service; `all` is one process each.")]) -> None:
    """Run a service against what the settings name, until SIGTERM."""
    settings = load_settings()
    check_kafka_options(settings)
    if service is Runnable.ALL:
        check_ports(settings, len(Service))
        sys.exit(_run_all(settings.http_port))
    sys.exit(run_service(Service(service.value), settings))


def _run_all(http_port: int) -> int:
    """All services as child processes; the first to end ends the others. Returns the worst exit code."""
    processes = [
        subprocess.Popen(room_command("service.run", each.value), env=os.environ | http_variables(each, http_port))
        for each in Service
    ]

    def stop(_number: int, _frame: object) -> None:
        for process in processes:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while all(process.poll() is None for process in processes):
        time.sleep(_LOOK_SECONDS)
    stop(0, None)
    return max(abs(process.wait()) for process in processes)
