"""Statements that ask for absurd time or memory, in half of the slots, while the other half runs small queries.

With the gate, and once more with a gate that lets everything through.
"""

import asyncio
import itertools
import json
import resource
import sys
import time
import uuid
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engines.duckdb import pool
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import EngineCrashed, Execution, QueryFailed
from processes.child import minimal_environment
from queryd.events import ErrorCode, OrgId, OutputFormat, QueryId
from tests.integration.outputs import read_output

_BOMBS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "resource-bombs.jsonl").read_text("utf-8").splitlines()
]
_SLOTS = 4
_MIB = 1024 * 1024
_MEMORY = 512 * _MIB
# Four times the memory, and three GiB at least: what a child of that memory is held to.
_ADDRESS_SPACE = 3 * 1024 * _MIB
# Memory comes at a gigabyte a second: a bomb has time to reach its limit, and much more than that.
_DEADLINE_SECONDS = 2.0
# What the product promises; our own event loop has to get its turn within it as well.
_GRACE_SECONDS = 2.0
_SAMPLE_SECONDS = 0.05

_SMALL = "SELECT count(*) AS n, sum(i) AS total FROM range(1000) AS t(i)"


@dataclass
class _Seen:
    """What a run has shown: seconds and outcome by bomb, small queries that ended, and the largest child in bytes."""

    bombs: dict[str, tuple[float, str]] = field(default_factory=dict)
    small: int = 0
    largest: int = 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells another process's memory")
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
async def test_bombs_end_by_their_deadline_and_harm_nobody(
    gated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not gated:
        script = str(Path(__file__).with_name("ungated_child.py"))
        monkeypatch.setattr(pool, "room_command", lambda _module, *arguments: [sys.executable, script, *arguments])
        root = {"PYTHONPATH": str(Path(__file__).parents[2])}
        monkeypatch.setattr(pool, "minimal_environment", lambda home: minimal_environment(home) | root)
    engine = DuckDBEngine(DuckDBSettings(_MEMORY, 1, tmp_path / "scratch", max_scratch_bytes=256 * _MIB), _SLOTS)
    await engine.start()
    try:
        seen = await _run(engine, tmp_path)
    finally:
        await engine.close()
    late = {name: taken for name, (taken, _) in seen.bombs.items() if taken > _DEADLINE_SECONDS + _GRACE_SECONDS}
    assert late == {}
    assert len(seen.bombs) == len(_BOMBS)
    assert seen.largest < _ADDRESS_SPACE
    assert seen.small > len(_BOMBS)
    if not gated:
        # Else nothing of the above would have been tried.
        assert {"QUERY_TIMEOUT", "MEMORY_LIMIT_EXCEEDED"} <= {outcome for _, outcome in seen.bombs.values()}
        assert "SQL_REJECTED" not in {outcome for _, outcome in seen.bombs.values()}


async def _run(engine: DuckDBEngine, tmp_path: Path) -> _Seen:
    """All bombs in half of the slots, one after another, and small queries in the others until the last has ended."""
    seen, over, numbers = _Seen(), asyncio.Event(), itertools.count()

    def prepare(sql: str, timeout_seconds: float) -> Execution:
        scratch = tmp_path / f"attempt-{next(numbers)}"
        scratch.mkdir()
        org, query = OrgId(str(uuid.UUID(int=7))), QueryId(str(uuid.uuid4()))
        return Execution(query, org, sql, {}, (), OutputFormat.JSON, scratch, timeout_seconds)

    async def bomb(waiting: list[dict[str, str]]) -> None:
        while waiting:
            entry = waiting.pop()
            started = time.monotonic()
            outcome = await _outcome(engine.execute(prepare(entry["sql"], _DEADLINE_SECONDS)))
            seen.bombs[entry["name"]] = (time.monotonic() - started, outcome)

    async def run_small() -> None:
        while not over.is_set():
            output = await engine.execute(prepare(_SMALL, 60.0))
            assert json.loads(read_output(output)) == {"n": 1000, "total": 499500}
            seen.small += 1

    async def sample() -> None:
        while not over.is_set():
            seen.largest = max([seen.largest, *(_resident(worker.process.pid) for worker in engine._all)])
            await asyncio.sleep(_SAMPLE_SECONDS)

    async with asyncio.TaskGroup() as group:
        for work in (run_small, run_small, sample):
            group.create_task(work())
        waiting = list(_BOMBS)
        await asyncio.gather(*(bomb(waiting) for _ in range(_SLOTS // 2)))
        over.set()
    return seen


async def _outcome(running: Awaitable[object]) -> str:
    try:
        await running
    except QueryFailed as failure:
        assert failure.code is not ErrorCode.INTERNAL
        return failure.code
    except EngineCrashed:
        return "crashed"
    return "ended"


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 for one that has just ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
