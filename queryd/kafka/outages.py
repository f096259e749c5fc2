"""One log line when a broker goes away and one when it is back, however often librdkafka complains in between."""

import logging

from confluent_kafka import KafkaError

_log = logging.getLogger("queryd.kafka")

# librdkafka's own log repeats every failed connection. What matters of it arrives through `error_cb`.
QUIET = {"log_level": 2}


class OutageLog:
    """Give its `complain` to librdkafka as `error_cb`; call `answered` when the broker has said anything."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._away = False

    def complain(self, error: KafkaError) -> None:
        """librdkafka reports an error that it goes on to mend by itself."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN and not self._away:
            self._away = True
            _log.warning("kafka is away, %s waits: %s", self._who, error.str())

    def answered(self) -> None:
        """The broker is there."""
        if self._away:
            self._away = False
            _log.info("kafka is back, %s goes on", self._who)


def explain_error(error: Exception) -> str:
    """The sentence of an error that confluent-kafka raised."""
    cause = error.args[0] if error.args else error
    return cause.str() if isinstance(cause, KafkaError) else str(cause)
