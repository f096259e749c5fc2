"""A judged statement inside text of ours, and which bytes are whose when DuckDB finds a fault."""

from contextlib import suppress
from dataclasses import dataclass

import duckdb

from queryd.events import Parameter


class StatementFailed(Exception):
    """DuckDB raised `error` while it ran a text in which the judged statement stands after `offset` bytes of ours."""

    def __init__(self, error: Exception, offset: int) -> None:
        super().__init__()
        self.error = error
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A judged statement with what stands around it, so that one knows which part is whose."""

    before: str
    text: str
    after: str

    def within(self, before: str, after: str) -> "Wrapped":
        """The same with more around it."""
        return Wrapped(before + self.before, self.text, self.after + after)

    def at_most(self, max_rows: int | None) -> "Wrapped":
        """The same, ended one row after that many, so that one can tell that there are more."""
        return self if max_rows is None else self.within("SELECT * FROM (", f") LIMIT {max_rows + 1}")

    def run(
        self, connection: duckdb.DuckDBPyConnection, values: dict[str, Parameter] | None
    ) -> list[tuple[object, ...]]:
        """Execute it and fetch all of its rows. Raises `StatementFailed`."""
        try:
            return connection.execute(self.before + self.text + self.after, values).fetchall()
        except (duckdb.Error, MemoryError, UnicodeError) as error:
            raise StatementFailed(error, len(self.before.encode())) from None

    def describe(
        self, connection: duckdb.DuckDBPyConnection, values: dict[str, Parameter] | None
    ) -> list[tuple[object, ...]]:
        """Plan it and return the name and the type, as text, of each column. Raises `StatementFailed`."""
        if values is None:
            # A relation is planned as far as its types. DESCRIBE optimizes the plan too, for four times the CPU time.
            # A relation's error does not say where it is: then DESCRIBE fails in its place.
            with suppress(duckdb.Error):
                relation = connection.sql(self.before + self.text + self.after)
                return list(zip(relation.columns, map(str, relation.types), strict=True))
        return self.within("DESCRIBE ", "").run(connection, values)
