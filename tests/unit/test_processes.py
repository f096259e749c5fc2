"""The frames, the two sides of the pipe, and that no child outlives its parent."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from processes import frames
from processes.child import ChildDied, ChildProcess, minimal_environment
from processes.lifeline import LIFELINE_VARIABLE

# Long enough for the slowest start of an interpreter that we have seen on a busy machine.
_PATIENCE_SECONDS = 20.0

_SERVER = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from processes.serving import serve

interrupted = threading.Event()

def handle(message, tell):
    match message["do"]:
        case "echo":
            return message
        case "tell":
            tell({{"before": 1}})
            os._exit(3)
        case "print":
            print("noise on stdout", flush=True)
            os.write(1, b"more noise")
            return {{"stdin": sys.stdin.read()}}
        case "wait":
            interrupted.wait()
            return {{"interrupted": True}}
        case "environment":
            return dict(os.environ)
        case "session":
            return {{"session": os.getsid(0), "pid": os.getpid()}}
        case "fail":
            raise RuntimeError("a bug")
        case "die":
            os._exit(3)

serve(handle, lambda notice: interrupted.set())
"""


def _command() -> list[str]:
    root = str(Path(__file__).resolve().parents[2])
    return [sys.executable, "-c", _SERVER.format(root=root)]


async def _start(tmp_path: Path) -> ChildProcess:
    return await ChildProcess.start(_command(), minimal_environment(tmp_path))


async def _end(child: ChildProcess) -> int:
    child.kill()
    return await child.wait()


def test_a_frame_survives_any_string() -> None:
    message = {"text": "naïve 🦆 \0 \ud800 'quoted'", "number": 2**63, "ratio": 1.0, "nothing": None}
    encoded = frames.encode(message)
    assert frames.body_length(encoded[: frames.HEADER.size]) == len(encoded) - frames.HEADER.size
    decoded = frames.decode(encoded[frames.HEADER.size :])
    assert decoded == message
    assert isinstance(decoded["ratio"], float)


@pytest.mark.parametrize("body", [b"[1]", b"{", b"\xff", b"1"])
def test_a_body_that_is_no_object_is_a_broken_frame(body: bytes) -> None:
    with pytest.raises(frames.BrokenFrame):
        frames.decode(body)


def test_an_absurd_length_is_a_broken_frame() -> None:
    with pytest.raises(frames.BrokenFrame):
        frames.body_length(b"\xff\xff\xff\xff")


async def test_a_child_answers_large_messages(tmp_path: Path) -> None:
    child = await _start(tmp_path)
    message = {"do": "echo", "sql": "x" * 262_144, "unicode": "é" * 200_000}
    assert await child.request(message) == message
    assert await _end(child) == -signal.SIGKILL


async def test_what_a_child_prints_does_not_disturb_the_protocol(tmp_path: Path) -> None:
    child = await _start(tmp_path)
    assert await child.request({"do": "print"}) == {"stdin": ""}
    assert await child.request({"do": "echo"}) == {"do": "echo"}
    await _end(child)


async def test_a_notice_arrives_while_a_request_runs(tmp_path: Path) -> None:
    child = await _start(tmp_path)
    waiting = asyncio.create_task(child.request({"do": "wait"}))
    child.send_notice({"interrupt": 1})
    assert await waiting == {"interrupted": True}
    await _end(child)


async def test_a_childs_message_arrives_even_if_it_dies_afterwards(tmp_path: Path) -> None:
    child = await _start(tmp_path)
    told: list[frames.Message] = []
    with pytest.raises(ChildDied):
        await child.request({"do": "tell"}, told.append)
    assert told == [{"before": 1}]
    await child.wait()


@pytest.mark.parametrize(("deed", "code"), [("die", 3), ("fail", 70)])
async def test_a_childs_death_ends_its_requests(tmp_path: Path, deed: str, code: int) -> None:
    child = await _start(tmp_path)
    with pytest.raises(ChildDied):
        await child.request({"do": deed})
    assert not child.alive
    with pytest.raises(ChildDied):
        await child.request({"do": "echo"})
    with pytest.raises(ChildDied):
        child.send_notice({})
    assert await child.wait() == code


async def test_a_cancelled_request_leaves_the_child_usable(tmp_path: Path) -> None:
    child = await _start(tmp_path)
    waiting = asyncio.create_task(child.request({"do": "wait"}))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    child.send_notice({"interrupt": 1})
    assert await child.request({"do": "echo"}) == {"do": "echo"}
    await _end(child)


async def test_a_child_inherits_nothing_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ours")
    monkeypatch.setenv("QUERYD_DATA_URL", "ours too")
    child = await _start(tmp_path)
    environment = await child.request({"do": "environment"})
    await _end(child)
    assert environment["HOME"] == str(tmp_path)
    assert environment["TZ"] == "UTC"
    assert "ours" not in " ".join(environment.values())


async def test_a_child_outlives_signals_that_were_meant_for_its_parents_group(tmp_path: Path) -> None:
    child = await _start(tmp_path)
    told = await child.request({"do": "session"})
    assert told == {"session": child.pid, "pid": child.pid}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child.pid, number)
    assert await child.request({"do": "echo"}) == {"do": "echo"}
    await _end(child)


_PARENT = """
import asyncio, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from processes.child import ChildProcess, minimal_environment

async def main():
    child = await ChildProcess.start({command!r}, minimal_environment(Path("/")), quiet=False)
    asyncio.create_task(child.request({{"do": "wait"}}))
    await child.request({{"do": "echo"}})
    print(child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_no_child_outlives_its_parent_killed_by_sigkill() -> None:
    root = str(Path(__file__).resolve().parents[2])
    script = _PARENT.format(root=root, command=_command())
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        # The child writes to the same stderr, so its end comes when both are gone; the test's time limit watches.
        assert parent.stderr.read() == b""


_SERVICE = """
import sys, threading
sys.path.insert(0, {root!r})
from processes.lifeline import hold_lifeline
hold_lifeline()
print("up", flush=True)
if {stay}:
    threading.Event().wait()
"""


def _service(stay: bool) -> list[str]:
    return [sys.executable, "-c", _SERVICE.format(root=str(Path(__file__).resolve().parents[2]), stay=stay)]


def test_a_service_ends_with_its_lifeline() -> None:
    theirs, ours = os.pipe()
    environment = {**os.environ, LIFELINE_VARIABLE: str(theirs)}
    with subprocess.Popen(_service(stay=True), env=environment, pass_fds=[theirs], stdout=subprocess.PIPE) as service:
        os.close(theirs)
        assert service.stdout is not None
        assert service.stdout.readline() == b"up\n"
        assert service.poll() is None
        os.close(ours)
        assert service.wait(_PATIENCE_SECONDS) == -signal.SIGKILL


def test_a_service_without_a_lifeline_runs_by_itself() -> None:
    environment = {name: value for name, value in os.environ.items() if name != LIFELINE_VARIABLE}
    done = subprocess.run(_service(stay=False), env=environment, check=True, stdout=subprocess.PIPE)
    assert done.stdout == b"up\n"
