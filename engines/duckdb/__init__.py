"""DuckDB in child processes, one query at a time each."""
