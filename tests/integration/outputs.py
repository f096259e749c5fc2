"""What an engine has returned, whether it came over the pipe or lies in a file."""

from pathlib import Path

from engines.protocol import Output


def read_output(output: Output) -> bytes:
    """Return the result's bytes."""
    return output.content.read_bytes() if isinstance(output.content, Path) else output.content
