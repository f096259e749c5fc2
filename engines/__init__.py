"""How does SQL run? The engine protocol, DuckDB in child processes, the gate and the sandbox."""
