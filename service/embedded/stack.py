"""All embedded servers under one directory, started together: Postgres, the S3 server and, if wanted, the broker."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.embedded.broker import Broker
from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline

# The stack takes 2–3 s to start on two cores; a loaded laptop gets a minute before we call it broken.
_START_SECONDS = 60.0


class EmbeddedStack:
    """The servers of one `queryd up`. Their data stays in `directory`; the broker keeps none.

    They end with this process, however it ends. With `broker=False`, `broker` is None: the caller has a Kafka.
    """

    def __init__(self, directory: Path, *, broker: bool = True, bucket: str = "queryd") -> None:
        # Servers change their working directory; a relative path would be another one there.
        directory = directory.resolve()
        logs = directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._lifeline = Lifeline()
        self.postgres = Postgres(directory / "postgres", logs / "postgres.log", self._lifeline)
        self.object_store = ObjectStore(directory / "s3", logs / "s3.log", self._lifeline, bucket)
        self.broker = Broker(directory / "kafka", logs / "kafka.log", self._lifeline) if broker else None

    def start(self) -> None:
        """Start all servers at once. When one fails, the others are stopped. Raises `EmbeddedError`."""
        try:
            _together(_starting(server) for server in self._servers())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all servers at once, which takes 2–3 s; whatever then still lives is killed. May be called twice."""
        try:
            _together(server.stop for server in self._servers())
        finally:
            self._lifeline.close()

    def kill(self) -> None:
        """Kill all servers, also while `start` waits for them on another thread."""
        self._lifeline.close()

    @property
    def ended(self) -> list[str]:
        """The servers that don't run: `postgres`, `s3`, `kafka`."""
        names = {Postgres: "postgres", ObjectStore: "s3", Broker: "kafka"}
        return [names[type(server)] for server in self._servers() if not server.server.running]

    def __enter__(self) -> "EmbeddedStack":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _servers(self) -> list[Postgres | ObjectStore | Broker]:
        return [server for server in (self.postgres, self.object_store, self.broker) if server is not None]


def _starting(server: Postgres | ObjectStore | Broker) -> Callable[[], None]:
    return lambda: server.start(_START_SECONDS)


def _together(calls: Iterable[Callable[[], None]]) -> None:
    """Make all calls at once, wait for all of them, then raise what the first that failed raised."""
    with ThreadPoolExecutor(thread_name_prefix="stack") as pool:
        futures = [pool.submit(call) for call in calls]
    for future in futures:
        future.result()
