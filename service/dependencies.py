"""What a service needs to work, and whether it answers now.

Names only: an error's text may hold what must not be shown. Each check gives up after 2 s and holds nobody up.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from db.health import is_writable
from queryd.kafka.outages import QUIET
from service.settings import Settings

# A server that is well answers within milliseconds; whoever asks for readiness gives up after some seconds himself.
_SECONDS = 2.0
# However many ask, a server is asked once in this time.
_FRESH_SECONDS = 1.0
_FORBIDDEN = 403
# S3 refuses a signature that is further off than this.
_SKEW_SECONDS = 15 * 60
# queryd writes no object with this key, so a healthy store answers NoSuchKey.
_PROBED_KEY = "results/.probe"
# Codes that mean that S3 rejects our credentials or clock, so that every request fails (S3's list of error codes).
_REJECTIONS = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "RequestTimeTooSkewed",
        "ExpiredToken",
        "InvalidToken",
        "AccountProblem",
        "AllAccessDisabled",
    }
)


@dataclass(frozen=True, slots=True)
class Dependency:
    """A server by the name that logs have for it. `answers` never raises for a server that is away."""

    name: str
    answers: Callable[[], Awaitable[bool]]


class Dependencies:
    """What one service needs."""

    def __init__(self, needed: Sequence[Dependency]) -> None:
        self._needed = needed
        self._missing: tuple[str, ...] = ()
        self._asked_at = -_FRESH_SECONDS
        self._asking = asyncio.Lock()

    async def find_missing(self) -> tuple[str, ...]:
        """The names of those that don't answer, at most a second old."""
        async with self._asking:
            if time.monotonic() - self._asked_at >= _FRESH_SECONDS:
                answers = await asyncio.gather(*(_ask(each) for each in self._needed))
                self._missing = tuple(
                    each.name for each, answered in zip(self._needed, answers, strict=True) if not answered
                )
                self._asked_at = time.monotonic()
            return self._missing


async def _ask(dependency: Dependency) -> bool:
    try:
        async with asyncio.timeout(_SECONDS):
            return await dependency.answers()
    except TimeoutError:
        return False


def kafka(settings: Settings) -> Dependency:
    """Some broker of the cluster."""
    clients: list[AdminClient] = []

    async def answers() -> bool:
        # Made at the first question: it keeps a thread and a connection.
        if not clients:
            clients.append(AdminClient(settings.kafka | QUIET))
        try:
            await asyncio.wrap_future(clients[0].describe_cluster(request_timeout=_SECONDS))
        except KafkaException:
            return False
        return True

    return Dependency("kafka", answers)


def postgres_data(settings: Settings) -> Dependency:
    """The data database, open to writing."""
    return Dependency("postgres data", lambda: is_writable(settings.data_url.get_secret_value()))


def postgres_state(settings: Settings) -> Dependency:
    """The state database, open to writing."""
    return Dependency("postgres state", lambda: is_writable(settings.state_url.get_secret_value()))


def s3(settings: Settings) -> Dependency:
    """The results bucket."""
    # A thread of its own: a store that hangs must not take one from those that poll and commit.
    threads = ThreadPoolExecutor(1, thread_name_prefix="queryd-s3")
    clients: list[Any] = []

    def ask() -> bool:
        if not clients:
            # boto3 takes 0.2 s and 25 MB: imported when first asked.
            from service.bucket import make_s3_client  # noqa: PLC0415

            clients.append(make_s3_client(_SECONDS))
        return _has_bucket(clients[0], settings.bucket)

    return Dependency("s3", lambda: asyncio.get_running_loop().run_in_executor(threads, ask))


def _has_bucket(client: Any, bucket: str) -> bool:
    """True if the store accepts our credentials and has the bucket, even if they don't allow reading."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    try:
        # GET, because the answer to a HEAD has no body and so no error code.
        client.get_object(Bucket=bucket, Key=_PROBED_KEY)["Body"].close()
    except ClientError as error:
        code, answer = error.response["Error"].get("Code"), error.response["ResponseMetadata"]
        # Credentials that only allow writing get a 403. A 404 of a server that is not S3 has another code.
        is_forbidden = answer["HTTPStatusCode"] == _FORBIDDEN and code not in _REJECTIONS
        return code == "NoSuchKey" or (is_forbidden and _is_near(answer.get("HTTPHeaders", {}).get("date")))
    except BotoCoreError:
        return False
    return True


def _is_near(date: str | None) -> bool:
    """Whether an HTTP date is so near to this machine's clock that a signature by it is taken."""
    return date is None or abs(time.time() - parsedate_to_datetime(date).timestamp()) < _SKEW_SECONDS
