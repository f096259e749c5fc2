"""How a schema comes to be: alembic over plain SQL, one chain of versions for each database."""
