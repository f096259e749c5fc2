"""The features of a Kafka cluster, by one ApiVersions request of our own: librdkafka does not expose them.

Format: https://kafka.apache.org/protocol, ApiVersions version 3; a broker answers it before authentication.
"""

import io
import socket
import struct

_SECONDS = 5.0
_API_VERSIONS, _VERSION = 18, 3
_FINALIZED_FEATURES = 2


def read_finalized_features(host: str, port: int) -> dict[str, int]:
    """Return the finalized level of each feature; none from a broker older than 2.7.

    Raises `OSError` if the broker can't be reached without TLS, and `EOFError` if it answers something else.
    """
    # Header version 2 without a client id, then the names of the client's software and version.
    body = struct.pack(">hhih", _API_VERSIONS, _VERSION, 0, -1) + b"\0" + _compact("queryd") + _compact("1") + b"\0"
    with socket.create_connection((host, port), _SECONDS) as connection:
        connection.sendall(struct.pack(">i", len(body)) + body)
        with connection.makefile("rb") as answer:
            return _parse(_Fields(_read(answer, struct.unpack(">i", _read(answer, 4))[0])))


class _Fields(io.BytesIO):
    """The fields of an answer, in their order."""

    def take(self, layout: str) -> int:
        value: int
        (value,) = struct.unpack(layout, _read(self, struct.calcsize(layout)))
        return value

    def take_varint(self) -> int:
        value = shift = 0
        while (octet := self.take(">B")) & 0x80:
            value, shift = value | (octet & 0x7F) << shift, shift + 7
        return value | octet << shift

    def skip_tags(self) -> None:
        for _ in range(self.take_varint()):
            self.take_varint()
            _read(self, self.take_varint())


def _parse(fields: _Fields) -> dict[str, int]:
    fields.take(">i")
    if fields.take(">h") != 0:
        # An older broker, which answers in version 0.
        return {}
    for _ in range(fields.take_varint() - 1):
        _read(fields, 6)
        fields.skip_tags()
    fields.take(">i")
    features: dict[str, int] = {}
    for _ in range(fields.take_varint()):
        tag, size = fields.take_varint(), fields.take_varint()
        if tag != _FINALIZED_FEATURES:
            _read(fields, size)
            continue
        for _ in range(fields.take_varint() - 1):
            name = _read(fields, fields.take_varint() - 1).decode()
            # The highest level comes before the lowest.
            features[name] = fields.take(">h")
            fields.take(">h")
            fields.skip_tags()
    return features


def _read(source: io.BufferedIOBase | io.BytesIO, size: int) -> bytes:
    found = source.read(size)
    if size < 0 or len(found) != size:
        raise EOFError("the answer is not Kafka's")
    return found


def _compact(text: str) -> bytes:
    return bytes([len(text) + 1]) + text.encode()
