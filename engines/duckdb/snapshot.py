"""Select a dataset's files at a Parquet location, by its pattern, hidden names and partition columns."""

import datetime
import fnmatch
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from engines.duckdb.listing import ObjectLister, StoredFile

_WILDCARD = re.compile(r"[*\[]")
_SCHEME = "s3://"
# DuckDB's rule for a partition folder: one `=`, and no character that DuckDB reads as the end of a path.
_PARTITION = re.compile(r"(?P<name>[^=?\n\\]+)=(?P<value>[^=?\n\\]*)")
# The value of a partition folder that means NULL.
_NULLS = frozenset({"", "__HIVE_DEFAULT_PARTITION__"})
# DuckDB also reads this word as NULL, in any case.
_NULL_WORD = "null"
_INTEGER = re.compile(r"-?\d{1,19}")
_BIGINTS = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Place:
    """A parsed Parquet location. `prefix` is the key prefix to list, `base` the number of parts before a wildcard."""

    bucket: str
    prefix: str
    parts: tuple[str, ...]
    base: int

    @classmethod
    def of(cls, location: str) -> "Place":
        """Parse `s3://bucket/key`, a folder (every `.parquet` below it) or a pattern."""
        bucket, _, path = location.removeprefix(_SCHEME).partition("/")
        pattern = f"{path}**/*.parquet" if path.endswith("/") or not path else path
        parts = tuple(pattern.split("/"))
        base = next((place for place, part in enumerate(parts) if _WILDCARD.search(part)), len(parts))
        return cls(bucket, _WILDCARD.split(pattern, maxsplit=1)[0], parts, base)

    @property
    def is_exact(self) -> bool:
        """True if it names one object."""
        return self.base == len(self.parts)

    @property
    def folder(self) -> str:
        """The folder of the location as far as it has no wildcard: `s3://bucket/…/`."""
        return self.url(self.prefix[: self.prefix.rfind("/") + 1])

    def url(self, key: str) -> str:
        """Return an object's URL, escaped so that DuckDB reads no part of it as settings or wildcards."""
        return f"{_SCHEME}{self.bucket}/{key}"

    def relative(self, key: str) -> str:
        """Return a key without the dataset's location, which authors must not see."""
        return key[self.prefix.rfind("/") + 1 :]

    def matches(self, key: str) -> bool:
        """True if a listed key matches the pattern, including hidden names."""
        return _matches(self.parts[self.base :], key.split("/")[self.base :])

    def is_hidden(self, key: str) -> bool:
        """True if a part of the key begins with `_` or `.` and the location does not name that part."""
        asked = [part for part in self.parts[self.base :] if part[:1] in ("_", ".")]
        # HTTP resolves `..` to the parent folder, so a request for such a key would leave the location.
        return any(
            name in (".", "..")
            or (name[:1] in ("_", ".") and not any(fnmatch.fnmatchcase(name, part) for part in asked))
            for name in key.split("/")[self.base :]
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files that an attempt reads, by key, with their partition columns' names and types.

    `hidden` and `outside` are keys that match the pattern and are not read: names that begin with `_` or `.`, and files
    outside the folders of the partition columns. `differing` are two different sets of partition columns' names; if the
    files have several sets, the dataset has no partition columns.
    """

    place: Place
    files: tuple[StoredFile, ...]
    partitions: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...] = field(default=(), compare=False)
    outside: tuple[str, ...] = field(default=(), compare=False)
    differing: tuple[tuple[str, ...], ...] = field(default=(), compare=False)


def take_snapshot(lister: ObjectLister, place: Place, partitions: Sequence[tuple[str, str]] | None) -> Snapshot:
    """List a location. `partitions` are the registered partition columns; if None, the folders' names give them.

    Raises `QueryFailed` and `EngineUnavailable`.
    """
    if place.is_exact:
        found = lister.find(place.bucket, place.prefix)
        matching = [] if found is None else [found]
    else:
        listed = lister.list(place.bucket, place.prefix)
        matching = [file for file in listed if not file.key.endswith("/") and place.matches(file.key)]
    data = [file for file in matching if not place.is_hidden(file.key)]
    hidden = tuple(file.key for file in matching if place.is_hidden(file.key))
    values = {file.key: partition_values(file.key) for file in data}
    differing: tuple[tuple[str, ...], ...] = ()
    if partitions is None:
        partitions, differing = find_partitions(list(values.values()))
    inside = [file for file in data if _fits(values[file.key], partitions)]
    kept = {file.key for file in inside}
    outside = tuple(file.key for file in data if file.key not in kept)
    return Snapshot(place, tuple(inside), tuple(partitions), hidden, outside, differing)


def partition_values(key: str) -> dict[str, str | None]:
    """Return the partition columns that a key's folders name, with their values as text; None is NULL."""
    values: dict[str, str | None] = {}
    for folder in key.split("/")[:-1]:
        if found := _PARTITION.fullmatch(folder):
            value = unquote(found["value"])
            values.setdefault(found["name"], None if value in _NULLS or value.lower() == _NULL_WORD else value)
    return values


def find_partitions(
    files: Sequence[dict[str, str | None]],
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, ...], ...]]:
    """Return the files' partition columns with their types, and two sets of names if the files have different sets.

    If most files are in no partition folder, the dataset has no partition columns.
    """
    counts = Counter(tuple(sorted(values)) for values in files)
    if not counts or counts[()] > len(files) - counts[()]:
        return (), ()
    several = sorted(names for names in counts if names)
    if len(several) > 1:
        return (), tuple(several[:2])
    listed = [values for values in files if values]
    return tuple((name, _find_type([values[name] for values in listed])) for name in several[0]), ()


def _find_type(values: Sequence[str | None]) -> str:
    texts = [value for value in values if value is not None]
    if not texts:
        return "VARCHAR"
    if all(_is_bigint(text) for text in texts):
        # Values with leading zeros and equal length are codes or padded numbers, so they are text. With different
        # lengths they are numbers.
        padded = any(text.lstrip("-").startswith("0") and len(text.lstrip("-")) > 1 for text in texts)
        return "VARCHAR" if padded and len({len(text) for text in texts}) == 1 else "BIGINT"
    return next((type_ for type_ in ("DATE", "TIMESTAMP") if all(_is_of(text, type_) for text in texts)), "VARCHAR")


def _fits(values: dict[str, str | None], partitions: Sequence[tuple[str, str]]) -> bool:
    """Whether a file's folders match the partition columns; without partition columns every folder matches."""
    if not partitions:
        return True
    if values.keys() != {name for name, _ in partitions}:
        return False
    return all((text := values[name]) is None or _is_of(text, type_) for name, type_ in partitions)


def _is_of(text: str, type_: str) -> bool:
    match type_:
        case "BIGINT":
            return _is_bigint(text)
        case "DATE":
            return re.fullmatch(r"\d{4}-\d\d-\d\d", text) is not None and _is_iso(text)
        case "TIMESTAMP":
            return re.fullmatch(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,6})?", text) is not None and _is_iso(text)
        case _:
            return True


def _is_bigint(text: str) -> bool:
    return _INTEGER.fullmatch(text) is not None and text.isascii() and int(text) in _BIGINTS


def _is_iso(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _matches(parts: Sequence[str], names: Sequence[str]) -> bool:
    if not parts or not names:
        return not parts and not names
    if parts[0] == "**":
        if len(parts) == 1:
            return True
        return any(_matches(parts[1:], names[start:]) for start in range(len(names)))
    return fnmatch.fnmatchcase(names[0], parts[0]) and _matches(parts[1:], names[1:])
