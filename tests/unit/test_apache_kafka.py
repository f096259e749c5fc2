"""The Kafka of the tests is started by what its tools accept."""

import uuid

import pytest

from tests.servers.apache_kafka import draw_cluster_id


def test_a_cluster_id_is_never_taken_for_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [uuid.UUID(int=0xFB << 120), uuid.UUID(int=0x01 << 120)]
    monkeypatch.setattr(uuid, "uuid4", lambda: draws.pop(0))
    assert draw_cluster_id() == "AQAAAAAAAAAAAAAAAAAAAA"
    assert not draws
