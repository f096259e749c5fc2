"""All benchmarks, one after the other. With `--json` each prints one line.

Run it from the checkout:
`python -m bench [--queries N] [--events N] [--rebuilt N] [--runs N] [--bootstrap HOST:PORT] [--json]`.
"""

import argparse
import sys

from bench import fairness, gate, neighbours, rebuild, relay, small_queries
from tests.servers import kafka as brokers


def main() -> None:
    """Run the benchmarks; the relay's and the rebuild's only where there is a Kafka with transactions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=500, help="small queries in a run")
    parser.add_argument("--events", type=int, default=30_000, help="events in a run of the relay")
    parser.add_argument("--rebuilt", type=int, default=rebuild.EVENTS, help="events in the log of a rebuild")
    parser.add_argument("--runs", type=int, default=3, help="runs of each")
    parser.add_argument("--bootstrap", help="a Kafka with transactions to use")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    arguments = parser.parse_args()
    as_json = ["--json"] if arguments.json else []
    common = ["--runs", str(arguments.runs), *as_json]
    gate.main(common)
    neighbours.main(common)
    fairness.main(as_json)
    if arguments.bootstrap is not None:
        common += ["--bootstrap", arguments.bootstrap]
    small_queries.main(["--queries", str(arguments.queries), *common])
    if arguments.bootstrap is None and brokers.choose("auto") is brokers.Kind.EMBEDDED:
        print(f"without the relay's and the rebuild's: install {brokers.WHAT_TO_INSTALL}", file=sys.stderr)
        return
    relay.main(["--events", str(arguments.events), *common])
    rebuild.main(["--events", str(arguments.rebuilt), *common])


if __name__ == "__main__":
    main()
