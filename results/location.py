"""Where a result lies: under a prefix of one attempt's own, which no other attempt ever writes to."""

import re
from dataclasses import dataclass

from queryd.events import OrgId, OutputFormat, QueryId

# The first digits of an attempt's token are enough to tell apart what two workers wrote as the same attempt.
_TOKEN_DIGITS = 8

# Everything of ours begins with it.
ROOT = "results/"
_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
# An attempt's number fits into the database's integer.
_KEY = re.compile(rf"({ROOT}{_UUID}/({_UUID})/(\d{{1,9}})-[0-9a-f]{{{_TOKEN_DIGITS}}}/).+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AttemptPlace:
    """Whose an object is, by its key: its query, the attempt's number, and the attempt's prefix."""

    query_id: QueryId
    attempt: int
    prefix: str


def read_key(key: str) -> AttemptPlace | None:
    """Whose an object is; None for one that no attempt of ours can have written."""
    found = _KEY.fullmatch(key)
    return None if found is None else AttemptPlace(QueryId(found[2]), int(found[3]), found[1])


def org_prefix(org_id: OrgId) -> str:
    """The prefix of everything that an org's queries have stored."""
    return f"{ROOT}{org_id}/"


def prefix(org_id: OrgId, query_id: QueryId, attempt: int, token: str) -> str:
    """The prefix of an attempt's objects, `results/{org_id}/{query_id}/{attempt}-{token8}/`.

    `token` is the attempt's token, a UUID in its usual form. Raises `ValueError` for a shorter one.
    """
    if len(token) < _TOKEN_DIGITS:
        raise ValueError("an attempt's token has at least eight digits")
    return f"{org_prefix(org_id)}{query_id}/{attempt}-{token[:_TOKEN_DIGITS]}/"


# What an author may know of a failure: `{"code", "message", "detail"}`, the detail in the engine's own words.
ERROR_FILE = "error.json"


def file_name(output_format: OutputFormat) -> str:
    """The name of a result that is one object: `result.parquet`, `result.csv` or `result.json`."""
    return f"result.{output_format}"
