"""The audit of reads of personal data. No entry, no result."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from db.connection import DataPool
from db.data.audit import AuditEntry, insert_reads


@dataclass(frozen=True, slots=True)
class PersonalRead:
    """That a statement reads a dataset with personal data: which such columns, or None where that can't be told."""

    dataset: str
    columns: frozenset[str] | None


async def record_reads(pool: DataPool, query_id: str, token: str, reads: Iterable[PersonalRead]) -> None:
    """Record the reads of an attempt before its result is released. Recording them again changes nothing.

    Raises `DatabaseUnavailable`, and `AuditRefused` where they can't be recorded at all.
    """
    entries = [entry for read in reads for entry in _list_entries(read)]
    if entries:
        await insert_reads(pool, query_id, token, entries)


def _list_entries(read: PersonalRead) -> Sequence[AuditEntry]:
    """One for each column; one for the dataset alone where no column is known, or none of them was read."""
    return [AuditEntry(read.dataset, column) for column in sorted(read.columns or ())] or [
        AuditEntry(read.dataset, None)
    ]
