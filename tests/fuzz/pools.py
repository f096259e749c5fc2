"""What mutations put into statements. The world of a run holds what is hidden under these names."""

# Relations that nobody was granted, files that a replacement scan would read, and catalogs.
HIDDEN = (
    "secret", "internal.other_org_payroll", "internal.orders", "internal.customers", "main.secret", "main.orders",
    "duckdb_views", "duckdb_tables()", "information_schema.columns", "information_schema.tables",
    "pg_catalog.pg_class", "pg_views", "sqlite_master", "'canary.csv'", "'canary.parquet'", '"canary.json"',
    "'*.csv'", "system.main.secret", "world.secret", "world.main.secret", "world.internal.orders", "temp.secret",
    '"SECRET"', "Secret",
)  # fmt: skip

# Calls in FROM, most of them of functions that may not be called there.
CALLS_IN_FROM = (
    "read_text('canary.txt')", "read_csv('canary.csv')", "read_csv_auto('canary.csv')",
    "read_parquet('canary.parquet')", "read_json('canary.json')", "read_blob('canary.txt')", "glob('*')",
    "sniff_csv('canary.csv')", "query('FROM secret')", "query_table('secret')", "duckdb_views()",
    "duckdb_variables()", "duckdb_settings()", "duckdb_columns()", "pragma_table_info('secret')",
    "parquet_metadata('canary.parquet')", "histogram_values(secret, s)", "summary(secret)", "main.range(3)",
    "duckdb_types()", "range(3)", "generate_series(1, 3)", "unnest([1, 2])", "json_each('{}')",
)  # fmt: skip

# Calls in expressions, most of them of functions that may not be called, and names that mean functions.
CALLS = (
    "getvariable('canary')", "current_setting('http_proxy_username')", "current_database()", "current_schemas(true)",
    "current_query()", "enum_range(NULL::canary_type)", "enum_first(NULL::canary_type)", "canary_macro()",
    "main.canary_macro()", "list_aggregate(['a'], 'max')", "nextval('canary_sequence')", "version()", "pg_typeof(1)",
    "json_serialize_sql('FROM secret')", "error('x')", "current_catalog", "current_schema", "session_user",
    "repeat('x', 2000000000)", "range(1000000000)", "lpad('x', 2000000000, 'y')", "list_resize([1], 500000000)",
    "upper('x')", "len('x')", "list_sum([1, 2])", "md5('x')", "date_trunc('month', ts)", "coalesce(NULL, 1)",
)  # fmt: skip

# Queries in expressions over what is hidden.
HIDDEN_QUERIES = (
    "(SELECT s FROM secret)", "(SELECT s FROM internal.other_org_payroll)",
    "(SELECT min(canary) FROM internal.orders)", "EXISTS (FROM secret)", "ARRAY(SELECT s FROM secret)",
    "(WITH secret AS (SELECT 'x' AS s) SELECT s FROM secret)",
    "(WITH secret AS (SELECT s FROM secret) SELECT s FROM secret)", "(SELECT max(s) FROM main.secret)",
    "(WITH RECURSIVE secret AS (SELECT s FROM secret UNION SELECT s FROM secret) SELECT max(s) FROM secret)",
    "(TABLE secret)", "(SELECT column_name FROM (DESCRIBE secret) LIMIT 1)", "(FROM (SUMMARIZE secret) LIMIT 1)",
)  # fmt: skip

# What may stand beside a statement.
SECOND_STATEMENTS = (
    "SELECT s FROM secret", "DROP TABLE products", "SET threads = 1", "SET VARIABLE y = 1", "FROM orders", "SELECT 2",
    "CREATE TABLE made AS SELECT 1", "COPY (SELECT 1) TO 'made.csv'", "ATTACH ':memory:' AS made",
)  # fmt: skip

# Statements that are no SELECT and hold one.
STATEMENTS = (
    "CREATE TABLE made_{n} AS {sql}", "CREATE VIEW made_{n} AS {sql}", "INSERT INTO products {sql}", "EXPLAIN {sql}",
    "COPY ({sql}) TO 'made_{n}.csv'", "DELETE FROM products WHERE id IN ({sql})", "DESCRIBE {sql}", "SUMMARIZE {sql}",
    "PREPARE p{n} AS {sql}", "CREATE MACRO made_{n}() AS TABLE {sql}", "SET VARIABLE made = ({sql})", "CALL {sql}",
)  # fmt: skip

# Types, those of nobody among them.
TYPES = (
    "INTEGER", "VARCHAR", "DECIMAL(9, 2)", "canary_type", "JSON", "ENUM('a')", "STRUCT(a INTEGER)", "secret", "BLOB",
    "INTEGER[]", "main.canary_type", "DOUBLE",
)  # fmt: skip

# Literals.
CONSTANTS = (
    "1", "0", "-1", "'x'", "NULL", "true", "1.5", "'canary.txt'", "''", "[1]", "{'a': 1}", "1000000000000",
)  # fmt: skip

# What parts tokens, for one parser or another.
BLANKS = (
    " ", "\n", "\t", "/**/", "/* a */", "-- a\n", "\xa0", "\u2003", "\r\n", " /* /* b */ */ ", "\ufeff", "\r",
)  # fmt: skip

# What can be nested without end: how it opens, and how it closes.
DEEP = (
    ("[", "]"), ("(", ")"), ("{'a':", "}"), ("NOT ", ""), ("- ", ""), ("CASE ", " WHEN 1 THEN 1 WHEN 2 THEN 2 END"),
    ("abs(", ")"), ("nullif(", ", 2)"), ("(SELECT ", ")"), ("list_transform([1], lambda x: ", ")"), ("/*", "*/"),
)  # fmt: skip

# Expressions around an expression.
WRAPPED = (
    "({})", "CASE WHEN true THEN {} END", "[{}]", "coalesce({}, {})", "{{'a': {}}}", "TRY({})",
    "upper(({})::VARCHAR)", "list_transform([1], lambda x: {})", "({} IS NOT NULL)", "({} COLLATE NOCASE)",
    "(SELECT {})", "max({}) OVER ()",
)  # fmt: skip

# Clauses with an expression in them.
CLAUSES = (
    " WHERE {}", " LIMIT {}", " ORDER BY {}", " QUALIFY {}", " GROUP BY {}", " USING SAMPLE 10%", " OFFSET {}",
    " AT (VERSION => 1)", " HAVING {}", " WINDOW w AS (ORDER BY {})", " TABLESAMPLE 1%",
    " GROUP BY GROUPING SETS (({}))",
)  # fmt: skip

# Names for CTEs, those of relations among them.
CTE_NAMES = (
    "secret", "orders", "t", "customers", "other_org_payroll", "x",
)  # fmt: skip
