"""`queryd watch`: what happens now, looked at again each second."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from db.connection import DatabaseUnavailable, DataPool, statement
from db.data.activity import read_activity
from service.cli.activity import Frame, make_frame, make_trouble, to_json, to_line, to_lines, to_view
from service.cli.database import optional_uuid, with_data
from service.cli.output import print_json

# News for eyes; oftener would only cost the database more.
_EVERY_SECONDS = 1.0
# How many queries are told where no terminal's height says it.
_QUERIES = 20


def add_commands(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(watch)


def watch(
    org: Annotated[str | None, typer.Option(help="Only this org's queries.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line for each look.")] = False,
) -> None:
    """Show lanes, rates and queries, each second anew, until Ctrl-C. Through a pipe it is one line a second."""
    org_id = optional_uuid(org, "--org")
    if once:
        frame = with_data(lambda pool: _look(pool, org_id, _QUERIES))
        _show_once(frame, as_json=as_json)
        return
    try:
        with_data(lambda pool: _follow(pool, org_id, as_json=as_json))
    except KeyboardInterrupt:
        # That is how one stops looking.
        return


def _show_once(frame: Frame, *, as_json: bool) -> None:
    console = Console()
    if as_json:
        print_json(to_json(frame))
    elif console.is_terminal:
        console.print(to_view(frame, console.width, console.height))
    else:
        for line in to_lines(frame):
            print(line)


async def _follow(pool: DataPool, org_id: str | None, *, as_json: bool) -> None:
    console = Console()
    if as_json:
        await _tell(pool, org_id, _QUERIES, lambda frame: print_json(to_json(frame)))
    elif console.is_terminal:
        # The last frame stays on the screen.
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            async for frame in _look_for_ever(pool, org_id, lambda: console.height):
                live.update(to_view(frame, console.width, console.height), refresh=True)
    else:
        await _tell(pool, org_id, 1, lambda frame: print(to_line(frame), flush=True))


async def _tell(pool: DataPool, org_id: str | None, limit: int, show: Callable[[Frame], None]) -> None:
    async for frame in _look_for_ever(pool, org_id, lambda: limit):
        show(frame)


async def _look_for_ever(pool: DataPool, org_id: str | None, limit: Callable[[], int]) -> AsyncIterator[Frame]:
    """A frame each second. While the database is away it says so, and goes on trying."""
    while True:
        started = time.monotonic()
        try:
            frame = await _look(pool, org_id, limit())
        except DatabaseUnavailable as error:
            frame = make_trouble(f"Postgres data (QUERYD_DATA_URL) does not answer: {error}", org_id)
        yield frame
        await asyncio.sleep(started + _EVERY_SECONDS - time.monotonic())


async def _look(pool: DataPool, org_id: str | None, limit: int) -> Frame:
    async with statement(pool) as connection:
        return make_frame(await read_activity(connection, org_id, limit), org_id)
