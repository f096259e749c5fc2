"""Mutated statements against the gate, on a DuckDB that holds what the gate must hide and could do harm."""
