"""Postgres data: the two canonical tables and ours beside them."""
