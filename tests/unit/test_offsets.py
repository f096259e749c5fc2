"""What may be committed when work finishes out of order, against a model that remembers everything."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from queryd.kafka.offsets import PartitionOffsets
from tests.unit.samples import QUICK


class OffsetsAgainstAModel(RuleBasedStateMachine):
    """The model keeps every record and what the broker was last told; holes are offsets that never arrive."""

    received: Bundle[int] = Bundle("received")

    def __init__(self) -> None:
        super().__init__()
        self.offsets = PartitionOffsets()
        self.sizes: dict[int, int] = {}
        self.finished: set[int] = set()
        self.committed: list[int] = []
        self.under_way: int | None = None

    @rule(target=received, hole=st.integers(0, 3), size=st.integers(0, 1_000))
    def receive(self, hole: int, size: int) -> int:
        offset = max(self.sizes, default=100) + 1 + hole
        self.offsets.receive(offset, size)
        self.sizes[offset] = size
        return offset

    @rule(offset=received)
    def finish(self, offset: int) -> None:
        self.offsets.finish(offset)
        self.finished.add(offset)

    @rule(offset=st.integers(0, 50))
    def finish_what_was_never_received(self, offset: int) -> None:
        self.offsets.finish(offset)

    @rule()
    def take(self) -> None:
        taken = self.offsets.take_commit()
        if taken is not None:
            assert taken == self.expected()
            assert all(taken > earlier for earlier in self.committed)
            self.committed.append(taken)
            self.under_way = taken
        elif self.committed:
            assert self.expected() == self.committed[-1]

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def the_broker_refuses(self) -> None:
        self.offsets.retake()
        assert self.under_way is not None
        self.committed.remove(self.under_way)
        self.under_way = None
        # Whatever stands may now be told again; a model with no commit at all is the weakest that must hold.
        again = self.offsets.take_commit()
        assert again == self.expected()
        assert again is not None
        assert all(again >= earlier for earlier in self.committed)
        self.committed = [again]

    def expected(self) -> int | None:
        unfinished = self.sizes.keys() - self.finished
        if unfinished:
            return min(unfinished)
        return max(self.sizes) + 1 if self.sizes else None

    @invariant()
    def the_position_is_the_end_of_the_finished_prefix(self) -> None:
        assert self.offsets.position() == self.expected()

    @invariant()
    def the_window_counts_what_is_unfinished(self) -> None:
        unfinished = self.sizes.keys() - self.finished
        assert self.offsets.unfinished == (len(unfinished), sum(self.sizes[offset] for offset in unfinished))


TestOffsetsAgainstAModel = OffsetsAgainstAModel.TestCase
TestOffsetsAgainstAModel.settings = QUICK


def _received(offsets: Sequence[int]) -> PartitionOffsets:
    partition = PartitionOffsets()
    for offset in offsets:
        partition.receive(offset, 10)
    return partition


@QUICK
@given(order=st.permutations(range(12)))
def test_a_commit_never_passes_the_first_unfinished_record(order: list[int]) -> None:
    partition = _received(range(12))
    committed = 0
    for place, offset in enumerate(order, start=1):
        partition.finish(offset)
        taken = partition.take_commit()
        left = set(order[place:])
        assert taken is None or taken == min(left, default=12) > committed
        committed = taken or committed
    assert committed == 12


def test_nothing_is_committed_before_anything_is_received_or_finished() -> None:
    assert PartitionOffsets().take_commit() is None
    assert PartitionOffsets().position() is None
    assert _received([7, 8]).take_commit() is None


def test_a_hole_left_by_compaction_does_not_hold_a_commit_up() -> None:
    partition = _received([3, 9, 27])
    partition.finish(3)
    assert partition.take_commit() == 9
    partition.finish(27)
    assert partition.take_commit() is None
    partition.finish(9)
    assert partition.take_commit() == 28


def test_a_commit_is_taken_once() -> None:
    partition = _received([0, 1])
    partition.finish(0)
    assert partition.take_commit() == 1
    assert partition.take_commit() is None


def test_a_commit_that_did_not_reach_the_broker_is_taken_again() -> None:
    partition = _received([0, 1, 2])
    partition.finish(0)
    assert partition.take_commit() == 1
    partition.retake()
    partition.finish(1)
    assert partition.take_commit() == 2
    assert partition.take_commit() is None


def test_a_refused_commit_of_nothing_commits_nothing() -> None:
    partition = _received([5])
    partition.retake()
    assert partition.take_commit() is None
    empty = PartitionOffsets()
    empty.retake()
    assert empty.take_commit() is None


def test_finishing_twice_or_out_of_the_blue_changes_nothing() -> None:
    partition = _received([4, 5])
    partition.finish(4)
    partition.finish(4)
    partition.finish(99)
    assert partition.unfinished == (1, 10)
    assert partition.take_commit() == 5


def test_a_million_finished_records_behind_one_long_query_cost_nothing() -> None:
    partition = _received(range(100_000))
    for offset in range(1, 100_000):
        partition.finish(offset)
        assert partition.position() == 0
    assert partition.unfinished == (1, 10)
    partition.finish(0)
    assert partition.take_commit() == 100_000


def test_a_record_is_over_once_it_is_finished_or_lies_below_what_was_read() -> None:
    offsets = PartitionOffsets()
    # Nothing was received: only where reading began says anything.
    assert not offsets.is_over(5, None)
    assert not offsets.is_over(5, 5)
    assert offsets.is_over(4, 5)
    for offset in (5, 7):
        offsets.receive(offset, 1)
    assert [offsets.is_over(offset, 5) for offset in range(4, 9)] == [True, False, True, False, False]
    offsets.finish(5)
    assert [offsets.is_over(offset, 5) for offset in range(4, 9)] == [True, True, True, False, False]
