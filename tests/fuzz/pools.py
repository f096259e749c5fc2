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

# A host that listens: the world puts the address of its listener in this place.
LISTENER = "listener.invalid"

# Types, in the forms that a function would look them up in, if it looked up names.
TYPE_TEXTS = (
    "canary_type", '"canary_type"', '"internal.hidden_type"', '"__queryd_datasets.other.hidden"', '["canary_type"]',
    '{"a": "canary_type"}', "internal.hidden_type", "__queryd_datasets.other.hidden", '"VARIANT"', "VARIANT",
)  # fmt: skip

# Other names: variables, settings, sequences, relations, macros, locales.
NAME_TEXTS = (
    "canary", "http_proxy_username", "canary_sequence", "secret", "canary_macro", "de@collation=/canary",
)  # fmt: skip

# Files and addresses, with settings behind them.
FILE_TEXTS = (
    "canary.csv", "canary.parquet", "canary.json", "canary.txt", "*", "**/*.csv", "file:canary.csv", "./canary.txt",
    f"http://{LISTENER}/canary.parquet", f"http://{LISTENER}/canary.txt", f"https://{LISTENER}/canary.json",
    f"s3://b/z.parquet?s3_endpoint={LISTENER}&s3_use_ssl=false&s3_url_style=path",
    f"canary.parquet?s3_endpoint={LISTENER}", f"?s3_endpoint={LISTENER}&s3_region=x", "a?key=value",
)  # fmt: skip

# These, and whatever else a function may take a text for.
TEXTS = (
    *TYPE_TEXTS, *NAME_TEXTS, *FILE_TEXTS,
    "main.canary_type", '{"a": "internal.hidden_type"}', '["VARIANT"]', "TYPE", "AGGREGATE_STATE<sum(INTEGER)>",
    "internal.other_org_payroll", "__queryd_datasets.other.hidden_table", "FROM secret", "SELECT s FROM secret",
    "canary_macro()", "de", "../canary", "EPSG:4326", "UTC", "DESC", "max", "year", "%Y", "$.a", "a", "(a)", "",
)  # fmt: skip

# Texts that only a parameter can be: no statement holds half of a surrogate pair.
PARAMETER_TEXTS = ("\ud800", "a\udcff", "a\0b")

# An expression that is a text, with the text itself at {}, or its halves at {0} and {1}.
COMPUTED = (
    "concat({0}, {1})", "{0} || {1}", "(SELECT {})", "array_to_string([{0}, {1}], '')", "CASE WHEN true THEN {} END",
    "replace({}, '~', '')", "coalesce(NULL, {})", "{}::VARCHAR", "format('{{}}{{}}', {0}, {1})",
    "max({})", "{}::JSON", "{}::ENUM('a', 'EPSG:4326')", "[{}]", "{}::BLOB",
)  # fmt: skip

# Calls that take a text at {}.
TEXT_CALLS = (
    "timezone({}, TIMESTAMP '2024-01-01')", "st_setcrs('POINT(1 1)'::GEOMETRY, {})", "strptime('2024', {})",
    "strftime(now(), {})",
    "date_part({}, DATE '2024-01-01')", "date_part([{}], DATE '2024-01-01')", "list_sort([2, 1], {})",
    "list_grade_up([2, 1], 'DESC', {})", "regexp_extract('a', '(a)', [{}])", "regexp_replace('a', {}, 'b', {})",
    "regexp_matches('a', 'a', {})", "struct_extract({{'a': 1}}, {})", "union_extract(union_value(a := 1), {})",
    "json_extract('{{\"a\": 1}}', {})", "json_value({}, {})", "json_structure({})", "array_to_string(['a'], {})",
    "decode('a'::BLOB, {})", "format({}, 1)", "printf({}, 1)", "parse_path({})",
    "time_bucket(INTERVAL 1 day, TIMESTAMPTZ '2024-01-01', {})", "date_trunc({}, now())", "quantile_disc({}, 0.5)",
    "string_agg('a', {})", "json_execute_serialized_sql({})", "json_serialize_sql({})", "read_text({})",
    "struct_pack(a := {})", "map([{}], [1])", "url_decode({})", "json({})", "to_json({})", "alias({})", "typeof({})",
    "({}).st_setcrs({})", "COLUMNS({})", "write_log({})", "error({})", "histogram({})", "hash({})",
    "can_cast_implicitly({}, {}, {})",
)  # fmt: skip

# Calls that would look it up as a type, and as another name.
TYPE_CALLS = (
    "from_json('0', {})", "from_json_strict('0', {})", "json_transform('0', {})", "json_transform_strict('0', {})",
    "from_json('{{\"a\": 0}}', {})", "make_type({})", "cast_to_type({}, 'a')",
)  # fmt: skip
NAME_CALLS = (
    "icu_sort_key('a', {})", "icu_sort_key({}, {})", "getvariable({})", "current_setting({})", "nextval({})",
    "which_secret({}, 's3')", "list_aggregate([1], {})",
)  # fmt: skip

# Calls in FROM that take a text.
TEXT_CALLS_IN_FROM = (
    "read_text({})", "read_text({})", "read_blob({})", "read_csv({})", "read_parquet({})", "read_parquet({})",
    "read_json({})", "glob({})", "query({})", "query_table({})", "sniff_csv({})", "parquet_schema({})",
    "parquet_metadata({})", "pragma_table_info({})", "json_each({})", "json_tree('{{}}', {})", "unnest([{}])",
    "duckdb_settings({})", "read_duckdb({})", "json_execute_serialized_sql({})", "parquet_kv_metadata({})",
)  # fmt: skip

# What tells the type of a value: the values of an enum, the names of its fields.
TOLD = (
    "{}", "typeof({})", "enum_range({})", "enum_range({})", "enum_range({})", "enum_first({})", "to_json({})",
    "({})::VARCHAR", "list_sort({})", "struct_keys({})",
)  # fmt: skip

# Calls that DuckDB 1.5.5 does not survive, or that it answers with an internal error.
CRASHES = (
    "lead(1, -9223372036854775808) OVER ()", "lag(1, -9223372036854775807 - 1) OVER ()",
    "st_setcrs('POINT(1 1)'::GEOMETRY, 'a'::ENUM('a'))", "reservoir_quantile(1, 0.5, 2147483647)",
    "(SELECT reservoir_quantile(1, 0.5, 2147483647))", "(SELECT x.repeat(2000000000) FROM (SELECT 'a' AS x))",
    "(SELECT x.lpad(2000000000, 'y') FROM (SELECT 'a' AS x))", "reservoir_quantile(1, NULL::DOUBLE[])",
    "array_select([]::VARCHAR[], [NULL])", "(SELECT max(switch(i, MAP {1: NULL}, 'a')) FROM range(3) t(i))",
    "unhex('ä')",
    "(SELECT lead(i, -9223372036854775808) OVER () FROM range(3) t(i) LIMIT 1)",
)  # fmt: skip
