"""The replays' own record: which process works on which replay, and how far it has come."""

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
from replay.refused import ReplayRefused


class Journal:
    """One connection's view. Its lock is released when the connection ends, however the process ends."""

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
    ) -> Replay:
        """Insert and lock a replay; `ReplayRefused` if another one of this kind is active, or the id was used."""
        # Locked first, so that it is never active without a process.
        await self._lock(replay_id)
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
        if written:
            return await self.find(replay_id)
        if (active := await read_active(self.connection, kind)) is None:
            raise ReplayRefused("this replay's id was used before: leave --id out, or resume that one")
        raise ReplayRefused(
            f"replay {active.id} of {kind} is not finished: wait for it, or end it with "
            f"queryd replay resume {active.id}, or queryd replay cancel {active.id}"
        )

    async def resume(self, replay_id: str) -> Replay:
        """Lock a replay that its process left; `ReplayRefused` if it has ended, or another process has it."""
        replay = await self.find(replay_id)
        if replay.status not in (ReplayStatus.ACTIVE, ReplayStatus.CANCELLING):
            raise ReplayRefused(f"replay {replay_id} has ended: it is {replay.status}. Plan a new one")
        await self._lock(replay_id)
        # Its last process may have come further before it released the lock.
        return await self.find(replay_id)

    async def find(self, replay_id: str) -> Replay:
        """One replay; raises `ReplayRefused` if there is none."""
        replay = await read_replay(self.connection, replay_id)
        if replay is None:
            raise ReplayRefused(f"there is no replay {replay_id}: queryd replay list shows them")
        return replay

    async def save(self, replay_id: str, checkpoint: Mapping[str, Any], counts: Mapping[str, Any]) -> ReplayStatus:
        """Write a checkpoint; its status, which says if it was cancelled. `ReplayRefused` if its row is gone."""
        status = await write_checkpoint(self.connection, replay_id, checkpoint, counts)
        if status is None:
            raise ReplayRefused(f"replay {replay_id} is no longer there: its org or user was deleted")
        return status

    async def end(self, replay_id: str, status: ReplayStatus, counts: Mapping[str, Any]) -> None:
        """Write its end."""
        await end_replay(self.connection, replay_id, status, counts)

    async def cancel(self, replay_id: str) -> ReplayStatus:
        """Ask for its end: `CANCELLING` if a process still works on it. Raises `ReplayRefused`."""
        status = await cancel_replay(self.connection, replay_id)
        if status is None:
            replay = await self.find(replay_id)
            raise ReplayRefused(f"replay {replay_id} has ended before: it is {replay.status}")
        return status

    async def _lock(self, replay_id: str) -> None:
        if not await try_hold(self.connection, replay_id):
            raise ReplayRefused(f"another process works on replay {replay_id}: queryd replay show {replay_id}")


@asynccontextmanager
async def opened_journal(data_url: str) -> AsyncIterator[Journal]:
    """A connection of its own to Postgres data. Raises `DatabaseUnavailable`, also out of the context."""
    with unavailable_told_apart():
        connecting = psycopg.AsyncConnection.connect(conninfo(data_url, "replay"), autocommit=True, prepare_threshold=0)
        async with await connecting as connection:
            yield Journal(connection)
