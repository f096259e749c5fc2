"""What the commands of replays print."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from db.data.replays import Replay, ReplayStatus
from replay.comparison import Comparison
from replay.kinds import Note, Skip
from replay.letters import LetterLine
from replay.plan import Plan
from replay.run import Outcome
from service.cli.output import print_fields, print_json, print_rows, show_rows


def print_plan(planned: Plan, as_json: bool) -> None:
    """The plan, and how to carry it out."""
    found = planned.to_json()
    if as_json:
        print_json(found)
        return
    _print_ranges(found["ranges"])
    print(f"records read: {planned.scanned}; to be published: {planned.tally.copies}")
    _print_counts(found)
    print(f"the first of them: {', '.join(planned.first_ids)}")
    say_how_to_execute(planned.hash, "nothing was published")


def say_how_to_execute(plan_hash: str, done: str) -> None:
    """The plan's hash, and the command that carries it out."""
    again = shlex.join(["queryd", *sys.argv[1:]])
    print(f"plan: {plan_hash}")
    print(f"{done}. To carry it out:")
    print(f"{again} --execute {plan_hash} --reason 'why'")


def print_outcome(outcome: Outcome, replay_id: str, as_json: bool, comparison: Comparison | None) -> None:
    """How a replay ended."""
    counts = outcome.counts
    if as_json:
        compared = {} if comparison is None else {"comparison": comparison.to_json()}
        print_json({"id": replay_id, "status": outcome.status.value} | dict(counts) | compared)
        return
    print(f"replay {replay_id}: {outcome.status.value}; published: {counts['published']}")
    _print_counts(counts)
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
    _print_counts(counts)
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
    show_rows("dead letters", [asdict(line) for line in lines], as_json)


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


def _print_counts(counts: Mapping[str, Any]) -> None:
    for name, count in counts.get("notes", {}).items():
        print(f"  {count} {Note(name).description}")
    for name, count in counts.get("skipped", {}).items():
        print(f"  {count} skipped, each {Skip(name).description}")
