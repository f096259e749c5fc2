"""Every command with every dependency wrong in each way: one line, an exit code of the table, and no secret."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import psycopg
import pytest
import typer

from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from queryd.codec import encode
from queryd.events import ErrorCode, OutputFormat, QueryStatusChanged, ResultFile
from service.cli import app
from service.embedded.broker import Broker
from service.embedded.object_store import ObjectStore
from service.embedded.ports import pick_ports
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.integration.records import prepare_topics
from tests.integration.stories import make_story
from tests.servers.kafka import Kafka

CANARY = "canary4711"
ORG = "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
UNKNOWN = "00000000-3f0e-4f5c-9d55-0d6f1f2f9a10"
_RESULT = b"a\r\n42\r\n"
_MINUTES = 15 * 60


class Need(StrEnum):
    """A dependency, and a word by which a person finds it in the one line."""

    KAFKA = "kafka"
    DATA = "data"
    STATE = "state"
    S3 = "s3"
    REGISTRY = "registry"
    DATASETS = "datasets"


_WORDS = {
    Need.KAFKA: ("kafka", "QUERYD_KAFKA"),
    Need.DATA: ("postgres data", "QUERYD_DATA_URL"),
    Need.STATE: ("postgres state", "QUERYD_STATE_URL"),
    Need.S3: (
        "s3",
        "AWS_",
        "QUERYD_RESULTS_URL",
        "credentials for datasets",
        "the datasets' store",
        "reading the dataset takes longer",
    ),
    Need.REGISTRY: ("schema registry", "QUERYD_SCHEMA_REGISTRY"),
    Need.DATASETS: ("datasets' Postgres", "QUERYD_DATASETS_PG_URL"),
}


@dataclass(frozen=True, slots=True)
class Command:
    """One command line, what it asks, and its exit code where all is well. `mends` are states that it is there for.

    Of commands of one `turn` only one runs at a time. `failed` is the exit code where a dependency is wrong: the engine
    that looks at a dataset can't always tell a wrong server from a wrong location.
    """

    line: str
    needs: tuple[Need, ...]
    code: int = 0
    mends: tuple[str, ...] = ()
    turn: str | None = None
    failed: tuple[int, ...] = (1,)


_D, _S, _K, _S3, _R, _P = Need.DATA, Need.STATE, Need.KAFKA, Need.S3, Need.REGISTRY, Need.DATASETS
_MADE = ("empty", "old")
# The ids in braces are those of the world.
COMMANDS = (
    Command(f"submit SELECT+'{CANARY}' --org {ORG}", (_K, _R)),
    Command(f"cancel {UNKNOWN} --org {ORG}", (_K, _R)),
    Command("status {stored}", (_D,)),
    Command(f"list --org {ORG}", (_D,)),
    Command("fetch {stored}", (_D, _S3)),
    Command("fetch {stored} -o result.csv", (_D, _S3)),
    Command("fetch {failed} --error", (_D, _S3)),
    Command("watch --once", (_D,)),
    Command("db upgrade", (_D, _S), mends=_MADE),
    Command("db platform", (_S,), mends=_MADE),
    Command("topics apply", (_K, _R), mends=("empty",)),
    Command("bucket apply", (_S3,), mends=("empty",)),
    Command(
        f"datasets add d{{n}} --org {ORG} --kind parquet --location {{parquet}} --visibility org",
        (_D, _S3),
        failed=(1, 2),
    ),
    Command(
        f"datasets add p{{n}} --org {ORG} --kind postgres --location public.shops --visibility org",
        (_D, _P),
        failed=(1, 2),
    ),
    Command(f"datasets list --org {ORG}", (_D,)),
    Command(f"datasets show known --org {ORG} --no-check", (_D,)),
    Command(f"datasets grant known --org {ORG} --to role:analysts", (_D,)),
    Command(f"datasets revoke known --org {ORG} --from role:analysts", (_D,)),
    Command(f"datasets remove unknown --org {ORG} --yes", (_D,), code=1),
    Command(f"saved add x --org {ORG} --user {ORG} --sql SELECT+1", (_D,)),
    Command(f"saved list --org {ORG}", (_D,)),
    Command("saved show {saved}", (_D,)),
    Command(f"saved run {{saved}} --org {ORG}", (_K, _R)),
    Command("saved edit {saved} --name y", (_D,)),
    Command(f"saved remove {UNKNOWN}", (_D,), code=1),
    Command(f"limits show {ORG}", (_D,)),
    Command(f"limits set {ORG} --running 5", (_D,)),
    Command("limits list", (_D,)),
    Command(f"limits reset {UNKNOWN}", (_D,)),
    Command("retention", (_D, _S3), turn="sweep"),
    Command(f"retention delete-org {UNKNOWN} --yes", (_D, _S3)),
    Command(f"retention delete-user {UNKNOWN} --org {UNKNOWN} --yes", (_D, _S3)),
    Command("replay requests --mode batch --partition 0 --from-offset 0", (_D, _K), code=1),
    Command("replay dead-letters", (_D, _K), code=1),
    Command("replay status --partition 0 --from-offset 0", (_D, _K), code=1),
    # Two at once refuse each other.
    Command("replay state-db", (_D, _S, _K), turn="rebuild"),
    Command(f"replay resume {UNKNOWN}", (_D,), code=1),
    Command(f"replay compare {UNKNOWN}", (_D,), code=1),
    Command("replay list", (_D,)),
    Command(f"replay show {UNKNOWN}", (_D,), code=1),
    Command(f"replay cancel {UNKNOWN}", (_D,), code=1),
    Command("doctor", (_K, _D, _S, _S3, _R, _P)),
)
# They start servers of their own, or wait for their dependencies for as long as it takes: other tests start them.
_STARTED_ELSEWHERE = {"up", "demo", "run"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One command in one environment."""

    command: Command
    need: Need | None
    state: str
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of it."""

    code: int
    stdout: str
    stderr: str
    seconds: float


@pytest.fixture(scope="module")
def answers(
    kafka: Kafka,
    postgres_server: Postgres,
    object_store_server: ObjectStore,
    lifeline: Lifeline,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[list[tuple[Cell, Answer]]]:
    """Every cell of the matrix, run."""
    folder = tmp_path_factory.mktemp("matrix")
    names = [f"{CANARY}_{purpose}_{uuid.uuid4().hex[:8]}" for purpose in ("data", "state", "old", "oldstate", "empty")]
    for name in names:
        postgres_server.create_database(name)
    data, state, old, old_state, empty = (postgres_server.url(name) for name in names)
    prepare_topics(kafka)
    bare = Broker(folder / "kafka", folder / "kafka.log", lifeline)
    with _away() as away, _no_such_server() as wrong:
        bare.start()
        try:
            healthy = _healthy(kafka, data, state, object_store_server)
            ids = _fill(data, state, object_store_server)
            _age(old, old_state)
            states = _states(healthy, away, wrong, {"empty": empty, "old": old, "oldstate": old_state}, bare.bootstrap)
            cells = list(_cells(healthy, states))
            yield list(zip(cells, _run(cells, ids, folder), strict=True))
        finally:
            bare.stop()
    for name in names:
        postgres_server.drop_database(name)


def test_the_matrix_has_every_command() -> None:
    listed = {" ".join(word for word in command.line.split()[:2]) for command in COMMANDS}
    for name in _leaves():
        assert name in _STARTED_ELSEWHERE or any(each == name or each.startswith(f"{name} ") for each in listed), name


@pytest.mark.slow
@pytest.mark.timeout(_MINUTES)
def test_whatever_is_wrong_is_one_line_and_a_code_of_the_table(answers: list[tuple[Cell, Answer]]) -> None:
    problems = [
        f"{cell.need}/{cell.state}: queryd {cell.command.line}\n  {problem}"
        for cell, answer in answers
        if (problem := _judge(cell, answer)) is not None
    ]
    assert not problems, f"{len(problems)} of {len(answers)}\n" + "\n".join(problems)


def _judge(cell: Cell, answer: Answer) -> str | None:
    """What is not as it must be."""
    told = answer.stderr + answer.stdout
    lines, is_report = answer.stderr.count("\n"), cell.command.line == "doctor"
    wanted = (cell.command.code,) if cell.need is None else cell.command.failed
    problems = {
        "did not end": answer.code < 0,
        "quotes what it must not": CANARY in told,
        "is not one line": lines > 1 or (answer.code != 0 and lines == 0 and not is_report),
        f"is not {wanted}": answer.code not in wanted,
        "does not name what is wrong": cell.need is not None
        and not any(word.lower() in told.lower() for word in _WORDS[cell.need]),
    }
    found = [problem for problem, there in problems.items() if there]
    seen = f"{answer.code} after {answer.seconds:.0f} s, {answer.stderr[-600:]!r}, {answer.stdout[-300:]!r}"
    return f"{', '.join(found)}: {seen}" if found else None


def _leaves() -> Iterator[str]:
    def walk(group: Any, prefix: str) -> Iterator[str]:
        for name, command in group.commands.items():
            path = f"{prefix} {name}".strip()
            if getattr(command, "commands", None):
                if command.callback is not None and command.invoke_without_command:
                    yield path
                yield from walk(command, path)
            else:
                yield path

    yield from walk(typer.main.get_command(app), "")


def _cells(healthy: dict[str, str], states: dict[Need, dict[str, dict[str, str]]]) -> Iterator[Cell]:
    for command in COMMANDS:
        # What it does not ask is refused, and nobody notices.
        unused = [states[need]["refused"] for need in Need if need not in command.needs]
        others = {name: value for variables in unused for name, value in variables.items()}
        yield Cell(command, None, "others refused", healthy | others)
        for need in command.needs:
            for state, variables in states[need].items():
                if state not in command.mends:
                    yield Cell(command, need, state, healthy | variables)


def _healthy(kafka: Kafka, data: str, state: str, store: ObjectStore) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "QUERYD_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "QUERYD_DATA_URL": data,
        "QUERYD_STATE_URL": state,
        "QUERYD_DATASETS_PG_URL": data,
        "QUERYD_RESULTS_URL": f"s3://{store.bucket}",
        "AWS_ENDPOINT_URL": store.endpoint_url,
        "AWS_REGION": store.region,
        "AWS_ACCESS_KEY_ID": store.writer.access_key,
        "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _states(
    healthy: dict[str, str], away: int, wrong: int, databases: dict[str, str], bare: str
) -> dict[Need, dict[str, dict[str, str]]]:
    """What is wrong with each dependency, as variables."""
    (closed,) = pick_ports(1)

    def kafka(port: int) -> dict[str, str]:
        return {"QUERYD_KAFKA_BOOTSTRAP": f"127.0.0.1:{port}"}

    def postgres(variable: str, schema: dict[str, str]) -> dict[str, dict[str, str]]:
        url = urlsplit(healthy[variable])
        host = f"{url.hostname}:{url.port}"
        return {
            "away": {variable: f"postgresql://{CANARY}:{CANARY}@127.0.0.1:{away}/{CANARY}"},
            "refused": {variable: f"postgresql://{CANARY}:{CANARY}@127.0.0.1:{closed}/{CANARY}"},
            "no Postgres": {variable: f"postgresql://{CANARY}:{CANARY}@127.0.0.1:{wrong}/{CANARY}"},
            "wrong password": {variable: f"postgresql://{url.username}:{CANARY}@{host}{url.path}"},
            "no such database": {variable: f"postgresql://{url.username}:{url.password}@{host}/{CANARY}"},
        } | {state: {variable: database} for state, database in schema.items()}

    def store(port: int) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}

    def registry(port: int) -> dict[str, str]:
        return {"QUERYD_SCHEMA_REGISTRY_URL": f"http://{CANARY}:{CANARY}@127.0.0.1:{port}"}

    sasl = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN"}
    sasl |= {"sasl.username": CANARY, "sasl.password": CANARY}
    return {
        Need.KAFKA: {
            "away": kafka(away),
            "refused": kafka(closed),
            "no Kafka": kafka(wrong),
            "wrong login": {"QUERYD_KAFKA_OPTIONS": json.dumps(sasl)},
            "empty": {"QUERYD_KAFKA_BOOTSTRAP": bare},
        },
        Need.DATA: postgres("QUERYD_DATA_URL", {"empty": databases["empty"], "old": databases["old"]}),
        Need.STATE: postgres("QUERYD_STATE_URL", {"empty": databases["empty"], "old": databases["oldstate"]}),
        Need.S3: {
            "away": store(away),
            "refused": store(closed),
            "no S3": store(wrong),
            "wrong keys": {"AWS_ACCESS_KEY_ID": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY},
            "wrong secret": {"AWS_SECRET_ACCESS_KEY": CANARY},
        },
        Need.REGISTRY: {"away": registry(away), "refused": registry(closed), "no registry": registry(wrong)},
        Need.DATASETS: postgres("QUERYD_DATASETS_PG_URL", {}),
    }


def _run(cells: list[Cell], ids: dict[str, str], folder: Path) -> list[Answer]:
    jobs = []
    for number, cell in enumerate(cells):
        place = folder / str(number)
        place.mkdir()
        # A blank inside an argument is a plus.
        words = [word.format(n=number, **ids).replace("+", " ") for word in cell.command.line.split()]
        jobs.append(
            {
                "id": number,
                "arguments": words,
                "environment": cell.environment,
                "folder": str(place),
                "turn": cell.command.turn,
            }
        )
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.command_zygote"],
        cwd=Path(__file__).resolve().parents[2],
        input="".join(f"{json.dumps(job)}\n" for job in jobs),
        capture_output=True,
        text=True,
        timeout=_MINUTES,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read = {answer.pop("id"): Answer(**answer) for answer in map(json.loads, done.stdout.splitlines())}
    return [read[number] for number in range(len(cells))]


def _fill(data: str, state: str, store: ObjectStore) -> dict[str, str]:
    """A query that succeeded, one that failed, a saved query and a dataset; their ids by name."""
    create_platform_tables(state)
    upgrade_data(data)
    upgrade_state(state)
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=store.writer.access_key,
        aws_secret_access_key=store.writer.secret_key,
    )
    key, error_key, parquet = (f"matrix/{uuid.uuid4()}/{name}" for name in ("result.csv", "error.json", "d.parquet"))
    client.put_object(Bucket=store.bucket, Key=key, Body=_RESULT)
    client.put_object(Bucket=store.bucket, Key=error_key, Body=b"{}")
    client.put_object(Bucket=store.bucket, Key=parquet, Body=_parquet())
    file = ResultFile(key, len(_RESULT), 1, "etag", hashlib.sha256(_RESULT).hexdigest())
    location = f"s3://{store.bucket}/matrix/"
    stored = make_story(files=(file,), output_location=location, output_format=OutputFormat.CSV)[-1]
    failed = make_story(code=ErrorCode.QUERY_ERROR)[-1]
    ids = {"stored": stored.query_id, "failed": failed.query_id, "saved": str(uuid.uuid4())}
    ids |= {"parquet": f"s3://{store.bucket}/{parquet}"}
    with psycopg.connect(data) as connection:
        _insert(connection, stored, [asdict(file)])
        _insert(connection, failed, [{"location": location, "key": error_key}])
        connection.execute(
            "INSERT INTO saved_queries (id, org_id, user_id, name, query) VALUES (%s, %s, %s, 'x', 'SELECT 1')",
            [ids["saved"], ORG, ORG],
        )
        connection.execute("CREATE TABLE shops AS SELECT 1 AS id")
        connection.execute(
            "INSERT INTO datasets (org_id, name, kind, location, visibility)"
            " VALUES (%s, 'known', 'parquet', 's3://queryd/known/', 'org')",
            [ORG],
        )
    return ids


def _insert(connection: psycopg.Connection[Any], event: QueryStatusChanged, files: list[dict[str, Any]]) -> None:
    connection.execute(
        "INSERT INTO query_results (id, org_id, mode, status, sql_hash, output_format, output_location, error_code)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
        [
            event.query_id,
            ORG,
            event.mode,
            event.status,
            event.sql_hash,
            event.output_format,
            event.output_location,
            event.error_code,
        ],
    )
    connection.execute(
        "INSERT INTO query_runs (query_id, fingerprint, topic, partition, record_offset, traceparent, sequence,"
        " queued_at, files, last_event) VALUES (%s, '', %s, 0, %s, '', 3, %s, %s, %s)",
        [
            event.query_id,
            event.mode.topic,
            abs(hash(event.query_id)) % 10**6,
            datetime.now(UTC),
            json.dumps(files),
            encode(replace(event, org_id=event.org_id)),
        ],
    )


def _parquet() -> bytes:
    import io  # noqa: PLC0415

    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    body = io.BytesIO()
    parquet.write_table(pa.table({"a": [1]}), body)
    return body.getvalue()


def _age(old: str, old_state: str) -> None:
    """Databases of a queryd before this one."""
    create_platform_tables(old_state)
    upgrade_data(old)
    upgrade_state(old_state)
    with psycopg.connect(old) as connection:
        connection.execute("UPDATE queryd_data_version SET version_num = 'data0001'")
    with psycopg.connect(old_state) as connection:
        connection.execute("UPDATE queryd_state_version SET version_num = 'state0000'")


class _away:  # noqa: N801 — a context manager in a with statement
    """A port that takes connections and never answers."""

    def __enter__(self) -> int:
        # The kernel takes them into its backlog.
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        port: int = self._listener.getsockname()[1]
        return port

    def __exit__(self, *_: object) -> None:
        self._listener.close()


class _Wrong(BaseHTTPRequestHandler):
    """Neither Kafka nor Postgres nor S3 nor a registry."""

    def _refuse(self) -> None:
        self.send_response(501)
        self.end_headers()
        self.wfile.write(CANARY.encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _refuse  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _no_such_server:  # noqa: N801
    """An HTTP server in the place of another."""

    def __enter__(self) -> int:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Wrong)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self._server.server_port

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
