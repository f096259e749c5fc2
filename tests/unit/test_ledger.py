"""What a transaction's metadata says about the rows that it published."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers.relay.ledger import (
    SPAN,
    Ledger,
    LedgerUnreadable,
    digest_events,
    read_ledger,
    within_span,
    write_ledger,
)
from tests.unit.samples import QUICK

GENERATION = "8d3c1f4e-2b7a-4c3d-9e6f-7a8b9c0d1e2f"
# The broker's default `offset.metadata.max.bytes`.
MAX_BYTES = 4096

_BASES = st.integers(1, 2**63 - 1 - SPAN)
_DISTANCES = st.sets(st.integers(0, SPAN - 1), min_size=1, max_size=500)
_LAST_BATCH = 2**63 - 1


def _make_ledger(positions: tuple[int, ...]) -> Ledger:
    return Ledger(GENERATION, positions, _LAST_BATCH, digest_events(["an event"]))


@QUICK
@given(base=_BASES, distances=_DISTANCES)
def test_every_position_and_no_other_survives_the_metadata(base: int, distances: set[int]) -> None:
    ledger = _make_ledger(tuple(sorted(base + distance for distance in distances)))
    assert read_ledger(write_ledger(ledger)) == ledger


@QUICK
@given(base=_BASES, distances=_DISTANCES)
def test_the_order_in_which_rows_were_published_does_not_matter(base: int, distances: set[int]) -> None:
    falling = tuple(sorted((base + distance for distance in distances), reverse=True))
    assert read_ledger(write_ledger(_make_ledger(falling))).positions == falling[::-1]


def test_a_full_batch_stays_below_the_brokers_limit() -> None:
    base = 2**63 - SPAN
    # 500 positions as far apart as a batch may have them, at the largest position of a bigint.
    positions = (*range(base, base + 499), base + SPAN - 1)
    metadata = write_ledger(_make_ledger(positions))
    assert len(metadata.encode()) < MAX_BYTES
    assert len(metadata.encode()) < 2_900
    assert read_ledger(metadata).positions == positions


@QUICK
@given(first=_BASES, steps=st.lists(st.integers(1, 2 * SPAN), max_size=20))
def test_a_batch_ends_where_the_bitmap_would(first: int, steps: list[int]) -> None:
    positions = [first]
    for step in steps:
        positions.append(positions[-1] + step)
    count = within_span(positions)
    assert count >= 1
    assert positions[count - 1] - first < SPAN
    assert count == len(positions) or positions[count] - first >= SPAN
    assert len(write_ledger(_make_ledger(tuple(positions[:count]))).encode()) < MAX_BYTES


def test_the_last_position_within_a_span_is_in_the_batch_and_the_next_is_not() -> None:
    assert within_span([7, 7 + SPAN - 1, 7 + SPAN]) == 2


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "{",
        "null",
        "[1]",
        '"text"',
        "7",
        "{}",
        json.dumps({"g": GENERATION, "b": 1}),
        json.dumps({"g": GENERATION, "b": None, "m": "AQ=="}),
        json.dumps({"g": GENERATION, "b": "one", "m": "AQ=="}),
        json.dumps({"g": GENERATION, "b": 1, "m": 7}),
        json.dumps({"g": GENERATION, "b": 1, "m": "%%%"}),
        json.dumps({"g": GENERATION, "b": 1, "m": "AQ"}),
        json.dumps({"g": GENERATION, "b": 1, "m": "é"}),
        json.dumps({"g": GENERATION, "b": 1, "m": "AQ==", "n": "one"}),
        '{"g": "x", "b": NaN, "m": "AQ=="}',
        '{"g": "x", "b": 1e999, "m": "AQ=="}',
        "[" * 100_000,
    ],
)
def test_metadata_of_somebody_else_is_unreadable_and_not_quoted(metadata: str) -> None:
    with pytest.raises(LedgerUnreadable, match=r"^the relay's committed offset holds no metadata of a relay$"):
        read_ledger(metadata)


def test_what_the_first_release_wrote_is_read_as_an_uncounted_batch() -> None:
    written = json.dumps({"g": GENERATION, "b": 7, "m": "Aw=="})
    assert read_ledger(written) == Ledger(GENERATION, (7, 8), batch=None, digest="")


def test_a_batchs_digest_is_that_of_its_events_in_any_order() -> None:
    assert digest_events(["a", "b"]) == digest_events(["b", "a"])
    assert len({digest_events(ids) for ids in ([], ["a"], ["b"], ["a", "b"], ["ab"])}) == 5
