"""A warm DuckDB for one org and one exact set of relations, which can reach those and nothing else.

The order of settings is the only one that works: limits first, then extensions, credentials and attachments, then what
may be touched at all, then no external access, then a locked configuration. After that only trusted code makes views.
"""

import importlib.util
import shutil
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import duckdb

from engines.duckdb import postgres_columns
from engines.duckdb.export import Plans
from engines.duckdb.listing import ObjectLister, StoredFile
from engines.duckdb.parquet_source import ParquetSource
from engines.duckdb.postgres_columns import CatalogColumn, ReadColumn
from engines.duckdb.settings import DuckDBSettings
from engines.duckdb.shapes import file_list
from engines.duckdb.snapshot import Place
from engines.duckdb.sql_text import literal, quote
from engines.protocol import Looked, LookedColumn, QueryFailed, Relation, RelationKind
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

# The one figure of a profile that we need: the tree of operators alone costs nothing that could be measured.
_PROFILE = """{"TOTAL_BYTES_READ": "true"}"""

_EXTENSIONS = {RelationKind.PARQUET: "httpfs", RelationKind.POSTGRES: "postgres_scanner"}


_Mark = str | tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Key:
    org_id: str
    relations: frozenset[Relation]
    kinds: frozenset[RelationKind]


class Instance:
    """One warm DuckDB. `kinds` says which storages it has been connected to."""

    def __init__(
        self,
        settings: DuckDBSettings,
        home: Path,
        relations: frozenset[Relation],
        kinds: frozenset[RelationKind],
        lister: ObjectLister | None = None,
    ):
        self.kinds = kinds
        self._relations = {relation.name: relation for relation in relations}
        self._lister = lister or ObjectLister(settings)
        self._owns_lister = lister is None
        self._views: set[str] = set()
        self.plans = Plans()
        self._sources: dict[str, ParquetSource] = {}
        # A version mark per URL, to detect a replaced file: DuckDB never refreshes its cached file metadata.
        self._marks: dict[str, _Mark] = {}
        self._catalogs: dict[str, tuple[CatalogColumn, ...]] = {}
        self.connection = duckdb.connect(":memory:", config=_CONNECT_CONFIG)
        try:
            self._prepare(settings, home)
        except BaseException:
            self.connection.close()
            raise

    def pin(self, names: Collection[str]) -> bool:
        """List the files of the named Parquet relations. Until the next call, queries read exactly these files.

        Returns False if a file that this instance knows was replaced; discard the instance then. Raises
        `QueryFailed` and `EngineUnavailable`.
        """
        for name in names:
            if self._relations[name].kind is not RelationKind.PARQUET:
                continue
            source = self._sources.setdefault(name, ParquetSource(self._relations[name]))
            if not source.pin(self._lister):
                continue
            self._views.discard(name)
            for file in source.snapshot.files:
                mark = _mark(file)
                if self._marks.setdefault(source.place.url(file.key), mark) != mark:
                    return False
        return True

    def expose(self, names: Collection[str]) -> None:
        """Create a view for each named granted relation, over its pinned files; pin them now if they are not.

        Raises DuckDB's exceptions if a storage is unreachable, and `QueryFailed` for files that are not one table.
        """
        self.pin([name for name in names if name not in self._sources])
        for name in names:
            relation = self._relations[name]
            if relation.kind is RelationKind.POSTGRES:
                self._look_at_table(relation)
            if name not in self._views:
                self._create_view(relation)
                self._views.add(name)

    def look(self, name: str) -> Looked:
        """Return what a granted relation holds now, and how each column is read. Raises the errors of `expose`."""
        relation = self._relations[name]
        if relation.kind is RelationKind.PARQUET:
            return self._sources[name].look(self.connection)
        self.expose([name])
        described = self.connection.execute(f"DESCRIBE FROM {_view(relation)}").fetchall()
        types = {str(row[0]): str(row[1]) for row in described}
        columns = postgres_columns.read_columns(self._catalogs[name])
        troubles = {column.name: column.trouble for column in columns if column.trouble}
        troubles |= self._read_first_row(_table(relation), [column for column in columns if not column.trouble])
        return Looked(
            tuple(
                LookedColumn(column.name, types[column.name], column.how, troubles.get(column.name))
                for column in columns
            )
        )

    def _read_first_row(self, table: str, columns: Sequence[ReadColumn]) -> dict[str, str]:
        """Read one row, since only a read shows the server's errors; returns unreadable columns with the reasons."""
        try:
            self._read_row(table, columns)
        except duckdb.Error as error:
            if postgres_columns.explain_column(error) is None:
                raise
        else:
            return {}
        troubles = {}
        for column in columns:
            try:
                self._read_row(table, [column])
            except duckdb.Error as error:
                troubles[column.name] = f"({column.declared}) {postgres_columns.explain_column(error)}"
        return troubles

    def _read_row(self, table: str, columns: Sequence[ReadColumn]) -> None:
        if columns:
            # With the hash DuckDB can't skip columns.
            row = f"{postgres_columns.write_select(columns, table)} LIMIT 1"
            self.connection.execute(f"SELECT count(*) FROM ({row}) AS t WHERE hash(t) IS NULL")  # noqa: S608 - ours

    def _look_at_table(self, relation: Relation) -> None:
        """Drop the view of a table whose columns have changed.

        The scanner caches tables' columns and never refreshes them. Without this it would read a recreated table with
        the old types.
        """
        schema, _, table = relation.location.rpartition(".")
        catalog = postgres_columns.read_catalog(self.connection, _ATTACHED, schema or "public", table)
        if catalog != self._catalogs.get(relation.name):
            self._views.discard(relation.name)
            self.connection.execute("CALL pg_clear_cache()")
            self._catalogs[relation.name] = catalog

    def bytes_of(self, name: str) -> int | None:
        """The total bytes of the pinned files of a granted Parquet relation; None for a Postgres relation."""
        source = self._sources.get(name)
        return None if source is None else source.bytes()

    def bytes_cached(self) -> int:
        """How much of files DuckDB holds in memory, and would not fetch again."""
        asked = "SELECT memory_usage_bytes FROM duckdb_memory() WHERE tag = 'EXTERNAL_FILE_CACHE'"
        [[count]] = self.connection.execute(asked).fetchall()
        return int(count)

    def files_of(self, name: str) -> str:
        """The pinned files of a granted Parquet relation, as DuckDB's table functions take them, in SQL."""
        return file_list(self.urls_of(name))

    def urls_of(self, name: str) -> dict[str, str]:
        """Map the URLs of a relation's pinned files to the keys that authors may see.

        The mapping is empty for a Postgres relation and for one that is not pinned.
        """
        source = self._sources.get(name)
        return {} if source is None else source.urls()

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
        if self._owns_lister:
            self._lister.close()

    def _prepare(self, settings: DuckDBSettings, home: Path) -> None:
        run = self.connection.execute
        # A statement without data reads nothing in parallel, and waking a thread costs it a fifth of its CPU time.
        run(f"SET threads = {settings.threads if self.kinds else 1}")
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
        if RelationKind.PARQUET in self.kinds:
            # Without this DuckDB reads parts of a key as settings.
            run("SET s3_url_compatibility_mode = true")
            # Without this cache every query sends a HEAD per listed file. `pin` detects replaced files.
            run("SET enable_http_metadata_cache = true")
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
        options = "TYPE postgres, READ_ONLY"
        if settings.postgres_password is not None:
            # DuckDB shows the connection string of an attached server, but it hides the password of a secret.
            password = literal(settings.postgres_password)
            self.connection.execute(f"CREATE SECRET {_ATTACHED} (TYPE postgres, PASSWORD {password})")
            options += f", SECRET {_ATTACHED}"
        self.connection.execute(f"ATTACH {literal(settings.postgres_url)} AS {_ATTACHED} ({options})")

    def _create_view(self, relation: Relation) -> None:
        self.plans.clear()
        schema = relation.name.rpartition(".")[0]
        if schema:
            self.connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quote(schema)}")
        self.connection.execute(f"CREATE OR REPLACE VIEW {_view(relation)} AS {self._write_select(relation)}")

    def _write_select(self, relation: Relation) -> str:
        match relation.kind:
            case RelationKind.PARQUET:
                return self._sources[relation.name].write_view(self.connection)
            case RelationKind.POSTGRES:
                columns = postgres_columns.read_columns(self._catalogs[relation.name])
                return postgres_columns.write_view(columns, _table(relation))


class WarmInstances:
    """The instances of one child, by org, exact set of relations and storages; the least recently used go first."""

    def __init__(self, settings: DuckDBSettings, home: Path) -> None:
        self._settings = settings
        self._home = home
        self._lister = ObjectLister(settings)
        self._warm: OrderedDict[_Key, Instance] = OrderedDict()

    def take(
        self, org_id: str, relations: frozenset[Relation], kinds: frozenset[RelationKind]
    ) -> tuple[Instance, bool]:
        """Return an instance connected to exactly the storages `kinds`, and whether it was warm already.

        A statement uses no connection to a storage that it does not read: such a storage may be down.
        """
        key = _Key(org_id, relations, kinds)
        instance = self._warm.get(key)
        if instance is not None:
            self._warm.move_to_end(key)
            return instance, True
        fresh = Instance(self._settings, self._home, relations, kinds, self._lister)
        self._warm[key] = fresh
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
        places = [Place.of(relation.location) for relation in relations if relation.kind is RelationKind.PARQUET]
        folders = {place.folder for place in places if not place.is_exact}
        files = {place.url(place.prefix) for place in places if place.is_exact}
        return cls(tuple(sorted(folders)), tuple(sorted(files)))

    def __bool__(self) -> bool:
        return bool(self.folders or self.files)


def _view(relation: Relation) -> str:
    schema, _, name = relation.name.rpartition(".")
    return f"{quote(schema or 'main')}.{quote(name)}"


def _table(relation: Relation) -> str:
    schema, _, table = relation.location.rpartition(".")
    return f"{_ATTACHED}.{quote(schema or 'public')}.{quote(table)}"


def _mark(file: StoredFile) -> _Mark:
    """The ETag; size and time of change for a store without ETags."""
    return file.etag or (file.size, int(file.modified))
