"""What the commands of replays print."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from db.data.replays import Replay, ReplayStatus
from replay.comparison import Comparison
from replay.kinds import NOTES, SKIP_REASONS, Note, Skip
from replay.letters import LetterLine
from replay.plan import Plan
from replay.run import Outcome
from service.cli.output import print_fields, print_json, print_rows


def print_plan(planned: Plan, as_json: bool) -> None:
    """The plan, and how to carry it out."""
    ranges = [
        {
            "topic": each.range.topic,
            "partition": each.range.partition,
            "start": each.range.start,
            "end": each.range.end,
            "matched": each.matched,
            "skipped": each.skipped,
        }
        for each in planned.ranges
    ]
    notes = {note.value: count for note, count in planned.notes.items()}
    skipped = {skip.value: count for skip, count in planned.skipped.items()}
    if as_json:
        print_json(
            {
                "kind": planned.kind,
                "hash": planned.hash,
                "ranges": ranges,
                "scanned": planned.scanned,
                "matched": planned.matched,
                "notes": notes,
                "skipped": skipped,
                "first_ids": planned.first_ids,
            }
        )
        return
    _print_ranges(ranges)
    print(f"records read: {planned.scanned}; to be published: {planned.matched}")
    for line in _describe_counts(notes, skipped):
        print(f"  {line}")
    print(f"the first of them: {', '.join(planned.first_ids)}")
    print(f"plan: {planned.hash}")
    again = shlex.join(["queryd", *sys.argv[1:]])
    print("nothing was published. To carry it out:")
    print(f"{again} --execute {planned.hash} --reason 'why'")


def print_outcome(outcome: Outcome, replay_id: str, as_json: bool, comparison: Comparison | None) -> None:
    """How a replay ended."""
    counts = outcome.counts
    if as_json:
        compared = {} if comparison is None else {"comparison": comparison.to_json()}
        print_json({"id": replay_id, "status": outcome.status.value} | dict(counts) | compared)
        return
    print(f"replay {replay_id}: {outcome.status.value}; published: {counts['published']}")
    for line in _describe_counts(counts["notes"], counts["skipped"]):
        print(f"  {line}")
    if comparison is not None:
        print(comparison.to_text())
    if outcome.status is ReplayStatus.ACTIVE:
        print(f"stopped; go on with: queryd replay resume {replay_id}")


def print_replay(replay: Replay, as_json: bool) -> None:
    """One replay, all that is known of it."""
    if as_json:
        details = {"plan": replay.plan, "counts": replay.counts, "checkpoint": replay.checkpoint}
        print_json(summarize(replay) | details)
        return
    plan, counts = replay.plan, replay.counts
    print_fields(summarize(replay) | {"plan": plan.get("hash")})
    asked = {**plan.get("asked", {}), "options": plan.get("options")}
    for name, said in ((part, value) for part, values in asked.items() for value in (values or {}).items()):
        print_fields({f"{name} {said[0]}": said[1]})
    for line in _describe_counts(counts.get("notes", {}), counts.get("skipped", {})):
        print(f"  {line}")
    reached = replay.checkpoint
    _print_ranges(
        [
            {
                "topic": topic,
                "partition": partition,
                "start": start,
                "end": end,
                "reached": reached.get(f"{topic}/{partition}", start),
            }
            for topic, partition, start, end in plan.get("ranges", ())
        ]
    )


def print_letters(lines: Sequence[LetterLine], as_json: bool) -> None:
    """Dead letters as they lie in their topic."""
    rows = [asdict(line) for line in lines]
    if as_json:
        print_json(rows)
    else:
        print_rows("dead letters", rows)


def summarize(replay: Replay) -> dict[str, Any]:
    """A replay in a line: who, why, and how far."""
    return {
        "id": replay.id,
        "kind": replay.kind,
        "status": replay.status,
        "by": replay.actor,
        "reason": replay.reason,
        "planned": replay.plan.get("matched"),
        "published": replay.counts.get("published"),
        "created_at": replay.created_at,
        "updated_at": replay.updated_at,
    }


def _print_ranges(ranges: Sequence[Mapping[str, Any]]) -> None:
    filled = [each for each in ranges if each["start"] < each["end"]]
    if filled:
        print_rows("ranges", filled)
    if len(filled) < len(ranges):
        print(f"empty partitions: {len(ranges) - len(filled)}")


def _describe_counts(notes: Mapping[str, int], skipped: Mapping[str, int]) -> Iterator[str]:
    for name, count in notes.items():
        yield f"{count} {NOTES[Note(name)]}"
    for name, count in skipped.items():
        yield f"{count} skipped, each {SKIP_REASONS[Skip(name)]}"
