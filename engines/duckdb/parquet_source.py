"""One Parquet relation of an instance: its current files, and the view that reads them."""

import hashlib
import json
from collections.abc import Sequence

import duckdb

from engines.duckdb.listing import ObjectLister, StoredFile
from engines.duckdb.shapes import (
    Shape,
    ShapeColumn,
    read_fingerprints,
    read_shape,
    unite,
    write_view,
)
from engines.duckdb.snapshot import Place, Snapshot, take_snapshot
from engines.duckdb.storage_errors import FILE_UNREADABLE
from engines.protocol import AS_IT_IS, Looked, LookedColumn, QueryFailed, Registered, Relation
from queryd.events import Column, ErrorCode


class ParquetSource:
    """A relation's snapshot, which each query takes anew, and the known schemas of its files."""

    def __init__(self, relation: Relation) -> None:
        self.place = Place.of(relation.location)
        told = relation.registered
        self._registered = None if told is None else Registered.from_fields(json.loads(told))
        self._snapshot: Snapshot | None = None
        # By key alone: the caller discards the instance when a file is replaced.
        self._fingerprints: dict[str, str] = {}
        self._shapes: dict[str, Shape] = {}

    @property
    def snapshot(self) -> Snapshot:
        """The files of the last `pin`."""
        assert self._snapshot is not None, "nothing has been pinned"
        return self._snapshot

    def pin(self, lister: ObjectLister) -> bool:
        """List the files; queries read exactly these until the next call. True if the files changed.

        Raises `QueryFailed` and `EngineUnavailable`.
        """
        partitions = None
        if self._registered is not None:
            partitions = [(column.name, column.type) for column in self._registered.partitions]
        taken = take_snapshot(lister, self.place, partitions)
        if not taken.files:
            raise QueryFailed(ErrorCode.QUERY_ERROR, "The dataset's files are missing.")
        changed = taken != self._snapshot
        self._snapshot = taken
        return changed

    def bytes(self) -> int:
        """The size of all files together."""
        return sum(file.size for file in self.snapshot.files)

    def urls(self) -> dict[str, str]:
        """Map the files' URLs to the keys that a statement's author may see."""
        return {self.place.url(file.key): self.place.relative(file.key) for file in self.snapshot.files}

    def write_view(self, connection: duckdb.DuckDBPyConnection) -> str:
        """Return the SELECT that reads the files. Raises DuckDB's exceptions and `QueryFailed`."""
        groups, _ = self._group(connection, trusting=True)
        columns = unite([shape for shape, _ in groups], self._registered_columns(), self.snapshot)
        return write_view(columns, [(shape, self._urls(files)) for shape, files in groups], self.snapshot)

    def look(self, connection: duckdb.DuckDBPyConnection) -> Looked:
        """Read the footers of all files for registration. Raises the errors of `write_view`."""
        snapshot = self.snapshot
        if snapshot.differing:
            one, other = ("/".join(f"{name}=" for name in names) for names in snapshot.differing)
            message = f"Some of the dataset's files lie in folders {one} and others in {other}."
            raise QueryFailed(ErrorCode.QUERY_ERROR, message)
        groups, unreadable = self._group(connection, trusting=False)
        united = unite([shape for shape, _ in groups], self._registered_columns(), snapshot)
        columns = [_look_at(column, groups) for column in united]
        columns += [LookedColumn(name, type_, "from the folders' names") for name, type_ in snapshot.partitions]
        until = max(file.modified for file in snapshot.files) if len(groups) == 1 and not unreadable else None
        registered = Registered(
            tuple(Column(column.name, column.type) for column in columns[: len(united)]),
            tuple(Column(name, type_) for name, type_ in snapshot.partitions),
            until,
            digest_files(_modified_before(until, snapshot.files)),
        )
        return Looked(
            tuple(columns),
            registered,
            len(snapshot.files),
            self.bytes(),
            snapshot.hidden,
            snapshot.outside,
            tuple(file.key for file in unreadable),
        )

    def _group(
        self, connection: duckdb.DuckDBPyConnection, *, trusting: bool
    ) -> tuple[list[tuple[Shape, list[StoredFile]]], list[StoredFile]]:
        """Group the files by shape. Files with an unreadable footer join the first shape.

        A query whose filter excludes their partitions then never reads them.
        """
        unreadable = self._look_at_footers(connection, trusting=trusting)
        by_fingerprint: dict[str, list[StoredFile]] = {}
        for file in self.snapshot.files:
            if file.key in self._fingerprints:
                by_fingerprint.setdefault(self._fingerprints[file.key], []).append(file)
        if not by_fingerprint:
            # DuckDB raises the error of this file; the caller adds its name.
            read_shape(connection, self.place.url(unreadable[0].key), unreadable[0].key)
            raise QueryFailed(ErrorCode.QUERY_ERROR, FILE_UNREADABLE, self.place.relative(unreadable[0].key))
        for fingerprint, files in by_fingerprint.items():
            if fingerprint not in self._shapes:
                key = files[0].key
                self._shapes[fingerprint] = read_shape(connection, self.place.url(key), key)
        groups = [(self._shapes[fingerprint], files) for fingerprint, files in by_fingerprint.items()]
        groups[0][1].extend(unreadable)
        return groups, unreadable

    def _look_at_footers(self, connection: duckdb.DuckDBPyConnection, *, trusting: bool) -> list[StoredFile]:
        """Read the missing fingerprints; returns the files without a readable footer."""
        files = self.snapshot.files
        unknown = [file for file in files if file.key not in self._fingerprints]
        alike = self._find_alike() if trusting else []
        alike = [file for file in alike if file.key not in self._fingerprints]
        # Registration saw that these files have equal schemas, so one footer is enough.
        leader = alike[0] if alike else None
        trusted = {file.key for file in alike[1:]}
        looked_at = [file for file in unknown if file.key not in trusted]
        found = read_fingerprints(connection, self._urls(looked_at))
        unreadable = []
        for file in looked_at:
            fingerprint = found[self.place.url(file.key)]
            if fingerprint is None:
                unreadable.append(file)
            else:
                self._fingerprints[file.key] = fingerprint
        if leader is not None and leader.key in self._fingerprints:
            self._fingerprints.update((file.key, self._fingerprints[leader.key]) for file in alike)
        elif leader is not None:
            return self._look_at_footers(connection, trusting=False)
        return unreadable

    def _find_alike(self) -> Sequence[StoredFile]:
        """The files that had equal schemas at registration; none if one was removed or another one was added.

        The date alone does not tell: a store may date a file to the start of its multipart upload, or restore an older
        version with that version's date.
        """
        if self._registered is None:
            return []
        alike = _modified_before(self._registered.alike_until, self.snapshot.files)
        return alike if digest_files(alike) == self._registered.alike_digest else []

    def _urls(self, files: Sequence[StoredFile]) -> list[str]:
        return [self.place.url(file.key) for file in files]

    def _registered_columns(self) -> list[ShapeColumn]:
        if self._registered is None:
            return []
        return [ShapeColumn(column.name, duckdb.sqltype(column.type)) for column in self._registered.columns]


def digest_files(files: Sequence[StoredFile]) -> str:
    """A digest of the files' keys, sizes and ETags, whatever their order."""
    told = sorted(f"{file.key}\n{file.size}\n{file.etag}" for file in files)
    return hashlib.sha256("\n\n".join(told).encode("utf-8", "surrogatepass")).hexdigest()


def _modified_before(until: float | None, files: Sequence[StoredFile]) -> list[StoredFile]:
    return [] if until is None else [file for file in files if file.modified < until]


def _look_at(column: ShapeColumn, groups: Sequence[tuple[Shape, Sequence[StoredFile]]]) -> LookedColumn:
    """Describe a column; if its files have different types, list them."""
    counts: dict[str, int] = {}
    for shape, files in groups:
        own = next((str(each.type) for each in shape.columns if each.name.lower() == column.name.lower()), "missing")
        counts[own] = counts.get(own, 0) + len(files)
    how = AS_IT_IS if len(counts) == 1 else ", ".join(f"{type_} in {count} files" for type_, count in counts.items())
    type_ = "INTEGER" if column.type.id == "null" else str(column.type)
    return LookedColumn(column.name, type_, how, column.trouble)
