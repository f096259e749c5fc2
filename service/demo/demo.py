"""`queryd demo`: the stack, the data, the questions, and the answers checked."""

import asyncio
import os
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from access.datasets import add_dataset
from access.saved_queries import save_query
from db.data.datasets import NewDataset
from queryd.client import QueryClient, QueryHandle
from queryd.events import QueryStatusChanged, Status
from service.demo.flights import DEPARTED, FLIGHTS, TABLES, flights_location, load_flights
from service.demo.questions import QUESTIONS, SAVED_NAME, SAVED_SQL, Question
from service.settings import Settings, load_settings
from service.up import Stack, Supervisor, cancel_on_signals, lock_folder
from service.wiring import opened_data_pool

# Two cores answer in some 15 s; without an answer for this long something is wrong.
_ANSWER_SECONDS = 120.0
_REFRESH_SECONDS = 0.1
# At these widths result locations fit beside full titles, and modes fit beside wrapped titles.
_WITH_PLACES = 156
_WITH_LANES = 76
_NEXT = """\
The demo's servers have stopped, so its results are no longer readable.
Try next: `make up`, a stack that keeps running; see README.md."""

_ORG = "00000000-0000-4000-8000-00000000f113"
_USER = "00000000-0000-4000-8000-00000000da7a"


class DemoFailed(Exception):
    """The demo's answers are not what they must be; the sentence says which."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that was submitted."""

    question: Question
    handle: QueryHandle


async def run_demo(directory: Path, *, quiet: bool) -> dict[str, Any]:
    """Run the demo in a fresh `directory`; returns what `--json` prints. Raises `DemoFailed` and `UpFailed`."""
    cancel_on_signals()
    console = Console(stderr=True, quiet=quiet)
    lock = _lock(directory)
    try:
        return await _run_alone(directory, console, quiet=quiet)
    finally:
        os.close(lock)


async def _run_alone(directory: Path, console: Console, *, quiet: bool) -> dict[str, Any]:
    await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
    stack = Stack(directory)
    started = time.monotonic()
    try:
        console.print("starting Postgres, S3 and Kafka …")
        await stack.run_start()
        with (directory / "logs" / "services.log").open("wb") as log:
            async with Supervisor(directory, log=log).running():
                settings = load_settings()
                console.print("loading the flights of 2013 …")
                rows, saved_query_id = await _load(settings, stack)
                console.print(
                    f"loaded {', '.join(f'{count:,} {name}' for name, count in rows.items())}", soft_wrap=True
                )
                console.print(f"asking {len(QUESTIONS)} questions over both lanes …")
                asked, events = await _ask(settings, saved_query_id, console)
                _check(asked, events)
    finally:
        await asyncio.to_thread(stack.stop)
    answer = _summarize(asked, events)
    if not quiet:
        _print_answers(
            asked,
            events,
            f"{FLIGHTS:,} flights, {DEPARTED:,} departed: as they must be. "
            f"{answer['Succeeded']} succeeded, {answer['Failed']} failed as they should, "
            f"{time.monotonic() - started:.0f} s in all.\n{_NEXT}",
        )
    return answer


def _lock(directory: Path) -> int:
    """Lock a file beside `directory`, which a demo deletes at its start. Returns a descriptor. Raises `DemoFailed`."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(directory.with_name(f"{directory.name}.lock"))
    if lock is None:
        raise DemoFailed("another demo is running here: wait until it ends, or start this one in another directory")
    return lock


async def _load(settings: Settings, stack: Stack) -> tuple[dict[str, int], str]:
    assert stack.servers is not None
    rows = await asyncio.to_thread(load_flights, settings.bucket, stack.servers.postgres.url("datasets"))
    async with opened_data_pool(settings) as pool:
        places = {"flights": ("parquet", flights_location(settings.bucket))}
        places |= {name: ("postgres", f"public.{name}") for name in TABLES}
        for name, (kind, location) in places.items():
            await add_dataset(
                pool,
                NewDataset(
                    org_id=_ORG,
                    user_id=None,
                    name=name,
                    kind=kind,
                    location=location,
                    visibility="org",
                    pii_columns=[],
                ),
            )
        saved = await save_query(pool, org_id=_ORG, user_id=_USER, name=SAVED_NAME, query=SAVED_SQL, visibility="org")
    return rows, saved.id


async def _ask(
    settings: Settings, saved_query_id: str, console: Console
) -> tuple[list[Asked], list[QueryStatusChanged]]:
    with QueryClient(settings.kafka) as client:
        asked = await asyncio.to_thread(_submit_all, client, saved_query_id)
        events = await _follow(asked, console)
        flights, departed = (await asyncio.to_thread(asked[0].handle.result, _ANSWER_SECONDS)).to_pylist()[0].values()
        if (flights, departed) != (FLIGHTS, DEPARTED):
            raise DemoFailed(f"counted {flights:,} flights and {departed:,} departed")
    return asked, events


def _submit_all(client: QueryClient, saved_query_id: str) -> list[Asked]:
    return [
        Asked(
            question,
            client.submit(
                question.sql,
                org_id=_ORG,
                user_id=_USER,
                query_id=str(uuid.uuid4()),
                saved_query_id=saved_query_id if question.saved else None,
                parameters=question.parameters,
                mode=question.mode,
                output_format=question.output_format,
                timeout_seconds=question.timeout_seconds,
            ),
        )
        for question in QUESTIONS
    ]


async def _follow(asked: Sequence[Asked], console: Console) -> list[QueryStatusChanged]:
    """The terminal event of each, with progress shown meanwhile."""
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
    )
    bar = progress.add_task("queries", total=len(asked))
    deadline = time.monotonic() + _ANSWER_SECONDS
    with Live(progress, console=console, refresh_per_second=10, transient=True) as live:
        while True:
            latest = [each.handle.event for each in asked]
            finished = [event for event in latest if event is not None and event.status.terminal]
            progress.update(bar, completed=len(finished))
            live.update(Group(progress, _table(asked, latest, width=live.console.width)))
            if len(finished) == len(asked):
                return finished
            if time.monotonic() > deadline:
                raise DemoFailed(f"{len(asked) - len(finished)} queries without an end after {_ANSWER_SECONDS:.0f} s")
            await asyncio.sleep(_REFRESH_SECONDS)


def _check(asked: Sequence[Asked], events: Sequence[QueryStatusChanged]) -> None:
    for each, event in zip(asked, events, strict=True):
        question = each.question
        if event.error_code != question.error:
            raise DemoFailed(f"{question.title}: {event.status}, {event.error_code}: {event.error_message}")
        if question.rows is not None and event.row_count != question.rows:
            raise DemoFailed(f"{question.title}: {event.row_count} rows instead of {question.rows}")


def _summarize(asked: Sequence[Asked], events: Sequence[QueryStatusChanged]) -> dict[str, Any]:
    return {
        "Succeeded": sum(event.status is Status.SUCCEEDED for event in events),
        "Failed": sum(event.status is Status.FAILED for event in events),
        "queries": [
            {
                "query_id": event.query_id,
                "title": each.question.title,
                "mode": event.mode.value,
                "output_format": each.question.output_format.value,
                "status": event.status.value,
                "row_count": event.row_count,
                "bytes": event.bytes,
                "duration_ms": event.duration_ms,
                "output_location": event.output_location,
                "error_code": None if event.error_code is None else event.error_code.value,
            }
            for each, event in zip(asked, events, strict=True)
        ],
    }


def _table(asked: Sequence[Asked], events: Sequence[QueryStatusChanged | None], *, width: int) -> Table:
    """Build a table with one line per query. On a narrow terminal wrap titles and omit less important columns."""
    places, lanes = width >= _WITH_PLACES, width >= _WITH_LANES
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0) if places else (0, 1, 0, 0), pad_edge=False)
    table.add_column("query")
    if lanes:
        table.add_column("lane", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name in ("rows", "bytes", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    if places:
        table.add_column("stored at", no_wrap=True)
    for each, event in zip(asked, events, strict=True):
        cells = [each.question.title]
        if lanes:
            cells.append(each.question.mode.value)
        if event is None:
            table.add_row(*cells, "requested")
            continue
        cells.append(_format_status(event, short=not places))
        cells += ["" if value is None else f"{value:,}" for value in (event.row_count, event.bytes, event.duration_ms)]
        if places:
            cells.append(_shorten(event.output_location))
        table.add_row(*cells)
    return table


def _format_status(event: QueryStatusChanged, *, short: bool) -> str:
    if event.error_code is None:
        return event.status.value
    # An error code already shows that the query failed.
    return event.error_code.value if short else f"{event.status}: {event.error_code}"


def _print_answers(asked: Sequence[Asked], events: Sequence[QueryStatusChanged], closing: str) -> None:
    # Where nobody sets a width (a pipe, CI), each query still has one line.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    console = Console(width=width)
    console.print(_table(asked, events, width=console.width))
    console.print(closing, highlight=False)


def _shorten(location: str | None) -> str:
    """The place without its org and with the first digits of its query; `--json` has the whole."""
    if location is None:
        return ""
    bucket, _, path = location.removeprefix("s3://").partition("/")
    _, _, query_id, attempt, _ = path.split("/")
    return f"s3://{bucket}/…/{query_id[:8]}…/{attempt}/"
