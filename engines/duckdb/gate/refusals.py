"""How the gate says no: the construct in words of ours, never the text, and of names only those of our own lists."""

from engines.protocol import QueryFailed
from queryd.events import ErrorCode

# One sentence for what does not exist, is not granted and is another org's: nobody can tell them apart.
NO_SUCH_RELATION = "it names a relation that does not exist or is not granted"
TOO_DEEP = "it is nested too deeply"


def rejected(reason: str) -> QueryFailed:
    """SQL_REJECTED, in a sentence that ends with `reason`."""
    return QueryFailed(ErrorCode.SQL_REJECTED, f"The SQL was rejected: {reason}.")


class UnknownRelation(QueryFailed):
    """SQL_REJECTED for a relation that is not granted. The detail, for the author only, has its name and place."""

    def __init__(self, name: str, location: int | None, where: str = "") -> None:
        failure = rejected(NO_SUCH_RELATION)
        super().__init__(failure.code, failure.message, f"There is no relation {name} that you may read{where}.")
        self._name = name
        # A byte offset in the parsed text.
        self.location = location

    def at(self, line: int, column: int) -> "UnknownRelation":
        """Return the same error with its line and column."""
        return UnknownRelation(self._name, self.location, f" (line {line}, column {column})")


def unknown(what: str) -> QueryFailed:
    """SQL_REJECTED for a part of the parser's tree that the gate has never been told of."""
    return rejected(f"it uses {what} that is not known to be harmless")


def uses(construct: str) -> QueryFailed:
    """SQL_REJECTED for a construct that is known, named in SQL's own words, and may not be used."""
    return rejected(f"it uses {construct}, which may not be used here")
