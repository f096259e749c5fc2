"""Structured logs on stderr: one JSON object a line, or coloured lines on a terminal."""

import logging
import sys

import structlog

# The fields that the package `queryd` passes as `extra=`, since it logs with the standard library only.
_FIELDS = ("topic", "partition", "offset", "partitions")


def set_up_logs(level: str, service: str | None = None) -> None:
    """Route structlog and the standard library's loggers to stderr.

    `level` is a standard level's name and applies to queryd's own loggers. Other libraries log only warnings and
    errors, because their other lines contain secrets, such as URLs with passwords. Every line contains `service`, from
    every thread and library.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(allow=_FIELDS),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            # Tracebacks stay out: a frame's exception text may quote what must not be logged.
            processors=[
                _name_service(service),
                _drop_traceback,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    logging.getLogger("queryd").setLevel(level)
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level]))
    for chatty in ("botocore", "boto3", "urllib3", "alembic", "psycopg.pool", "stamina"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def _name_service(service: str | None) -> structlog.typing.Processor:
    def add(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if service is not None:
            event.setdefault("service", service)
        return event

    return add


def _drop_traceback(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    error = event.pop("exc_info", None)
    if isinstance(error, tuple) and error[0] is not None:
        event["error"] = error[0].__name__
    return event
