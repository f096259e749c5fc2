"""The frames on a pipe between a parent and its child: four bytes of length, big-endian, then a JSON object."""

import json
import struct
from typing import Any

HEADER = struct.Struct(">I")

# The largest message is an SQL text of 256 KiB whose every character JSON escapes twelvefold, and its parameters; more
# than this means that the two sides are out of step.
MAX_FRAME_BYTES = 64 * 1024 * 1024

Message = dict[str, Any]


class BrokenFrame(Exception):
    """The bytes on the pipe are no frame of ours: the other side can't be trusted any more, end it."""


def encode(message: Message) -> bytes:
    """The bytes of one frame. Escapes everything outside ASCII, so that any Python string survives."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """The length in bytes of the body after a header of four bytes; raises `BrokenFrame` for an absurd one."""
    length: int = HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise BrokenFrame("a frame is longer than any message of ours")
    return length


def decode(body: bytes) -> Message:
    """The message in a frame's body; raises `BrokenFrame` for anything that is not a JSON object."""
    try:
        message = json.loads(body)
    except ValueError:
        raise BrokenFrame("a frame does not hold JSON") from None
    if not isinstance(message, dict):
        raise BrokenFrame("a frame holds no object")
    return message
