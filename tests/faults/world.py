"""Everything that the servers, the scratch folders and the logs hold after a run, read once and judged later.

Of queryd nothing is used but its schemas and its documents.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from tests.acceptance import stranger
from tests.acceptance.stranger import Contract, Record, Servers, StatusEvent
from tests.faults.canaries import Canaries
from tests.faults.contents import Content, Unreadable, read_content
from tests.faults.evidence import Evidence
from tests.faults.evidence import Place as Addresses

RESULTS = "results/"
# As many as a local S3 server can use; each thread has a connection of its own.
_S3_THREADS = 8
# A UUID as text.
_ID_LENGTH = 36
_HEX = "0123456789abcdef"


@dataclass(frozen=True, slots=True)
class ReadObject:
    """An object's own bytes: how many, their SHA-256 in hex, and what they say (None: unreadable)."""

    bytes: int
    sha256: str
    content: Content | None


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object as it is listed, the ETag without quotes. `read` is None where no row points to it."""

    bytes: int
    etag: str
    read: ReadObject | None = None


@dataclass(frozen=True, slots=True)
class Leak:
    """A canary where none may be."""

    where: str
    canary: str


@dataclass(frozen=True, slots=True)
class World:
    """`told` are the status events by query id, in the order of their offsets; `foreign` says what else is there.

    `requests` are the records of both lanes by where they lie. Rows stand by query id, tasks' statuses by task id,
    objects by key. `uploads` are the keys of uploads that were never completed, `scratch` what is left of attempts.
    """

    told: Mapping[str, Sequence[StatusEvent]]
    foreign: Sequence[str]
    requests: Mapping[stranger.Place, Record]
    dead_letters: Sequence[Record]
    results: Mapping[str, Mapping[str, Any]]
    statuses: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, str]
    objects: Mapping[str, FoundObject]
    uploads: Sequence[str]
    scratch: Sequence[Path]
    leaks: Sequence[Leak]


def gather(evidence: Evidence) -> World:
    """Read everything of a run that is quiet and swept; raises what the servers' clients raise, retrying nothing."""
    servers = to_servers(evidence.place)
    canaries = canaries_of(evidence)
    told, foreign = _read_story(servers)
    results = stranger.read_results(servers)
    requests = [
        record for topic in stranger.REQUEST_TOPICS.values() for record in stranger.read_whole(servers.bootstrap, topic)
    ]
    return World(
        told=told,
        foreign=foreign,
        requests={record.place: record for record in requests},
        dead_letters=stranger.read_whole(servers.bootstrap, stranger.DEAD_LETTER_TOPIC),
        results=results,
        statuses=stranger.read_statuses(servers),
        tasks=_read_tasks(servers),
        objects=_read_objects(
            servers, results, {query.query_id for query in evidence.queries if query.content is not None}
        ),
        uploads=_list_uploads(servers),
        scratch=_find_leavings(evidence.scratch, results),
        leaks=[*_search_files(evidence.logs, canaries), *_search_databases(servers, canaries)],
    )


def to_servers(addresses: Addresses) -> Servers:
    """The servers as the stranger knows them."""
    return Servers(
        {
            "QUERYD_KAFKA_BOOTSTRAP": addresses.bootstrap,
            "QUERYD_DATA_URL": addresses.data_url,
            "QUERYD_STATE_URL": addresses.state_url,
            "QUERYD_RESULTS_URL": f"s3://{addresses.bucket}",
            "AWS_ENDPOINT_URL": addresses.endpoint_url,
            "AWS_REGION": addresses.region,
            "AWS_ACCESS_KEY_ID": addresses.access_key,
            "AWS_SECRET_ACCESS_KEY": addresses.secret_key,
        }
    )


def canaries_of(evidence: Evidence) -> Canaries:
    """Those of the queries and those of the malformed records."""
    malformed = [record.canary for record in evidence.malformed if record.canary is not None]
    return Canaries([*(query.canary for query in evidence.queries), *malformed])


def _read_story(servers: Servers) -> tuple[dict[str, list[StatusEvent]], list[str]]:
    contract = Contract()
    told: dict[str, list[StatusEvent]] = {}
    foreign: list[str] = []
    for record in stranger.read_whole(servers.bootstrap, stranger.STATUS_TOPIC):
        try:
            name, fields = contract.decode(record.value or b"")
        except ValueError as error:
            foreign.append(f"{record.place} is no status event: {error}")
            continue
        if name != "QueryStatusChanged":
            foreign.append(f"{record.place} is a {name}")
            continue
        told.setdefault(fields["query_id"], []).append(StatusEvent(record, fields))
    return told, foreign


def _read_tasks(servers: Servers) -> dict[str, str]:
    with psycopg.connect(servers.state_url) as connection:
        return dict(connection.execute("SELECT id::text, status FROM tasks").fetchall())


def _read_objects(
    servers: Servers, results: Mapping[str, Mapping[str, Any]], with_rows: set[str]
) -> dict[str, FoundObject]:
    client = servers.s3()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=servers.bucket, Prefix=RESULTS)
    listed = [item for page in pages for item in page.get("Contents", [])]
    owners = {
        stranger.prefix_of(row["output_location"]): query_id
        for query_id, row in results.items()
        if row["output_location"] is not None
    }

    def find(item: Mapping[str, Any]) -> FoundObject:
        key, etag = item["Key"], item["ETag"].strip('"')
        folder, _, name = key.rpartition("/")
        owner = owners.get(f"{folder}/")
        if owner is None:
            return FoundObject(item["Size"], etag)
        data = client.get_object(Bucket=servers.bucket, Key=key)["Body"].read()
        return FoundObject(item["Size"], etag, read_object(name, data, with_rows=owner in with_rows))

    with ThreadPoolExecutor(_S3_THREADS) as pool:
        return dict(zip((item["Key"] for item in listed), pool.map(find, listed), strict=True))


def read_object(name: str, data: bytes, *, with_rows: bool) -> ReadObject:
    """What an object called `result.csv`, say, holds."""
    try:
        content = read_content(name.rpartition(".")[2], data, with_rows=with_rows)
    except Unreadable:
        content = None
    return ReadObject(len(data), hashlib.sha256(data).hexdigest(), content)


def _list_uploads(servers: Servers) -> list[str]:
    pages = servers.s3().get_paginator("list_multipart_uploads").paginate(Bucket=servers.bucket)
    return [upload["Key"] for page in pages for upload in page.get("Uploads", [])]


def _find_leavings(folders: Iterable[Path], query_ids: Iterable[str]) -> list[Path]:
    """Every file, and every folder that is named by a query; an idle engine's own folders are empty."""
    known = set(query_ids)
    found = (path for folder in folders if folder.exists() for path in sorted(folder.rglob("*")))
    return [path for path in found if not path.is_dir() or path.name[:_ID_LENGTH] in known]


def _search_files(paths: Iterable[Path], canaries: Canaries) -> list[Leak]:
    # Services' logs may have one name in a folder each.
    return [Leak("/".join(path.parts[-2:]), canary) for path in paths for canary in sorted(canaries.find_in_file(path))]


_TABLES = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm') AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
ORDER BY 1, 2
"""
# A row as text has every column: texts and JSON as they are, bytes in hex.
_ROWS = """
SELECT t::text FROM {table} t WHERE strpos(t::text, %(text)s) > 0 OR strpos(t::text, %(hex)s) > 0
"""
# Where a user has saved a query, its text belongs.
_MAY_HOLD_SQL = "saved_queries"


def _search_databases(servers: Servers, canaries: Canaries) -> list[Leak]:
    """Every column of every table of both databases."""
    if not canaries.prefix:
        return []
    return [
        Leak(f"table {table}", canary)
        for url in (servers.data_url, servers.state_url)
        for table, row in _search_tables(url, canaries.prefix)
        for canary in sorted(canaries.find(row.encode()) | canaries.find(_unhex(row)))
    ]


def _search_tables(url: str, prefix: str) -> list[tuple[str, str]]:
    wanted = {"text": prefix, "hex": prefix.encode().hex()}
    with psycopg.connect(url) as connection:
        connection.execute("SET bytea_output = 'hex'")
        return [
            (name, row)
            for schema, name in connection.execute(_TABLES).fetchall()
            if name != _MAY_HOLD_SQL
            for (row,) in connection.execute(
                sql.SQL(_ROWS).format(table=sql.Identifier(schema, name)), wanted
            ).fetchall()
        ]


def _unhex(row: str) -> bytes:
    """The bytes of all `\\x…` of a row as text, one after another."""
    pieces = [piece[: len(piece) - len(piece.lstrip(_HEX))] for piece in row.split("\\x")[1:]]
    return b" ".join(bytes.fromhex(piece[: len(piece) // 2 * 2]) for piece in pieces)
