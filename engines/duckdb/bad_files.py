"""Find the file of a dataset that can't be read."""

from collections.abc import Iterator, Mapping, Sequence

import duckdb

from engines.duckdb.errors import Meaning, Told, cut, mask_addresses, translate
from engines.duckdb.instance import Instance
from engines.duckdb.sql_text import literal
from engines.duckdb.storage_errors import FILE_UNREADABLE
from engines.protocol import QueryFailed, Relation
from queryd.events import ErrorCode


def find_file(instance: Instance, relations: Sequence[Relation], error: Exception, meaning: Meaning) -> Meaning:
    """Return the error with the file's key as detail, if a file of one of the relations caused it.

    If DuckDB's text names no file, this reads each file alone, which costs at most one more scan of the dataset. The
    query's deadline and limits interrupt this scan too.
    """
    files = {url: key for relation in relations for url, key in instance.urls_of(relation.name).items()}
    text = Told.by(error).message
    named = next((url for url in files if f"'{url}'" in text or f'"{url}"' in text), None)
    key = None if named is None else files[named]
    if named is None:
        key, text = next(_read_each(instance.connection, files), (None, text))
    else:
        text = text.replace(named, key or "…")
    if key is None:
        return meaning
    failure = QueryFailed(ErrorCode.QUERY_ERROR, FILE_UNREADABLE, cut(f"{key}: {mask_addresses(text)}"))
    return Meaning(failure, known=meaning.known)


def _read_each(connection: duckdb.DuckDBPyConnection, files: Mapping[str, str]) -> Iterator[tuple[str | None, str]]:
    """Yield the key of each file that can't be read, and DuckDB's error text."""
    for url, key in files.items():
        try:
            connection.execute(f"SELECT max(hash(t)) FROM read_parquet([{literal(url)}]) AS t").fetchall()  # noqa: S608
        except duckdb.InterruptException:
            return
        except (duckdb.Error, UnicodeError) as error:
            if isinstance(translate(error).ours, QueryFailed):
                yield key, Told.by(error).message.replace(url, key)
