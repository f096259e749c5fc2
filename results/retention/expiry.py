"""Results whose time is over: what their rows and their stories say from then on."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import structlog
from psycopg.types.json import Jsonb

from db.connection import Connection
from db.data.outbox import shard_of
from db.data.retention import DueResult, Expiry, StoredResult, expire_results, read_due
from queryd.codec import Undecodable, decode_status, encode
from queryd.events import Invalid
from queryd.headers import REPUBLISHED, build_status_headers, continue_trace
from queryd.registry import RegistryAway, RegistryRefused
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.retention")

# Why the event comes once more: the value of its header.
_REASON = "result_expired"


async def expire_batch(connection: Connection) -> list[StoredResult]:
    """Expire the results that are due, at most 500; what their rows pointed to. Empty when nothing is left to do here.

    The event that carries its result is published again without it, in the transaction that takes it from the row.
    """
    due = await read_due(connection)
    # In another thread, for a registry may be asked about a schema.
    return await expire_results(connection, await asyncio.to_thread(_to_expiries, due))


def _to_expiries(due: Sequence[DueResult]) -> list[Expiry]:
    """What can be let go now. An event that can't be told again keeps its result, for whoever sweeps next."""
    expiries = [Expiry(result.query_id, shard_of(result.query_id)) for result in due if result.inline_event is None]
    reasons = set()
    for result in due:
        try:
            if result.inline_event is not None:
                expiries.append(_to_expiry(result, result.inline_event))
        except (Undecodable, Invalid) as error:
            # A newer release's, which sweeps too.
            reasons.add(str(error))
        except (RegistryAway, RegistryRefused) as error:
            reasons.add(str(error))
            break
    for reason in sorted(reasons):
        _log.warning(LogEvent.RETENTION_POSTPONED, reason=reason)
    return expiries


def _to_expiry(result: DueResult, inline_event: bytes) -> Expiry:
    # The same fact in its place in the story, with its own id, sequence and time.
    event = replace(decode_status(inline_event), inline_result=None)
    headers = build_status_headers(event, continue_trace(result.traceparent)) | {REPUBLISHED: _REASON}
    return Expiry(result.query_id, shard_of(result.query_id), event.event_id, encode(event), Jsonb(headers))
