"""`queryd run all` and `queryd up` end when a service can't go on."""

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import up
from service.cli import run
from service.run import Service

# Only a guard against a hang: each test finishes within seconds.
_PATIENCE_SECONDS = 30.0
_WAIT = "import time; time.sleep(600)"
# Report readiness, then end with this code as soon as the file exists.
_READY_THEN_EXIT = """
import os, pathlib, sys, time
pathlib.Path(os.environ["QUERYD_READY_FILE"]).touch()
while not pathlib.Path({flag!r}).exists():
    time.sleep(0.02)
sys.exit({code})
"""


@pytest.fixture
def _signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.timeout(_PATIENCE_SECONDS)
@pytest.mark.usefixtures("_signal_handlers")
@pytest.mark.parametrize("ending", Service)
def test_run_all_ends_when_any_service_ends(ending: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = dict.fromkeys(map(str, Service), _WAIT) | {str(ending): "raise SystemExit(77)"}
    monkeypatch.setattr(run, "room_command", lambda _module, name: [sys.executable, "-c", scripts[name]])
    assert run._run_all(0) == 77


@pytest.mark.timeout(_PATIENCE_SECONDS)
@pytest.mark.parametrize(
    ("code", "again", "error", "sentence"),
    [
        (2, sys.executable, up.UpFailed, "relay can't start with these settings"),
        (1, "/no/such/program", up.UpFailed, "relay can't be started: No such file"),
    ],
    ids=["wrong setting", "no program"],
)
async def test_up_ends_when_a_service_that_was_ready_cannot_be_started_again(
    code: int, again: str, error: type[Exception], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, stopped = tmp_path / "flag", threading.Event()
    programs = iter([sys.executable, again])

    class Servers:
        @property
        def ended(self) -> list[str]:
            # Asked for only when all services are ready.
            flag.touch()
            return []

    async def start() -> None:
        pass

    def command(_module: str, name: str) -> list[str]:
        program = next(programs) if name == Service.RELAY else sys.executable
        return [
            program,
            "-c",
            _READY_THEN_EXIT.format(flag=str(flag if name == Service.RELAY else "/never"), code=code),
        ]

    def make_stack(directory: Path) -> SimpleNamespace:
        return SimpleNamespace(directory=directory, servers=Servers(), run_start=start, stop=stopped.set)

    settings = SimpleNamespace(http_port=0)
    monkeypatch.setattr(up, "Stack", make_stack)
    monkeypatch.setattr(up, "load_settings", lambda: settings)
    monkeypatch.setattr(up, "room_command", command)
    with pytest.raises(error, match=sentence):
        await asyncio.wait_for(up.run_up(tmp_path), _PATIENCE_SECONDS / 2)
    assert stopped.is_set()
    assert not list((tmp_path / "run").iterdir())
