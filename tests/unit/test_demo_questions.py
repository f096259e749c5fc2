"""The demo shows everything that the service does, and knows every answer beforehand."""

import pytest

from queryd.codec import decode_request, encode
from queryd.events import ErrorCode, Mode, OutputFormat
from service.demo.flights import DEPARTED, FLIGHTS, TABLES
from service.demo.questions import QUESTIONS, SAVED_SQL, Question
from tests.unit.samples import SAVED_ID, make_request


def test_at_least_twelve_questions_over_both_lanes_and_all_formats() -> None:
    assert len(QUESTIONS) >= 12
    assert {question.mode for question in QUESTIONS} == set(Mode)
    assert {question.output_format for question in QUESTIONS} == set(OutputFormat)
    assert len({question.title for question in QUESTIONS}) == len(QUESTIONS)


def test_exactly_two_questions_must_fail_a_mistake_and_a_time_limit() -> None:
    failing = [question for question in QUESTIONS if question.error is not None]
    assert {question.error for question in failing} == {ErrorCode.QUERY_ERROR, ErrorCode.QUERY_TIMEOUT}
    assert len(failing) == 2
    assert all(question.rows is None for question in failing)
    # The mode's own limit would keep a viewer waiting.
    assert [question.timeout_seconds for question in failing if question.error is ErrorCode.QUERY_TIMEOUT] == [2]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.title)
def test_every_question_is_a_valid_request_whose_answer_is_known(question: Question) -> None:
    assert question.saved == (question.sql is None)
    assert (question.rows is None) == (question.error is not None)
    request = make_request(
        mode=question.mode,
        sql=question.sql,
        saved_query_id=SAVED_ID if question.saved else None,
        parameters=question.parameters,
        output_format=question.output_format,
        timeout_seconds=question.timeout_seconds,
    )
    assert decode_request(encode(request)) == request
    sql = question.sql or SAVED_SQL
    assert all(f"${name}" in sql for name in question.parameters)
    assert sql.count("$") == len(question.parameters)


def test_the_questions_join_hot_and_cold_use_windows_and_a_saved_query() -> None:
    texts = [question.sql or SAVED_SQL for question in QUESTIONS]
    assert any("flights" in text and any(table in text for table in TABLES) for text in texts)
    assert any(" OVER (" in text for text in texts)
    assert any(question.saved and question.parameters for question in QUESTIONS)
    assert all(any(table in text for text in texts) for table in TABLES)


def test_every_flight_is_exported_and_counted() -> None:
    assert (FLIGHTS, DEPARTED) == (336_776, 328_521)
    assert [question.mode for question in QUESTIONS if question.rows == FLIGHTS] == [Mode.BATCH]
    assert "count(dep_time) AS departed" in (QUESTIONS[0].sql or "")
