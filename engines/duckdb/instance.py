"""A warm DuckDB for one org and one exact set of relations, which can reach those and nothing else.

The order of settings is the only one that works: limits first, then extensions, credentials and attachments, then what
may be touched at all, then no external access, then a locked configuration. After that only trusted code makes views.
"""

import importlib.util
import shutil
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import duckdb
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from engines.duckdb.settings import DuckDBSettings
from engines.duckdb.sql_text import literal, quote
from engines.protocol import QueryFailed, Relation, RelationKind
from queryd.column_types import NoCounterpart, parse_type
from queryd.events import ErrorCode

# No name that a dataset can have: SQL never reaches the attached server but through our views.
_ATTACHED = "__queryd_datasets"

# Each idle instance holds a few MB and a connection; eight serve the orgs that share a child over some minutes.
_MAX_WARM = 8

_CONNECT_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_unsigned_extensions": "false",
    "python_enable_replacements": "false",
}

# Files are added to a dataset now and then. An old figure costs at most a look at its footers, or leaves one out.
_SIZE_SECONDS = 300.0

# The one figure of a profile that we need: the tree of operators alone costs nothing that could be measured.
_PROFILE = """{"TOTAL_BYTES_READ": "true"}"""

_EXTENSIONS = {RelationKind.PARQUET: "httpfs", RelationKind.POSTGRES: "postgres_scanner"}


@dataclass(frozen=True, slots=True)
class _Size:
    """Bytes, and when they were counted, on the monotonic clock."""

    bytes: int
    seen: float


@dataclass(frozen=True, slots=True)
class _Key:
    org_id: str
    relations: frozenset[Relation]


class Instance:
    """One warm DuckDB. `kinds` says which storages it has been connected to."""

    def __init__(
        self, settings: DuckDBSettings, home: Path, relations: frozenset[Relation], kinds: frozenset[RelationKind]
    ):
        self.kinds = kinds
        self._relations = {relation.name: relation for relation in relations}
        self._views: set[str] = set()
        self._sizes: dict[str, _Size] = {}
        self.connection = duckdb.connect(":memory:", config=_CONNECT_CONFIG)
        try:
            self._prepare(settings, home)
        except BaseException:
            self.connection.close()
            raise

    def expose(self, names: Collection[str]) -> None:
        """Make sure of a view for each granted relation named. Raises DuckDB's exceptions for one out of reach."""
        if any(self._relations[name].kind is RelationKind.POSTGRES for name in names):
            self._forget_tables()
        for name in names:
            if name not in self._views:
                self._create_view(self._relations[name])
                self._views.add(name)

    def _forget_tables(self) -> None:
        """What the scanner remembers of tables' columns it never looks up again; a table that was made anew since would
        be read by the old one's types."""
        self.connection.execute("CALL pg_clear_cache()")
        self._views -= {name for name in self._views if self._relations[name].kind is RelationKind.POSTGRES}

    def bytes_of(self, name: str) -> int | None:
        """How many bytes the files of a granted Parquet relation have together; None for one in Postgres.

        It asks the store once, and again after some minutes. Raises DuckDB's exceptions for one out of reach.
        """
        relation = self._relations[name]
        if relation.kind is not RelationKind.PARQUET:
            return None
        known = self._sizes.get(name)
        if known is None or time.monotonic() - known.seen > _SIZE_SECONDS:
            # Of these functions' columns only the size is asked for: nothing is read, it comes with the listing.
            [[total]] = self.connection.execute(f"SELECT sum(size) FROM read_blob({_files(relation)})").fetchall()  # noqa: S608
            known = self._sizes[name] = _Size(int(total or 0), time.monotonic())
        return known.bytes

    def bytes_cached(self) -> int:
        """How much of files DuckDB holds in memory, and would not fetch again."""
        asked = "SELECT memory_usage_bytes FROM duckdb_memory() WHERE tag = 'EXTERNAL_FILE_CACHE'"
        [[count]] = self.connection.execute(asked).fetchall()
        return int(count)

    def files_of(self, name: str) -> str:
        """The files of a granted Parquet relation, as DuckDB's table functions take them, in SQL."""
        return _files(self._relations[name])

    def names_in(self, names: Collection[str]) -> frozenset[str]:
        """The names of the columns of exposed relations, and of the fields of their structs."""
        found: set[str] = set()
        for name in names:
            view = ".".join(quote(part) for part in name.split("."))
            for column, described, *_ in self.connection.execute(f"DESCRIBE {view}").fetchall():
                found.add(column)
                with suppress(NoCounterpart):
                    found.update(field for part in parse_type(described).walk() for field, _ in part.parts)
        return frozenset(found)

    def close(self) -> None:
        """Free everything that it holds."""
        self.connection.close()

    def _prepare(self, settings: DuckDBSettings, home: Path) -> None:
        run = self.connection.execute
        run(f"SET threads = {settings.threads}")
        run(f"SET memory_limit = '{settings.memory_bytes}B'")
        run(f"SET temp_directory = {literal(str(home / 'spill'))}")
        # Given at connect it would be echoed and ignored.
        run(f"SET max_temp_directory_size = '{settings.max_scratch_bytes}B'")
        run(f"SET secret_directory = {literal(str(home / 'secrets'))}")
        run("SET TimeZone = 'UTC'")
        # On a service's stderr nobody watches a bar.
        run("SET enable_progress_bar = false")
        # Where in the statement the fault lies is told no other way.
        run("SET errors_as_json = true")
        run("SET enable_profiling = 'no_output'")
        # COPY is no SELECT.
        run("SET profiling_coverage = 'ALL'")
        run(f"SET custom_profiling_settings = {literal(_PROFILE)}")
        for kind in sorted(self.kinds):
            run(f"LOAD {literal(str(extension_file(_EXTENSIONS[kind])))}")
        reach = _Reach.of(self._relations.values()) if RelationKind.PARQUET in self.kinds else _Reach((), ())
        if reach:
            self._create_secret(settings, reach)
        if RelationKind.POSTGRES in self.kinds:
            self._attach(settings)
        folders = (f"{home / 'out'}/", *reach.folders)
        run(f"SET allowed_directories = [{', '.join(map(literal, folders))}]")
        if reach.files:
            run(f"SET allowed_paths = [{', '.join(map(literal, reach.files))}]")
        run("SET enable_external_access = false")
        run("SET lock_configuration = true")

    def _create_secret(self, settings: DuckDBSettings, reach: "_Reach") -> None:
        """Credentials that DuckDB uses for the datasets' own prefixes and for nothing else."""
        endpoint = urlsplit(settings.endpoint_url or "")
        options = {
            "KEY_ID": settings.access_key,
            "SECRET": settings.secret_key,
            "SESSION_TOKEN": settings.session_token,
            "REGION": settings.region,
            "ENDPOINT": endpoint.netloc + endpoint.path.rstrip("/") if settings.endpoint_url else None,
            "URL_STYLE": "path" if settings.endpoint_url else None,
        }
        given = [f"{name} {literal(value)}" for name, value in options.items() if value]
        if endpoint.scheme == "http":
            given.append("USE_SSL false")
        scope = ", ".join(map(literal, (*reach.folders, *reach.files)))
        self.connection.execute(f"CREATE SECRET datasets (TYPE s3, {', '.join([*given, f'SCOPE [{scope}]'])})")

    def _attach(self, settings: DuckDBSettings) -> None:
        if settings.postgres_url is None:
            message = "The datasets' Postgres is not configured: set QUERYD_DATASETS_PG_URL."
            raise QueryFailed(ErrorCode.INTERNAL, message)
        given = conninfo_to_dict(settings.postgres_url)
        password = given.pop("password", None)
        options = "TYPE postgres, READ_ONLY"
        if password is not None:
            # DuckDB shows the connection string of an attached server, and of a secret everything but the password.
            self.connection.execute(f"CREATE SECRET {_ATTACHED} (TYPE postgres, PASSWORD {literal(str(password))})")
            options += f", SECRET {_ATTACHED}"
        url = literal(make_conninfo("", **given))
        self.connection.execute(f"ATTACH {url} AS {_ATTACHED} ({options})")

    def _create_view(self, relation: Relation) -> None:
        schema, _, name = relation.name.rpartition(".")
        if schema:
            self.connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quote(schema)}")
        view = f"{quote(schema or 'main')}.{quote(name)}"
        self.connection.execute(f"CREATE OR REPLACE VIEW {view} AS FROM {_source(relation)}")


class WarmInstances:
    """The instances of one child, by org and exact set of relations; the least recently used go first."""

    def __init__(self, settings: DuckDBSettings, home: Path) -> None:
        self._settings = settings
        self._home = home
        self._warm: OrderedDict[_Key, Instance] = OrderedDict()

    def take(
        self, org_id: str, relations: frozenset[Relation], kinds: frozenset[RelationKind]
    ) -> tuple[Instance, bool]:
        """An instance connected to at least the storages `kinds`, and whether it was warm already.

        A storage is connected only when a statement reads from it, so that one that is down harms no other.
        """
        key = _Key(org_id, relations)
        instance = self._warm.get(key)
        if instance is not None and kinds <= instance.kinds:
            self._warm.move_to_end(key)
            return instance, True
        if instance is not None:
            kinds |= instance.kinds
        fresh = Instance(self._settings, self._home, relations, kinds)
        if instance is not None:
            instance.close()
        self._warm[key] = fresh
        self._warm.move_to_end(key)
        if len(self._warm) > _MAX_WARM:
            _, oldest = self._warm.popitem(last=False)
            oldest.close()
        return fresh, False

    def drop(self, instance: Instance) -> None:
        """Close one instance: what it is connected to can't be trusted any more."""
        for key in [key for key, kept in self._warm.items() if kept is instance]:
            del self._warm[key]
        instance.close()

    def keep_only(self, instance: Instance) -> None:
        """Close all others, to give their caches' memory back."""
        for key in [key for key, kept in self._warm.items() if kept is not instance]:
            self._warm.pop(key).close()


@cache
def extension_file(name: str) -> Path:
    """The file of an extension's wheel. DuckDB checks its signature at LOAD. Raises `QueryFailed` if it is missing."""
    package = importlib.util.find_spec(f"duckdb_extension_{name}")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for file in Path(folder).glob(f"extensions/*/{name}.duckdb_extension"):
            return file
    package_name = f"duckdb-extension-{name.replace('_', '-')}"
    raise QueryFailed(ErrorCode.INTERNAL, f"The package {package_name} is not installed beside the engine.")


def empty(folder: Path) -> None:
    """Remove what a query left behind."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@dataclass(frozen=True, slots=True)
class _Reach:
    """What the relations in S3 need: folders (ending in `/`) for patterns, exact files for the others."""

    folders: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, relations: Iterable[Relation]) -> "_Reach":
        patterns = {_pattern(relation.location) for relation in relations if relation.kind is RelationKind.PARQUET}
        folders = {fixed_part(pattern) for pattern in patterns if _is_glob(pattern)}
        files = {pattern for pattern in patterns if not _is_glob(pattern)}
        return cls(tuple(sorted(folders)), tuple(sorted(files)))

    def __bool__(self) -> bool:
        return bool(self.folders or self.files)


def _source(relation: Relation) -> str:
    """What a relation's view reads from, in SQL."""
    match relation.kind:
        case RelationKind.PARQUET:
            return f"read_parquet({_files(relation)})"
        case RelationKind.POSTGRES:
            schema, _, table = relation.location.rpartition(".")
            return f"{_ATTACHED}.{quote(schema or 'public')}.{quote(table)}"


def _files(relation: Relation) -> str:
    """Where a Parquet relation's files lie, as a literal in SQL."""
    return literal(_pattern(relation.location))


def _pattern(location: str) -> str:
    """A location as `read_parquet` takes it; a folder means every Parquet file below it."""
    return f"{location}**/*.parquet" if location.endswith("/") else location


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[{")


def fixed_part(location: str) -> str:
    """The folder of a location, as far as it has no wildcard; ends in `/`."""
    fixed = location
    for character in "*?[{":
        fixed = fixed.partition(character)[0]
    return fixed[: fixed.rfind("/") + 1]
