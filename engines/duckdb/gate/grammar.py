"""Every node, field and word of the trees that DuckDB writes for a SELECT which may run, and nothing else.

The tree belongs to one version: `json_serialize_sql` with `skip_null`, `skip_empty` and `skip_default`. What is not
here is refused: a new version's new field may hold a table, a function or an expression.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum

from engines.duckdb.gate.names import words

# The version whose trees stand here; a test fails on any other.
TREE_VERSION = "1.5.5"


class Part(StrEnum):
    """What stands in a field: nodes, of which some have kinds, and leaves."""

    EXPRESSION = "an expression"
    QUERY = "a query"
    SOURCE = "a source in FROM"
    MODIFIER = "a clause after the query"
    TYPE_INFO = "a type"

    STATEMENT = "a statement"
    PARAMETER = "a parameter"
    CTES = "a WITH clause"
    NAMED_CTE = "a named CTE"
    CTE = "a CTE"
    ORDER = "an ORDER BY entry"
    CASE = "a WHEN"
    REPLACEMENT = "a REPLACE entry"
    RENAMING = "a RENAME entry"
    COLUMN = "a qualified column"
    SAMPLE = "a SAMPLE clause"
    PIVOT = "a PIVOT column"
    PIVOT_ENTRY = "a PIVOT value"
    VALUE = "a value"
    TYPE = "a type's name"
    MEMBER = "a type's member"

    TEXT = "a text"
    NUMBER = "a number"
    FLAG = "a flag"
    LITERAL = "a literal"
    WORD = "a keyword"


LEAVES = frozenset({Part.TEXT, Part.NUMBER, Part.FLAG, Part.LITERAL, Part.WORD})


@dataclass(frozen=True, slots=True)
class Field:
    """What a field holds: a part, in lists `lists` deep; `words` are the only ones that a WORD may be."""

    part: Part
    lists: int = 0
    words: frozenset[str] = frozenset()
    # Computed once, because the gate reads it for every field of every node.
    is_leaf: bool = dataclass_field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_leaf", self.part in LEAVES)


@dataclass(frozen=True, slots=True)
class Shape:
    """The fields that a node may have, and those that it always has; the tree leaves out what is empty or default."""

    fields: Mapping[str, Field]
    required: frozenset[str]


def _shape(required: str, fields: Mapping[str, Field]) -> Shape:
    return Shape(fields, words(required))


def _word(text: str) -> Field:
    return Field(Part.WORD, words=frozenset(text.split(",")))


_TEXT, _TEXTS = Field(Part.TEXT), Field(Part.TEXT, 1)
_NUMBER, _FLAG = Field(Part.NUMBER), Field(Part.FLAG)
_EXPRESSION, _EXPRESSIONS = Field(Part.EXPRESSION), Field(Part.EXPRESSION, 1)
_QUERY, _STATEMENT = Field(Part.QUERY), Field(Part.STATEMENT)
_SOURCE, _SAMPLE = Field(Part.SOURCE), Field(Part.SAMPLE)
_VALUES, _TYPE = Field(Part.VALUE, 1), Field(Part.TYPE)
_ORDERS = Field(Part.ORDER, 1)

_COMPARISONS = (
    "COMPARE_EQUAL,COMPARE_NOTEQUAL,COMPARE_LESSTHAN,COMPARE_GREATERTHAN,COMPARE_LESSTHANOREQUALTO,"
    "COMPARE_GREATERTHANOREQUALTO,COMPARE_DISTINCT_FROM,COMPARE_NOT_DISTINCT_FROM"
)
_OPERATORS = (
    "OPERATOR_NOT,OPERATOR_IS_NULL,OPERATOR_IS_NOT_NULL,OPERATOR_COALESCE,OPERATOR_TRY,OPERATOR_UNPACK,COMPARE_IN,"
    "COMPARE_NOT_IN,GROUPING_FUNCTION,ARRAY_EXTRACT,ARRAY_SLICE,STRUCT_EXTRACT,ARRAY_CONSTRUCTOR"
)
_WINDOWS = (
    "WINDOW_AGGREGATE,WINDOW_RANK,WINDOW_RANK_DENSE,WINDOW_NTILE,WINDOW_PERCENT_RANK,WINDOW_CUME_DIST,"
    "WINDOW_ROW_NUMBER,WINDOW_FIRST_VALUE,WINDOW_LAST_VALUE,WINDOW_LEAD,WINDOW_LAG,WINDOW_NTH_VALUE,WINDOW_FILL"
)
_BOUNDARY = _word(
    "INVALID,UNBOUNDED_PRECEDING,UNBOUNDED_FOLLOWING,CURRENT_ROW_RANGE,CURRENT_ROW_ROWS,CURRENT_ROW_GROUPS,"
    "EXPR_PRECEDING_ROWS,EXPR_FOLLOWING_ROWS,EXPR_PRECEDING_RANGE,EXPR_FOLLOWING_RANGE,EXPR_PRECEDING_GROUPS,"
    "EXPR_FOLLOWING_GROUPS"
)


def _expression(kind: str, types: str, required: str = "", **fields: Field) -> Shape:
    common = {"class": _word(kind), "type": _word(types), "alias": _TEXT, "query_location": _NUMBER}
    return _shape(f"class type {required}", common | fields)


_EXPRESSION_SHAPES: Mapping[str, Shape] = {
    "BETWEEN": _expression(
        "BETWEEN",
        "COMPARE_BETWEEN,COMPARE_NOT_BETWEEN",
        "input lower upper",
        input=_EXPRESSION,
        lower=_EXPRESSION,
        upper=_EXPRESSION,
    ),
    "CASE": _expression("CASE", "CASE_EXPR", "case_checks", case_checks=Field(Part.CASE, 1), else_expr=_EXPRESSION),
    "CAST": _expression("CAST", "OPERATOR_CAST", "child cast_type", child=_EXPRESSION, cast_type=_TYPE, try_cast=_FLAG),
    "COLLATE": _expression("COLLATE", "COLLATE", "child", child=_EXPRESSION, collation=_TEXT),
    "COLUMN_REF": _expression("COLUMN_REF", "COLUMN_REF", "column_names", column_names=_TEXTS),
    "COMPARISON": _expression("COMPARISON", _COMPARISONS, "left right", left=_EXPRESSION, right=_EXPRESSION),
    "CONJUNCTION": _expression("CONJUNCTION", "CONJUNCTION_AND,CONJUNCTION_OR", "children", children=_EXPRESSIONS),
    "CONSTANT": _expression("CONSTANT", "VALUE_CONSTANT", "value", value=Field(Part.VALUE)),
    "FUNCTION": _expression(
        "FUNCTION",
        "FUNCTION",
        "function_name",
        function_name=_TEXT,
        schema=_TEXT,
        catalog=_TEXT,
        children=_EXPRESSIONS,
        filter=_EXPRESSION,
        order_bys=Field(Part.MODIFIER),
        distinct=_FLAG,
        is_operator=_FLAG,
    ),
    "LAMBDA": _expression("LAMBDA", "LAMBDA", "lhs expr", lhs=_EXPRESSION, expr=_EXPRESSION),
    "OPERATOR": _expression("OPERATOR", _OPERATORS, "children", children=_EXPRESSIONS),
    "PARAMETER": _expression("PARAMETER", "VALUE_PARAMETER", "identifier", identifier=_TEXT),
    "POSITIONAL_REFERENCE": _expression("POSITIONAL_REFERENCE", "POSITIONAL_REFERENCE", index=_NUMBER),
    "STAR": _expression(
        "STAR",
        "STAR",
        relation_name=_TEXT,
        exclude_list=_TEXTS,
        qualified_exclude_list=Field(Part.COLUMN, 1),
        replace_list=Field(Part.REPLACEMENT, 1),
        rename_list=Field(Part.RENAMING, 1),
        columns=_FLAG,
        expr=_EXPRESSION,
    ),
    "SUBQUERY": _expression(
        "SUBQUERY",
        "SUBQUERY",
        "subquery",
        subquery_type=_word("SCALAR,EXISTS,NOT_EXISTS,ANY"),
        subquery=_STATEMENT,
        child=_EXPRESSION,
        comparison_type=_word(f"INVALID,{_COMPARISONS}"),
    ),
    "WINDOW": _expression(
        "WINDOW",
        _WINDOWS,
        "function_name",
        function_name=_TEXT,
        schema=_TEXT,
        catalog=_TEXT,
        children=_EXPRESSIONS,
        partitions=_EXPRESSIONS,
        orders=_ORDERS,
        start=_BOUNDARY,
        end=_BOUNDARY,
        start_expr=_EXPRESSION,
        end_expr=_EXPRESSION,
        offset_expr=_EXPRESSION,
        default_expr=_EXPRESSION,
        ignore_nulls=_FLAG,
        filter_expr=_EXPRESSION,
        exclude_clause=_word("NO_OTHER,CURRENT_ROW,GROUP,TIES"),
        distinct=_FLAG,
        arg_orders=_ORDERS,
    ),
}


def _query(kind: str, required: str = "", **fields: Field) -> Shape:
    common = {"type": _word(kind), "modifiers": Field(Part.MODIFIER, 1), "cte_map": Field(Part.CTES)}
    return _shape(f"type {required}", common | fields)


_QUERY_SHAPES: Mapping[str, Shape] = {
    "SELECT_NODE": _query(
        "SELECT_NODE",
        select_list=_EXPRESSIONS,
        from_table=_SOURCE,
        where_clause=_EXPRESSION,
        group_expressions=_EXPRESSIONS,
        group_sets=Field(Part.NUMBER, 2),
        aggregate_handling=_word("STANDARD_HANDLING,FORCE_AGGREGATES,NO_AGGREGATES_ALLOWED"),
        having=_EXPRESSION,
        sample=_SAMPLE,
        qualify=_EXPRESSION,
    ),
    "SET_OPERATION_NODE": _query(
        "SET_OPERATION_NODE",
        "left right",
        setop_type=_word("UNION,UNION_BY_NAME,EXCEPT,INTERSECT"),
        setop_all=_FLAG,
        left=_QUERY,
        right=_QUERY,
    ),
    "RECURSIVE_CTE_NODE": _query(
        "RECURSIVE_CTE_NODE",
        "cte_name left right",
        cte_name=_TEXT,
        union_all=_FLAG,
        left=_QUERY,
        right=_QUERY,
        aliases=_TEXTS,
        key_targets=_EXPRESSIONS,
    ),
}


def _source(kind: str, required: str = "", **fields: Field) -> Shape:
    common = {"type": _word(kind), "alias": _TEXT, "sample": _SAMPLE, "query_location": _NUMBER}
    return _shape(f"type {required}", common | fields)


_SOURCE_SHAPES: Mapping[str, Shape] = {
    "BASE_TABLE": _source(
        "BASE_TABLE", "table_name", catalog_name=_TEXT, schema_name=_TEXT, table_name=_TEXT, column_name_alias=_TEXTS
    ),
    "JOIN": _source(
        "JOIN",
        "left right",
        left=_SOURCE,
        right=_SOURCE,
        condition=_EXPRESSION,
        join_type=_word("INNER,LEFT,RIGHT,FULL,SEMI,ANTI"),
        ref_type=_word("REGULAR,NATURAL,CROSS,POSITIONAL,ASOF"),
        using_columns=_TEXTS,
    ),
    "SUBQUERY": _source("SUBQUERY", "subquery", subquery=_STATEMENT, column_name_alias=_TEXTS),
    "TABLE_FUNCTION": _source(
        "TABLE_FUNCTION",
        "function",
        function=_EXPRESSION,
        column_name_alias=_TEXTS,
        with_ordinality=_word("WITH_ORDINALITY,WITHOUT_ORDINALITY"),
    ),
    "EMPTY": _source("EMPTY"),
    "EXPRESSION_LIST": _source("EXPRESSION_LIST", values=Field(Part.EXPRESSION, 2)),
    "PIVOT": _source(
        "PIVOT",
        "source",
        source=_SOURCE,
        aggregates=_EXPRESSIONS,
        unpivot_names=_TEXTS,
        pivots=Field(Part.PIVOT, 1),
        groups=_TEXTS,
        column_name_alias=_TEXTS,
        include_nulls=_FLAG,
    ),
}


def _modifier(kind: str, **fields: Field) -> Shape:
    return _shape("type", {"type": _word(kind)} | fields)


_MODIFIER_SHAPES: Mapping[str, Shape] = {
    "ORDER_MODIFIER": _modifier("ORDER_MODIFIER", orders=_ORDERS),
    "DISTINCT_MODIFIER": _modifier("DISTINCT_MODIFIER", distinct_on_targets=_EXPRESSIONS),
    "LIMIT_MODIFIER": _modifier("LIMIT_MODIFIER", limit=_EXPRESSION, offset=_EXPRESSION),
    "LIMIT_PERCENT_MODIFIER": _modifier("LIMIT_PERCENT_MODIFIER", limit=_EXPRESSION, offset=_EXPRESSION),
}


def _type_info(kind: str, **fields: Field) -> Shape:
    return _shape("type", {"type": _word(kind), "alias": _TEXT} | fields)


_TYPE_INFO_SHAPES: Mapping[str, Shape] = {
    "DECIMAL_TYPE_INFO": _type_info("DECIMAL_TYPE_INFO", width=_NUMBER, scale=_NUMBER),
    "STRING_TYPE_INFO": _type_info("STRING_TYPE_INFO", collation=_TEXT),
    "LIST_TYPE_INFO": _type_info("LIST_TYPE_INFO", child_type=_TYPE),
    "ARRAY_TYPE_INFO": _type_info("ARRAY_TYPE_INFO", child_type=_TYPE, size=_NUMBER),
    "STRUCT_TYPE_INFO": _type_info("STRUCT_TYPE_INFO", child_types=Field(Part.MEMBER, 1)),
    "GENERIC_TYPE_INFO": _type_info("GENERIC_TYPE_INFO"),
    # A type that is looked up by its name when the statement is bound; `catalog` and `schema` are not for us.
    "UNBOUND_TYPE_INFO": _type_info("UNBOUND_TYPE_INFO", name=_TEXT, user_type_modifiers=_VALUES),
}

# Types that the parser knows by itself.
_TYPE_IDS = (
    "NULL,BOOLEAN,TINYINT,SMALLINT,INTEGER,BIGINT,HUGEINT,UTINYINT,USMALLINT,UINTEGER,UBIGINT,UHUGEINT,FLOAT,DOUBLE,"
    "DECIMAL,BIGNUM,CHAR,VARCHAR,BLOB,BIT,UUID,DATE,TIME,TIME_NS,TIME WITH TIME ZONE,TIMESTAMP,TIMESTAMP_S,"
    "TIMESTAMP_MS,TIMESTAMP_NS,TIMESTAMP WITH TIME ZONE,INTERVAL,LIST,ARRAY,STRUCT,MAP,UNION,UNBOUND"
)

# Types that SQL may name; a test holds them against the types of the running version.
TYPE_NAMES = words(
    """
    array bigint bignum binary bit bitstring blob bool boolean bpchar bytea char date datetime dec decimal double enum
    float float4 float8 geometry guid hugeint int int1 int128 int16 int2 int32 int4 int64 int8 integer integral interval
    json list logical long map null numeric nvarchar real row short signed smallint string struct text time time_ns
    timestamp timestamp_ms timestamp_ns timestamp_s timestamp_us timestamptz timetz tinyint ubigint uhugeint uint128
    uint16 uint32 uint64 uint8 uinteger union usmallint utinyint uuid varbinary varchar varint
    """
) | {"time with time zone", "timestamp with time zone"}

_FIXED_SHAPES: Mapping[Part, Shape] = {
    Part.STATEMENT: _shape("node", {"node": _QUERY, "named_param_map": Field(Part.PARAMETER, 1)}),
    Part.PARAMETER: _shape("key", {"key": _TEXT, "value": _NUMBER}),
    Part.CTES: _shape("map", {"map": Field(Part.NAMED_CTE, 1)}),
    Part.NAMED_CTE: _shape("key value", {"key": _TEXT, "value": Field(Part.CTE)}),
    Part.CTE: _shape(
        "query",
        {
            "aliases": _TEXTS,
            "query": _STATEMENT,
            "materialized": _word("CTE_MATERIALIZE_DEFAULT,CTE_MATERIALIZE_ALWAYS,CTE_MATERIALIZE_NEVER"),
            "key_targets": _EXPRESSIONS,
        },
    ),
    Part.ORDER: _shape(
        "expression",
        {
            "type": _word("ORDER_DEFAULT,ASCENDING,DESCENDING"),
            "null_order": _word("ORDER_DEFAULT,NULLS FIRST,NULLS LAST"),
            "expression": _EXPRESSION,
        },
    ),
    Part.CASE: _shape("when_expr then_expr", {"when_expr": _EXPRESSION, "then_expr": _EXPRESSION}),
    Part.REPLACEMENT: _shape("key value", {"key": _TEXT, "value": _EXPRESSION}),
    Part.RENAMING: _shape("key value", {"key": Field(Part.COLUMN), "value": _TEXT}),
    Part.COLUMN: _shape("column", {"catalog": _TEXT, "schema": _TEXT, "table": _TEXT, "column": _TEXT}),
    Part.SAMPLE: _shape(
        "sample_size",
        {
            "sample_size": Field(Part.VALUE),
            "is_percentage": _FLAG,
            "method": _word("System,Bernoulli,Reservoir"),
            "seed": _NUMBER,
        },
    ),
    Part.PIVOT: _shape(
        "", {"pivot_expressions": _EXPRESSIONS, "unpivot_names": _TEXTS, "entries": Field(Part.PIVOT_ENTRY, 1)}
    ),
    Part.PIVOT_ENTRY: _shape("", {"values": _VALUES, "star_expr": _EXPRESSION, "alias": _TEXT}),
    Part.VALUE: _shape("type", {"type": _TYPE, "is_null": _FLAG, "value": Field(Part.LITERAL)}),
    Part.TYPE: _shape("id", {"id": _word(_TYPE_IDS), "type_info": Field(Part.TYPE_INFO)}),
    Part.MEMBER: _shape("second", {"first": _TEXT, "second": _TYPE}),
}

# The parts that come in kinds, with the field that tells which.
_KINDS: Mapping[Part, tuple[str, Mapping[str, Shape]]] = {
    Part.EXPRESSION: ("class", _EXPRESSION_SHAPES),
    Part.QUERY: ("type", _QUERY_SHAPES),
    Part.SOURCE: ("type", _SOURCE_SHAPES),
    Part.MODIFIER: ("type", _MODIFIER_SHAPES),
    Part.TYPE_INFO: ("type", _TYPE_INFO_SHAPES),
}

# What is known and left out above, in SQL's words, so that its author learns what it was.
REFUSED_KINDS: Mapping[str, str] = {
    "SHOW_REF": "DESCRIBE, SHOW or SUMMARIZE",
    "DEFAULT": "DEFAULT",
}
REFUSED_FIELDS: Mapping[str, str] = {
    "at_clause": "AT (VERSION or TIMESTAMP)",
    "export_state": "EXPORT_STATE",
    "pivot_enum": "PIVOT without its values written out",
}


def shape_of(part: Part, node: Mapping[str, object]) -> Shape | None:
    """The fields that a node of that part and kind may have; None for a kind that is not known."""
    fixed = _FIXED_SHAPES.get(part)
    if fixed is not None:
        return fixed
    field, shapes = _KINDS[part]
    kind = node.get(field)
    return shapes.get(kind) if isinstance(kind, str) else None
