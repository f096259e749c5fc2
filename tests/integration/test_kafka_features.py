"""What `queryd doctor` asks of Kafka's own protocol, and what it says of a cluster with old transactions."""

import pytest
from pydantic import SecretStr

from service import doctor
from service.doctor import examine_transactions
from service.kafka_features import read_finalized_features
from service.settings import Settings
from tests.servers.kafka import Kafka

_SETTINGS = Settings(
    kafka_bootstrap="127.0.0.1:1",
    data_url=SecretStr("postgresql://localhost/data"),
    state_url=SecretStr("postgresql://localhost/state"),
    results_url="s3://bucket",
)


@pytest.mark.needs_kafka
def test_the_finalized_features_of_apache_kafka_are_read(kafka: Kafka) -> None:
    host, port = kafka.bootstrap.split(",")[0].rsplit(":", 1)
    features = read_finalized_features(host, int(port))
    assert features["transaction.version"] == 2
    assert features["metadata.version"] > 20


@pytest.mark.parametrize(
    ("features", "state"),
    [({"transaction.version": 2}, "well"), ({"transaction.version": 1}, "warning"), ({}, "warning")],
)
def test_a_cluster_without_the_second_version_of_transactions_is_a_warning(
    features: dict[str, int], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "read_finalized_features", lambda _host, _port: features)
    [finding] = examine_transactions(_SETTINGS)
    assert (finding.what, finding.state) == ("relay", state)


def test_of_a_cluster_that_is_away_another_check_says_so() -> None:
    assert list(examine_transactions(_SETTINGS)) == []
