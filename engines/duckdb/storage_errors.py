"""What DuckDB says of the datasets' store, of the datasets' Postgres and of the scratch disk, in terms of ours.

The lists of outages are closed: an error that is in none of them is no outage and ends its query at once. Each entry is
proven by a situation in tests/integration/test_engine_outages.py; docs/reliability.md lists them.
"""

import errno
import re

import duckdb

from engines.protocol import EngineUnavailable, Outage, QueryFailed
from queryd.events import ErrorCode

Ours = QueryFailed | EngineUnavailable

# The store's answers that mean "later".
_STATUSES_OF_OUTAGES = frozenset({408, 429, 500, 502, 503, 504})
# curl's texts of failed transfers. A server that restarts may cut a TLS handshake, so that this one is an outage too.
_TRANSFERS_OF_OUTAGES = frozenset(
    {
        "Could not resolve hostname",
        "Could not connect to server",
        "SSL connect error",
        "Timeout was reached",
        "Server returned nothing (no headers, no data)",
        "Transferred a partial file",
        "Failed sending data to the peer",
        "Failure when receiving data from the peer",
    }
)
# A store signs nothing that is a quarter of an hour off; it answers 403, which is nobody's fault but a clock's.
_CLOCK_WRONG = "RequestTimeTooSkewed"

_STATUS = re.compile(r"\(HTTP (\d{3})|returned HTTP (\d{3}) ")
_TRANSFER = re.compile(r"(.+?) error for HTTP [A-Z]+ to '")
_SHORT = "Short read for HTTP GET"
_CHANGED = "ETag on reading file"
# Offsets in a file that lead beyond its end.
_BEYOND = ("This could mean the file was changed.", "Content-Length from server mismatches requested range")
_NO_FILES = "No files found that match"

# The Postgres scanner's errors: the server's or libpq's own words stand at their end, behind a quoted connection string
# or statement.
_CONNECTING = re.compile(r"Unable to connect to Postgres at(?: \".*\")?: (.*)", re.DOTALL)
_SCANNING = re.compile(r"Failed to (?:prepare|execute|fetch|initiate|read|send|copy)\b|Error during PQ")
_SAID = re.compile(r"[^\":]*(?: \".*\")?:\s*(.*)", re.DOTALL)
_POSTGRES_OUTAGES = re.compile(
    r"could not translate host name"
    r"|Connection refused|Connection timed out|Connection reset by peer|No route to host|Network is unreachable"
    r"|timeout expired"
    r"|server closed the connection unexpectedly|no connection to the server|connection not open"
    r"|SSL connection has been closed unexpectedly|SSL SYSCALL error|unexpected eof while reading"
    r"|could not (?:receive data from|send data to) server"
    r"|FATAL:  sorry, too many clients already|FATAL:  too many connections for|FATAL:  remaining connection slots"
    r"|FATAL:  the database system is |FATAL:  terminating connection"
    # A long scan of a replica is cancelled when it is in the way of replication.
    r"|ERROR:  canceling statement due to conflict with recovery"
)
_POSTGRES_TIMEOUT = "canceling statement due to statement timeout"
_POSTGRES_DENIED = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|ERROR:  permission denied for"
    r"|FATAL:  permission denied for|is not permitted to log in|role \".*\" does not exist"
)
# DuckDB wants as many dimensions in every row as the column's type has.
_DIMENSIONS = re.compile(r"Expected an array with \d+ dimensions?, but this array has \d+")

_DISK_FULL_NUMBERS = frozenset({str(errno.ENOSPC), str(errno.EDQUOT)})
_DISK_FULL = re.compile(r": (?:No space left on device|Disk quota exceeded)\s*$")
_FILE_TOO_LARGE = re.compile(r": File too large\s*$")

# What the Parquet reader says of a file that it can't read. Some texts name no file.
_UNREADABLE = re.compile(
    r"File '.*' too small to be a Parquet file"
    r"|No magic bytes found at end of file"
    r"|Failed to read (?:Parquet )?file ['\"]"
    r"|Parquet file '"
    r"|Parquet file (?:has invalid|is likely corrupted)"
    r"|The parquet file '"
    r"|Malformed Parquet schema in file"
    r"|Invalid (?:string encoding|JSON) found in Parquet file"
    r"|Invalid decimal encoding in Parquet file"
    r"|Mismatch in parquet read"
    r"|Could not read enough bytes from file \"s3://"
    r"|DELTA_\w+ - .* corrupt file\?"
    r"|Failed to decompress GZIP block"
    r"|TProtocolException"
    r"|don't know what type"
    r"|Out of buffer"
)
_DIFFERING = re.compile(r"schema mismatch in glob|column count mismatch")

FILE_UNREADABLE = "A file of the dataset can't be read."
# In front of the sentences of columns that can't be read, which our views raise where such a column is used.
REFUSED = "__queryd_refused: "


def read_disk_error(kind: type[Exception], text: str, number: str = "") -> Ours | None:
    """The meaning of an error of the scratch disk; None where it is none. `number` is the errno, if DuckDB tells it."""
    if not issubclass(kind, duckdb.IOException):
        return None
    if number in _DISK_FULL_NUMBERS or _DISK_FULL.search(text):
        return EngineUnavailable(Outage.SCRATCH)
    if number == str(errno.EFBIG) or _FILE_TOO_LARGE.search(text):
        return QueryFailed(ErrorCode.RESULT_TOO_LARGE, "The result is larger than a result may be.")
    return None


def read_store_error(kind: type[Exception], text: str) -> Ours | None:
    """The meaning of an error of the datasets' store; None where it is none. Only httpfs raises these texts."""
    if issubclass(kind, duckdb.HTTPException):
        found = _STATUS.search(text)
        return read_status(int(found[1] or found[2]) if found else 0, text)
    if not issubclass(kind, duckdb.IOException):
        return None
    transfer = _TRANSFER.match(text)
    if text.startswith(_SHORT) or (transfer and transfer[1] in _TRANSFERS_OF_OUTAGES):
        return EngineUnavailable(Outage.STORE)
    if transfer:
        return QueryFailed(
            ErrorCode.INTERNAL, "The engine can't speak to the datasets' store: check its endpoint and certificate."
        )
    if text.startswith(_NO_FILES):
        return _missing()
    return None


def read_status(status: int, text: str) -> Ours:
    """The meaning of an answer of the datasets' store that is no success; `text` holds its body."""
    if _CLOCK_WRONG in text:
        return EngineUnavailable(Outage.CLOCKS)
    if status in _STATUSES_OF_OUTAGES:
        return EngineUnavailable(Outage.STORE)
    if status in (401, 403):
        return _denied()
    if status in (404, 410):
        return _missing()
    return _read_status_of_file(status, text)


def _read_status_of_file(status: int, text: str) -> QueryFailed:
    if status == 416 or any(sign in text for sign in _BEYOND):
        return QueryFailed(ErrorCode.QUERY_ERROR, FILE_UNREADABLE)
    if text.startswith(_CHANGED):
        return QueryFailed(ErrorCode.QUERY_ERROR, "A file of the dataset changed while it was read.")
    return QueryFailed(ErrorCode.INTERNAL, f"The datasets' store refuses to be read (HTTP {status}).")


def read_postgres_error(text: str) -> Ours | None:
    """The meaning of an error of the datasets' Postgres; None where it is none.

    Its errors come as several kinds of exceptions, so that the text decides. No text of an author's begins like them.
    """
    if _DIMENSIONS.match(text):
        message = "A column of the dataset holds arrays with several dimensions, which can't be read."
        return QueryFailed(ErrorCode.QUERY_ERROR, message)
    connecting = _CONNECTING.match(text)
    if connecting is None and not _SCANNING.match(text):
        return None
    # A text ends where the statement that it quotes has a NUL.
    found = connecting or _SAID.match(text)
    said = found[1] if found else ""
    if _POSTGRES_DENIED.search(said):
        return _denied()
    if _POSTGRES_OUTAGES.search(said):
        return EngineUnavailable(Outage.POSTGRES)
    if connecting:
        message = "The engine can't log in to the datasets' Postgres: check QUERYD_DATASETS_PG_URL."
        return QueryFailed(ErrorCode.INTERNAL, message)
    return _read_scan_error(said)


def _read_scan_error(said: str) -> QueryFailed:
    if _POSTGRES_TIMEOUT in said:
        return QueryFailed(ErrorCode.QUERY_TIMEOUT, "A scan of the datasets' Postgres took longer than it may.")
    # A view that divides by zero, a column that was dropped meanwhile.
    return QueryFailed(ErrorCode.QUERY_ERROR, "The datasets' Postgres could not read the dataset.")


def read_file_error(text: str) -> QueryFailed | None:
    """The meaning of an error of a dataset's file; None where it is none. The detail is the caller's to add."""
    if _DIFFERING.search(text):
        return QueryFailed(ErrorCode.QUERY_ERROR, "The files of the dataset differ in their columns.")
    if _UNREADABLE.match(text):
        return QueryFailed(ErrorCode.QUERY_ERROR, FILE_UNREADABLE)
    return None


def _denied() -> QueryFailed:
    return QueryFailed(ErrorCode.ENGINE_UNAVAILABLE, "The engine's credentials may not read the dataset.")


def _missing() -> QueryFailed:
    return QueryFailed(ErrorCode.QUERY_ERROR, "The dataset's files are missing.")
