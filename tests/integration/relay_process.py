"""A relay of one shard as a process: `python -m tests.integration.relay_process DATA_URL BOOTSTRAP SHARD`.

It prints `ready` when it publishes or stands by, and ends by a signal.
"""

import asyncio
import sys

from producers.relay.relay import Relay, RelayRules
from telemetry.logs import set_up_logs


def main() -> None:
    """Publish for ever."""
    set_up_logs("INFO")
    url, bootstrap, shard = sys.argv[1:]
    rules = RelayRules(url, {"bootstrap.servers": bootstrap}, transactions=True, shards=(int(shard),))
    asyncio.run(Relay(rules, lambda: print("ready", flush=True)).run())


if __name__ == "__main__":
    main()
