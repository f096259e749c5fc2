"""Kafka's own console tools, laid out as its distribution has them, for what docs/events.md prints."""

import os
from pathlib import Path

from tests.servers.apache_kafka import resolve_tools_classpath

# As a distribution's scripts do it: its own jars behind the caller's class path.
_LAUNCHER = """\
#!/bin/sh
exec java -XX:TieredStopAtLevel=1 -cp "${{CLASSPATH:+$CLASSPATH:}}{libs}/*" {main} "$@"
"""
_TOOLS = {
    "kafka-console-producer.sh": "org.apache.kafka.tools.ConsoleProducer",
    "kafka-console-consumer.sh": "org.apache.kafka.tools.consumer.ConsoleConsumer",
}


def lay_out_distribution(folder: Path) -> None:
    """Make `bin/` and `libs/` in an empty folder; raises `RuntimeError` when Maven can't get the jars."""
    libs = folder / "libs"
    libs.mkdir()
    for jar in map(Path, resolve_tools_classpath().split(os.pathsep)):
        (libs / jar.name).symlink_to(jar)
    (folder / "bin").mkdir()
    for name, main in _TOOLS.items():
        script = folder / "bin" / name
        script.write_text(_LAUNCHER.format(libs=libs, main=main))
        script.chmod(0o755)
