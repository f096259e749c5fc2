"""What a transaction's offset metadata says: which rows of which outbox it published.

The positions stand as a base and a bitmap: 500 positions that lie within 16,000 of each other take under 2,900 bytes of
base64, well below the broker's default `offset.metadata.max.bytes` of 4,096. Positions alone say nothing once a
database was restored, for it draws them again for other events: so each batch has a number, which Postgres counts too,
and a digest of its events' ids.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# How far apart the positions of one batch may lie.
SPAN = 16_000


class LedgerUnreadable(ValueError):
    """The committed metadata was not written by a relay of ours."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The outbox's generation, and of one published batch the positions, its number from 1 and its events' digest.

    `batch` is None in what a relay of the first release wrote, and `digest` is empty then.
    """

    generation: str
    positions: tuple[int, ...]
    batch: int | None
    digest: str


def digest_events(event_ids: Iterable[str]) -> str:
    """16 hex digits for the events of a batch, whatever their order: enough to tell two batches apart by accident."""
    return hashlib.sha256("\n".join(sorted(event_ids)).encode()).hexdigest()[:16]


def write_ledger(ledger: Ledger) -> str:
    """The metadata of a batch; its positions lie within `SPAN`."""
    base = min(ledger.positions)
    bitmap = bytearray((max(ledger.positions) - base) // 8 + 1)
    for position in ledger.positions:
        bitmap[(position - base) // 8] |= 1 << (position - base) % 8
    return json.dumps(
        {
            "g": ledger.generation,
            "n": ledger.batch,
            "d": ledger.digest,
            "b": base,
            "m": base64.b64encode(bitmap).decode(),
        }
    )


def read_ledger(metadata: str) -> Ledger:
    """Raises `LedgerUnreadable`."""
    try:
        written = json.loads(metadata)
        generation, base, bitmap = str(written["g"]), int(written["b"]), base64.b64decode(written["m"], validate=True)
        number = written.get("n")
        batch, digest = None if number is None else int(number), str(written.get("d", ""))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, binascii.Error) as error:
        raise LedgerUnreadable("the relay's committed offset holds no metadata of a relay") from error
    positions = tuple(
        base + index * 8 + bit for index, octet in enumerate(bitmap) for bit in range(8) if octet & 1 << bit
    )
    return Ledger(generation, positions, batch, digest)


def within_span(positions: Sequence[int]) -> int:
    """How many of the rising positions fit into one batch's bitmap."""
    return sum(1 for position in positions if position - positions[0] < SPAN)
