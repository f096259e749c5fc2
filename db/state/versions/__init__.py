"""The chain of versions of this database."""
