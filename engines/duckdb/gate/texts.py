"""A statement's text: what is refused before any parser sees it, and what of it is one statement."""

import itertools
import re
from collections.abc import Iterator, Sequence

import duckdb

from engines.duckdb.gate import thresholds
from engines.duckdb.gate.copies import check_copies
from engines.duckdb.gate.refusals import TOO_DEEP, rejected

_OPENING, _CLOSING = b"([{", b")]}"
_DOT, _SEMICOLON, _SIGNS = ord("."), ord(";"), b"+-~!@"

# What DuckDB's parser takes for spaces; its tokenizer takes those of Unicode for names.
_SPACES = " \t\n\r\f\v\u00a0\u202f\u205f\u2060\u3000\ufeff" + "".join(map(chr, range(0x2000, 0x200C)))
_WORD = re.compile(rb"[A-Za-z]{1,8}(?![\w$])")
_WORDS = frozenset({int(duckdb.token_type.keyword), int(duckdb.token_type.identifier)})
_OPERATOR, _COMMENT = int(duckdb.token_type.operator), int(duckdb.token_type.comment)
# Stands for a token that is no operator. No operator contains this byte.
_NO_SIGN = 0

_Token = tuple[int, duckdb.token_type]


def check_size(sql: str) -> None:
    """Refuse what is known to hang or blow up a parser. Raises `QueryFailed` with SQL_REJECTED."""
    try:
        encoded = sql.encode()
    except UnicodeEncodeError:
        raise rejected("it is not valid Unicode") from None
    if len(encoded) > thresholds.MAX_SQL_BYTES:
        raise rejected(f"it is longer than {thresholds.MAX_SQL_BYTES} bytes")
    if "\0" in sql:
        raise rejected("it holds a NUL character")
    # Counted in the bare text, for the tokenizer itself is what they are hard for.
    if sql.count("/*") > thresholds.MAX_BLOCK_COMMENTS:
        raise rejected(f"it has more than {thresholds.MAX_BLOCK_COMMENTS} comments between slashes")
    _check_tokens(encoded)


def trim(sql: str) -> str:
    """The text without the semicolons, blanks and comments before and after the statement.

    What is left can stand inside brackets: it neither ends early nor swallows the bracket that follows on a new line.
    """
    if ";" not in sql:
        return sql.strip() and sql
    encoded = sql.encode()
    tokens: list[_Token] = duckdb.tokenize(sql)
    starts = [at for at, _ in tokens] + [len(encoded)]
    is_outside = [
        _is_semicolon(encoded, token) or not encoded[token[0] : end].decode().strip(_SPACES)
        for token, end in zip(tokens, starts[1:], strict=True)
    ]
    if all(is_outside):
        return ""
    first, last = is_outside.index(False), len(tokens) - 1 - is_outside[::-1].index(False)
    return encoded[starts[first] if first else 0 : starts[last + 1]].decode()


def is_one_statement(text: str) -> bool:
    """Whether no semicolon is left in a trimmed text but in strings, names and comments."""
    if ";" not in text:
        return True
    encoded = text.encode()
    return not any(_is_semicolon(encoded, token) for token in duckdb.tokenize(text))


def _is_semicolon(encoded: bytes, token: _Token) -> bool:
    return token[1] == duckdb.token_type.operator and encoded[token[0]] == _SEMICOLON


def _check_tokens(encoded: bytes) -> None:
    tokens: list[_Token] = duckdb.tokenize(encoded.decode())
    if len(tokens) > thresholds.MAX_TOKENS:
        raise rejected(f"it has more than {thresholds.MAX_TOKENS} words and signs")
    # Converted once: each kind is compared four times, and a kind takes ten times as long to compare as a number.
    kinds = [int(kind) for _, kind in tokens]
    signs = [
        encoded[offset] if kind == _OPERATOR else _NO_SIGN for (offset, _), kind in zip(tokens, kinds, strict=True)
    ]
    if _bracket_depth(signs) > thresholds.MAX_BRACKET_DEPTH:
        raise rejected(f"brackets are nested deeper than {thresholds.MAX_BRACKET_DEPTH}")
    signs_without_comments = [sign for sign, kind in zip(signs, kinds, strict=True) if kind != _COMMENT]
    if _longest_chain(signs_without_comments) >= thresholds.MAX_DOTTED_CHAIN:
        raise rejected(f"a name has more than {thresholds.MAX_DOTTED_CHAIN} parts")
    if _longest_run_of_signs(signs) > thresholds.MAX_EXPRESSION_DEPTH:
        raise rejected(TOO_DEEP)
    check_copies(_words(encoded, [offset for offset, _ in tokens], kinds))


def _bracket_depth(signs: Sequence[int]) -> int:
    """How deep brackets stand within brackets, those in strings and comments apart."""
    return max(itertools.accumulate((sign in _OPENING) - (sign in _CLOSING) for sign in signs), default=0)


def _longest_chain(signs: Sequence[int]) -> int:
    """Count the dots of the longest dotted name. `signs` must not contain comments."""
    longest = chain = 0
    after_dot = False
    for sign in signs:
        if sign == _DOT:
            chain, after_dot = chain + 1, True
        elif after_dot:
            after_dot = False
        else:
            chain = 0
        longest = max(longest, chain)
    return longest


def _longest_run_of_signs(signs: Sequence[int]) -> int:
    """How many signs stand before one value: the parser folds those before a number, whose depth no tree shows."""
    longest = run = 0
    for sign in signs:
        run = run + 1 if sign in _SIGNS else 0
        longest = max(longest, run)
    return longest


def _words(encoded: bytes, offsets: Sequence[int], kinds: Sequence[int]) -> Iterator[str]:
    """The words of the text in upper case, and a sign for anything else; comments and constants are signs too."""
    for offset, kind in zip(offsets, kinds, strict=True):
        found = _WORD.match(encoded, offset) if kind in _WORDS else None
        yield found[0].decode().upper() if found else "?"
