"""Settings: environment variables, `QUERYD_` and the field's name; S3 takes the standard `AWS_*` ones.

Where a variable is unset, `.queryd/env` in the current directory is read, which `queryd up` writes.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from access.limits import OrgLimits
from processes.failpoints import FAILPOINTS_VARIABLE
from processes.lifeline import LIFELINE_VARIABLE
from processes.serving import NOTICES_VARIABLE
from queryd.events import Mode
from queryd.kafka.outages import QUIET
from queryd.registry import OPTIONS_VARIABLE, use
from service.cores import count_cores
from service.environment import ADDRESSES, isolate, read_env_file
from service.readiness import READY_VARIABLE
from service.sizes import read_size, show_size

STATE_DIRECTORY = Path(".queryd")
ENV_FILE = STATE_DIRECTORY / "env"

_GIB = 1024**3
# Of the columns in `org_limits`.
_MOST_INT = 2**31 - 1
_MOST_BIGINT = 2**63 - 1
_HOUR = 3600.0
_DAY = 24 * _HOUR


class WrongSetting(ValueError):
    """A setting is missing or wrong; the sentence names the variable."""


def _check_results_url(url: str) -> str:
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9._-]*/?", url):
        raise ValueError("must be s3://bucket, without a path")
    return url.rstrip("/")


def _check_postgres_url(url: SecretStr) -> SecretStr:
    if not url.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("must be a libpq URI, postgresql://…")
    return url


def _check_registry_url(url: SecretStr) -> SecretStr:
    if not url.get_secret_value().startswith(("http://", "https://", "mock://")):
        raise ValueError("must be a URL, https://host:port")
    return url


def _read_size(size: object) -> object:
    return read_size(size) if isinstance(size, str) else size


PostgresUrl = Annotated[SecretStr, AfterValidator(_check_postgres_url)]
# A number of bytes, optionally with a suffix.
Size = Annotated[int, BeforeValidator(_read_size)]


def _default_slots() -> int:
    return max(1, int(count_cores()))


class Settings(BaseSettings):
    """Every setting of every service. Times are in seconds; sizes in bytes, or with a suffix such as `MiB`."""

    model_config = SettingsConfigDict(env_prefix="QUERYD_", extra="ignore", frozen=True, allow_inf_nan=False)

    kafka_bootstrap: str = Field(min_length=1)
    # Further librdkafka properties as a JSON object: SASL, TLS.
    kafka_options: dict[str, str | int | bool] = Field(default_factory=dict, repr=False)
    # Half of it passes before a dead member's partitions move; librdkafka's default is 45 s.
    kafka_session_timeout: float = Field(default=15.0, ge=1, le=300)
    # `consumer` is KIP-848, where brokers of 4.0 and newer decide on assignments.
    kafka_group_protocol: Literal["classic", "consumer"] = "classic"
    # How long the broker may hold an executor's fetch that finds no request. Kafka answers once there is one; the
    # embedded broker only after half of this.
    kafka_fetch_wait: float = Field(default=0.5, ge=0.01, le=10)

    # With it events are written in Confluent's wire format; the options are confluent-kafka's: credentials, TLS.
    schema_registry_url: Annotated[SecretStr, AfterValidator(_check_registry_url)] | None = None
    schema_registry_options: dict[str, str | int | bool] = Field(default_factory=dict, repr=False)

    data_url: PostgresUrl
    state_url: PostgresUrl
    datasets_pg_url: PostgresUrl | None = None

    results_url: Annotated[str, AfterValidator(_check_results_url)]
    # What reads datasets in S3. Without them the writing credentials serve, and `doctor` says so.
    datasets_access_key_id: str | None = None
    datasets_secret_access_key: SecretStr | None = None
    datasets_session_token: SecretStr | None = None

    slots_interactive: int = Field(default_factory=_default_slots, ge=1, le=256)
    slots_batch: int = Field(default_factory=_default_slots, ge=1, le=256)
    child_memory: Size = Field(default=_GIB, ge=64 * 1024**2)
    child_threads: int = Field(default=2, ge=1, le=256)
    scratch_bytes: Size = Field(default=20 * _GIB, ge=1024**2)
    scratch: Path = STATE_DIRECTORY / "scratch"

    # Renewed every third of it: two renewals may be lost before the lease is.
    lease_seconds: float = Field(default=15.0, ge=3, le=600)
    drain_seconds: float = Field(default=12.0, ge=0, le=3600)
    queue_timeout_interactive: float = Field(default=600.0, gt=0)
    queue_timeout_batch: float = Field(default=_DAY, gt=0)
    timeout_interactive: float = Field(default=60.0, gt=0)
    timeout_interactive_max: float = Field(default=300.0, gt=0)
    timeout_batch: float = Field(default=_HOUR, gt=0)
    timeout_batch_max: float = Field(default=_DAY, gt=0)
    result_retention: float = Field(default=7 * _DAY, gt=0)
    # Thirteen months: a year's queries can be told of at its end.
    row_retention: float = Field(default=400 * _DAY, gt=0)
    # Listing a million objects takes minutes; nobody waits for what is swept.
    retention_interval: float = Field(default=_HOUR, ge=1)

    # Of an org that has none of its own, see `queryd limits`; without a value there is no limit.
    org_running_queries: int | None = Field(default=None, ge=1, le=_MOST_INT)
    org_queued_queries: int | None = Field(default=None, ge=1, le=_MOST_INT)
    org_timeout: int | None = Field(default=None, ge=1, le=_MOST_INT)
    org_bytes_scanned: Size | None = Field(default=1024 * _GIB, ge=1, le=_MOST_BIGINT)
    org_result_bytes: Size | None = Field(default=10 * _GIB, ge=1, le=_MOST_BIGINT)
    org_result_rows: int | None = Field(default=None, ge=1, le=_MOST_BIGINT)

    relay_transactions: bool = True
    sql_hash_key: SecretStr | None = Field(default=None, min_length=16)
    # 0 is no server. `run all` and `up` take this port and the two that follow.
    http_port: int = Field(default=0, ge=0, le=65_533)
    http_host: str = Field(default="127.0.0.1", min_length=1)
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")

    partitions: int = Field(default=6, ge=1, le=1000)
    replication: int = Field(default=1, ge=1, le=9)

    @field_validator("kafka_options")
    @classmethod
    def _check_options(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        if "group.protocol" in options:
            # Other properties of a group depend on it.
            raise ValueError("group.protocol has a setting of its own, QUERYD_KAFKA_GROUP_PROTOCOL")
        return options

    @model_validator(mode="after")
    def _check_credentials(self) -> Self:
        if (self.datasets_access_key_id is None) != (self.datasets_secret_access_key is None):
            raise ValueError("QUERYD_DATASETS_ACCESS_KEY_ID and QUERYD_DATASETS_SECRET_ACCESS_KEY go together")
        return self

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        for lane in Mode:
            default, longest = getattr(self, f"timeout_{lane}"), getattr(self, f"timeout_{lane}_max")
            if default > longest:
                raise ValueError(f"QUERYD_TIMEOUT_{lane.upper()} is above QUERYD_TIMEOUT_{lane.upper()}_MAX")
        return self

    @property
    def bucket(self) -> str:
        """The results bucket's name."""
        return self.results_url.removeprefix("s3://")

    @property
    def kafka(self) -> dict[str, Any]:
        """librdkafka's configuration, for every client."""
        return {**self.kafka_options, "bootstrap.servers": self.kafka_bootstrap}

    @property
    def hash_key(self) -> str | None:
        """The key of the requests' fingerprints and of SQL hashes."""
        return None if self.sql_hash_key is None else self.sql_hash_key.get_secret_value()

    def org_limits(self) -> OrgLimits:
        """What holds for an org that has no limits of its own."""
        return OrgLimits(
            running_queries=self.org_running_queries,
            queued_queries=self.org_queued_queries,
            timeout_seconds=self.org_timeout,
            bytes_scanned=self.org_bytes_scanned,
            result_bytes=self.org_result_bytes,
            result_rows=self.org_result_rows,
        )

    def slots(self) -> dict[Mode, int]:
        """Queries running at once in each lane."""
        return {Mode.INTERACTIVE: self.slots_interactive, Mode.BATCH: self.slots_batch}

    def group(self, name: str) -> dict[str, Any]:
        """librdkafka's configuration of a consumer group of ours."""
        group: dict[str, Any] = {"group.id": f"queryd-{name}"}
        if self.kafka_group_protocol == "consumer":
            # The broker decides on the session timeout, and librdkafka refuses the property.
            group["group.protocol"] = "consumer"
        else:
            group["session.timeout.ms"] = int(self.kafka_session_timeout * 1000)
        return group

    @property
    def requests_group(self) -> dict[str, Any]:
        """librdkafka's configuration of the executors' group."""
        return self.group("executor") | {"fetch.wait.max.ms": int(self.kafka_fetch_wait * 1000)}


# Variables of ours that are no settings: how processes find each other, what the command line and tests take.
_OTHER_VARIABLES = frozenset(
    {READY_VARIABLE, LIFELINE_VARIABLE, FAILPOINTS_VARIABLE, NOTICES_VARIABLE, "QUERYD_ORG", "QUERYD_USER"}
)
_OTHER_PREFIXES = ("QUERYD_TEST_",)
_PREFIX = "QUERYD_"
# Two letters wrong in ten are a slip, more are another word.
_CLOSE = 0.8


def find_unknown_variables() -> dict[str, str | None]:
    """The `QUERYD_` variables of the environment that nothing reads, each with the setting that it may stand for."""
    settings = {field.upper(): _PREFIX + field.upper() for field in Settings.model_fields}
    known = _OTHER_VARIABLES.union(settings.values())
    unknown: dict[str, str | None] = {}
    for name in sorted(os.environ):
        upper = name.upper()
        if upper.startswith(_PREFIX) and upper not in known and not upper.startswith(_OTHER_PREFIXES):
            close = difflib.get_close_matches(upper.removeprefix(_PREFIX), settings, n=1, cutoff=_CLOSE)
            unknown[name] = settings[close[0]] if close else None
    return unknown


def describe_unknown(name: str, meant: str | None) -> str:
    """What to say of one that `find_unknown_variables` found."""
    return f"{name} is no setting" + ("" if meant is None else f" ({meant} is one)")


def load_env_file() -> None:
    """Take variables that are not set from `.queryd/env`.

    If the environment names no other server, the process uses the file's stack. Then remove variables for other
    programs (`AWS_PROFILE`, a proxy, `PGSERVICE`) from the environment.
    """
    told = read_env_file(ENV_FILE)
    ours = [name for name in ADDRESSES if name in told and name.startswith(_PREFIX)]
    # A stack's file contains all addresses.
    if "AWS_ENDPOINT_URL" in told and all(os.environ.get(name, told[name]) == told[name] for name in ours):
        isolate(settings=True)
        os.environ.update({name: value for name, value in told.items() if name.startswith("AWS_")})
    for name, value in told.items():
        os.environ.setdefault(name, value)


def are_of_the_embedded_stack(*names: str) -> bool:
    """True when each of the variables stands in `.queryd/env`, and in the environment as it stands there."""
    told = read_env_file(ENV_FILE)
    return all(name in told and os.environ.get(name) == told[name] for name in names)


def load_settings() -> Settings:
    """The settings of this process, which set its wire format as well.

    Raises `WrongSetting` naming the first variable that is wrong.
    """
    load_env_file()
    if region := os.environ.get("AWS_REGION"):
        # The SDKs' standard name; boto3 reads only the other one.
        os.environ.setdefault("AWS_DEFAULT_REGION", region)
    try:
        settings = Settings()
    except SettingsError as error:
        raise WrongSetting(f"{_find_options(str(error))}: must be a JSON object of properties") from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        if not problem["loc"]:
            raise WrongSetting(problem["msg"].removeprefix("Value error, ")) from None
        name = "QUERYD_" + str(problem["loc"][0]).upper()
        raise WrongSetting(f"{name}: {_explain(name, problem)}") from None
    _use_registry(settings)
    return settings


def _find_options(message: str) -> str:
    """Which of the two that are JSON can't be read."""
    return OPTIONS_VARIABLE if OPTIONS_VARIABLE.removeprefix(_PREFIX).lower() in message else "QUERYD_KAFKA_OPTIONS"


def _use_registry(settings: Settings) -> None:
    url = settings.schema_registry_url
    try:
        use(None if url is None else url.get_secret_value(), settings.schema_registry_options)
    except ImportError as error:
        raise WrongSetting(str(error)) from None
    except (TypeError, ValueError, OSError) as error:
        # The client's sentence may quote the URL, and a file that it can't read.
        why = f"the registry's client does not take them ({type(error).__name__})"
        raise WrongSetting(f"{OPTIONS_VARIABLE}: {why}") from None


def check_kafka_options(settings: Settings) -> None:
    """Let librdkafka judge its own properties; raises `WrongSetting`."""
    try:
        AdminClient(settings.kafka | QUIET)
    except KafkaException as error:
        raise WrongSetting(f"QUERYD_KAFKA_OPTIONS: {error.args[0].str()}") from None


_SIZES = frozenset({"child_memory", "scratch_bytes", "org_bytes_scanned", "org_result_bytes"})


def _explain(name: str, problem: ErrorDetails) -> str:
    kind, message, bounds = problem["type"], problem["msg"], problem.get("ctx", {})
    if problem["loc"][0] in _SIZES and kind == "greater_than_equal":
        return f"must be at least {show_size(bounds['ge'])}"
    if problem["loc"][0] in _SIZES and kind == "less_than_equal":
        return f"must be at most {show_size(bounds['le'])}"
    if kind == "missing":
        return f"is not set. Run `queryd up` in this directory, or export {name}"
    if kind == "string_pattern_mismatch":
        return "must be DEBUG, INFO, WARNING or ERROR"
    if kind == "too_short":
        return "is too short: at least 16 characters"
    return message.removeprefix("Value error, ")
