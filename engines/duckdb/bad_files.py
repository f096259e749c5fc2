"""Which file of a dataset can't be read."""

import re
from collections.abc import Iterator, Sequence

import duckdb

from engines.duckdb.errors import Meaning, Told, cut, mask_addresses, translate
from engines.duckdb.instance import fixed_part
from engines.duckdb.sql_text import literal
from engines.duckdb.storage_errors import FILE_UNREADABLE
from engines.protocol import QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode

_QUOTED = re.compile(r"""['"](s3://.*?\.[\w]+)['"]""")


def find_file(
    connection: duckdb.DuckDBPyConnection, relations: Sequence[Relation], error: Exception, meaning: Meaning
) -> Meaning:
    """The same error with the file's key as detail, if one of the relations' files is to blame.

    Where DuckDB's text names no file, each one is read alone, which costs at most one more scan of the dataset. The
    query's deadline and limits interrupt that too.
    """
    parquet = [relation for relation in relations if relation.kind is RelationKind.PARQUET]
    text = Told.by(error).message
    named = _QUOTED.search(text)
    key = None
    if named is None:
        key, text = next(_read_each(connection, parquet), (None, text))
    else:
        key = next((_relative(named[1], each) for each in parquet if _is_below(named[1], each)), None)
        text = text.replace(named[1], key or "…")
    if key is None:
        return meaning
    failure = QueryFailed(ErrorCode.QUERY_ERROR, FILE_UNREADABLE, cut(f"{key}: {mask_addresses(text)}"))
    # The file explains the error, so that nothing else has to.
    return Meaning(failure, known=meaning.known)


def _read_each(
    connection: duckdb.DuckDBPyConnection, relations: Sequence[Relation]
) -> Iterator[tuple[str | None, str]]:
    """The key of each file that can't be read, and what DuckDB says of it."""
    for relation in relations:
        try:
            listed = connection.execute(f"SELECT file FROM glob({literal(_pattern(relation))})").fetchall()  # noqa: S608
        except duckdb.Error:
            return
        for (file,) in listed:
            try:
                connection.execute(f"SELECT max(hash(t)) FROM read_parquet({literal(str(file))}) AS t").fetchall()  # noqa: S608
            except duckdb.InterruptException:
                return
            except (duckdb.Error, UnicodeError) as error:
                if isinstance(translate(error).ours, QueryFailed):
                    key = _relative(str(file), relation)
                    yield key, Told.by(error).message.replace(str(file), key)


def _pattern(relation: Relation) -> str:
    return f"{relation.location}**/*.parquet" if relation.location.endswith("/") else relation.location


def _is_below(url: str, relation: Relation) -> bool:
    return url.startswith(fixed_part(relation.location))


def _relative(url: str, relation: Relation) -> str:
    return url.removeprefix(fixed_part(relation.location))
