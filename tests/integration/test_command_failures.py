"""Every command with every dependency wrong in each way: one line, an exit code of the table, and no secret."""

import hashlib
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
import typer

from queryd.codec import encode
from queryd.events import ErrorCode, OutputFormat, QueryStatusChanged, ResultFile
from service.cli import app
from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.integration.stories import make_story
from tests.integration.wrong_dependencies import CANARY, NO_BUCKET, WORDS, Dependencies, Need, dependencies
from tests.servers.kafka import Kafka

ORG = "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
UNKNOWN = "00000000-3f0e-4f5c-9d55-0d6f1f2f9a10"
_RESULT = b"a\r\n42\r\n"
_MINUTES = 15 * 60


@dataclass(frozen=True, slots=True)
class Command:
    """One command line, the dependencies that it uses, and its exit codes when all of them work.

    `mends` are wrong states in which the command must succeed.

    Of commands of one `turn` only one runs at a time. `failed` is the exit code where a dependency is wrong: the engine
    that looks at a dataset can't always tell a wrong server from a wrong location.
    """

    line: str
    needs: tuple[Need, ...]
    codes: tuple[int, ...] = (0,)
    mends: tuple[str, ...] = ()
    turn: str | None = None
    failed: tuple[int, ...] = (1,)


_D, _S, _K, _S3, _R, _P = Need.DATA, Need.STATE, Need.KAFKA, Need.S3, Need.REGISTRY, Need.DATASETS
_MADE = ("empty", "old")
# These commands take the bucket from a row or an argument, not from QUERYD_RESULTS_URL.
_OWN_BUCKET = ("no bucket",)
# Other tests may have written to the topics: then there is something to replay.
_DONE_OR_EMPTY = (0, 1)
# The ids in braces are those of the world.
COMMANDS = (
    Command(f"submit SELECT+'{CANARY}' --org {ORG}", (_K, _R)),
    Command(f"cancel {UNKNOWN} --org {ORG}", (_K, _R)),
    Command("status {stored}", (_D,)),
    Command(f"list --org {ORG}", (_D,)),
    Command("fetch {stored}", (_D, _S3), mends=_OWN_BUCKET),
    Command("fetch {stored} -o result.csv", (_D, _S3), mends=_OWN_BUCKET),
    Command("fetch {failed} --error", (_D, _S3), mends=_OWN_BUCKET),
    Command("fetch {lost}", (_D, _S3), codes=(1,), mends=_OWN_BUCKET),
    Command("watch --once", (_D,)),
    Command("db upgrade", (_D, _S), mends=_MADE),
    Command("db platform", (_S,), mends=_MADE),
    Command("topics apply", (_K, _R), mends=("empty",)),
    Command("bucket apply", (_S3,), mends=("no bucket",)),
    Command(
        f"datasets add d{{n}} --org {ORG} --kind parquet --location {{parquet}} --visibility org",
        (_D, _S3),
        mends=_OWN_BUCKET,
        failed=(1, 2),
    ),
    Command(
        f"datasets add l{{n}} --org {ORG} --kind parquet --location s3://{NO_BUCKET}/d/ --visibility org",
        (_S3,),
        codes=(2,),
        mends=_OWN_BUCKET,
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
    Command(f"datasets remove unknown --org {ORG} --yes", (_D,), codes=(1,)),
    Command(f"saved add x --org {ORG} --user {ORG} --sql SELECT+1", (_D,)),
    Command(f"saved list --org {ORG}", (_D,)),
    Command("saved show {saved}", (_D,)),
    Command(f"saved run {{saved}} --org {ORG}", (_K, _R)),
    Command("saved edit {saved} --name y", (_D,)),
    Command(f"saved remove {UNKNOWN}", (_D,), codes=(1,)),
    Command(f"limits show {ORG}", (_D,)),
    Command(f"limits set {ORG} --running 5", (_D,)),
    Command("limits list", (_D,)),
    Command(f"limits reset {UNKNOWN}", (_D,)),
    Command("retention", (_D, _S3), turn="sweep"),
    Command(f"retention delete-org {UNKNOWN} --yes", (_D, _S3)),
    Command(f"retention delete-user {UNKNOWN} --org {UNKNOWN} --yes", (_D, _S3)),
    Command("replay requests --mode batch --partition 0 --from-offset 0", (_D, _K), codes=_DONE_OR_EMPTY),
    Command("replay dead-letters", (_D, _K), codes=_DONE_OR_EMPTY),
    Command("replay status --partition 0 --from-offset 0", (_D, _K), codes=_DONE_OR_EMPTY),
    # Two at once refuse each other.
    Command("replay state-db", (_D, _S, _K), turn="rebuild"),
    Command(f"replay resume {UNKNOWN}", (_D,), codes=(1,)),
    Command(f"replay compare {UNKNOWN}", (_D,), codes=(1,)),
    Command("replay list", (_D,)),
    Command(f"replay show {UNKNOWN}", (_D,), codes=(1,)),
    Command(f"replay cancel {UNKNOWN}", (_D,), codes=(1,)),
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
    with dependencies(kafka, postgres_server, object_store_server, lifeline, folder) as there:
        ids = _fill(there.right["QUERYD_DATA_URL"], object_store_server)
        cells = list(_cells(there))
        yield list(zip(cells, _run(cells, ids, folder), strict=True))


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
    wanted = cell.command.codes if cell.need is None else cell.command.failed
    problems = {
        "did not end": answer.code < 0,
        "quotes what it must not": CANARY in told,
        "is not one line": lines > 1 or (answer.code != 0 and lines == 0 and not is_report),
        f"is not {wanted}": answer.code not in wanted,
        "does not name what is wrong": cell.need is not None
        and not any(word.lower() in told.lower() for word in WORDS[cell.need]),
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


def _cells(there: Dependencies) -> Iterator[Cell]:
    for command in COMMANDS:
        # What it does not ask is refused, and nobody notices.
        unused = [there.wrong[need]["refused"] for need in Need if need not in command.needs]
        others = {name: value for variables in unused for name, value in variables.items()}
        yield Cell(command, None, "others refused", there.right | others)
        for need in command.needs:
            for state, variables in there.wrong[need].items():
                if state not in command.mends:
                    yield Cell(command, need, state, there.right | variables)


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


def _fill(data: str, store: ObjectStore) -> dict[str, str]:
    """A query that succeeded, one that failed, a saved query and a dataset; their ids by name."""
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
    nowhere = f"s3://{NO_BUCKET}/matrix/"
    lost = make_story(files=(file,), output_location=nowhere, output_format=OutputFormat.CSV)[-1]
    ids = {"stored": stored.query_id, "failed": failed.query_id, "lost": lost.query_id, "saved": str(uuid.uuid4())}
    ids |= {"parquet": f"s3://{store.bucket}/{parquet}"}
    with psycopg.connect(data) as connection:
        _insert(connection, stored, [asdict(file)])
        _insert(connection, lost, [asdict(file)])
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
