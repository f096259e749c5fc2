"""`make demo` and `make up` from a clean clone, wherever it lies and whatever the user's shell has set."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from service.embedded.ports import pick_ports
from service.environment import read_env_file
from tests.acceptance.clean_clone import MAKE_SECONDS, Clone, collect_wheels, copy_clean

pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
    pytest.mark.timeout(2 * MAKE_SECONDS),
]

CLOSING = "336,776 flights, 328,521 departed: as they must be. 12 succeeded, 2 failed as they should"
_LOOK_SECONDS = 0.05
# Nobody listens on port 1, and nothing is found under these names.
_NOWHERE = "http://127.0.0.1:1"

# One environment for all: each of these alone has broken the demo, or is of the same kind as one that has.
HOSTILE = {
    "AWS_ACCESS_KEY_ID": "AKIAOFANOTHERWORLD",
    "AWS_SECRET_ACCESS_KEY": "of-another-account",
    "AWS_SESSION_TOKEN": "of-another-session",
    "AWS_PROFILE": "no-such-profile",
    "AWS_DEFAULT_PROFILE": "no-such-profile",
    "AWS_CONFIG_FILE": "/nonexistent/config",
    "AWS_ENDPOINT_URL": _NOWHERE,
    "AWS_ENDPOINT_URL_S3": _NOWHERE,
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    "AWS_CA_BUNDLE": "/nonexistent/ca.pem",
    "AWS_REGION": "mars-north-1",
    "AWS_DEFAULT_REGION": "mars-north-1",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT": "regional",
    "AWS_USE_DUALSTACK_ENDPOINT": "true",
    "AWS_USE_FIPS_ENDPOINT": "true",
    "HTTP_PROXY": _NOWHERE,
    "HTTPS_PROXY": _NOWHERE,
    "ALL_PROXY": _NOWHERE,
    "http_proxy": _NOWHERE,
    "https_proxy": _NOWHERE,
    "all_proxy": _NOWHERE,
    "no_proxy": "example.com",
    "PGHOST": "nowhere.invalid",
    "PGHOSTADDR": "127.0.0.2",
    "PGPORT": "1",
    "PGUSER": "somebody",
    "PGPASSWORD": "something",
    "PGPASSFILE": "/nonexistent/pgpass",
    "PGDATABASE": "elsewhere",
    "PGSERVICE": "no-such-service",
    "PGSSLMODE": "verify-full",
    "PGSSLROOTCERT": "/nonexistent/root.crt",
    "PGSSLNEGOTIATION": "direct",
    "PGGSSENCMODE": "require",
    "PGREQUIREAUTH": "none",
    "PGCHANNELBINDING": "require",
    "PGTARGETSESSIONATTRS": "standby",
    "PGOPTIONS": "-c default_transaction_read_only=on -c search_path=nowhere",
    "PGCLIENTENCODING": "LATIN1",
    "PGDATESTYLE": "German",
    "PGTZ": "Asia/Kathmandu",
    "PGDATA": "/nonexistent",
    "TZ": "Asia/Kathmandu",
    "SSL_CERT_FILE": "/nonexistent/ca.pem",
    "SSL_CERT_DIR": "/nonexistent",
    "REQUESTS_CA_BUNDLE": "/nonexistent/ca.pem",
    "OPENSSL_CONF": "/nonexistent/openssl.cnf",
    "JAVA_TOOL_OPTIONS": "-Xmx1k",
    "CLUSTER_ID": "another",
    "PYTHONPATH": "/nonexistent",
    "PYTHONWARNINGS": "error",
    "OTEL_EXPORTER_OTLP_ENDPOINT": _NOWHERE,
    "WEED_JWT_SIGNING_KEY": "of-another-store",
    "QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:1",
    "QUERYD_KAFKA_OPTIONS": '{"security.protocol": "SASL_SSL"}',
    "QUERYD_DATA_URL": "postgresql://127.0.0.1:1/data",
    "QUERYD_STATE_URL": "postgresql://127.0.0.1:1/state",
    "QUERYD_DATASETS_PG_URL": "postgresql://127.0.0.1:1/datasets",
    "QUERYD_RESULTS_URL": "s3://of-another-stack",
    "QUERYD_RELAY_TRANSACTIONS": "true",
    "QUERYD_SCHEMA_REGISTRY_URL": _NOWHERE,
    "QUERYD_SCRATCH": "/nonexistent",
    "QUERYD_SLOTS_BATCH": "no number",
}


@pytest.fixture(scope="module")
def clone(wheels: Path) -> Iterator[Clone]:
    """Installed by the first `make demo` that a test runs in it; its path has a space, and letters outside of ASCII."""
    with make_clone("ein Gerät für 数据") as folder:
        yield Clone(folder, wheels)


@pytest.fixture(scope="module")
def wheels() -> Iterator[Path]:
    """All that `make demo` installs, fetched once. Not below pytest's folder, which is closed to other users."""
    folder = Path(tempfile.mkdtemp(prefix="queryd-wheels-"))
    try:
        folder.chmod(0o755)
        collect_wheels(folder)
        # Whatever the umask of who runs the tests.
        for wheel in folder.iterdir():
            wheel.chmod(0o644)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def make_clone(name: str, mode: int = 0o755, user: str | None = None) -> Iterator[Path]:
    """A clean clone in a new folder of this name, whose parent has this mode."""
    parent = Path(tempfile.mkdtemp(prefix="queryd-"))
    try:
        parent.chmod(mode)
        folder = parent / name
        folder.mkdir()
        copy_clean(folder, user)
        yield folder
    finally:
        shutil.rmtree(parent)


def assert_passed(done: "subprocess.CompletedProcess[str]") -> None:
    """The demo's answers were right, the last line says what to try next, and nothing was wrong on the way."""
    assert done.returncode == 0, done.stderr + done.stdout
    # A narrow terminal wraps both sentences.
    words = " ".join(done.stdout.split())
    assert CLOSING in words
    assert words.endswith("Try next: `make up`, a stack that keeps running; see README.md.")
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
def test_the_demo_passes_from_a_clean_clone_with_spaces_and_letters_in_its_path(clone: Clone) -> None:
    assert_passed(clone.run("make", "demo"))


@pytest.mark.slow
def test_the_demo_ignores_the_shells_variables_for_other_programs(clone: Clone) -> None:
    assert_passed(clone.run("make", "demo", environment=HOSTILE))


@pytest.mark.slow
def test_the_demo_needs_neither_a_home_nor_a_locale(clone: Clone) -> None:
    bare = ("env", "-u", "HOME", "LC_ALL=C", "COLUMNS=60")
    done = clone.run(*bare, "make", "demo")
    assert_passed(done)
    # And its table fits.
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert "336,776  5," in done.stdout
    assert "…" not in done.stdout


@pytest.mark.slow
def test_a_demo_beside_a_running_stack_is_its_own_and_a_second_one_is_refused(clone: Clone) -> None:
    with _up(clone) as up:
        settings = read_env_file(clone.folder / ".queryd" / "env")
        assert Path(settings["QUERYD_SCRATCH"]) == clone.folder.resolve() / ".queryd" / "scratch"
        log = clone.folder / ".queryd/demo/logs/kafka.log"
        # Of an earlier demo.
        log.unlink(missing_ok=True)
        first = clone.start("sh", "-ec", "set -a; . .queryd/env; set +a; exec make demo")
        _await(log.exists)
        second = clone.run("make", "demo")
        assert (second.returncode, second.stdout) == (2, "")
        assert [line for line in second.stderr.splitlines() if not line.startswith("make")] == [
            "queryd: another demo is running here: wait until it ends, or start this one in another directory"
        ]
        output, errors = first.communicate(timeout=MAKE_SECONDS)
        assert_passed(subprocess.CompletedProcess([], first.returncode, output, errors))
        with psycopg.connect(settings["QUERYD_DATA_URL"]) as connection:
            assert connection.execute("SELECT count(*) FROM query_results").fetchone() == (0,)
        assert up.poll() is None


@pytest.mark.slow
def test_ports_stay_over_a_restart_and_a_stale_or_stopped_stack_is_named(clone: Clone) -> None:
    command = str(clone.folder / ".venv/bin/queryd")
    path = clone.folder / ".queryd" / "env"
    with _up(clone):
        first = read_env_file(path)
    stopped = clone.run(command, "status", _ANY_ID, environment=first)
    assert (stopped.returncode, stopped.stderr.count("\n")) == (2, 1)
    assert "is not running: start it with `queryd up`" in stopped.stderr
    with _up(clone):
        assert read_env_file(path) == first
    port = int(first["QUERYD_KAFKA_BOOTSTRAP"].rpartition(":")[2])
    with ExitStack() as ended:
        other = ended.enter_context(socket.create_server(("127.0.0.1", port)))
        ended.enter_context(_up(clone, first))
        assert read_env_file(path)["QUERYD_KAFKA_BOOTSTRAP"] != first["QUERYD_KAFKA_BOOTSTRAP"]
        other.close()
        stale = clone.run(command, "status", _ANY_ID, environment=first)
        assert (stale.returncode, stale.stderr.count("\n")) == (2, 1)
        assert "of an earlier start of the stack" in stale.stderr
        # A command that takes the environment from the folder, in a shell full of others'.
        alone = {name: value for name, value in HOSTILE.items() if not name.startswith("QUERYD_")}
        submitted = clone.run(command, "submit", "SELECT 1 AS x", "--org", _ANY_ID, "--wait", environment=alone)
        assert "Succeeded" in submitted.stdout, submitted.stderr


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_taken_port_is_one_line_and_exit_2(clone: Clone, offset: int) -> None:
    (port,) = pick_ports(1)
    with socket.create_server(("127.0.0.1", port + offset)):
        done = clone.run(str(clone.folder / ".venv/bin/queryd"), "up", environment={"QUERYD_HTTP_PORT": str(port)})
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"queryd: QUERYD_HTTP_PORT: can't listen on 127.0.0.1, port {port + offset}: ")


@pytest.fixture
def heeded_sigint() -> Iterator[None]:
    """Whoever runs the tests in the background has SIGINT ignored, and what we start would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("heeded_sigint")
@pytest.mark.parametrize("target", ["demo", "up"])
@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.6, 1.0, 2.0, 3.0])
def test_ctrl_c_leaves_no_traceback_and_no_process(clone: Clone, target: str, seconds: float) -> None:
    process = clone.start("make", target)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in output + errors
    assert len([line for line in errors.splitlines() if line.startswith("queryd")]) <= 1, errors
    assert not running_in(clone.folder)


@pytest.mark.slow
@pytest.mark.usefixtures("heeded_sigint")
def test_an_environment_that_was_interrupted_while_it_was_made_is_made_again(wheels: Path) -> None:
    with make_clone("interrupted") as folder:
        clone = Clone(folder, wheels)
        for seconds in (0.2, 1.0, 2.0):
            _interrupt(clone, seconds)
        # Whatever stage the last one had reached, the next begins from there.
        done = clone.run("make", ".venv/bin/python")
        assert done.returncode == 0, done.stderr
        assert not (folder / ".venv" / "unfinished").exists()
        # And while pip starts and works.
        for seconds in (0.3, 0.6, 2.0):
            _interrupt(clone, seconds)


def _interrupt(clone: Clone, seconds: float) -> None:
    process = clone.start("make", "up")
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    for told in ("Traceback", "was made by another", "could not make"):
        assert told not in output + errors


_ANY_ID = "11111111-1111-4111-8111-111111111111"


@contextmanager
def _up(clone: Clone, environment: dict[str, str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """`make up` that has printed `ready`; at its end it must be gone, with all it has started."""
    log = clone.folder.parent / "up.stderr"
    with log.open("w") as stderr:
        up = clone.start("make", "up", environment=environment, stderr=stderr.fileno())
        try:
            assert up.stdout is not None
            assert up.stdout.readline() == "ready\n", log.read_text()
            yield up
        finally:
            os.killpg(up.pid, signal.SIGTERM)
            up.communicate(timeout=60)
    assert not running_in(clone.folder)


def running_in(folder: Path) -> list[str]:
    """The command lines of processes that work in this folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.readlink().is_relative_to(folder.resolve()):
                found.append((link.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            # It ended, or is another user's.
            continue
    return found


def _await(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MAKE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(_LOOK_SECONDS)
