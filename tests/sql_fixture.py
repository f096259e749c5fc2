"""The relations that the corpora of statements are about, those that nobody was granted among them."""

import duckdb

GRANTED = (
    "orders",
    "customers",
    "products",
    "prices",
    "employees",
    "events",
    "load",
    "Order Details",
    "finance.invoices",
)

_TABLES = """
CREATE TABLE orders AS SELECT i AS id, i % 5 + 1 AS customer_id, i % 3 + 1 AS product_id, i * 1.5 AS amount,
    i % 4 AS qty, ['paid', 'open', 'void'][i % 3 + 1] AS status,
    TIMESTAMP '2024-01-01' + to_hours(i) AS ts FROM range(20) t(i);
CREATE TABLE customers AS SELECT i AS id, 'name ' || i AS name, ['EU', 'US'][i % 2 + 1] AS region FROM range(1, 6) t(i);
CREATE TABLE products AS SELECT i AS id FROM range(1, 4) t(i);
CREATE TABLE prices AS SELECT i AS product_id, TIMESTAMP '2023-12-31' AS ts, i * 1.25 AS price FROM range(1, 4) t(i);
CREATE TABLE employees AS SELECT i AS id, nullif(i // 2, 0) AS parent_id FROM range(1, 6) t(i);
CREATE TABLE events AS SELECT '{"a": {"b": 1}}' AS payload, 'https://example.com' AS url;
CREATE TABLE "load" AS SELECT 1 AS "install", 2 AS "attach";
CREATE TABLE "Order Details" AS SELECT 1 AS "pragma", 2 AS "copy";
CREATE SCHEMA finance;
CREATE TABLE finance.invoices AS SELECT i AS order_id, i * 10.0 AS total FROM range(5) t(i);
"""


def make_fixture(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the granted relations."""
    connection.execute(_TABLES)
