"""The state database rebuilt, from the log or from Postgres data, beside the live one and then swapped."""
