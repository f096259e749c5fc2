"""How far a consumer is behind, from librdkafka's own statistics.

A committed offset against the high watermark would count the holes of compaction and the markers of transactions, so
that a reader of a transactional topic never seems to arrive. What is counted here is records that still are to be
fetched, by where the fetcher stands, and records fetched and not handed over yet.

Source: librdkafka's STATISTICS.md, `topics.*.partitions.*`.
"""

import json
from typing import Any

# How often librdkafka writes its statistics: some 5 KB, parsed in 0.1 ms.
STATISTICS_MILLIS = 5_000


def read_behind(statistics: str) -> dict[tuple[str, int], int]:
    """Records of each partition that the consumer has yet to hand over; partitions that it does not know are missing.

    `statistics` is the JSON that librdkafka gives to `stats_cb`; raises `ValueError` and `KeyError` if it is not.
    """
    topics: dict[str, Any] = json.loads(statistics)["topics"]
    return {
        (topic, int(number)): behind
        for topic, told in topics.items()
        for number, partition in told["partitions"].items()
        if (behind := _count(partition)) is not None
    }


def _count(partition: dict[str, Any]) -> int | None:
    """An offset below zero is librdkafka's word for unknown; partition -1 is that of unassigned messages."""
    end, position = partition["ls_offset"], partition["next_offset"]
    if partition["partition"] < 0 or end < 0 or position < 0:
        return None
    return int(max(0, end - position)) + int(partition["fetchq_cnt"])
