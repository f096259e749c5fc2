"""The command line as a person has it: what it leaves alone, and one sentence for what went wrong."""

import base64
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import psycopg
import pytest

from queryd import QueryClient
from tests.acceptance.printed import read_blocks
from tests.acceptance.stack import Stack, run_stack

ORG = "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
STRANGER = "0f0e0d0c-3f0e-4f5c-9d55-0d6f1f2f9a10"
USED = "44444444-4444-4444-8444-444444444444"
_PATIENCE_SECONDS = 60


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with run_stack() as running:
        yield running


def _queryd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "queryd", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )


@pytest.mark.slow
def test_a_second_up_in_one_directory_is_refused_and_leaves_the_first_alone(stack: Stack) -> None:
    before = (stack.folder / ".queryd/env").read_text()
    second = _queryd(stack.folder, "up")
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("queryd: another queryd runs in .queryd")
    assert (stack.folder / ".queryd/env").read_text() == before


def test_a_query_is_submitted_waited_for_and_fetched(stack: Stack) -> None:
    submitted = _queryd(stack.folder, "submit", "SELECT 42 AS answer", "--org", ORG, "--format", "csv", "--wait")
    assert submitted.returncode == 0, submitted.stderr
    query_id = submitted.stdout.splitlines()[0].removeprefix("query id: ")
    assert _queryd(stack.folder, "status", query_id).stdout.splitlines()[3] == "status: Succeeded"
    assert _queryd(stack.folder, "fetch", query_id).stdout.split() == ["answer", "42"]


@pytest.mark.slow
def test_an_inline_result_is_printed_at_once_and_can_be_fetched(stack: Stack, tmp_path: Path) -> None:
    asked = ("submit", "SELECT 42 AS answer", "--org", ORG, "--format", "csv", "--inline", "--wait")
    submitted = _queryd(stack.folder, *asked)
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.endswith("\n\nanswer\n42\n")
    query_id = submitted.stdout.splitlines()[0].removeprefix("query id: ")
    status = json.loads(_queryd(stack.folder, "status", query_id, "--json").stdout)
    assert (status["status"], status["output_location"], status["row_count"], status["bytes"]) == (
        *("Succeeded", None),
        *(1, len(b"answer\r\n42\r\n")),
    )
    path = tmp_path / "result.csv"
    assert _queryd(stack.folder, "fetch", query_id, "-o", str(path)).returncode == 0
    assert path.read_bytes() == b"answer\r\n42\r\n"
    place = json.loads(_queryd(stack.folder, "fetch", query_id, "--json").stdout)
    assert base64.b64decode(place.pop("inline_result")) == path.read_bytes()
    assert place == {"query_id": query_id, "output_location": None, "files": []}
    link = _queryd(stack.folder, "fetch", query_id, "--link")
    assert (link.returncode, link.stdout) == (2, "")
    assert "no object to link to" in link.stderr


# Hours of work on any machine.
_ENDLESS = "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"


@pytest.mark.slow
def test_a_waiting_submit_prints_the_id_at_once_and_each_status(stack: Stack) -> None:
    waiting = subprocess.Popen(
        [sys.executable, "-m", "queryd", "submit", _ENDLESS, "--org", ORG, "--inline", "--wait"],
        cwd=stack.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert waiting.stdout is not None
        assert waiting.stderr is not None
        # Through a pipe, and the query runs for hours.
        query_id = waiting.stdout.readline().removeprefix("query id: ").strip()
        states = ""
        while "Running" not in states:
            states += waiting.stderr.readline()
        cancelled = _queryd(stack.folder, "cancel", query_id, "--org", ORG)
        # By the time that it has looked, the query may have ended already.
        assert re.search("note: (it ends as QUERY_CANCELLED unless|the query is cancelled)", cancelled.stdout)
        stdout, stderr = waiting.communicate(timeout=_PATIENCE_SECONDS)
        assert waiting.returncode == 1
        assert stderr.splitlines()[-1].endswith("Z Failed")
        assert "error code: QUERY_CANCELLED" in stdout
    finally:
        waiting.kill()
        waiting.wait()
    again = _queryd(stack.folder, "cancel", query_id, "--org", ORG)
    assert (again.returncode, "note: the query is cancelled" in again.stdout) == (0, True)


@pytest.mark.slow
def test_a_cancel_prints_the_status_of_its_query(stack: Stack) -> None:
    submitted = _queryd(stack.folder, "submit", "SELECT 1", "--org", ORG, "--wait", "--json")
    query_id = json.loads(submitted.stdout)["query_id"]
    assert submitted.stderr == ""
    late = _queryd(stack.folder, "cancel", query_id, "--org", ORG)
    assert late.stdout == (
        f"query id: {query_id}\nstatus: Succeeded\nnote: too late: the query had already ended; nothing changes\n"
    )
    unknown = json.loads(_queryd(stack.folder, "cancel", str(uuid.uuid4()), "--org", ORG, "--json").stdout)
    assert (unknown["status"], "no query with this id yet" in unknown["note"]) == (None, True)
    # Another org's query is no query.
    strangers = json.loads(_queryd(stack.folder, "cancel", query_id, "--org", STRANGER, "--json").stdout)
    assert (strangers["status"], strangers["note"]) == (None, unknown["note"])


@pytest.mark.slow
def test_limits_of_a_request_and_texts_that_look_like_numbers(stack: Stack) -> None:
    many = ("submit", "SELECT * FROM range(10)", "--org", ORG, "--wait", "--json")
    assert json.loads(_queryd(stack.folder, *many, "--max-rows", "9").stdout)["error_code"] == "RESULT_TOO_LARGE"
    assert json.loads(_queryd(stack.folder, *many, "--max-rows", "10").stdout)["status"] == "Succeeded"
    assert json.loads(_queryd(stack.folder, *many, "--max-bytes-scanned", "1GiB").stdout)["status"] == "Succeeded"
    wrong = _queryd(stack.folder, *many, "--max-bytes-scanned", "1 gig")
    assert (wrong.returncode, wrong.stderr.startswith("queryd: --max-bytes-scanned must be a size")) == (2, True)
    asked = ("submit", "SELECT typeof($a) || typeof($b) AS t", "--org", ORG, "--format", "csv", "--inline", "--wait")
    typed = _queryd(stack.folder, *asked, "--param", "a=02134", "--param-text", "b=94105")
    assert typed.stdout.endswith("\nt\nVARCHARVARCHAR\n")


@pytest.mark.slow
def test_an_orgs_queries_are_listed_by_time_and_status(stack: Stack) -> None:
    org, other = str(uuid.uuid4()), str(uuid.uuid4())
    before = datetime.now(UTC)
    ids = []
    for sql in ("SELECT 1", "SELECT no_such_column", "SELECT 2"):
        submitted = _queryd(stack.folder, "submit", sql, "--org", org, "--wait", "--json")
        ids.append(json.loads(submitted.stdout)["query_id"])
    _queryd(stack.folder, "submit", "SELECT 1", "--org", other, "--wait")

    def list_ids(*options: str) -> list[str]:
        answer = _queryd(stack.folder, "list", "--org", org, "--json", *options)
        assert answer.returncode == 0, answer.stderr
        return [row["query_id"] for row in json.loads(answer.stdout)]

    assert list_ids() == ids[::-1]
    assert list_ids("--limit", "1") == [ids[2]]
    assert list_ids("--status", "Failed") == [ids[1]]
    assert list_ids("--status", "Failed", "--status", "Succeeded") == ids[::-1]
    assert list_ids("--mode", "batch") == []
    assert list_ids("--user", other) == []
    assert list_ids("--since", f"{before - timedelta(seconds=5):%Y-%m-%dT%H:%M:%SZ}") == ids[::-1]
    assert list_ids("--until", f"{before - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}") == []
    assert "query id\tstatus\tmode" in _queryd(stack.folder, "list", "--org", org).stdout
    assert _queryd(stack.folder, "list", "--org", org, "--since", "yesterday").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("change", ["gone", "longer", "other bytes"])
def test_a_result_with_a_wrong_size_or_checksum_is_not_written(stack: Stack, tmp_path: Path, change: str) -> None:
    submitted = _queryd(stack.folder, "submit", "SELECT 42 AS a", "--org", ORG, "--format", "csv", "--wait", "--json")
    answer = json.loads(submitted.stdout)
    settings = _settings_of(stack)
    bucket, key = settings["QUERYD_RESULTS_URL"].removeprefix("s3://"), answer["files"][0]["key"]
    store = boto3.session.Session().client(
        "s3",
        endpoint_url=settings["AWS_ENDPOINT_URL"],
        region_name=settings["AWS_REGION"],
        aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
    )
    if change == "gone":
        store.delete_object(Bucket=bucket, Key=key)
    else:
        store.put_object(Bucket=bucket, Key=key, Body=b"a\r\n42\r\n43" if change == "longer" else b"a\r\n43\r\n")
    path = tmp_path / "result.csv"
    for output in ((), ("-o", str(path))):
        fetched = _queryd(stack.folder, "fetch", answer["query_id"], *output)
        assert (fetched.returncode, fetched.stdout, fetched.stderr.count("\n")) == (1, "", 1)
        assert "submit the query again" in fetched.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_running_query_is_cancelled_by_its_org_and_by_no_other(stack: Stack) -> None:
    submitted = _queryd(stack.folder, "submit", _ENDLESS, "--org", ORG, "--json")
    query_id = json.loads(submitted.stdout)["query_id"]
    _await_status(stack, query_id, "Running")
    assert _queryd(stack.folder, "cancel", query_id, "--org", STRANGER).returncode == 0
    # The stranger's cancel lies before ours in the topic, so it was looked at when ours has done its work.
    cancelled = _queryd(stack.folder, "cancel", query_id, "--org", ORG, "--reason", "wrong table", "--wait", "--json")
    assert cancelled.returncode == 0, cancelled.stderr
    answer = json.loads(cancelled.stdout)
    assert (answer["status"], answer["error_code"]) == ("Failed", "QUERY_CANCELLED")
    assert (answer["attempt"], answer["output_location"]) == (1, None)


@pytest.mark.slow
def test_a_cancel_before_its_request_wins(stack: Stack) -> None:
    query_id = str(uuid.uuid4())
    assert _queryd(stack.folder, "cancel", query_id, "--org", ORG).returncode == 0
    _await_noted(stack, query_id)
    submitted = _queryd(stack.folder, "submit", "SELECT 1", "--id", query_id, "--org", ORG, "--wait", "--json")
    assert json.loads(submitted.stdout)["error_code"] == "QUERY_CANCELLED"


@pytest.mark.slow
def test_a_finished_query_stays_finished(stack: Stack) -> None:
    submitted = _queryd(stack.folder, "submit", "SELECT 1", "--org", ORG, "--wait", "--json")
    query_id = json.loads(submitted.stdout)["query_id"]
    cancelled = _queryd(stack.folder, "cancel", query_id, "--org", ORG, "--wait")
    assert (cancelled.returncode, cancelled.stdout.splitlines()[1]) == (1, "status: Succeeded")


def _await_status(stack: Stack, query_id: str, status: str) -> None:
    _await_row(stack, "SELECT FROM query_results WHERE id = %s AND status = %s", query_id, status)


def _await_noted(stack: Stack, query_id: str) -> None:
    _await_row(stack, "SELECT FROM query_cancellations WHERE query_id = %s", query_id)


def _await_row(stack: Stack, statement: str, *values: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with psycopg.connect(stack.servers.data_url, autocommit=True) as connection:
        while connection.execute(statement.encode(), values).fetchone() is None:
            assert time.monotonic() < deadline, statement
            time.sleep(0.02)


@pytest.mark.slow
def test_an_id_that_was_used_for_another_query_is_no_success(stack: Stack) -> None:
    assert _queryd(stack.folder, "submit", "SELECT 1", "--org", ORG, "--id", USED, "--wait").returncode == 0
    again = _queryd(stack.folder, "submit", "SELECT 2", "--org", ORG, "--id", USED, "--wait")
    assert again.returncode == 1
    assert "was used before" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("submit", "SELECT 1", "--org", "no-uuid"), "--org is not a UUID"),
        (("submit", "--org", ORG), "give the SQL"),
        (("submit", " ", "--org", ORG), "the SQL is empty"),
        (("submit", "SELECT $x", "--org", ORG, "--param", f"x={2**63}"), "--param x"),
        (("submit", "SELECT $x", "--org", ORG, "--param", "x"), "--param must be name=value"),
        (("datasets", "add", "x y", "--org", ORG, "--kind", "parquet", "--location", "s3://b/k"), "--user"),
        (("saved", "add", "x", "--org", ORG, "--user", ORG, "--sql", "SELECT 1", "--visibility", "x"), "visibility"),
    ],
)
def test_what_was_asked_wrongly_is_one_sentence_and_exit_2(
    stack: Stack, arguments: tuple[str, ...], sentence: str
) -> None:
    answer = _queryd(stack.folder, *arguments)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
    assert sentence in answer.stderr


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_one_sentence(stack: Stack, tmp_path: Path) -> None:
    query = _queryd(stack.folder, "submit", "SELECT 1 AS x", "--org", ORG, "--format", "csv", "--wait")
    query_id = query.stdout.splitlines()[0].removeprefix("query id: ")
    answer = _queryd(stack.folder, "fetch", query_id, "-o", str(tmp_path / "nowhere/result.csv"))
    assert (answer.returncode, answer.stderr.count("\n")) == (1, 1)
    assert "can't write" in answer.stderr
    assert _queryd(stack.folder, "fetch", query_id, "-o", str(tmp_path)).returncode == 1


def test_every_line_of_the_log_names_its_service(stack: Stack) -> None:
    """Those of `up` itself and of every library that logs among them."""
    stack.await_restart("projector", stack.kill("projector"))
    lines = [json.loads(line) for line in stack.log.read_text().splitlines()]
    assert [line for line in lines if not line.get("service")] == []
    assert {line["service"] for line in lines} >= {"executor", "relay", "projector"}
    [restarted] = [line for line in lines if line["event"] == "service_restarted"]
    assert (restarted["service"], restarted["exit_code"]) == ("projector", -signal.SIGKILL)
    assigned = [line for line in lines if line["event"] == "partitions assigned"]
    assert {topic for line in assigned for topic in line["partitions"]} >= {"query.status", "query.cancellations"}


def test_the_readmes_five_lines_run_as_printed(stack: Stack) -> None:
    code = read_blocks("README.md", "sh", "A client in five lines")[0]
    assert len(code.partition("<<'END'\n")[2].partition("END\n")[0].splitlines()) == 5
    activated = stack.folder / ".venv"
    activated.symlink_to(sys.prefix)
    ran = subprocess.run(
        ["sh", "-e", "-c", code],
        cwd=stack.folder,
        env=_without_settings(),
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )
    activated.unlink()
    assert (ran.stdout, ran.stderr, ran.returncode) == ("Succeeded\n[{'answer': 42}]\n", "", 0)


_PAGE = {
    "Submit, wait, read": (
        r"Succeeded\n\[{'n': 0}, {'n': 1}, {'n': 2}\]\n3\nhttp://.*X-Amz-Expires=3600.*\nQUERY_ERROR\n"
    ),
    "On asyncio": r"\[0, 1, 4, 9, 16\]\n1\n",
    "Events": r"([0-9a-f-]{36} \d (Queued|Running)\n)*[0-9a-f-]{36} \d (Succeeded|Failed)\n",
}


@pytest.mark.slow
def test_the_code_of_the_clients_page_runs_as_printed(stack: Stack) -> None:
    # In one program: the events are of the org whose queries the first section has submitted.
    code = "".join(block for section in _PAGE for block in read_blocks("docs/clients.md", "python", section))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=stack.folder,
        env=_without_settings() | _settings_of(stack),
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )
    assert (ran.stderr, ran.returncode) == ("", 0)
    assert re.fullmatch("".join(_PAGE.values()), ran.stdout), ran.stdout


@pytest.mark.slow
def test_the_projector_of_the_clients_page_keeps_its_table(stack: Stack) -> None:
    [code] = read_blocks("docs/clients.md", "python", "Your own tables")
    running = subprocess.Popen(
        [sys.executable, "-c", code], cwd=stack.folder, env=_without_settings() | _settings_of(stack)
    )
    try:
        with QueryClient({"bootstrap.servers": stack.servers.bootstrap}) as client:
            ended = client.submit("SELECT 1", org_id=ORG).wait(_PATIENCE_SECONDS)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while _read_spending(stack.folder / "spending.db", ended.query_id) != (ORG, ended.duration_ms):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        assert running.wait(_PATIENCE_SECONDS) == 0
    finally:
        running.kill()
        running.wait()


def _read_spending(path: Path, query_id: str) -> tuple[str, int] | None:
    if not path.exists():
        return None
    with closing(sqlite3.connect(path)) as database, suppress(sqlite3.OperationalError):
        found: tuple[str, int] | None = database.execute(
            "SELECT org, ms FROM queries WHERE id = ? AND sequence = 3", [query_id]
        ).fetchone()
        return found
    # The table is not there yet.
    return None


def _without_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("QUERYD_", "AWS_"))}


def _settings_of(stack: Stack) -> dict[str, str]:
    lines = (stack.folder / ".queryd/env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)
