"""Every service with every dependency wrong in each way, and `up` and `demo` with what they get from outside.

A service waits for what may come back, and names it in its log or at `/readyz`. It ends with a sentence where only a
person can help.
"""

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.embedded.broker import Broker
from service.embedded.object_store import ObjectStore
from service.embedded.ports import is_free, pick_ports
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from service.run import Service
from tests.integration.wrong_dependencies import CANARY, WORDS, Dependencies, Need, dependencies
from tests.servers.kafka import Kafka, Kind

_NEEDS = {
    "executor": (Need.KAFKA, Need.DATA, Need.S3, Need.REGISTRY),
    "relay": (Need.KAFKA, Need.DATA),
    "projector": (Need.KAFKA, Need.STATE),
}
# `run all` starts the same services: one wrong state of each dependency shows that it says the same.
_ALL = (Need.KAFKA, Need.DATA, Need.STATE, Need.S3)
# Two cores start three services within a few seconds.
_AT_ONCE = 3
# A service stops waiting for Postgres after 10 s and for S3 after 2 s; the rest is for a busy machine.
_PATIENCE_SECONDS = 40.0
# `queryd up` ends 15 s after SIGTERM; a busy machine takes longer.
_END_SECONDS = 30.0
_LOOK_SECONDS = 0.2
_PORT_CHOICES = 3
_TIMEOUT_SECONDS = 10 * 60


@dataclass(frozen=True, slots=True)
class Cell:
    """One service in one environment."""

    service: str
    need: Need
    state: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def there(
    postgres_server: Postgres,
    object_store_server: ObjectStore,
    lifeline: Lifeline,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Dependencies]:
    """Dependencies of these tests alone: an executor would read other tests' requests."""
    folder = tmp_path_factory.mktemp("services")
    broker = Broker(folder / "own", folder / "own.log", lifeline)
    broker.start()
    try:
        kafka = Kafka(broker.bootstrap, Kind.EMBEDDED)
        with dependencies(kafka, postgres_server, object_store_server, lifeline, folder) as made:
            yield made
    finally:
        broker.stop()


@pytest.mark.slow
@pytest.mark.timeout(_TIMEOUT_SECONDS)
def test_a_service_names_the_wrong_dependency_and_stops_on_sigterm(there: Dependencies, tmp_path: Path) -> None:
    cells = list(_cells(there))
    # Relays run one at a time: a second relay waits for the first one's lock and checks nothing else.
    with ThreadPoolExecutor(_AT_ONCE) as threads, ThreadPoolExecutor(1) as one_thread:
        found = [
            (one_thread if cell.service in ("relay", "all") else threads).submit(_run, cell, tmp_path) for cell in cells
        ]
        problems = [
            f"{cell.need}/{cell.state}: queryd run {cell.service}\n  {problem}"
            for cell, each in zip(cells, found, strict=True)
            if (problem := each.result()) is not None
        ]
    assert not problems, f"{len(problems)} of {len(cells)}\n" + "\n".join(problems)


@pytest.mark.slow
@pytest.mark.timeout(_TIMEOUT_SECONDS)
def test_up_reports_a_wrong_kafka_in_one_line(there: Dependencies, tmp_path: Path) -> None:
    # It starts everything else itself, and makes the topics.
    states = {state: variables for state, variables in there.wrong[Need.KAFKA].items() if state != "empty"}

    def run(state: str) -> "subprocess.CompletedProcess[str]":
        place = tmp_path / state.replace(" ", "-")
        place.mkdir()
        return _queryd("up", place, _bare_environment(there) | states[state])

    with ThreadPoolExecutor(2) as threads:
        for state, done in zip(states, threads.map(run, states), strict=True):
            assert done.returncode == 1, (state, done.stderr)
            sentence = done.stderr.rstrip().rpartition("\n")[2]
            assert sentence.startswith("queryd: kafka"), (state, done.stderr)
            assert CANARY not in done.stderr + done.stdout
            assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(_TIMEOUT_SECONDS)
def test_the_demo_ignores_dependencies_in_the_environment(there: Dependencies, tmp_path: Path) -> None:
    wrong: dict[str, str] = {}
    for need in Need:
        wrong |= there.wrong[need]["refused"]
    done = _queryd("demo", tmp_path, _bare_environment(there) | wrong)
    assert done.returncode == 0, done.stderr


def _bare_environment(there: Dependencies) -> dict[str, str]:
    """What a shell has that knows of no stack."""
    return {name: there.right[name] for name in ("PATH", "HOME")}


def _queryd(command: str, place: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "queryd", command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS / 2,
        check=False,
    )


def _cells(there: Dependencies) -> Iterator[Cell]:
    for service, needs in _NEEDS.items():
        for need in needs:
            for state, variables in there.wrong[need].items():
                yield Cell(service, need, state, there.right | variables)
    for need in _ALL:
        yield Cell("all", need, "refused", there.right | there.wrong[need]["refused"])


def _run(cell: Cell, folder: Path) -> str | None:
    """Run a service until it has said what is wrong, then end it; returns what is not as it must be."""
    problem = None
    for number in range(_PORT_CHOICES):
        problem = _run_once(cell, folder / f"{cell.service}-{cell.need}-{cell.state}-{number}".replace(" ", "-"))
        # Another process may have taken a port since it was found free.
        if problem is None or "Address already in use" not in problem:
            break
    return problem


def _pick_ports_in_a_row() -> int:
    """The first of as many free ports as `queryd run all` listens on."""
    while True:
        (port,) = pick_ports(1)
        if all(is_free(port + distance) for distance in range(len(Service))):
            return port


def _run_once(cell: Cell, place: Path) -> str | None:
    place.mkdir()
    port = _pick_ports_in_a_row()
    own = {
        "QUERYD_HTTP_PORT": str(port),
        "QUERYD_SCRATCH": str(place),
        "QUERYD_SLOTS_INTERACTIVE": "1",
        "QUERYD_SLOTS_BATCH": "1",
        "QUERYD_RELAY_TRANSACTIONS": "false",
    }
    with (place / "log").open("w+b") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "queryd", "run", cell.service],
            cwd=place,
            env=cell.environment | own,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            named = _wait_until_named(cell, process, place / "log", port)
            ended_by_itself = process.poll()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                return f"did not end within {_END_SECONDS:.0f} s"
        finally:
            process.kill()
            process.wait()
    told = (place / "log").read_text()
    problems = {
        "does not name what is wrong": not named,
        f"ended with {ended_by_itself}": ended_by_itself not in (None, 1, 2),
        "quotes what it must not": CANARY in told,
        "prints a traceback": "Traceback" in told,
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    return f"{', '.join(found)}: {told[-1500:]}" if found else None


def _wait_until_named(cell: Cell, process: "subprocess.Popen[bytes]", log: Path, port: int) -> bool:
    """Wait until the service names what is wrong: in its log, or at `/readyz`, and is not ready."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        has_ended = process.poll() is not None
        ports = range(port, port + (len(Service) if cell.service == "all" else 1))
        unready = [] if has_ended else [_read_unready_body(each) for each in ports]
        told = f"{log.read_text()} {unready}".lower()
        if any(word.lower() in told for word in WORDS[cell.need]) and (has_ended or any(unready)):
            return True
        if has_ended:
            return False
        time.sleep(_LOOK_SECONDS)
    return False


def _read_unready_body(port: int) -> str:
    """What a service that is not ready says of it; empty if it is ready, or does not listen yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return ""
    except urllib.error.HTTPError as refused:
        return refused.read().decode()
    except OSError:
        return ""
