"""Names as DuckDB compares them, and lists of them as code can be read."""


def fold(name: str) -> str:
    """A name as DuckDB compares it: only ASCII letters lose their case."""
    return name.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


def words(text: str) -> frozenset[str]:
    """The words of a text, which blanks part."""
    return frozenset(text.split())
