"""A DuckDB child whose gate lets everything through: what holds then is the sandbox and the deadline alone."""

import runpy
from collections.abc import Iterable, Mapping

from engines.duckdb import gate
from engines.duckdb.gate import Judged
from engines.protocol import Relation
from queryd.events import Parameter


class _OpenGate:
    """In the gate's place. It knows no relations."""

    def judge(
        self,
        sql: str,
        _relations: Iterable[Relation],
        _parameters: Mapping[str, Parameter],
        _denied: frozenset[str] = frozenset(),
    ) -> Judged:
        return Judged(sql, frozenset(), ())


if __name__ == "__main__":
    gate.Gate = _OpenGate  # type: ignore[assignment,misc]
    runpy.run_module("engines.duckdb.child", run_name="__main__")
