"""The first gate: what DuckDB's own parser says about a statement, judged against what its caller was granted.

It is one of two layers. The second is the instance itself, which could do no harm if this one were wrong.
`judge` is the way in; `texts`, `copies` and `thresholds` say what no parser is given, `grammar`, `walk` and `functions`
what a tree may hold, `amounts` and `extent` what may be multiplied, `lineage` which personal data is read for certain.
"""

from engines.duckdb.gate.judge import Gate, Judged

__all__ = ["Gate", "Judged"]
