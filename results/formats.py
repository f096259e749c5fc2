"""What a stored result says about itself."""

from queryd.events import OutputFormat

_CONTENT_TYPES = {
    OutputFormat.PARQUET: "application/vnd.apache.parquet",
    OutputFormat.CSV: "text/csv; charset=utf-8; header=present",
    OutputFormat.JSON: "application/x-ndjson",
}

ERROR_CONTENT_TYPE = "application/json"


def content_type(output_format: OutputFormat) -> str:
    """The media type of a result in that format."""
    return _CONTENT_TYPES[output_format]
