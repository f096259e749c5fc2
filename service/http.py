"""What an orchestrator and Prometheus ask a service, on one port: `/livez`, `/readyz` and `/metrics`.

The server runs in the service's own event loop, so that an answer says that the loop turns. It has no authentication
and shows nothing worth one; it listens on the loopback address unless told otherwise.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum

import uvicorn
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.dependencies import Dependencies
from service.readiness import announce_ready
from service.settings import Settings, WrongSetting
from telemetry.metrics import Metrics

# An answer under way when the service ends gets this long; the service's own drain is over by then.
_CLOSE_SECONDS = 1
# Then the server is cancelled: nothing that it does is worth waiting for.
_GIVE_UP_SECONDS = 2.0
# A probe and a scraper at a time. Out of file descriptors, asyncio tries so many accepts in a row and logs each:
# uvicorn's own 2,048 were as many lines in a second.
_BACKLOG = 16


class State(StrEnum):
    """Where a service is in its life. Only a `READY` one has work sent to it."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


class Health:
    """One service's health. Its state moves on by `announce` and `stop`, and never back."""

    def __init__(self, service: str, dependencies: Dependencies, alive: Callable[[], bool]) -> None:
        """`alive` says whether the service's loops run."""
        self.service = service
        self.state = State.STARTING
        self.alive = alive
        self._dependencies = dependencies

    def announce(self) -> None:
        """The service does its work now; said once, whoever asks and whoever waits for it."""
        if self.state is State.STARTING:
            self.state = State.READY
            announce_ready(self.service)

    def stop(self) -> None:
        """The service drains."""
        self.state = State.STOPPING

    async def find_missing(self) -> tuple[str, ...]:
        """The names of what doesn't answer, at most a second old."""
        return await self._dependencies.find_missing()


def make_app(health: Health, metrics: Metrics) -> Starlette:
    """The three pages."""

    async def livez(_request: Request) -> Response:
        alive = health.alive()
        return JSONResponse({"service": health.service, "alive": alive}, 200 if alive else 503)

    async def readyz(_request: Request) -> Response:
        missing = await health.find_missing()
        ready = health.state is State.READY and not missing
        said = {"service": health.service, "ready": ready, "state": health.state.value, "missing": list(missing)}
        return JSONResponse(said, 200 if ready else 503)

    async def show_metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": content_type})

    return Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", show_metrics)])


def bind(settings: Settings) -> socket.socket | None:
    """The socket to serve on, None where no port is set; raises `WrongSetting` for one that can't be had."""
    host, port = settings.http_host, settings.http_port
    if not port:
        return None
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise WrongSetting(f"QUERYD_HTTP_PORT: can't listen on {host}, port {port}: {error.strerror}") from None


def check_ports(settings: Settings, count: int) -> None:
    """Raises `WrongSetting` unless `count` ports, starting with `QUERYD_HTTP_PORT`, are free."""
    if settings.http_port:
        for port in range(settings.http_port, settings.http_port + count):
            listener = bind(settings.model_copy(update={"http_port": port}))
            assert listener is not None
            listener.close()


@asynccontextmanager
async def serving(app: Starlette, listener: socket.socket) -> AsyncIterator[None]:
    """Serve for as long as the context lasts; its end takes some 0.2 s, and 2 s at most. Closes the socket."""
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_CLOSE_SECONDS,
            backlog=_BACKLOG,
        )
    )
    task = asyncio.create_task(server.serve([listener]), name="http")
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait({task}, timeout=_GIVE_UP_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        listener.close()


class _Server(uvicorn.Server):
    """Leaves signals alone: what SIGTERM means is the service's to say."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
