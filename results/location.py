"""Where a result lies: under a prefix of one attempt's own, which no other attempt ever writes to."""

from queryd.events import OrgId, OutputFormat, QueryId

# The first digits of an attempt's token are enough to tell apart what two workers wrote as the same attempt.
_TOKEN_DIGITS = 8


def prefix(org_id: OrgId, query_id: QueryId, attempt: int, token: str) -> str:
    """The prefix of an attempt's objects, `results/{org_id}/{query_id}/{attempt}-{token8}/`.

    `token` is the attempt's token, a UUID in its usual form. Raises `ValueError` for a shorter one.
    """
    if len(token) < _TOKEN_DIGITS:
        raise ValueError("an attempt's token has at least eight digits")
    return f"results/{org_id}/{query_id}/{attempt}-{token[:_TOKEN_DIGITS]}/"


def file_name(output_format: OutputFormat) -> str:
    """The name of a result that is one object: `result.parquet`, `result.csv` or `result.json`."""
    return f"result.{output_format}"
