"""Where a client finds Kafka, as the environment says."""

import json
import os
from typing import Any

from queryd.registry import use_environment


def read_kafka() -> dict[str, Any]:
    """librdkafka's configuration: the broker in `QUERYD_KAFKA_BOOTSTRAP`, and the properties in `QUERYD_KAFKA_OPTIONS`,
    a JSON object. The schema registry of the environment, if it names one, is used from now on.

    Raises `LookupError` where no broker is set, `ValueError` for options that are no JSON object.
    """
    bootstrap = os.environ.get("QUERYD_KAFKA_BOOTSTRAP")
    if not bootstrap:
        raise LookupError("QUERYD_KAFKA_BOOTSTRAP is not set: beside `queryd up`, run `set -a; . .queryd/env` first")
    use_environment()
    return _read_options() | {"bootstrap.servers": bootstrap}


def _read_options() -> dict[str, Any]:
    try:
        return dict(json.loads(os.environ.get("QUERYD_KAFKA_OPTIONS") or "{}"))
    except (ValueError, TypeError):
        # The options may hold a password, so that nothing of them is told.
        raise ValueError("QUERYD_KAFKA_OPTIONS must be a JSON object of librdkafka properties") from None
