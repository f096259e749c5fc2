"""How a service tells the `queryd up` that started it that it is ready: a file, named in its environment."""

import os
from pathlib import Path

import structlog

from telemetry.events import LogEvent

READY_VARIABLE = "QUERYD_READY_FILE"

_log = structlog.get_logger("queryd.service")


def announce_ready(service: str) -> None:
    """The service does its work now."""
    _log.info(LogEvent.SERVICE_READY, service=service)
    path = os.environ.get(READY_VARIABLE)
    if path:
        Path(path).touch()
