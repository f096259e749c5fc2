"""`queryd doctor`'s sentences against real servers, `queryd bucket apply`, and links to results."""

import os
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import psycopg
import pytest
from typer.testing import CliRunner

from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from engines.duckdb.landlock import supported_abi
from queryd.results import ResultReader
from service.bucket import BucketRefused, apply_bucket
from service.cli import app
from service.cli.operate import print_findings
from service.doctor import Finding, examine
from service.embedded.object_store import Credentials, ObjectStore
from service.embedded.postgres import Postgres
from service.settings import ENV_FILE, Settings
from tests.faults.s3_proxy import Mode, S3Proxy

CANARY = "canary4711"


@pytest.fixture
def environment(
    object_store: ObjectStore, data_url: str, state_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Settings that are right but for Kafka, where nobody listens; the environment is given back as it was."""
    # It remembers the credentials that it first saw.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    before = dict(os.environ)
    for name in before:
        if name.startswith(("QUERYD_", "AWS_")):
            del os.environ[name]
    os.environ |= {
        "QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:1",
        "QUERYD_DATA_URL": data_url,
        "QUERYD_STATE_URL": state_url,
        "QUERYD_RESULTS_URL": f"s3://{object_store.bucket}",
        "AWS_ENDPOINT_URL": object_store.endpoint_url,
        "AWS_REGION": object_store.region,
    }
    _use(object_store.writer)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def without_kafka(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, and Kafka is not asked for: it would be waited for."""
    monkeypatch.setattr("service.doctor.examine_kafka", lambda _settings: iter(()))


def _use(keys: Credentials) -> None:
    boto3.DEFAULT_SESSION = None
    os.environ |= {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key}


def _find(what: str) -> Finding:
    findings = examine(Settings())
    assert CANARY not in repr(findings)
    (finding,) = (each for each in findings if each.what == what)
    return finding


def _instead(url: str, *, userinfo: str | None = None, database: str | None = None) -> str:
    parts = urlsplit(url)
    if userinfo is not None:
        parts = parts._replace(netloc=f"{userinfo}@{parts.hostname}:{parts.port}")
    if database is not None:
        parts = parts._replace(path=f"/{database}")
    return parts.geturl()


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_kafka_that_is_not_there() -> None:
    assert _find("kafka").advice.startswith("no broker answers: is Kafka up")


@pytest.mark.usefixtures("environment")
def test_a_property_that_kafkas_client_does_not_know() -> None:
    os.environ["QUERYD_KAFKA_OPTIONS"] = f'{{"sasl.{CANARY}": "{CANARY}"}}'
    assert _find("kafka").advice.startswith("a property in QUERYD_KAFKA_OPTIONS is unknown")


@pytest.mark.usefixtures("without_kafka")
@pytest.mark.parametrize(
    ("userinfo", "database", "sentence"),
    [
        (None, CANARY, "the server has no such database, or the role may not enter it"),
        (f"queryd:{CANARY}", None, "the server refuses the password or the role"),
        (f"{CANARY}:{CANARY}", None, "the server refuses the password or the role"),
        ("queryd", None, "the server requires a password, and QUERYD_DATA_URL has none"),
    ],
)
def test_what_postgres_refuses_is_told_apart(
    data_url: str, userinfo: str | None, database: str | None, sentence: str
) -> None:
    os.environ["QUERYD_DATA_URL"] = _instead(data_url, userinfo=userinfo, database=database)
    finding = _find("postgres data")
    assert finding.state == "wrong"
    assert finding.advice.startswith(sentence)
    assert "QUERYD_DATA_URL" in finding.advice


@pytest.mark.slow
@pytest.mark.usefixtures("without_kafka")
def test_a_database_without_our_tables_is_told_apart_from_one_that_is_away(postgres_server: Postgres) -> None:
    said = _find("postgres state").advice
    assert "tables are missing: consumer_offsets, query_status; run `queryd db upgrade`" in said
    # What the upgrade does not make.
    assert "tasks; on a development machine run `queryd db platform`" in said
    create_platform_tables(os.environ["QUERYD_STATE_URL"])
    said = _find("postgres state").advice
    assert "tasks" not in said
    assert "query_status" in said
    os.environ["QUERYD_DATASETS_PG_URL"] = _instead(postgres_server.url("postgres"), database=CANARY)
    assert "QUERYD_DATASETS_PG_URL" in _find("datasets in postgres").advice


@pytest.mark.usefixtures("without_kafka")
def test_a_state_database_that_only_lacks_the_platforms_tables_is_sent_to_them(state_url: str) -> None:
    create_platform_tables(state_url)
    upgrade_state(state_url)
    assert _find("postgres state").state == "well"
    with psycopg.connect(state_url) as connection:
        connection.execute("DROP TABLE tasks CASCADE")
    said = _find("postgres state").advice
    assert said.startswith(
        "the platform's tables are missing: tasks; on a development machine run `queryd db platform`"
    )
    assert "upgrade" not in said


@pytest.mark.slow
@pytest.mark.usefixtures("without_kafka")
def test_databases_that_are_swapped_are_recognised_and_not_upgraded(data_url: str, state_url: str) -> None:
    create_platform_tables(state_url)
    upgrade_data(data_url)
    upgrade_state(state_url)
    assert (_find("postgres data").state, _find("postgres state").state) == ("well", "well")
    os.environ |= {"QUERYD_DATA_URL": state_url, "QUERYD_STATE_URL": data_url}
    for what in ("postgres data", "postgres state"):
        assert "check whether QUERYD_DATA_URL and QUERYD_STATE_URL are swapped" in _find(what).advice
    refused = CliRunner().invoke(app, ["db", "upgrade"])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("queryd: QUERYD_DATA_URL: it contains the tables of the other database")
    # One database for both is no mistake.
    os.environ |= {"QUERYD_DATA_URL": state_url, "QUERYD_STATE_URL": state_url}
    assert CliRunner().invoke(app, ["db", "upgrade"]).exit_code == 0
    assert _find("postgres data").state == "well"


@pytest.mark.usefixtures("without_kafka")
def test_an_older_schema_version_is_detected(data_url: str) -> None:
    upgrade_data(data_url)
    with psycopg.connect(data_url) as connection:
        connection.execute("UPDATE queryd_data_version SET version_num = 'data0003'")
    finding = _find("postgres data")
    assert (finding.state, "the schema's version is 3" in finding.advice) == ("wrong", True)


@pytest.mark.usefixtures("without_kafka")
def test_problems_come_first() -> None:
    states = [finding.state for finding in examine(Settings())]
    assert states == sorted(states, key=("wrong", "warning", "well").index)
    assert states[0] == "wrong"
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 1
    assert told.stdout.splitlines()[1].startswith("wrong\t")


@pytest.mark.parametrize("columns", [40, 80])
def test_findings_fit_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    advice = " ".join(["check the hosts in QUERYD_KAFKA_BOOTSTRAP,"] * 8)
    print_findings([Finding("kafka", "wrong", advice)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrong    kafka"
    assert max(map(len, lines)) <= columns
    assert " ".join(line.strip() for line in lines[1:]) == advice


@pytest.mark.slow
@pytest.mark.usefixtures("without_kafka")
def test_what_must_be_so_in_the_embedded_stack_is_no_warning_there(
    postgres_server: Postgres, data_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.environ |= {
        "QUERYD_RELAY_TRANSACTIONS": "false",
        "QUERYD_DATASETS_PG_URL": postgres_server.url("postgres"),
    }
    assert (_find("relay").state, _find("datasets in postgres").state) == ("warning", "warning")
    # As `queryd up` writes it.
    ENV_FILE.parent.mkdir()
    ENV_FILE.write_text("".join(f"{name}={value}\n" for name, value in os.environ.items() if name[:7] == "QUERYD_"))
    relay, datasets = _find("relay"), _find("datasets in postgres")
    assert (relay.state, datasets.state) == ("well", "well")
    assert "as it must be with the embedded broker" in relay.advice
    assert "as it is in the embedded stack" in datasets.advice
    # Whoever points elsewhere has left the embedded stack.
    os.environ |= {"QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:2", "QUERYD_DATA_URL": _instead(data_url, database="postgres")}
    assert (_find("relay").state, _find("datasets in postgres").state) == ("warning", "warning")


@pytest.mark.slow
@pytest.mark.usefixtures("without_kafka")
def test_what_s3_refuses_is_told_apart(object_store: ObjectStore) -> None:
    assert _find("s3") == Finding("s3", "well", f"bucket {object_store.bucket}")
    _use(Credentials(CANARY, CANARY))
    assert _find("s3").advice.startswith("the keys are wrong")
    _use(Credentials(object_store.writer.access_key, CANARY))
    assert _find("s3").advice.startswith("the keys are wrong")
    os.environ["QUERYD_RESULTS_URL"] = "s3://another"
    _use(object_store.reader)
    assert _find("s3").advice.startswith("the keys may not use the bucket")
    _use(object_store.writer)
    assert "queryd bucket apply" in _find("s3").advice
    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"
    assert _find("s3").advice.startswith("nobody listens there")


@pytest.mark.slow
@pytest.mark.usefixtures("without_kafka")
@pytest.mark.parametrize(
    ("mode", "state", "advice"),
    [
        (Mode.PASS, "well", "an existing object is not overwritten"),
        (Mode.UNCONDITIONAL, "wrong", "the S3 server does not support conditional writes"),
        (Mode.OVERWRITING, "wrong", "the S3 server ignores If-None-Match"),
    ],
)
def test_a_store_without_conditional_writes_is_found(
    object_store: ObjectStore, mode: Mode, state: str, advice: str
) -> None:
    proxy = S3Proxy(int(object_store.endpoint_url.rpartition(":")[2]))
    proxy.start()
    try:
        proxy.enter(mode)
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
        finding = _find("s3 writes")
        assert (finding.state, finding.advice[: len(advice)]) == (state, advice)
    finally:
        proxy.stop()
    os.environ["AWS_ENDPOINT_URL"] = object_store.endpoint_url
    listed = boto3.client("s3").list_objects_v2(Bucket=object_store.bucket, Prefix="results/")
    assert [found["Key"] for found in listed.get("Contents", ()) if found["Key"].endswith("/doctor")] == []


@pytest.mark.usefixtures("without_kafka")
def test_a_bucket_is_made_once_and_takes_objects(object_store: ObjectStore) -> None:
    name = f"made-{uuid.uuid4()}"
    assert [apply_bucket(name), apply_bucket(name)] == ["created", "kept"]
    client = boto3.client("s3", region_name=object_store.region)
    assert client.list_objects_v2(Bucket=name)["KeyCount"] == 0
    client.delete_bucket(Bucket=name)


@pytest.mark.usefixtures("without_kafka")
def test_a_bucket_that_is_refused_is_not_waited_for(object_store: ObjectStore) -> None:
    _use(object_store.reader)
    with pytest.raises(BucketRefused, match="the keys may not use the bucket"):
        apply_bucket(object_store.bucket)
    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"
    with pytest.raises(BucketRefused, match="nobody listens there"):
        apply_bucket(object_store.bucket, seconds=0)


@pytest.mark.usefixtures("without_kafka")
def test_a_link_is_signed_with_version_4_and_works_for_whoever_has_it(object_store: ObjectStore) -> None:
    key = f"results/{uuid.uuid4()}/result.csv"
    client = boto3.client("s3", region_name=object_store.region)
    client.put_object(Bucket=object_store.bucket, Key=key, Body=b"answer\n42\n")
    link = ResultReader().link(f"s3://{object_store.bucket}/results/", key)
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in link
    assert f"%2F{object_store.region}%2Fs3%2Faws4_request" in link
    assert "X-Amz-Expires=3600" in link
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(link, timeout=10) as answer:
        assert answer.read() == b"answer\n42\n"
    client.delete_object(Bucket=object_store.bucket, Key=key)


@pytest.mark.usefixtures("without_kafka")
def test_the_kernels_layers_are_told() -> None:
    """On a kernel that lacks one, the doctor warns; the rest goes on."""
    finding = _find("sandbox")
    expected = "well" if supported_abi() >= 4 else "warning"
    assert finding.state == expected
    assert "Landlock" in finding.advice
