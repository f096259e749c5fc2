"""A replay as new queries finds those whose data has changed in between, and no other."""

import io

import psycopg
import pyarrow as pa
import pytest
from pyarrow import parquet

from queryd.events import Mode
from replay import result_difference
from tests.integration.fleet import Fleet
from tests.integration.queries import make_request, new_id
from tests.integration.replays.commands import CommandLine, await_terminal, publish, stretch
from tests.servers.kafka import Kafka

_QUERIES, _CHANGED = 200, 3


def _put_table(fleet: Fleet, org_id: str, name: str, values: list[float]) -> None:
    """A dataset of that name; put again, the same one with other rows."""
    file = io.BytesIO()
    parquet.write_table(pa.table({"n": range(len(values)), "value": values}), file)
    location = fleet.put_object(f"datasets/{org_id}/{name}.parquet", file.getvalue())
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        connection.execute(
            "INSERT INTO datasets (org_id, name, kind, location, visibility) VALUES (%s, %s, 'parquet', %s, 'org') "
            "ON CONFLICT DO NOTHING",
            [org_id, name, location],
        )


@pytest.mark.slow
def test_the_three_whose_data_was_changed_are_found(
    fleet: Fleet, queryd: CommandLine, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    org_id = new_id()
    _put_table(fleet, org_id, "quiet", [0.1 * n for n in range(50)])
    _put_table(fleet, org_id, "edited", [0.1 * n for n in range(50)])
    changed = [
        make_request(org_id=org_id, mode=Mode.BATCH, sql=f"SELECT n, value + {n} AS v FROM edited ORDER BY n")
        for n in range(_CHANGED)
    ]
    unchanged = [
        # Rows without an order, and sums whose last digits depend on it.
        make_request(org_id=org_id, sql=f"SELECT n % {n + 2} AS k, sum(value) AS v FROM quiet GROUP BY k")
        if n % 4
        else make_request(org_id=org_id, sql=f"SELECT {n} / (SELECT 'x{n}')")
        for n in range(_QUERIES - _CHANGED)
    ]
    with stretch() as span:
        publish(kafka, [*unchanged, *changed])
        await_terminal(fleet, org_id, _QUERIES)
    # One row of fifty.
    _put_table(fleet, org_id, "edited", [0.1 * n + (n == 7) for n in range(50)])

    asked = ["requests", *span.options, "--org", org_id, "--as-new"]
    planned = queryd.replay(*asked)
    assert (planned["matched"], planned["notes"]) == (_QUERIES, {"as_new": _QUERIES})
    execute = ["--execute", planned["hash"], "--reason", "an upgrade", "--compare", "--patience", "60"]
    done = queryd.replay(*asked, *execute, code=1)
    comparison = done["comparison"]
    assert comparison["counts"] == {"same": _QUERIES - _CHANGED, "different": _CHANGED, "gone": 0, "unfinished": 0}
    found = {each["original"] for each in comparison["queries"] if each["verdict"] == "different"}
    assert found == {request.query_id for request in changed}
    assert all(each["differences"] == ["values"] for each in comparison["queries"] if each["original"] in found)
    # The same may be asked again, for as long as the results are there.
    assert queryd.replay("compare", done["id"], code=1)["counts"] == comparison["counts"]
    assert "--as-new" in queryd.refuse("compare", queryd.carry_out("requests", *span.options, "--org", org_id)["id"])
    # DuckDB runs out of memory: a sentence, whose text is ours.
    monkeypatch.setattr(result_difference, "_SETTINGS", result_difference._SETTINGS | {"memory_limit": "1KB"})
    refused = queryd.refuse("compare", done["id"])
    assert "DuckDB can't compare the results of" in refused and "OutOfMemoryException. Free memory" in refused
    assert "Traceback" not in refused
