"""Confluent's wire format: a zero byte, the id of a schema that lies in a schema registry (4 bytes, big-endian), the
body. A process that has been told of a registry writes its events so; readers know both formats by the first byte.

The registry is asked once about each schema. Nothing is asked where a query's transaction would have to wait for the
answer: whoever writes announces the schemas at its start, and a subscription fetches those of the records that it hands
over before it does. Needs the extra `registry`.
"""

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastavro.utils import generate_one

from queryd.contract import contract, parse_plainly
from queryd.events import Topic

_log = logging.getLogger("queryd.registry")

URL_VARIABLE = "QUERYD_SCHEMA_REGISTRY_URL"
OPTIONS_VARIABLE = "QUERYD_SCHEMA_REGISTRY_OPTIONS"

MAGIC = b"\0"
HEADER_BYTES = 5

# What may be written to a topic; dead letters are other topics' bytes.
EVENT_OF_TOPIC = {
    Topic.REQUESTS_INTERACTIVE: "QueryRequested",
    Topic.REQUESTS_BATCH: "QueryRequested",
    Topic.CANCELLATIONS: "QueryCancelRequested",
    Topic.STATUS: "QueryStatusChanged",
}

# The registry answers from memory, within milliseconds. Who waits for longer holds up a poll, or a caller of `submit`.
_ANSWER_SECONDS = 3.0
# Between two tries while it is away.
_AGAIN_SECONDS = 1.0
# An id that is unknown now may be given out later: it is asked about again with a record that comes after this time.
_UNKNOWN_SECONDS = 10.0
# While it lies between the poll and its reading, a record of an unknown id is not asked about again; the longest time
# that takes is a poll's full window of malformed records.
_UNKNOWN_KEPT_SECONDS = 60.0
# Ids that nobody has given out, in a full window of records: what each costs here is some hundred bytes.
_MOST_UNKNOWN = 100_000
# The registry's own codes for what it does not have; a bare 404 is some other server's.
_NOT_FOUND = range(40_400, 40_500)
_SERVER_ERROR = 500
_TOO_MANY_REQUESTS = 429
_NEEDS_EXTRA = f"{URL_VARIABLE} needs more packages: in a clone, pip install '.[registry]'"


class RegistryAway(Exception):
    """The registry does not answer, or answers as no registry does: wait and try again. No record is wrong for it."""


class RegistryRefused(Exception):
    """The registry will not take a schema, or wants other credentials: put that right, then start again."""


class SchemaUnusable(ValueError):
    """Nothing can be read with the schema that a record names; the sentence says why."""


@dataclass(frozen=True, slots=True)
class WriterSchema:
    """A schema from the registry; `name` is its record's, without the namespace."""

    name: str
    parsed: Any


class Registry:
    """One schema registry. Safe for several threads; every call but `missing` may wait for the registry for 3 s."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """`options` are confluent-kafka's own, such as `basic.auth.user.info` or `ssl.ca.location`, and
        `auto.register.schemas`. Asks nothing yet. Raises `ValueError` for what the client does not take, `ImportError`
        without the extra."""
        try:
            from confluent_kafka.schema_registry import SchemaRegistryClient  # noqa: PLC0415
            from confluent_kafka.schema_registry.avro import AvroSerializer  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(_NEEDS_EXTRA) from error
        asked = dict(options)
        registers = asked.pop("auto.register.schemas", True)
        # Retrying is ours: the client's own would hold a thread for a minute.
        self.client = SchemaRegistryClient.new_client(
            {"timeout": _ANSWER_SECONDS, "max.retries": 0} | asked | {"url": url}
        )
        # The subject is `<topic>-value`, where Confluent's own consumers look first.
        serializing = {"auto.register.schemas": registers, "subject.name.strategy.type": "TOPIC"}
        self._serializers = {
            topic: AvroSerializer(self.client, contract().newest[name].text, conf=serializing)
            for topic, name in EVENT_OF_TOPIC.items()
        }
        self._announced: set[Topic] = set()
        self._known: dict[int, WriterSchema | SchemaUnusable] = {}
        # Since when, on this process's monotonic clock.
        self._unknown: dict[int, float] = {}
        self._lock = threading.Lock()
        self._away = False

    def announce(self) -> None:
        """Have the registry know the newest schema of each topic, so that `write` never has to ask.

        Raises `RegistryAway` and `RegistryRefused`.
        """
        for topic in EVENT_OF_TOPIC:
            self._announce(topic)

    def apply(self) -> dict[str, str]:
        """Register all versions of each topic's schema, and have the registry hold new ones against all older ones;
        what was done, by subject. Safe to repeat. Raises `RegistryAway` and `RegistryRefused`."""
        from confluent_kafka.schema_registry import ConfigCompatibilityLevel, Schema, ServerConfig  # noqa: PLC0415

        compatibility = ServerConfig(compatibility=ConfigCompatibilityLevel.FULL_TRANSITIVE)
        for topic, name in EVENT_OF_TOPIC.items():
            with _Asking(self):
                self.client.set_config(_subject(topic), compatibility)
                for version in contract().versions(name):
                    self.client.register_schema(_subject(topic), Schema(version.text, "AVRO"))
        return {_subject(topic): "schemas registered" for topic in EVENT_OF_TOPIC}

    def write(self, topic: Topic, fields: dict[str, Any]) -> bytes:
        """An event's fields in the newest version of its topic's schema.

        Raises fastavro's errors for values that it has no room for; where the registry was never asked about the
        topic, `RegistryAway` and `RegistryRefused`.
        """
        if topic not in self._announced:
            self._announce(topic)
        return self._serialize(topic, fields)

    def find_writer(self, encoded: bytes) -> WriterSchema:
        """The schema that a record in Confluent's wire format was written with.

        Raises `SchemaUnusable`, and `RegistryAway` where the registry has to be asked and is not there.
        """
        schema_id = _schema_id(encoded)
        if schema_id is None:
            raise SchemaUnusable(f"the record is shorter than the {HEADER_BYTES} bytes of Confluent's wire format")
        if not self._remembers(schema_id, _UNKNOWN_KEPT_SECONDS):
            self._fetch(schema_id)
        match self._known.get(schema_id):
            case WriterSchema() as schema:
                return schema
            case SchemaUnusable() as unusable:
                raise unusable
            case None:
                raise SchemaUnusable("the schema registry does not know the record's schema id")

    def missing(self, records: Iterable[bytes | None]) -> set[int]:
        """The schema ids of these records that the registry has to be asked about; asks nothing."""
        ids = {schema_id for encoded in records if encoded and (schema_id := _schema_id(encoded)) is not None}
        return {schema_id for schema_id in ids if not self._remembers(schema_id, _UNKNOWN_SECONDS)}

    def fetch(self, ids: Iterable[int]) -> None:
        """Ask about schemas; what the answers were, `find_writer` says. Raises `RegistryAway`."""
        for schema_id in ids:
            self._fetch(schema_id)

    def _announce(self, topic: Topic) -> None:
        # The serializer asks at its first event and never again.
        with _Asking(self):
            self._serialize(topic, generate_one(contract().newest[EVENT_OF_TOPIC[topic]].parsed))
        self._announced.add(topic)

    def _serialize(self, topic: Topic, fields: Any) -> bytes:
        from confluent_kafka.serialization import MessageField, SerializationContext  # noqa: PLC0415

        written = self._serializers[topic](fields, SerializationContext(topic.value, MessageField.VALUE))
        assert isinstance(written, bytes)
        return written

    def _remembers(self, schema_id: int, seconds: float) -> bool:
        since = self._unknown.get(schema_id)
        return schema_id in self._known or (since is not None and time.monotonic() - since < seconds)

    def _fetch(self, schema_id: int) -> None:
        from confluent_kafka.schema_registry import SchemaRegistryError  # noqa: PLC0415

        try:
            with _Asking(self, passed=(SchemaRegistryError,)):
                found: Any = self.client.get_schema(schema_id)
        except SchemaRegistryError as error:
            if error.error_code not in _NOT_FOUND:
                raise self._tell_away(error) from error
            with self._lock:
                self._unknown.pop(schema_id, None)
                self._unknown[schema_id] = time.monotonic()
                if len(self._unknown) > _MOST_UNKNOWN:
                    del self._unknown[next(iter(self._unknown))]
            return
        self._known[schema_id] = _understand(found)

    def _tell_away(self, error: Exception) -> RegistryAway:
        """Say so once an outage."""
        away = RegistryAway(f"the schema registry does not answer: {_describe(error)}")
        if not self._away:
            self._away = True
            _log.warning("%s", away)
        return away

    def _tell_back(self) -> None:
        if self._away:
            self._away = False
            _log.info("the schema registry is back")


class _Asking:
    """What the client raises while it asks becomes one of ours; `passed` is the caller's to judge."""

    def __init__(self, registry: Registry, passed: tuple[type[Exception], ...] = ()) -> None:
        self._registry = registry
        self._passed = passed

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, raised: BaseException | None, _trace: object) -> None:
        from confluent_kafka.schema_registry import SchemaRegistryError  # noqa: PLC0415

        if raised is None:
            self._registry._tell_back()
        elif isinstance(raised, SchemaRegistryError) and not isinstance(raised, self._passed):
            if raised.http_status_code < _SERVER_ERROR and raised.http_status_code != _TOO_MANY_REQUESTS:
                raise RegistryRefused(f"the schema registry refuses: {_describe(raised)}") from raised
            raise self._registry._tell_away(raised) from raised
        # The client documents no closed set of errors for a server that is not there, or is none.
        elif isinstance(raised, Exception) and not isinstance(raised, self._passed):
            raise self._registry._tell_away(raised) from raised


_in_use: Registry | None = None


def use(url: str | None, options: Mapping[str, Any] | None = None) -> None:
    """Set the wire format of this process: with a URL Confluent's, with None Avro's single-object encoding.

    Asks nothing yet. Raises `ValueError` for what confluent-kafka does not take, `ImportError` without the extra.
    """
    global _in_use  # noqa: PLW0603 — a process has one wire format, as it has one clock
    _in_use = None if url is None else Registry(url, options or {})


def use_environment() -> None:
    """`use` what `QUERYD_SCHEMA_REGISTRY_URL` and `QUERYD_SCHEMA_REGISTRY_OPTIONS` say. Raises as it does."""
    use(os.environ.get(URL_VARIABLE) or None, json.loads(os.environ.get(OPTIONS_VARIABLE) or "{}"))


def registry_in_use() -> Registry | None:
    """The registry of this process; None where events are written in single-object encoding."""
    return _in_use


async def announce_schemas() -> None:
    """`Registry.announce`, waiting for the registry for as long as it takes; without one nothing.

    Raises `RegistryRefused`.
    """
    while _in_use is not None:
        try:
            await asyncio.to_thread(_in_use.announce)
        except RegistryAway:
            await asyncio.sleep(_AGAIN_SECONDS)
        else:
            return


def _subject(topic: Topic) -> str:
    return f"{topic.value}-value"


def _schema_id(encoded: bytes) -> int | None:
    if encoded[:1] != MAGIC or len(encoded) < HEADER_BYTES:
        return None
    return int.from_bytes(encoded[1:HEADER_BYTES], "big")


def _understand(found: Any) -> WriterSchema | SchemaUnusable:
    if found.schema_type not in (None, "AVRO") or found.references:
        return SchemaUnusable("the record's schema in the registry is no self-contained Avro schema")
    try:
        schema = json.loads(found.schema_str)
        return WriterSchema(schema["name"].rpartition(".")[2], parse_plainly(schema))
    # fastavro documents no closed set of errors for what is no schema. Nothing but reading it happens inside.
    except Exception as error:  # noqa: BLE001
        return SchemaUnusable(f"the record's schema in the registry can't be read ({type(error).__name__})")


def _describe(error: Exception) -> str:
    """Numbers and classes only: an error's text may quote the URL, with its credentials."""
    status, code = getattr(error, "http_status_code", None), getattr(error, "error_code", None)
    return type(error).__name__ if status is None else f"HTTP status {status}, code {code}"
