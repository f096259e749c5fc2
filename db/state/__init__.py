"""Postgres state: what the control plane knows about queries."""
