"""Dead letters go back to their topic, mended, as often as the cap allows."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from confluent_kafka import Message, Producer

from queryd.codec import Undecodable, decode_fields, encode, encode_fields
from queryd.events import QueryRequested, Topic
from queryd.headers import ReplayHeader
from tests.integration.fleet import Fleet, await_that
from tests.integration.queries import make_request, new_id
from tests.integration.records import PATIENCE_SECONDS, config_of, headers_of, write
from tests.integration.replays.commands import CommandLine, await_terminal, find_copies, publish, read_records, stretch
from tests.servers.kafka import Kafka

_LETTERS, _MENDED = 500, 450
# Only one lane is asked for: it has a slot that no other test uses.
_LANE = Topic.REQUESTS_INTERACTIVE


def _letters_of(kafka: Kafka, org_id: str) -> list[Message]:
    return [record for record in read_records(kafka, [Topic.DEAD_LETTERS]) if _org_of(record) == org_id]


def _org_of(record: Message) -> str | None:
    try:
        org_id: str = decode_fields(_value(record), QueryRequested.__name__)["org_id"]
    except Undecodable:
        # Other tests bury records of any kind, one without a value among them.
        return None
    return org_id


def _await_letters(kafka: Kafka, org_id: str, count: int) -> list[Message]:
    await_that(lambda: len(_letters_of(kafka, org_id)) >= count, f"{count} dead letters")
    found = _letters_of(kafka, org_id)
    assert len(found) == count
    return found


def _ends(fleet: Fleet, org_id: str) -> Counter[tuple[str, str | None]]:
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        rows = connection.execute("SELECT status, error_code FROM query_results WHERE org_id = %s", [org_id]).fetchall()
    return Counter((status, code) for status, code in rows)


def _broken(org_id: str, count: int, *, beyond_mending: bool = False) -> Sequence[QueryRequested]:
    """Requests with a time limit of zero; some have no statement besides, and no patch of the limit helps them."""
    changes = {"sql": None} if beyond_mending else {}
    return [make_request(org_id=org_id, timeout_seconds=0, **changes) for _ in range(count)]


@pytest.mark.slow
def test_mended_letters_succeed_and_the_others_are_dead_again_with_their_count(
    fleet: Fleet, queryd: CommandLine, kafka: Kafka
) -> None:
    org_id = new_id()
    publish(kafka, [*_broken(org_id, _MENDED), *_broken(org_id, _LETTERS - _MENDED, beyond_mending=True)])
    letters = _await_letters(kafka, org_id, _LETTERS)
    assert {headers_of(letter)["queryd_dead_redrives"] for letter in letters} == {b"0"}

    done = queryd.carry_out("dead-letters", "--org", org_id, "--set", "timeout_seconds=30")
    assert (done["published"], done["notes"]) == (_LETTERS, {"new_id": _LETTERS})

    # The ids of the letters had been told that they failed, and stay so.
    await_terminal(fleet, org_id, 2 * _LETTERS)
    assert _ends(fleet, org_id) == {
        ("Succeeded", None): _MENDED,
        ("Failed", "INVALID_REQUEST"): _LETTERS + (_LETTERS - _MENDED),
    }
    fresh = find_copies(_await_letters(kafka, org_id, _LETTERS + (_LETTERS - _MENDED)), done["id"])
    assert len(fresh) == _LETTERS - _MENDED
    assert {headers_of(letter)["queryd_dead_redrives"] for letter in fresh} == {b"1"}
    # What it died of is told once, of the last time.
    assert {_names(letter).count("queryd_dead_code") for letter in fresh} == {1}


def _names(record: Message) -> list[str]:
    headers: Any = record.headers() or ()
    return [name for name, _ in headers]


@pytest.mark.slow
def test_a_letter_is_sent_again_once_and_parked_in_the_end(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    """What comes of it is a letter of its own, with the count of both; that one may be sent again, up to the cap."""
    org_id = new_id()
    publish(kafka, _broken(org_id, 3))
    _await_letters(kafka, org_id, 3)
    queryd.carry_out("dead-letters", "--org", org_id)
    _await_letters(kafka, org_id, 6)
    planned = queryd.replay("dead-letters", "--org", org_id, "--max-redrives", "2")
    assert (planned["matched"], planned["skipped"]["redriven"]) == (3, 3)
    refused = queryd.refuse("dead-letters", "--org", org_id, "--max-redrives", "1")
    assert "3 parked (it was sent" in refused
    assert "3 redriven (it was sent" in refused
    # Letters that nobody can read without a registry are listed too, whoever's they are.
    listed = [each for each in queryd.list_letters("--org", org_id, "--max-redrives", "1") if each["org_id"] == org_id]
    assert sorted((each["redrives"], each["skip"]) for each in listed) == [(0, "redriven")] * 3 + [(1, "parked")] * 3
    assert {each["code"] for each in listed} == {"INVALID_REQUEST"}
    assert {each["reason"] for each in listed} == {"timeout_seconds must be above zero"}


@pytest.mark.slow
def test_letters_of_one_id_are_requests_of_their_own(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id = new_id()
    first = make_request(org_id=org_id)
    publish(kafka, [make_request(org_id=org_id, query_id=first.query_id, sql=f"SELECT {n}") for n in range(3)])
    _await_letters(kafka, org_id, 2)
    assert queryd.carry_out("dead-letters", "--org", org_id)["published"] == 2
    await_terminal(fleet, org_id, 3)
    assert _ends(fleet, org_id) == {("Succeeded", None): 3}
    assert "2 redriven" in queryd.refuse("dead-letters", "--org", org_id)


@pytest.mark.slow
def test_a_letter_whose_id_nobody_has_keeps_it_and_its_bytes(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    """It could not be read; the reader may have learnt since."""
    key = new_id()
    write(config_of(kafka), _LANE, key, b"\xc3\x01" + bytes(8) + b"of another version")
    await_that(lambda: _with_key(kafka, key), "the dead letter")
    done = queryd.carry_out("dead-letters", "--key", key, "--error-code", "UNDECODABLE")
    assert (done["published"], done["notes"]) == (1, {"own_id": 1})
    [copied] = find_copies(read_records(kafka, [_LANE]), done["id"])
    assert copied.value() == b"\xc3\x01" + bytes(8) + b"of another version"
    assert headers_of(copied)["queryd_dead_redrives"] == b"1"
    assert "queryd_dead_code" not in headers_of(copied)
    patched = queryd.refuse("dead-letters", "--key", key, "--set", "timeout_seconds=5")
    assert "unreadable" in patched


@pytest.mark.slow
def test_a_record_in_confluents_format_stops_no_replay_where_there_is_no_registry(
    fleet: Fleet, queryd: CommandLine, kafka: Kafka
) -> None:
    """Anybody's record may begin with a zero byte. The request is named, the letter goes back as any unreadable one."""
    key, value = new_id(), bytes(5) + b"of some other registry"
    with stretch() as span:
        write(config_of(kafka), _LANE, key, value)
    await_that(lambda: _with_key(kafka, key), "the dead letter")
    asked = queryd.refuse("requests", *span.options, "--key", key)
    assert "1 no_registry" in asked
    assert "QUERYD_SCHEMA_REGISTRY_URL" in asked
    for more in (["--org", new_id()], ["--mode", "batch"], ["--set", "timeout_seconds=5"]):
        assert "1 no_registry" in queryd.refuse("dead-letters", "--key", key, *more)
    done = queryd.carry_out("dead-letters", "--key", key)
    assert (done["published"], done["notes"]) == (1, {"own_id": 1})
    [copied] = find_copies(read_records(kafka, [_LANE]), done["id"])
    assert copied.value() == value


def _with_key(kafka: Kafka, key: str) -> list[Message]:
    return [record for record in read_records(kafka, [Topic.DEAD_LETTERS]) if record.key() == key.encode()]


@pytest.mark.slow
def test_a_mended_letter_of_nobody_s_org_runs_once_under_its_own_id(
    fleet: Fleet, queryd: CommandLine, kafka: Kafka
) -> None:
    org_id, request = new_id(), make_request()
    fields = decode_fields(encode(request), QueryRequested.__name__) | {"org_id": "nobody"}
    write(config_of(kafka), _LANE, request.query_id, encode_fields(fields, QueryRequested.__name__, _LANE))
    await_that(lambda: _with_key(kafka, request.query_id), "the dead letter")
    asked = ["dead-letters", "--key", request.query_id, "--set", f"org_id={org_id}"]
    assert queryd.carry_out(*asked)["notes"] == {"own_id": 1}
    await_terminal(fleet, org_id, 1)
    assert "1 redriven" in queryd.refuse(*asked)


@pytest.mark.slow
def test_a_letter_in_conflict_runs_under_a_new_id(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id = new_id()
    first = make_request(org_id=org_id)
    publish(kafka, [first])
    await_terminal(fleet, org_id, 1)
    publish(kafka, [make_request(org_id=org_id, query_id=first.query_id, sql="SELECT 2")])
    _await_letters(kafka, org_id, 1)
    done = queryd.carry_out("dead-letters", "--org", org_id, "--error-code", "CONFLICT")
    assert done["notes"] == {"new_id": 1}
    await_terminal(fleet, org_id, 2)
    assert _ends(fleet, org_id) == {("Succeeded", None): 2}
    [copied] = find_copies(read_records(kafka, [_LANE]), done["id"])
    headers = headers_of(copied)
    assert copied.key() == decode_fields(_value(copied), QueryRequested.__name__)["query_id"].encode()
    assert headers[ReplayHeader.TOPIC] == Topic.DEAD_LETTERS.encode()


def _value(record: Message) -> bytes | None:
    value = record.value()
    assert not isinstance(value, str)
    return value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("timeout_seconds=0", "timeout_seconds must be above zero"),
        ("mode=sometimes", "mode must be one of"),
        ("org_id=nobody", "org_id is not a UUID"),
        ("colour=red", "no field colour"),
        ("query_id=00000000-0000-0000-0000-000000000001", "conflicts"),
        ('timeout_seconds="long"', "timeout_seconds would make every request invalid"),
        # A text would become a list of its letters: other roles than were meant.
        ("roles=admin", "roles would not stay as it is given"),
        ('parameters={"n": 12345678901234567890}', "parameters would not stay as it is given"),
        ('parameters=[["a", 1]]', "parameters would make every request invalid"),
    ],
)
def test_a_patch_that_makes_requests_invalid_is_refused(
    queryd: CommandLine, kafka: Kafka, change: str, said: str
) -> None:
    org_id = new_id()
    publish(kafka, _broken(org_id, 1))
    _await_letters(kafka, org_id, 1)
    assert said in queryd.refuse("dead-letters", "--org", org_id, "--set", change)


def test_a_patch_that_breaks_a_valid_letter_is_refused(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    """A letter in conflict is a valid request; without its statement it would not be."""
    org_id = new_id()
    first = make_request(org_id=org_id)
    publish(kafka, [first, make_request(org_id=org_id, query_id=first.query_id, sql="SELECT 2")])
    _await_letters(kafka, org_id, 1)
    said = queryd.refuse("dead-letters", "--org", org_id, "--set", f"saved_query_id={new_id()}")
    assert "make a valid request invalid" in said


@pytest.mark.slow
def test_a_resumed_patch_is_given_again(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    """Its values are kept nowhere: they may be SQL."""
    org_id, replay_id, canary = new_id(), new_id(), "canary_of_a_patch"
    publish(kafka, _broken(org_id, 300))
    _await_letters(kafka, org_id, 300)
    change = f"sql=SELECT 1 AS {canary}"
    patch = ["--set", change, "--set", "timeout_seconds=9"]
    planned = queryd.replay("dead-letters", "--org", org_id, *patch)
    running = queryd.start(
        "dead-letters", "--org", org_id, *patch, "--execute", planned["hash"], "--reason", "to be killed",
        "--id", replay_id, "--rate", "50",
    )  # fmt: skip
    await_that(lambda: find_copies(read_records(kafka, [_LANE]), replay_id), "the first copies")
    running.kill()
    running.communicate()
    assert "--set" in queryd.refuse("resume", replay_id)
    assert "--set" in queryd.refuse("resume", replay_id, "--set", "timeout_seconds=9")
    done = queryd.replay("resume", replay_id, *patch, "--rate", "10000")
    # What the first process had sent and not noted is not sent again, where it was accepted by now.
    assert (done["status"], done["published"] + done["skipped"].get("redriven", 0)) == ("Done", 300)
    await_terminal(fleet, org_id, 600)
    assert _ends(fleet, org_id) == {("Succeeded", None): 300, ("Failed", "INVALID_REQUEST"): 300}
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        [(row,)] = connection.execute("SELECT replays::text FROM replays WHERE id = %s", [replay_id]).fetchall()
    assert canary not in row
    assert "timeout_seconds" in row


@pytest.mark.slow
def test_what_queryd_has_not_buried_is_left_alone(queryd: CommandLine, kafka: Kafka) -> None:
    key = new_id()
    producer = Producer(config_of(kafka))
    producer.produce(Topic.DEAD_LETTERS, key=key, value=encode(make_request()))
    assert producer.flush(PATIENCE_SECONDS) == 0
    assert "1 foreign" in queryd.refuse("dead-letters", "--key", key)
