"""The replays' own record: who works on which, and how far it has come."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from db.connection import Connection, conninfo, unavailable_told_apart
from db.data.replays import (
    Replay,
    ReplayStatus,
    begin,
    cancel_replay,
    end_replay,
    read_active,
    read_replay,
    try_hold,
    write_checkpoint,
)


class ReplayRefused(Exception):
    """It can't begin, go on or end; the sentence says what to do instead."""


class Journal:
    """One connection's view. What it holds is let go when the connection ends, however the process ends."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def begin(
        self,
        *,
        replay_id: str,
        kind: str,
        actor: str,
        reason: str,
        plan: Mapping[str, Any],
        org_id: str | None = None,
        user_id: str | None = None,
    ) -> None:
        """Write it down and hold it. Raises `ReplayRefused` where another is active on its scope."""
        with unavailable_told_apart():
            # Held first: nobody finds it active and without a process.
            await self._hold(replay_id)
            written = await begin(
                self.connection,
                replay_id=replay_id,
                kind=kind,
                scope=kind,
                actor=actor,
                reason=reason,
                plan=plan,
                org_id=org_id,
                user_id=user_id,
            )
            if not written:
                raise ReplayRefused(await self._explain_refusal(kind))

    async def resume(self, replay_id: str) -> Replay:
        """Take up one that was left; raises `ReplayRefused` where it has ended, or another process has it."""
        with unavailable_told_apart():
            replay = await self.find(replay_id)
            if replay.status not in (ReplayStatus.ACTIVE, ReplayStatus.CANCELLING):
                raise ReplayRefused(f"replay {replay_id} has ended: it is {replay.status}. Plan a new one")
            await self._hold(replay_id)
            # Its last process may have come further before it let go.
            return await self.find(replay_id)

    async def find(self, replay_id: str) -> Replay:
        """One replay; raises `ReplayRefused` where there is none."""
        with unavailable_told_apart():
            replay = await read_replay(self.connection, replay_id)
        if replay is None:
            raise ReplayRefused(f"there is no replay {replay_id}: queryd replay list shows them")
        return replay

    async def save(
        self, replay_id: str, checkpoint: Mapping[str, Any], counts: Mapping[str, Any]
    ) -> ReplayStatus | None:
        """Remember how far it has come; None where its row is gone."""
        with unavailable_told_apart():
            return await write_checkpoint(self.connection, replay_id, checkpoint, counts)

    async def end(self, replay_id: str, status: ReplayStatus, counts: Mapping[str, Any]) -> None:
        """It has ended."""
        with unavailable_told_apart():
            await end_replay(self.connection, replay_id, status, counts)

    async def cancel(self, replay_id: str) -> ReplayStatus:
        """Ask for its end: `CANCELLING` where a process still works on it. Raises `ReplayRefused`."""
        with unavailable_told_apart():
            status = await cancel_replay(self.connection, replay_id)
        if status is None:
            replay = await self.find(replay_id)
            raise ReplayRefused(f"replay {replay_id} has ended before: it is {replay.status}")
        return status

    async def _hold(self, replay_id: str) -> None:
        if not await try_hold(self.connection, replay_id):
            raise ReplayRefused(f"another process works on replay {replay_id}: queryd replay show {replay_id}")

    async def _explain_refusal(self, scope: str) -> str:
        active = await read_active(self.connection, scope)
        if active is None:
            return "this replay's id was used before: leave --id out, or resume that one"
        return (
            f"replay {active.id} of {scope} is not finished: wait for it, or end it with "
            f"queryd replay resume {active.id}, or queryd replay cancel {active.id}"
        )


@asynccontextmanager
async def opened_journal(data_url: str) -> AsyncIterator[Journal]:
    """A connection of its own to Postgres data. Raises `DatabaseUnavailable`."""
    with unavailable_told_apart():
        connection = await psycopg.AsyncConnection.connect(
            conninfo(data_url, "replay"), autocommit=True, prepare_threshold=0
        )
    async with connection:
        yield Journal(connection)
