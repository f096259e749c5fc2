"""`queryd watch`: what the tables hold is what is shown, to a person, a pipe and a machine."""

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from consumers.executor.admission import Done
from consumers.executor.status_event import QueryFacts
from db.connection import DataPool, statement
from db.data.activity import RATE_SECONDS, Activity, read_activity
from db.migrations.upgrade import upgrade_data
from queryd.events import Mode
from service.cli.activity import make_frame, to_line
from tests.integration.queries import Worker, make_failure, make_record, make_request, new_id, opened_pool

_COLUMNS, _LINES = 80, 24
_NOTHING = Activity([], {}, [], [])
_PATIENCE_SECONDS = 60.0
# What moves the cursor, or colours.
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
async def pool(data_url: str) -> AsyncIterator[DataPool]:
    await asyncio.to_thread(upgrade_data, data_url)
    async with opened_pool(data_url) as opened:
        yield opened


@pytest.fixture
def environment(data_url: str) -> dict[str, str]:
    """What the command needs: nobody listens at port 9, and it asks nothing of any other server."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("QUERYD_", "AWS_"))}
    return inherited | {
        "QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:9",
        "QUERYD_DATA_URL": data_url,
        "QUERYD_STATE_URL": "postgresql://nobody@127.0.0.1:9/state",
        "QUERYD_RESULTS_URL": "s3://nowhere",
    }


async def _look(pool: DataPool, org_id: str | None = None, limit: int = 10) -> Activity:
    async with statement(pool) as connection:
        return await read_activity(connection, org_id, limit)


async def _succeed(worker: Worker, **changes: Any) -> QueryFacts:
    facts = (await worker.admit_new(**changes)).facts
    await worker.finish(facts, await worker.start(facts))
    return facts


async def _fail(worker: Worker, **changes: Any) -> QueryFacts:
    facts = (await worker.admit_new(**changes)).facts
    state = await worker.start(facts)
    await worker.end(make_failure(facts, state, token=state.token))
    return facts


async def test_lanes_are_counted_apart_and_rates_are_of_the_last_seconds(pool: DataPool) -> None:
    worker = Worker(pool)
    assert await _look(pool) == _NOTHING
    waiting = [await worker.admit_new() for _ in range(2)]
    await worker.start((await worker.admit_new(mode=Mode.BATCH)).facts)
    await _succeed(worker)
    failed = await _fail(worker)
    await _succeed(worker, mode=Mode.BATCH)
    past = await _succeed(worker)
    async with pool.connection() as connection:
        for column, seconds, query_id in (
            ("ended_at", RATE_SECONDS + 5, past.query_id),
            ("queued_at", 90, waiting[0].facts.query_id),
        ):
            await connection.execute(
                f"UPDATE query_runs SET {column} = {column} - make_interval(secs => %s) WHERE query_id = %s".encode(),
                [seconds, query_id],
            )
    activity = await _look(pool)
    [interactive] = activity.waiting
    assert (interactive.topic, interactive.waiting) == (Mode.INTERACTIVE.topic, 2)
    assert 90 <= interactive.oldest_seconds < 90 + _PATIENCE_SECONDS
    assert activity.running == {Mode.BATCH.topic: 1}
    assert {(each.topic, each.ended, each.failed) for each in activity.ended} == {
        (Mode.INTERACTIVE.topic, 2, 1),
        (Mode.BATCH.topic, 1, 0),
    }
    [seen] = [query for query in activity.seen if query.query_id == failed.query_id]
    assert (seen.status, seen.error_code, seen.org_id, seen.mode) == (
        *("Failed", "QUERY_ERROR"),
        *(failed.org_id, "interactive"),
    )


async def test_a_query_that_fails_at_its_admission_has_ended(pool: DataPool) -> None:
    assert await Worker(pool).admit(make_record(make_request(saved_query_id=new_id()))) == [Done()]
    [ended] = (await _look(pool)).ended
    assert (ended.ended, ended.failed) == (1, 1)


async def test_running_queries_come_first_and_of_the_others_the_latest(pool: DataPool) -> None:
    worker = Worker(pool)
    ended = [(await _succeed(worker)).query_id for _ in range(3)]
    running = [(await worker.admit_new()).facts for _ in range(2)]
    for facts in running:
        await worker.start(facts)
    expected = [*(facts.query_id for facts in running), *reversed(ended)]
    assert [query.query_id for query in (await _look(pool)).seen] == expected
    assert [query.query_id for query in (await _look(pool, limit=3)).seen] == expected[:3]
    first = (await _look(pool)).seen[0]
    assert first.run_seconds is not None
    assert first.age_seconds >= first.run_seconds >= 0


async def test_where_more_wait_than_are_counted_it_says_so(pool: DataPool, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        await Worker(pool).admit_new()
    assert (await _look(pool)).counted_all
    monkeypatch.setattr("db.data.activity.MOST_COUNTED", 2)
    frame = make_frame(await _look(pool), None)
    assert not frame.counted_all
    assert "interactive: 2+ waiting" in to_line(frame)
    assert "; batch: 0+ waiting" in to_line(frame)


async def test_an_org_is_shown_its_own_only(pool: DataPool) -> None:
    worker, org_id = Worker(pool), new_id()
    for org in (org_id, new_id()):
        await _fail(worker, org_id=org)
        await worker.admit_new(org_id=org)
    activity = await _look(pool, org_id)
    assert [each.waiting for each in activity.waiting] == [1]
    assert activity.running == {}
    assert [(each.ended, each.failed) for each in activity.ended] == [(1, 1)]
    # The newest first, those that wait too.
    assert [query.status for query in activity.seen] == ["Queued", "Failed"]
    assert {query.org_id for query in activity.seen} == {org_id}
    assert (await _look(pool, new_id())) == _NOTHING


# The command.


@pytest.mark.slow
async def test_a_look_is_one_json_line_or_plain_lines(
    pool: DataPool, environment: dict[str, str], tmp_path: Path
) -> None:
    worker = Worker(pool)
    failed, waiting = await _fail(worker), await worker.admit_new(mode=Mode.BATCH, sql="SELECT 'canary'")
    answer, plain = await asyncio.gather(
        _queryd(environment, tmp_path, "--once", "--json"),
        _queryd(environment, tmp_path, "--once", "--org", waiting.facts.org_id),
    )
    assert (answer.returncode, answer.stderr, answer.stdout.count("\n")) == (0, "", 1)
    told = json.loads(answer.stdout)
    assert told["lanes"]["batch"]["waiting"] == 1
    assert told["lanes"]["interactive"] == {
        "waiting": 0,
        "running": 0,
        "oldest_waiting_seconds": None,
        "finished_per_second": 0.1,
        "failed_per_second": 0.1,
    }
    assert [query["query_id"] for query in told["queries"]] == [failed.query_id]
    lanes, headings, row = plain.stdout.splitlines()
    assert "interactive: 0 waiting, 0 running" in lanes
    assert headings.split("\t") == ["query", "org", "lane", "status", "error", "age", "ran"]
    assert row.split("\t")[:5] == [waiting.facts.query_id, waiting.facts.org_id, "batch", "Queued", ""]


async def _queryd(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "queryd", "watch", *arguments],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )


@pytest.mark.slow
async def test_a_pipe_gets_a_line_a_second_until_ctrl_c(
    pool: DataPool, environment: dict[str, str], tmp_path: Path
) -> None:
    await Worker(pool).admit_new()

    async def follow(wanted: bytes, *options: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "queryd", "watch", *options),
            env=environment,
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            for _ in range(2):
                assert wanted in await asyncio.wait_for(process.stdout.readline(), _PATIENCE_SECONDS)
        finally:
            process.send_signal(signal.SIGINT)
            _, complaints = await asyncio.wait_for(process.communicate(), _PATIENCE_SECONDS)
        assert (process.returncode, complaints) == (0, b"")

    await asyncio.gather(follow(b"interactive: 1 waiting"), follow(b'"waiting": 1', "--json"))


@pytest.mark.slow
async def test_a_terminal_of_80_columns_shows_whole_lines(
    pool: DataPool, environment: dict[str, str], tmp_path: Path
) -> None:
    worker = Worker(pool)
    running = (await worker.admit_new()).facts
    await worker.start(running)
    # More than the screen has room for.
    for _ in range(_LINES):
        await _succeed(worker)
    await worker.admit_new(mode=Mode.BATCH)
    failed = await _fail(worker)
    with _on_a_terminal(environment, tmp_path) as (process, terminal):
        frames = await asyncio.to_thread(_read_frames, terminal, 2)
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, _PATIENCE_SECONDS) == 0
    for frame in frames:
        lines = [_CONTROLS.sub("", line).rstrip() for line in frame.split("\r\n")]
        assert len(lines) < _LINES
        assert max(map(len, lines)) <= _COLUMNS
        assert "all orgs" in lines[0]
        assert lines[1].split() == ["lane", "waiting", "oldest", "running", "finished/s", "failed/s"]
        assert [lines[2].split()[0], lines[3].split()[:2]] == ["interactive", ["batch", "1"]]
        assert lines[5].split() == ["query", "org", "status", "age", "ran"]
        for status, facts in (("Running", running), ("Failed", failed)):
            [line] = [line for line in lines if line.startswith(facts.query_id)]
            assert re.fullmatch(rf"{facts.org_id[:8]} +{status} +[\d.]+ s +[\d.]+ s", line.split(maxsplit=1)[1])


@contextmanager
def _on_a_terminal(environment: dict[str, str], folder: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """The command on a terminal of its own, whose other end is a file descriptor of ours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, _COLUMNS, 0, 0))
    environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "queryd", "watch"],
        env=environment | {"TERM": "xterm-256color"},
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_frames(terminal: int, count: int) -> list[str]:
    """What the first frames have written, whole: each begins with its title."""
    written = b""
    while written.count(b"queryd  ") <= count:
        written += os.read(terminal, 65_536)
    return [f"queryd  {frame}" for frame in written.decode().split("queryd  ")[1 : count + 1]]
