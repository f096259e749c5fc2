"""How far behind, from librdkafka's statistics: what is known is counted, and what is not is left out."""

import json
from typing import Any

import pytest

from queryd.kafka.lag import read_behind


def _tell(**changes: Any) -> str:
    """The statistics of one partition that is fetched to its end."""
    partition = {"partition": 3, "ls_offset": 100, "hi_offset": 100, "next_offset": 100, "fetchq_cnt": 0} | changes
    return json.dumps({"topics": {"lane": {"partitions": {str(partition["partition"]): partition}}}})


@pytest.mark.parametrize(
    ("changes", "behind"),
    [
        ({}, 0),
        # In the log and not fetched, fetched and not handed over, and both.
        ({"next_offset": 60}, 40),
        ({"fetchq_cnt": 7}, 7),
        ({"next_offset": 90, "fetchq_cnt": 7}, 17),
        # An open transaction's records are nobody's yet.
        ({"hi_offset": 500}, 0),
        # What was fetched since the end was last heard of.
        ({"next_offset": 120}, 0),
    ],
)
def test_what_is_still_to_come_is_counted(changes: dict[str, int], behind: int) -> None:
    assert read_behind(_tell(**changes)) == {("lane", 3): behind}


@pytest.mark.parametrize("changes", [{"ls_offset": -1001}, {"next_offset": -1001}, {"partition": -1}])
def test_a_partition_that_is_not_known_is_left_out(changes: dict[str, int]) -> None:
    assert read_behind(_tell(**changes)) == {}
