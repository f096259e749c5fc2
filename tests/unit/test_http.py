"""Health and metrics over HTTP: what each page says, to whom it is quick, and how the server ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service import dependencies
from service.dependencies import Dependencies, Dependency
from service.embedded.ports import pick_ports
from service.http import Health, bind, make_app, serving
from service.run import Service, http_variables
from service.settings import Settings, WrongSetting
from telemetry.metrics import Metrics

# A guard against hanging, and the promise that a service's end does not wait for readers.
_PROMPT_SECONDS = 5.0

_SETTINGS: dict[str, Any] = {
    "kafka_bootstrap": "localhost:1",
    "data_url": "postgresql://queryd:canary4711@localhost/data",
    "state_url": "postgresql://queryd:canary4711@localhost/state",
    "results_url": "s3://results",
}


class Server:
    """A dependency that answers as it is told, and counts how often it was asked."""

    def __init__(self, name: str) -> None:
        self.there = True
        self.asked = 0
        self.hangs = False
        self.dependency = Dependency(name, self._answers)

    async def _answers(self) -> bool:
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        return self.there


@pytest.fixture
def postgres() -> Server:
    return Server("postgres data")


@pytest.fixture
def broker() -> Server:
    return Server("kafka")


@pytest.fixture
def health(postgres: Server, broker: Server) -> Health:
    return Health("executor", Dependencies([broker.dependency, postgres.dependency]), alive=lambda: True)


@asynccontextmanager
async def _served(health: Health) -> AsyncIterator[int]:
    """The pages on a port of the kernel's choice, as a real server serves them."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    async with serving(make_app(health, Metrics()), listener):
        yield port


async def _get(port: int, path: str) -> tuple[int, str, str]:
    """Status, headers and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = (await asyncio.wait_for(reader.read(), _PROMPT_SECONDS)).decode()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


async def _ask_ready(port: int) -> tuple[int, dict[str, Any]]:
    status, _, body = await _get(port, "/readyz")
    return status, json.loads(body)


def _pass_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "_FRESH_SECONDS", 0.0)


async def test_a_service_is_alive_while_its_loops_are(postgres: Server, broker: Server) -> None:
    alive = True
    health = Health("relay", Dependencies([broker.dependency, postgres.dependency]), alive=lambda: alive)
    postgres.there = broker.there = False
    async with _served(health) as port:
        # What it depends on may be away: starting it again would not bring that back.
        assert (await _get(port, "/livez"))[0] == 200
        alive = False
        status, _, body = await _get(port, "/livez")
    assert (status, json.loads(body)) == (503, {"service": "relay", "alive": False})


async def test_a_service_is_ready_from_its_first_work_to_its_drain(health: Health) -> None:
    async with _served(health) as port:
        assert await _ask_ready(port) == (
            503,
            {"service": "executor", "ready": False, "state": "starting", "missing": []},
        )
        health.announce()
        assert await _ask_ready(port) == (
            200,
            {"service": "executor", "ready": True, "state": "ready", "missing": []},
        )
        health.stop()
        # A standby that takes over during its own drain announces itself once more.
        health.announce()
        assert await _ask_ready(port) == (
            503,
            {"service": "executor", "ready": False, "state": "stopping", "missing": []},
        )


@pytest.mark.parametrize("gone", [["kafka"], ["postgres data"], ["kafka", "postgres data"]])
async def test_what_is_missing_is_named(
    health: Health, postgres: Server, broker: Server, gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pass_a_second(monkeypatch)
    health.announce()
    for server in (broker, postgres):
        server.there = server.dependency.name not in gone
    async with _served(health) as port:
        status, said = await _ask_ready(port)
        assert (status, said["ready"], said["missing"]) == (503, False, gone)
        broker.there = postgres.there = True
        assert (await _ask_ready(port))[0] == 200


async def test_a_server_that_hangs_is_missing_and_keeps_nobody(
    health: Health, postgres: Server, broker: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependencies, "_SECONDS", 0.05)
    health.announce()
    broker.hangs = postgres.hangs = True
    async with _served(health) as port:
        status, said = await _ask_ready(port)
    assert (status, said["missing"]) == (503, ["kafka", "postgres data"])


async def test_however_many_ask_a_server_is_asked_once_a_second(
    health: Health, broker: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than this test can take.
    monkeypatch.setattr(dependencies, "_FRESH_SECONDS", 600.0)
    async with _served(health) as port:
        await asyncio.gather(*(_ask_ready(port) for _ in range(5)))
    assert broker.asked == 1


async def test_metrics_are_prometheus_text(health: Health) -> None:
    async with _served(health) as port:
        status, head, body = await _get(port, "/metrics")
    assert status == 200
    assert "content-type: text/plain; version=" in head
    assert "queryd_lease_losses_total 0.0" in body


async def test_other_pages_are_not_there_and_nothing_says_who_serves(health: Health) -> None:
    async with _served(health) as port:
        status, head, _ = await _get(port, "/")
    assert status == 404
    assert "server:" not in head


async def test_signals_stay_the_services_own(health: Health) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    async with _served(health) as port:
        await _get(port, "/livez")
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


async def test_a_reader_that_stays_connected_does_not_keep_the_service(health: Health, broker: Server) -> None:
    broker.hangs = True
    loop = asyncio.get_running_loop()
    async with _served(health) as port:
        # One has its answer and keeps the connection, one waits for its answer.
        idle, asking = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        idle[1].write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await idle[0].readuntil(b"\r\n\r\n")
        asking[1].write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asking[1].drain()
        start = loop.time()
    assert loop.time() - start < _PROMPT_SECONDS
    for _, writer in (idle, asking):
        writer.close()


async def test_the_port_is_free_again_afterwards(health: Health) -> None:
    async with _served(health) as port:
        pass
    socket.create_server(("127.0.0.1", port)).close()


def test_without_a_port_nothing_listens() -> None:
    assert bind(Settings(**_SETTINGS)) is None


def test_a_port_that_is_taken_is_one_clear_sentence() -> None:
    (port,) = pick_ports(1)
    sentence = rf"^QUERYD_HTTP_PORT: can't listen on 127\.0\.0\.1, port {port}: "
    with socket.create_server(("127.0.0.1", port)), pytest.raises(WrongSetting, match=sentence):
        bind(Settings(**_SETTINGS, http_port=port))


@pytest.mark.parametrize("command", [["run", "relay"], ["--room", "service.run", "projector"]])
def test_a_service_whose_port_is_taken_says_one_line_and_exits_2(command: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("QUERYD_", "AWS_"))}
    (port,) = pick_ports(1)
    with socket.create_server(("127.0.0.1", port)):
        environment |= {f"QUERYD_{name.upper()}": value for name, value in _SETTINGS.items()}
        done = subprocess.run(
            [sys.executable, "-m", "queryd", *command],
            cwd=tmp_path,
            env=environment | {"QUERYD_HTTP_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"queryd: QUERYD_HTTP_PORT: can't listen on 127.0.0.1, port {port}: ")


def test_services_that_share_a_host_take_ports_in_a_row() -> None:
    assert [http_variables(service, 9_100) for service in Service] == [
        {"QUERYD_HTTP_PORT": "9100"},
        {"QUERYD_HTTP_PORT": "9101"},
        {"QUERYD_HTTP_PORT": "9102"},
    ]
    assert http_variables(Service.RELAY, 0) == {}


@pytest.mark.slow
@pytest.mark.parametrize("make", [dependencies.postgres_data, dependencies.postgres_state, dependencies.kafka])
async def test_a_server_that_is_not_there_is_no_error(make: Callable[[Settings], Dependency]) -> None:
    (port,) = pick_ports(1)
    settings = Settings(
        **_SETTINGS
        | {
            "kafka_bootstrap": f"127.0.0.1:{port}",
            "data_url": f"postgresql://queryd:canary4711@127.0.0.1:{port}/data",
            "state_url": f"postgresql://queryd:canary4711@127.0.0.1:{port}/state",
        }
    )
    missing = make(settings)
    assert await Dependencies([missing]).find_missing() == (missing.name,)
