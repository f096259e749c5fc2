"""`--param` types values by JSON's rules; `--param-text` sends text."""

import pytest

from queryd.events import Parameter
from service.cli.parameters import read_parameters


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("94105", 94105),
        ("-1", -1),
        ("1e5", 100_000.0),
        ("1.10", 1.1),
        ("true", True),
        ("null", None),
        ('"94105"', "94105"),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("-Infinity", "-Infinity"),
        ("1e400", "1e400"),
        ("nan", "nan"),
        ("02134", "02134"),
        ("[1, 2]", "[1, 2]"),
        ('{"a": 1}', '{"a": 1}'),
        ("Bern", "Bern"),
        ("", ""),
        ("a=b", "a=b"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_param_types_values_as_the_help_says(text: str, value: Parameter) -> None:
    guessed = read_parameters([f"p={text}"], [])["p"]
    assert (guessed, type(guessed)) == (value, type(value))
    # And a way to say text for each of them.
    assert read_parameters([], [f"p={text}"]) == {"p": text}


@pytest.mark.parametrize(
    ("guessed", "texts", "sentence"),
    [
        ([f"n={2**63}"], [], "--param-text n=… sends text"),
        (["n"], [], "--param must be name=value"),
        ([], ["=x"], "--param-text must be name=value"),
        (["n=1"], ["n=1"], "given twice"),
        (["n=1", "n=2"], [], "given twice"),
    ],
)
def test_a_usage_error_is_one_line_and_code_2(
    guessed: list[str], texts: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_parameters(guessed, texts)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
