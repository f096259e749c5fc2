"""Translate DuckDB's errors about the datasets' store, the datasets' Postgres and the scratch disk.

The lists of outages are complete: an error in none of them is no outage and ends its query at once. Each entry has a
test in tests/integration/test_engine_outages.py; docs/reliability.md lists the situations.
"""

import errno
import re

import duckdb

from engines.protocol import EngineUnavailable, Outage, QueryFailed
from queryd.events import ErrorCode

Ours = QueryFailed | EngineUnavailable

# HTTP statuses after which a retry may succeed.
_STATUSES_OF_OUTAGES = frozenset({408, 429, 500, 502, 503, 504})
# curl's texts of failed transfers. A restarting server may cut a TLS handshake, so its error is an outage too.
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
# A store refuses a signature that is 15 minutes off with 403. The cause is a clock, not the credentials.
_CLOCK_WRONG = "RequestTimeTooSkewed"

_STATUS = re.compile(r"\(HTTP (\d{3})|returned HTTP (\d{3}) ")
_TRANSFER = re.compile(r"(.+?) error for HTTP [A-Z]+ to '")
_SHORT = "Short read for HTTP GET"
_CHANGED = "ETag on reading file"
# Errors about an offset beyond the end of a file.
_BEYOND = ("This could mean the file was changed.", "Content-Length from server mismatches requested range")
_NO_FILES = "No files found that match"

# The Postgres scanner's errors. They quote the connection string or the statement, then the server's or libpq's text.
_CONNECTING = re.compile(r"Unable to connect to Postgres at(?: \".*\")?: (.*)", re.DOTALL)
# DuckDB commits a read too, and reports a failed commit as a transaction's error.
_SCANNING = re.compile(
    r"Failed to (?:prepare|execute|fetch|initiate|read|send|copy|begin|commit|roll ?back)\b|Error during PQ"
)
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
    # A replica cancels a long scan that blocks replication.
    r"|ERROR:  canceling statement due to conflict with recovery"
)
_POSTGRES_TIMEOUT = "canceling statement due to statement timeout"
_POSTGRES_DENIED = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|ERROR:  permission denied for"
    r"|FATAL:  permission denied for|is not permitted to log in|role \".*\" does not exist"
)
# DuckDB requires the same number of dimensions in every row.
_DIMENSIONS = re.compile(r"Expected an array with \d+ dimensions?, but this array has \d+")

_DISK_FULL_NUMBERS = frozenset({str(errno.ENOSPC), str(errno.EDQUOT)})
_DISK_FULL = re.compile(r": (?:No space left on device|Disk quota exceeded)\s*$")
_FILE_TOO_LARGE = re.compile(r": File too large\s*$")

# The Parquet reader's errors about an unreadable file. Some texts do not name the file.
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
# From the text's beginning: an author's values may hold the same words.
_DIFFERING = re.compile(
    r"Failed to read file(?:\(s\))? \".*(?:schema mismatch in glob|column count mismatch):", re.DOTALL
)

FILE_UNREADABLE = "A file of the dataset can't be read."
# The prefix of the errors that queryd's views raise if a statement uses an unreadable column.
REFUSED = "__queryd_refused: "


def read_disk_error(kind: type[Exception], text: str, number: str = "") -> Ours | None:
    """Translate an error of the scratch disk; None for other errors. `number` is the errno, if DuckDB gives it."""
    if not issubclass(kind, duckdb.IOException):
        return None
    if number in _DISK_FULL_NUMBERS or _DISK_FULL.search(text):
        return EngineUnavailable(Outage.SCRATCH)
    if number == str(errno.EFBIG) or _FILE_TOO_LARGE.search(text):
        return QueryFailed(ErrorCode.RESULT_TOO_LARGE, "The result exceeds the size limit.")
    return None


def read_store_error(kind: type[Exception], text: str) -> Ours | None:
    """Translate an error of the datasets' store; None for other errors. Only httpfs raises these texts."""
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
    """Translate an error response of the datasets' store; `text` contains its body."""
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
    """Translate an error of the datasets' Postgres; None for other errors.

    DuckDB raises these errors with several classes, so the text decides. An author's text can't begin like them.
    """
    if _DIMENSIONS.match(text):
        message = "A column of the dataset holds arrays with several dimensions, which can't be read."
        return QueryFailed(ErrorCode.QUERY_ERROR, message)
    connecting = _CONNECTING.match(text)
    if connecting is None and not _SCANNING.match(text):
        return None
    # DuckDB cuts the text at a NUL in the statement that it quotes.
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
        return QueryFailed(
            ErrorCode.QUERY_TIMEOUT, "A scan of the datasets' Postgres exceeded the server's time limit."
        )
    # For example, a view divides by zero, or a column was dropped during the scan.
    return QueryFailed(ErrorCode.QUERY_ERROR, "The datasets' Postgres could not read the dataset.")


def read_file_error(text: str) -> QueryFailed | None:
    """Translate an error of a dataset's file; None for other errors. The caller adds the detail."""
    if _DIFFERING.match(text):
        return QueryFailed(ErrorCode.QUERY_ERROR, "The dataset's files have different columns.")
    if _UNREADABLE.match(text):
        return QueryFailed(ErrorCode.QUERY_ERROR, FILE_UNREADABLE)
    return None


def _denied() -> QueryFailed:
    return QueryFailed(ErrorCode.ENGINE_UNAVAILABLE, "The engine's credentials may not read the dataset.")


def _missing() -> QueryFailed:
    return QueryFailed(ErrorCode.QUERY_ERROR, "The dataset's files are missing.")
